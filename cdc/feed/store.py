"""What a store of the feed promises: ids in commit order, replays without effect, gaps that are known.

One suite of tests runs over all of them (`tests/integration/test_feed_stores.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import msgspec

from cdc.feed.record import EntityState, Pruned, Record
from cdc.position import Position

SCAN_ROWS = 2_000
"""How many rows one `scan` looks at, at most: so that it answers at once however rarely something matches."""


class FeedWriter(Protocol):
    """Writes the changes of one source. Used by one thread at a time.

    Every transaction on the feed, of whatever writer, first takes one lock, which it holds until it has committed, and
    then gives ids: so they become visible in the order of their numbers. Raises the errors of `cdc.errors`; after one
    of `begin`, `states`, `append` or `commit` nothing is left of the transaction, and `open` comes next.
    """

    def open(self) -> Position | None:
        """Connect, create or migrate the tables, and return this source's position; `None` if it has none."""
        ...

    def begin(self, position: Position) -> None:
        """Store the position at which this source begins. Durable."""
        ...

    def states(self, keys: Collection[tuple[str, str]]) -> Mapping[tuple[str, str], EntityState]:
        """What is known of entities of this source, by (entity_type, key), open transaction included.

        The first call of a transaction takes the lock, and raises `TransientError` where the stored position is not the
        one that this writer knows: another one was at work.
        """
        ...

    def known(self, positions: Collection[str]) -> Collection[str]:
        """Those of the positions of which this source has records, open transaction included. Takes the lock, too."""
        ...

    def append(self, records: Sequence[Record], states: Sequence[EntityState]) -> None:
        """Add records, in order, in the open transaction (begun here if none is). `states` replace older ones.

        A record whose (source, position) is there already adds nothing.
        """
        ...

    def commit(self, position: Position) -> None:
        """Make all that was appended visible at once, durably, together with the position; wake the readers."""
        ...

    def publish(self, record: Record) -> Record | None:
        """Store one record in a transaction of its own, with the next version of its entity; as it was stored.

        `None` if its (source, position) is there already. From any thread, whatever others do; needs no `open`, and
        makes a lost connection anew. Raises `TransientError` where another writer has the lock for too long.
        """
        ...

    def prune(
        self, entity_type: str | None, recorded_before: int, rows: int, sources: Collection[str] | None = None
    ) -> int:
        """Remove at most `rows` records older than that, in one transaction that also notes what was removed.

        entity_type: `None` for all types. recorded_before: microseconds. sources: of these alone; `None` for all.
        Returns how many it removed. The entities' states stay. From any thread, as `publish`; never while this writer
        has a transaction open.
        """
        ...

    def entity_types(self) -> Sequence[str]:
        """All types of which there are records."""
        ...

    def forget(self) -> None:
        """Remove this source's position; what it wrote stays.

        Entities keep their versions and scopes, but no `known`: it may change before the source begins again.
        """
        ...

    def close(self) -> None:
        """Disconnect; what was not committed is rolled back. Safe to call twice."""
        ...


class Wanted(msgspec.Struct, frozen=True):
    """Which records a reader wants. `None`: all."""

    entity_types: frozenset[str] | None = None
    channels: frozenset[str] | None = None
    location_id: str | None = None


class Scan(msgspec.Struct, frozen=True):
    """What one look at the feed found.

    cursor: the id up to which everything was looked at: go on behind it.
    more: whether there are rows behind `cursor`.
    """

    records: Sequence[Record]
    cursor: int
    more: bool


class Listener(Protocol):
    """Waits for news of a feed. Used by one thread."""

    def wait(self, timeout_seconds: float) -> bool:
        """Return when something was committed since the last call, or after the time-out: then False.

        It may wake without need, and where a store has no news (or lost its connection, which it makes anew) it says so
        by returning True. Raises `TransientError` while the store is away.
        """
        ...


class FeedReader(Protocol):
    """Reads a feed. All methods block, may be called from several threads at once, and see committed records only."""

    def open(self) -> None:
        """Check that the feed can be read. Raises `TransientError` if it is not there (yet)."""
        ...

    def head(self) -> int:
        """The last id that is visible, also if its record was pruned since; below all that come for an empty feed."""
        ...

    def scan(self, after: int, wanted: Wanted, limit: int) -> Scan:
        """The first `limit` wanted records behind `after`, of the next `SCAN_ROWS` rows. Takes milliseconds."""
        ...

    def history(self, entity_type: str, entity_id: str, before: int | None, limit: int) -> Sequence[Record]:
        """The newest records of one entity, newest first; with `before`, those with smaller ids."""
        ...

    def cursor_at(self, recorded_at: int) -> int:
        """The largest cursor behind which are all records recorded at that time (microseconds) or later."""
        ...

    def pruned(self) -> Mapping[tuple[str, str], Pruned]:
        """By (entity_type, channel), what retention has removed; by `BEGINNING`, where the feed begins, if not with 1.

        Whether there is a gap behind a cursor is to be asked after the scan: what is removed between the two calls
        would be missed otherwise.
        """
        ...

    def oldest(self) -> int | None:
        """The smallest id that is there."""
        ...

    def listen(self) -> AbstractContextManager[Listener]:
        """Begin to listen: what is committed from now on wakes the listener."""
        ...

    def close(self) -> None:
        """Disconnect. Safe to call twice."""
        ...
