"""A feed in memory, for tests of what reads or writes one: every promise of `cdc.feed.store` but durability."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Condition

from msgspec.structs import replace

from cdc.errors import TransientError
from cdc.feed.record import EntityState, Pruned, Record
from cdc.feed.store import SCAN_ROWS, Listener, Scan, Wanted
from cdc.position import Position


class MemoryFeed:
    """What readers and writers share.

    away: while it is true, everything raises `TransientError`.
    """

    def __init__(self) -> None:
        self.away = False
        self.commits = 0
        self.news = Condition()
        self.records: list[Record] = []
        self.head = 0
        self.positions: dict[str, Position] = {}
        self.states: dict[tuple[str, str, str], EntityState] = {}
        self.pruned: dict[tuple[str, str], Pruned] = {}

    def reader(self) -> MemoryReader:
        """One more reader."""
        return MemoryReader(self)

    def writer(self, source: str) -> MemoryWriter:
        """The writer of one source."""
        return MemoryWriter(self, source)

    def check(self) -> None:
        """Raise `TransientError` while the feed is away."""
        if self.away:
            raise TransientError("the feed is away")

    def store(self, records: Sequence[Record]) -> list[Record]:
        """Add those that are new, with ids, and wake the listeners."""
        stored = []
        known = {(record.source, record.position) for record in self.records}
        now = time.time_ns() // 1000
        for record in records:
            if (record.source, record.position) not in known:
                self.head += 1
                stored.append(replace(record, id=self.head, recorded_at=record.recorded_at or now))
        self.records += stored
        self.commits += 1
        self.news.notify_all()
        return stored


class MemoryWriter:
    """A `FeedWriter`."""

    def __init__(self, feed: MemoryFeed, source: str) -> None:
        self._feed = feed
        self._source = source
        self._pending: list[Record] = []
        self._states: dict[tuple[str, str, str], EntityState] = {}

    def open(self) -> Position | None:
        """The position that was committed last."""
        self._feed.check()
        return self._feed.positions.get(self._source)

    def begin(self, position: Position) -> None:
        """Set the position."""
        self._feed.positions[self._source] = position

    def states(self, keys: Collection[tuple[str, str]]) -> Mapping[tuple[str, str], EntityState]:
        """Of the open transaction, or committed."""
        self._feed.check()
        known = self._feed.states | self._states
        return {key: known[self._source, *key] for key in keys if (self._source, *key) in known}

    def known(self, positions: Collection[str]) -> Collection[str]:
        """Those that are stored, or pending."""
        self._feed.check()
        told = {each.position for each in (*self._feed.records, *self._pending) if each.source == self._source}
        return told & set(positions)

    def append(self, records: Sequence[Record], states: Sequence[EntityState]) -> None:
        """Keep them for `commit`."""
        self._feed.check()
        self._pending += records
        self._states |= {(self._source, state.entity_type, state.key): state for state in states}

    def commit(self, position: Position) -> None:
        """Make all visible at once."""
        self._feed.check()
        with self._feed.news:
            self._feed.store(self._pending)
            self._feed.states |= self._states
            self._feed.positions[self._source] = position
        self._pending, self._states = [], {}

    def publish(self, record: Record) -> Record | None:
        """Store one record with the next version of its entity."""
        self._feed.check()
        with self._feed.news:
            key = (record.source, record.entity_type, record.entity_id)
            state = self._feed.states.get(key)
            version = state.version + 1 if state else 1
            stored = self._feed.store([replace(record, version=version)])
            if not stored:
                return None
            self._feed.states[key] = EntityState(entity_type=key[1], key=key[2], version=version)
        return stored[0]

    def prune(
        self, entity_type: str | None, recorded_before: int, rows: int, sources: Collection[str] | None = None
    ) -> int:
        """Remove the oldest, and note it."""
        self._feed.check()
        with self._feed.news:
            gone = [
                record
                for record in self._feed.records
                if record.recorded_at < recorded_before
                and entity_type in (None, record.entity_type)
                and (sources is None or record.source in sources)
            ][:rows]
            for record in gone:
                kind = (record.entity_type, record.channel)
                before = self._feed.pruned.get(kind, Pruned(0, 0, 0))
                self._feed.pruned[kind] = Pruned(record.id, record.recorded_at, before.rows + 1)
            removed = {record.id for record in gone}
            self._feed.records = [record for record in self._feed.records if record.id not in removed]
        return len(gone)

    def entity_types(self) -> Sequence[str]:
        """In alphabetical order."""
        return sorted({record.entity_type for record in self._feed.records})

    def forget(self) -> None:
        """Remove the position, and what is known."""
        self._feed.positions.pop(self._source, None)
        for key, state in self._feed.states.items():
            if key[0] == self._source:
                self._feed.states[key] = replace(state, known=None)

    def close(self) -> None:
        """Drop what was not committed."""
        self._pending, self._states = [], {}


class MemoryReader:
    """A `FeedReader`."""

    def __init__(self, feed: MemoryFeed) -> None:
        self._feed = feed

    def open(self) -> None:
        """Raise `TransientError` while it is away."""
        self._feed.check()

    def head(self) -> int:
        """The last id given."""
        self._feed.check()
        return self._feed.head

    def scan(self, after: int, wanted: Wanted, limit: int) -> Scan:
        """Look through the next `SCAN_ROWS` rows."""
        self._feed.check()
        with self._feed.news:
            behind = [record for record in self._feed.records if record.id > after]
            head = self._feed.head
        window = behind[:SCAN_ROWS]
        found = [record for record in window if _matches(record, wanted)]
        if len(found) > limit or (len(found) == limit and found[-1] is not window[-1]):
            return Scan(found[:limit], found[limit - 1].id, more=True)
        if len(behind) > len(window):
            return Scan(found, window[-1].id, more=True)
        return Scan(found, max(after, head), more=False)

    def history(self, entity_type: str, entity_id: str, before: int | None, limit: int) -> Sequence[Record]:
        """The newest first."""
        self._feed.check()
        found = [
            record
            for record in reversed(self._feed.records)
            if (record.entity_type, record.entity_id) == (entity_type, entity_id) and (not before or record.id < before)
        ]
        return found[:limit]

    def cursor_at(self, recorded_at: int) -> int:
        """By looking at all."""
        self._feed.check()
        return next((each.id - 1 for each in self._feed.records if each.recorded_at >= recorded_at), self._feed.head)

    def pruned(self) -> Mapping[tuple[str, str], Pruned]:
        """What `prune` noted."""
        self._feed.check()
        return dict(self._feed.pruned)

    def oldest(self) -> int | None:
        """The first that is there."""
        self._feed.check()
        return self._feed.records[0].id if self._feed.records else None

    @contextmanager
    def listen(self) -> Iterator[Listener]:
        """Commits from now on wake it."""
        self._feed.check()
        yield _Listener(self._feed)

    def close(self) -> None:
        """There is nothing to close."""


class _Listener:
    def __init__(self, feed: MemoryFeed) -> None:
        self._feed = feed
        self._seen = feed.commits

    def wait(self, timeout_seconds: float) -> bool:
        with self._feed.news:
            woken = self._feed.news.wait_for(lambda: self._feed.commits != self._seen, timeout_seconds)
            self._feed.check()
            self._seen = self._feed.commits
        return woken


def _matches(record: Record, wanted: Wanted) -> bool:
    return (
        (wanted.entity_types is None or record.entity_type in wanted.entity_types)
        and (wanted.channels is None or record.channel in wanted.channels)
        and (wanted.location_id is None or record.location_id == wanted.location_id)
    )
