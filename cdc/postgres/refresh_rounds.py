"""The rounds of a refresh: parts of tables are read ahead from a snapshot of the source, in a thread of their own."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from contextlib import closing
from time import monotonic
from typing import Final

import msgspec
import psycopg
import structlog

from cdc.change import TableName
from cdc.config import SinkConfig, SourceConfig
from cdc.errors import CdcError, TransientError
from cdc.position import Lsn
from cdc.postgres.conflicts import checked_late
from cdc.postgres.connection import connect
from cdc.postgres.digest import nudge
from cdc.postgres.refresh_marks import RefreshMark
from cdc.postgres.refresh_read import KeyedTable, Part, RangeReader, keyed
from cdc.postgres.schema import SchemaTable, read_estimates, read_tables
from cdc.postgres.snapshot import open_snapshot

ROUND_SECONDS: Final = 30.0
"""How long a snapshot is held, once the mirror has come to it."""

AHEAD_ROWS: Final = 10_000
AHEAD_BYTES: Final = 8 * 1024**2
"""So much is read before it can be written, and kept in memory."""

_MAX_WAIT_SECONDS: Final = 30.0

log = structlog.get_logger()


class Planned(msgspec.Struct, frozen=True):
    """A round is to have these tables, each of about so many rows. Its snapshot is taken when they are watched."""

    tables: Mapping[TableName, KeyedTable]
    rows: Mapping[TableName, int]


class Begun(msgspec.Struct, frozen=True):
    """The round has its snapshot."""

    position: Lsn


class Ended(msgspec.Struct, frozen=True):
    """The round is over. unusable: tables without a key that they could be refreshed by."""

    unusable: tuple[TableName, ...] = ()


Item = Planned | Begun | Part | Ended


class ReadParts:
    """What is read and not taken yet, in order: as much as may be kept, or one part."""

    def __init__(self) -> None:
        self._items: deque[Item] = deque()
        self._rows = self._bytes = 0
        self._closed = False
        self._changed = threading.Condition()

    def put(self, item: Item) -> None:
        """Return once there was room for it."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self.has_room(item))
            rows, size = _weight(item)
            self._items.append(item)
            self._rows += rows
            self._bytes += size

    def take(self) -> Item | None:
        """The first, if there is one."""
        with self._changed:
            if not self._items:
                return None
            item = self._items.popleft()
            rows, size = _weight(item)
            self._rows -= rows
            self._bytes -= size
            self._changed.notify()
            return item

    def close(self) -> None:
        """Let nobody wait any more."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def has_room(self, item: Item) -> bool:
        """Whether nobody would have to wait."""
        rows, size = _weight(item)
        return not self._rows or (self._rows + rows <= AHEAD_ROWS and self._bytes + size <= AHEAD_BYTES)


def _weight(item: Item) -> tuple[int, int]:
    """Rows and bytes; even a part without any takes some room."""
    if not isinstance(item, Part):
        return 0, 0
    return max(1, len(item.keys) + item.absent.count(b"\n")), len(item.text) + len(item.absent)


class RoundReader:
    """Reads rounds of parts, each when it is told to."""

    def __init__(self, sink: SinkConfig, source: SourceConfig) -> None:
        assert sink.url is not None
        assert source.url is not None
        self.error: str | None = None
        self.end_round, self.reached = threading.Event(), threading.Event()
        self._sink, self._target_url, self._source_url = sink, sink.url.reveal(), source.url.reveal()
        self._ahead = ReadParts()
        self._left: set[TableName] = set()
        self._marks: Mapping[TableName, RefreshMark] = {}
        self._after_seconds = 0.0
        self._planning, self._beginning = threading.Semaphore(0), threading.Semaphore(0)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"refresh:{sink.name}", daemon=True)
        self._thread.start()

    # for the delivery's thread

    def plan(self, marks: Mapping[TableName, RefreshMark], *, after_seconds: float = 0.0) -> None:
        """Let a round begin."""
        self._after_seconds = after_seconds
        self.end_round.clear()
        self.reached.clear()
        self._left.clear()
        self._marks = dict(marks)
        self._planning.release()

    def begin(self) -> None:
        """Let it go on: its tables are watched."""
        self._beginning.release()

    def take(self) -> Item | None:
        """What has come, if anything has."""
        return self._ahead.take()

    def leave(self, table: TableName) -> None:
        """Read no more of a table in this round."""
        self._left.add(table)

    def close(self) -> None:
        """End soon: at the latest when a snapshot has come that is being waited for."""
        self._stop.set()
        self._ahead.close()
        self.end_round.set()
        self._planning.release()
        self._beginning.release()
        self._thread.join(1.0)

    # the thread itself

    def _run(self) -> None:
        failures = 0
        while True:
            self._planning.acquire()
            if self._stop.wait(self._after_seconds):
                return
            unusable: tuple[TableName, ...] = ()
            try:
                unusable = self._round()
                failures, self.error = 0, None
            except (CdcError, psycopg.Error) as exc:
                failures += 1
                self.error = str(exc)
                seconds = min(0.1 * 2**failures, _MAX_WAIT_SECONDS)
                log.warning("resync interrupted", sink=self._sink.name, error=str(exc), retry_in_seconds=seconds)
                self._stop.wait(seconds)
            self._ahead.put(Ended(unusable))

    def _round(self) -> tuple[TableName, ...]:
        planned, schema, unusable = self._plan()
        if unusable or not planned.tables:
            return unusable
        self._ahead.put(planned)
        self._beginning.acquire()
        if self._stop.is_set():
            return ()
        until: float | None = None
        with closing(open_snapshot(self._source_url, schema)) as snapshot:
            with connect(self._source_url) as connection:
                nudge(connection)
            self._ahead.put(Begun(snapshot.position))
            for name, table in planned.tables.items():
                with closing(RangeReader(snapshot, self._target_url, table)) as reader:
                    for part in reader.parts(self._marks[name].done_key):
                        if name in self._left:
                            break
                        self._ahead.put(part)
                        if until is None and self.reached.is_set():
                            until = monotonic() + ROUND_SECONDS
                        if self.end_round.is_set() or (until is not None and monotonic() > until):
                            return ()
        return ()

    def _plan(self) -> tuple[Planned, dict[TableName, SchemaTable], tuple[TableName, ...]]:
        tables: dict[TableName, KeyedTable] = {}
        schema: dict[TableName, SchemaTable] = {}
        unusable: list[TableName] = []
        not_yet: list[str] = []
        with connect(self._source_url) as source, connect(self._target_url) as target:
            at_source, on_target = read_tables(source), read_tables(target)
            for name in self._marks:
                if name not in at_source:
                    not_yet.append(f"{name} is no longer at the source")
                    continue
                there = on_target.get(self._sink.target_name(name))
                table = keyed(source, self._sink, at_source[name], there)
                if there is None or table is None or checked_late(target, table.target):
                    unusable.append(name)
                elif lacking := set(table.columns) - {column.name for column in there.columns}:
                    # the stream brings them, maybe long after the source has got them
                    not_yet.append(f"{there.name} has no column {', '.join(sorted(lacking))} yet")
                else:
                    tables[name], schema[name] = table, at_source[name]
            sizes = read_estimates(source) if tables and not unusable else {}
        if not_yet and not tables and not unusable:
            raise TransientError("; ".join(not_yet))
        rows = {name: size.rows for name, size in sizes.items() if name in tables}
        return Planned(tables, rows), schema, tuple(unusable)
