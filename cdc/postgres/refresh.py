"""Refreshing tables of a mirror beside the stream: they are read again, and put right part by part.

As in Netflix's DBLog, parts of the tables and the changes of the stream are interleaved; but which changes a part holds
is not told by watermarks in the log, since in PostgreSQL transactions become visible in another order than they commit
in. A part is read from the snapshot of a slot: it holds exactly the transactions that commit below its position P. It
is written when the mirror has applied all of those, between two transactions of the stream:

- rows that no change since P has touched are written as the snapshot has them, if they differ;
- rows of the mirror that the snapshot has not are deleted;
- touched rows belong to the stream, but for columns that no change carried (see `cdc.postgres.touched`).

So what has been refreshed is right from then on. The parts of a round share a snapshot, and are read ahead until the
mirror has come to its position: many small tables wait together for a mirror that is behind, not one after the other. A
snapshot holds up VACUUM and DDL at the source, hence a round is short, and the next one goes on behind the last key.
How far each table is stands on the target, and is stored with the part: see `cdc.postgres.refresh_marks`. Whatever
breaks a round, the next one does again only what was not stored.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec
import structlog

from cdc.change import Batch, TableName
from cdc.config import SinkConfig, SourceConfig
from cdc.errors import PermanentError
from cdc.position import Lsn
from cdc.postgres.connection import Connection
from cdc.postgres.refresh_marks import RefreshMark, RefreshMarks
from cdc.postgres.refresh_read import Part
from cdc.postgres.refresh_rounds import Begun, Ended, Planned, RoundReader
from cdc.postgres.refresh_write import Written, write_part
from cdc.postgres.touched import Touched
from cdc.stats import ResyncStatus

MAX_TOUCHED: Final = 100_000
"""More keys than that are not kept in memory: the round ends early, and another one begins."""

MAX_REFUSED: Final = 100
"""So many rows of a table are looked for by themselves among those that the mirror refuses; then parts count as one."""

_FIRST_RETRY_SECONDS: Final = 1.0
_MAX_RETRY_SECONDS: Final = 300.0
"""Between two attempts at tables of which rows are refused: each reads them again from the first of those rows on."""

_MOST_TOLD: Final = 200

log = structlog.get_logger()


class Refresh:
    """The refresh of one sink's tables, as long as it is connected. Methods are for the delivery's thread.

    What the mirror refuses does not keep the rest of its table from being put right, if `on_error` says to park. But
    how far that table is stays before the first such row, and once nothing else is left it is read again from there.

    marks: the tables that are not done, and how far they are. error: what the last round ended with.
    """

    def __init__(self, sink: SinkConfig, source: SourceConfig, marks: Mapping[TableName, RefreshMark]) -> None:
        self.marks = dict(marks)
        self.error: str | None = None
        self._sink = sink
        self._of_all = len(marks)
        self._expected: Mapping[TableName, int] = {}
        self._position = Lsn(0)
        self._touched: Touched | None = None
        self._parts: list[Part] = []  # the next one last
        self._reading = dict(marks)  # as `marks`, but past what is refused; without tables that have come to their end
        self._refused: Counter[TableName] = Counter()
        self._refusals: dict[TableName, str] = {}  # also of the attempt before this
        self._attempts = 0
        self._reader = RoundReader(sink, source)
        self._reader.plan(self._reading)

    def observe(self, batches: Sequence[Batch]) -> None:
        """Take note of changes that are applied, each of them once."""
        if self._touched is not None:
            self._touched.observe(batches)
            if len(self._touched) > MAX_TOUCHED:
                self._reader.end_round.set()

    def next_part(self, position: Lsn) -> Part | None:
        """Called between two transactions: what is to be written now. position: all that commits below is applied.

        Raises `Unusable` for tables that can only be copied again.
        """
        while (part := self._next(position)) is not None:
            assert self._touched is not None
            self._touched.fold()
            if part.table.name not in self._touched.void:
                return part
            self._reader.leave(part.table.name)  # emptied, or altered: it is read again from another snapshot
        return None

    def write(self, connection: Connection, part: Part) -> RefreshMark:
        """Write a part in the open transaction, and how far its table is with it; returns that."""
        assert self._touched is not None
        written = write_part(connection, part, self._touched.rows[part.table.name])
        mark = self._moved(part, written)
        marks = RefreshMarks(connection, self._sink.name)
        if self._refused[mark.table]:
            return mark
        if mark.done_key is None:
            marks.finish(mark)
        else:
            marks.put(mark)
        return mark

    def wrote(self, mark: RefreshMark) -> None:
        """The transaction has committed."""
        table = mark.table
        self._note_read(mark)
        if self._refused[table]:
            return
        self.marks[table] = mark
        if mark.done_key is None:
            del self.marks[table]
            self._refusals.pop(table, None)
            counts = {field: getattr(mark, field) for field in ("rows", "inserted", "updated", "deleted")}
            log.info("table resynced", sink=self._sink.name, table=str(table), **counts)

    def refused(self, part: Part, error: PermanentError) -> None:
        """The mirror refuses a part, and nothing of it is written: the row that is at fault is looked for.

        Raises `PermanentError` with its key once it is found, unless refused changes are parked.
        """
        table = part.table.name
        halves = part.halves() if self._refused[table] < MAX_REFUSED else None
        if halves is not None:
            self._parts += reversed(halves)
            return
        failure = _refusal(part, error)
        if not self._sink.parks:
            raise failure
        self._refused[table] += 1
        self._refusals[table] = str(failure)
        log.error("resync refused", sink=self._sink.name, error=str(failure), hint=failure.hint)
        self._note_read(self._moved(part, Written(0, 0, 0)))
        if part.absent and part.keys:
            self._parts.append(msgspec.structs.replace(part, keys=(), text=b""))

    def _moved(self, part: Part, written: Written) -> RefreshMark:
        before = self._reading.get(part.table.name) or self.marks[part.table.name]
        return RefreshMark(
            part.table.name,
            part.done,
            before.rows + len(part.keys),
            before.inserted + written.inserted,
            before.updated + written.updated,
            before.deleted + written.deleted,
            before.since or self._position,
        )

    def _note_read(self, mark: RefreshMark) -> None:
        if mark.done_key is None:
            self._reading.pop(mark.table, None)
        else:
            self._reading[mark.table] = mark

    def _plan(self) -> None:
        """Let the next round begin. Tables of which rows are refused wait for all others, and then some time."""
        seconds = 0.0
        if not self._reading and self.marks:
            seconds = min(_FIRST_RETRY_SECONDS * 2**self._attempts, _MAX_RETRY_SECONDS)
            self._attempts += 1
            self._reading = dict(self.marks)
            self._refused.clear()
        self._reader.plan(self._reading, after_seconds=seconds)

    def status(self) -> ResyncStatus:
        """How far it is."""
        marks = [self._reading.get(table, mark) for table, mark in self.marks.items()]
        return ResyncStatus(
            tables_done=self._of_all - len(marks),
            tables_expected=self._of_all,
            rows_done=sum(mark.rows for mark in marks),
            rows_expected=sum(max(self._expected.get(mark.table, 0), mark.rows) for mark in marks),
            rows_written=sum(mark.inserted + mark.updated + mark.deleted for mark in marks),
            error=self.error or next(iter(self._refusals.values()), None),
        )

    def close(self) -> None:
        """End. The round at hand is lost, what was stored of it is not."""
        self._reader.close()

    def _next(self, position: Lsn) -> Part | None:
        if self._reader.end_round.is_set():
            self._parts.clear()
        while not self._parts and (part := self._receive()) is not None:
            if not self._reader.end_round.is_set():
                self._parts.append(part)
        if not self._parts or position < self._position:
            return None
        self._reader.reached.set()
        return self._parts.pop()

    def _receive(self) -> Part | None:
        while (item := self._reader.take()) is not None:
            match item:
                case Part():
                    return item
                case Planned(tables, rows):
                    self._touched = Touched({name: table.key for name, table in tables.items()})
                    self._expected = rows
                    self._reader.begin()
                case Begun(position):
                    assert self._touched is not None
                    self._position = position
                    self._touched.begin(position)
                case Ended(unusable):
                    self._touched = None
                    self.error = self._reader.error
                    if unusable:
                        raise Unusable(unusable)
                    self._plan()
        return None


def _refusal(part: Part, error: PermanentError) -> PermanentError:
    row = f"row ({', '.join(part.table.key)}) = ({', '.join(part.keys[0])})" if len(part.keys) == 1 else "rows"
    return PermanentError(
        f"{part.table.name}: {row[:_MOST_TOLD]} as at the source: refused by the mirror: {error}",
        hint=f"put {part.table.target} of the mirror right: a constraint, index or trigger that the source has not",
    )


class Unusable(Exception):
    """These tables cannot be refreshed by ranges of a key."""

    def __init__(self, tables: tuple[TableName, ...]) -> None:
        super().__init__(", ".join(map(str, tables)))
        self.tables = tables
