"""A source and a sink in memory, for tests of pipelines and of sinks and sources of your own.

They keep every promise of `cdc.source` and `cdc.sink` but durability, and fail when they are told to.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence, Set
from threading import Condition

from cdc.change import Batch, Change, Image, Operation, Table, TableName, Transaction
from cdc.errors import FatalError, ResyncRequired, TransientError
from cdc.position import Position, SourcePosition, as_lsn
from cdc.sink import Ahead, Applied, QuickLook, Refused, Subject
from cdc.source import Beginning, Estimate, Snapshot
from cdc.stats import CaptureStats

_STEP = 100
"""Distance of two commits: positions look like LSNs, which never come one by one."""


class MemorySource:
    """A source whose transactions are what `commit` was called with, in that order, from any thread.

    confirmed: what `confirm` called durable; a stream cannot begin before it any more.
    """

    def __init__(self, name: str, tables: Sequence[Table] = ()) -> None:
        self.name = name
        self.confirmed = 0
        self._tables = tuple(tables)
        self._log: list[Transaction] = []
        self._next: int | None = None
        self._errors: deque[Exception] = deque()
        self._news = Condition()

    def commit(self, *changes: Change, commit_time_seconds: float | None = None) -> SourcePosition:
        """Commit one transaction; return the position behind it."""
        seconds = time.time() if commit_time_seconds is None else commit_time_seconds
        with self._news:
            position = (len(self._log) + 1) * _STEP
            self._log.append(
                Transaction(
                    position=position,
                    end=position + 1,
                    commit_time=int(seconds * 1_000_000),
                    xid=len(self._log) + 1,
                    first_ordinal=0,
                    complete=True,
                    changes=list(changes),
                )
            )
            self._news.notify_all()
        return position + 1

    def fail(self, *errors: Exception) -> None:
        """Make the next calls of `open` or `read` raise these, one each."""
        with self._news:
            self._errors.extend(errors)
            self._news.notify_all()

    def open(self, position: SourcePosition | None) -> SourcePosition:
        """Stream from `position` on; `None` begins with the first transaction."""
        with self._news:
            self._raise_next()
            start = 0 if position is None else as_lsn(position)
            if start < self.confirmed:
                raise ResyncRequired(f"{self.name}: changes after {start} are gone", hint="copy again")
            self._next = sum(as_lsn(transaction.position) < start for transaction in self._log)
            return start

    def restart(self) -> Beginning:
        """Stream what is committed from now on."""
        with self._news:
            self._next = len(self._log)
            return Beginning(len(self._log) * _STEP + 1, {})

    def read(self, timeout_seconds: float) -> Batch | None:
        """All transactions that were not read yet, as one batch."""
        with self._news:
            if self._next is None:
                raise TransientError(f"{self.name}: not connected")
            first = self._next
            self._news.wait_for(lambda: self._errors or len(self._log) > first, timeout_seconds)
            self._raise_next()
            transactions = self._log[first:]
            self._next = len(self._log)
        if not transactions:
            return None
        return Batch(self._tables, transactions, transactions[-1].end, size=_size(transactions))

    def confirm(self, *, durable: SourcePosition, applied: SourcePosition | None) -> None:  # noqa: ARG002 - protocol
        """Remember what is durable."""
        self.confirmed = max(self.confirmed, as_lsn(durable))

    def observe(self, stats: CaptureStats) -> None:
        """Tell where the last transaction ends."""
        stats.server_end = self._log[-1].end if self._log else 0

    def tables(self) -> Sequence[TableName]:
        """The tables that it was made with."""
        return [table.qualified for table in self._tables]

    def estimates(self) -> Mapping[TableName, Estimate]:
        """Nothing is known about sizes."""
        return {}

    def dump_schema(self) -> object:
        """Nothing has to be described."""
        return None

    def sequences(self) -> object:
        """There are none."""
        return None

    def snapshot(self) -> Snapshot:
        """Not kept: begin with the first transaction instead."""
        raise FatalError(f"{self.name}: a source in memory has no snapshots")

    def primary_key(self, table: TableName) -> Sequence[str]:
        """The columns of the key."""
        found = next(each for each in self._tables if each.qualified == table)
        return [column.name for column in found.columns if column.is_key]

    def shapes(self, oids: Collection[int]) -> Sequence[object]:  # noqa: ARG002 - the protocol's
        """Nothing: documents have their shape with them."""
        return ()

    def reread(self, table: Table, image: Image) -> Image | None:  # noqa: ARG002 - protocol
        """Not kept by key."""
        raise FatalError(f"{self.name}: a source in memory has no rows to read again")

    def close(self) -> None:
        """Disconnect; `open` connects again."""
        with self._news:
            self._next = None

    def _raise_next(self) -> None:
        if self._errors:
            self._next = None
            raise self._errors.popleft()


class MemorySink:
    """A sink that keeps what was applied, and its position, over `close` and `open` as a database would.

    transactions: what is visible, in order. A transaction that came in several batches is one again.
    """

    all_or_nothing = True

    def __init__(self, name: str) -> None:
        self.name = name
        self.consistent = True
        self.transactions: list[Transaction] = []
        self.position: Position | None = None
        self._tables: list[tuple[Table, ...]] = []
        self._pending: list[tuple[tuple[Table, ...], Transaction]] | None = None
        self._errors: deque[Exception] = deque()
        self._refused: set[Image | None] = set()
        self._settled: Collection[tuple[SourcePosition, int]] = ()

    @property
    def rows(self) -> list[tuple[TableName, Operation, Image | None]]:
        """Every visible change of a row: its table, what it does, and the row's image afterwards."""
        return [
            (tables[change.table].qualified, Operation(change.operation), change.after)
            for tables, transaction in zip(self._tables, self.transactions, strict=True)
            for change in transaction.changes
            if change.table >= 0
        ]

    def fail(self, *errors: Exception) -> None:
        """Make the next calls of `open` or `apply` raise these, one each."""
        self._errors.extend(errors)

    def open(self) -> Position | None:
        """Return the stored position."""
        self._raise_next()
        self._pending = []
        return self.position

    def prepare(self, batches: Sequence[Batch]) -> None:
        """There is nothing to prepare."""

    def apply(self, batches: Sequence[Batch], position: Position) -> Applied:
        """Keep the changes; those of an unfinished transaction stay invisible."""
        self._raise_next()
        if self._pending is None:
            raise TransientError(f"{self.name}: not connected")
        self._check(batches)
        for batch in batches:
            self._pending += [(batch.tables, transaction) for transaction in batch.transactions]
        if not batches or batches[-1].complete:
            self._commit(position)
        return Applied(changes=sum(batch.change_count for batch in batches))

    def ahead(self) -> Ahead | None:
        """Never: data and position are stored together."""
        return None

    def settled(self) -> Collection[tuple[SourcePosition, int]]:
        """What `apply_parked` applied last."""
        return self._settled

    def refuse(self, *images: Image) -> None:
        """From now on refuse all changes to these rows, and no others."""
        self._refused = set(images)

    def subject_of(self, tables: Sequence[Table], change: Change) -> Subject:
        """A row by its key, or what stands for it; a change without is about its table."""
        if change.table < 0:
            return Subject((), None)
        return Subject((tables[change.table].qualified,), None if change.key is None else (change.key,))

    def free_of(self, table: Table, keys: Set[bytes]) -> QuickLook:  # noqa: ARG002 - protocol
        """By its key."""
        return QuickLook(lambda change: change.key is not None and change.key not in keys)

    def apply_part(self, batches: Sequence[Batch], position: Position) -> Applied:  # noqa: ARG002 - protocol
        """Keep the changes, visible at once."""
        return self._keep(batches)

    def apply_parked(self, batches: Sequence[Batch]) -> Applied:
        """Keep the changes, visible at once, and which they are."""
        applied = self._keep(batches)
        self._settled = [
            (each.position, each.first_ordinal)
            for batch in batches
            for each in batch.transactions
            if isinstance(each.position, int)
        ]
        return applied

    def _keep(self, batches: Sequence[Batch]) -> Applied:
        self._raise_next()
        self._check(batches)
        for batch in batches:
            self._tables += [batch.tables] * len(batch.transactions)
            self.transactions += batch.transactions
        return Applied(changes=sum(batch.change_count for batch in batches))

    def upkeep(self, position: SourcePosition) -> None:
        """There is none."""

    def close(self) -> None:
        """Disconnect; what was not complete is gone."""
        self._pending = None

    def _check(self, batches: Sequence[Batch]) -> None:
        changes = (change for batch in batches for each in batch.transactions for change in each.changes)
        if any(image in self._refused for change in changes for image in (change.after, change.key)):
            raise Refused(f"{self.name}: a row is refused", undone=True)

    def _commit(self, position: Position) -> None:
        for tables, transaction in self._pending or []:
            self._tables.append(tables)
            self.transactions.append(transaction)
        self._pending = []
        self.position = position

    def _raise_next(self) -> None:
        if self._errors:
            self._pending = None
            raise self._errors.popleft()


def _size(transactions: Sequence[Transaction]) -> int:
    """About what the rows weigh."""
    return sum(
        len(image or b"")
        for transaction in transactions
        for change in transaction.changes
        for image in (change.key, change.before, change.after)
    )
