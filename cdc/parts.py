"""What changes are about, and how batches come apart into changes and together again. Pure: no I/O."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from functools import partial
from itertools import groupby
from operator import attrgetter
from typing import Final, NamedTuple, cast

import msgspec

from cdc.change import DDL, TRUNCATE, Batch, Change, Table, TableName, Transaction, Truncate
from cdc.packed_rows import PackedRows, Span
from cdc.queue import Stored
from cdc.queue.parked import ParkedId
from cdc.sink import NEVER_FREE, QuickLook, Subject

_OPERATION: Final = attrgetter("operation")

IsFree = Callable[[Change], bool]
"""As `cdc.sink.QuickLook.is_free`."""

FreeOf = Callable[[Table, Set[bytes]], QuickLook]
"""As `cdc.sink.Parking.free_of`."""

Passes = Callable[[Transaction, Change, ParkedId], bool]
"""Whether a change, of a transaction and at a place, may go on its way."""


class Subjects:
    """Counts what changes are about, and tells whether another one has to wait behind them."""

    def __init__(self) -> None:
        # by table its keys, `None` for the table as a whole; a schema as a whole is a table without a name
        self._keys: dict[TableName, Counter[bytes | None]] = {}
        self._schemas: Counter[str] = Counter()

    def __bool__(self) -> bool:
        """Whether anything was added."""
        return bool(self._keys)

    def add(self, subject: Subject, count: int = 1) -> None:
        """Count a change; -1 takes it back."""
        for table in subject.tables:
            keys = self._keys.setdefault(table, Counter())
            for key in subject.keys or (None,):
                keys[key] += count
                if not keys[key]:
                    del keys[key]
            if not keys:
                del self._keys[table]
            self._schemas[table.schema] += count

    def block(self, subject: Subject) -> bool:
        """Whether a later change must wait."""
        for table in subject.tables:
            if self._schemas and (table.schema, "") in self._keys:
                return True
            keys = self._keys.get(table)
            if keys is not None:
                if subject.keys is None or None in keys:
                    return True
                for key in subject.keys:
                    if key in keys:
                        return True
            elif not table.name and self._schemas[table.schema]:
                return True
        return False

    def covers(self, subject: Subject) -> bool:
        """Whether it would add nothing: all that waits for it waits anyway."""
        return all(
            keys is not None and (None in keys or (subject.keys is not None and keys.keys() >= set(subject.keys)))
            for keys in map(self._keys.get, subject.tables)
        )

    def concern(self, batch: Batch) -> bool:
        """Whether any change of a batch's rows might have to wait."""
        names = [table.qualified for table in batch.tables]
        return any(name in self._keys or (name.schema, "") in self._keys for name in names)

    def quick_look(self, batch: Batch, free_of: FreeOf, more: Subjects) -> QuickLook:
        """What tells of most changes of rows that they need not wait: it runs for every change.

        Where it says no, `block` has to be asked. more: what there is to wait for besides. It may grow, and only
        `is_free` takes that into account.
        """
        looks = [self._quick_look(table, free_of) for table in batch.tables]
        more_keys = more._keys

        def is_free(change: Change) -> bool:
            if more_keys or change.operation >= TRUNCATE:
                return False
            look = looks[change.table]
            return look is None or look.is_free(change)

        marks: set[bytes] = set()
        for look in looks:
            if look is not None:
                if look.marks is None:
                    return QuickLook(is_free)
                marks |= look.marks
        return QuickLook(is_free, None if more_keys else frozenset(marks))

    def _quick_look(self, table: Table, free_of: FreeOf) -> QuickLook | None:
        """`None` where no change of a row waits."""
        keys = self._keys.get(table.qualified)
        if (table.schema, "") in self._keys or (keys is not None and None in keys):
            return NEVER_FREE
        return None if keys is None else free_of(table, cast("Set[bytes]", keys.keys()))


class Item(NamedTuple):
    """A change that is on its way, and its place in the order of the source."""

    stored: Stored
    transaction: Transaction
    change: Change
    id: ParkedId


class Part(NamedTuple):
    """What is applied together, and the transaction before it where that must be told.

    last: what it ends with, if that is not among its items: it is parked already.
    """

    items: Sequence[Item]
    before: Transaction | None = None
    last: Item | None = None


def items_of(piece: Stored) -> Iterator[Item]:
    """All changes of a stored batch."""
    for transaction, (place, ordinal) in places_of(piece.seq, piece.batch.transactions):
        for number, change in enumerate(transaction.changes, ordinal):
            yield Item(piece, transaction, change, (place, number))


def places_of(seq: int, transactions: Iterable[Transaction]) -> Iterator[tuple[Transaction, ParkedId]]:
    """Transactions of a stored batch, each beside the place of its first change. All of them, unless positions tell."""
    before = 0
    for transaction in transactions:
        position = transaction.position
        # which numbers tell; else so many changes of its batch come before it
        yield transaction, (position, transaction.first_ordinal) if isinstance(position, int) else (seq, before)
        before += len(transaction.changes)


def sifted(piece: Stored, passes: Passes, is_free: IsFree | None = None, spans: Iterable[Span] | None = None) -> Stored:
    """Without the changes that do not pass. Transactions stay, if need be empty: they are positions.

    is_free: a quick look, by which changes pass that need not be asked about.
    spans: where packed transactions have to be looked at, in order; each is taken when all before it was asked about.
        `None`: everywhere.
    """
    transactions = piece.batch.transactions
    sift = partial(_sift, piece.seq, passes, is_free)
    kept: Sequence[Transaction] | None
    if spans is None:
        kept = sift(transactions)
    else:
        assert isinstance(transactions, PackedRows)
        kept = transactions.altered(spans, sift)
    return piece if kept is None else Stored(piece.seq, msgspec.structs.replace(piece.batch, transactions=kept))


def _sift(
    seq: int, passes: Passes, is_free: IsFree | None, transactions: Sequence[Transaction]
) -> list[Transaction] | None:
    """The transactions with what passes of them; `None` if all does."""
    kept: list[Transaction] = []
    torn = False
    for transaction, (place, ordinal) in places_of(seq, transactions):
        changes = transaction.changes
        if is_free is None or not all(map(is_free, changes)):
            passing = [
                change for number, change in enumerate(changes, ordinal) if passes(transaction, change, (place, number))
            ]
            if len(passing) < len(changes):
                torn = True
                transaction = msgspec.structs.replace(transaction, changes=passing)  # noqa: PLW2901
        kept.append(transaction)
    return kept if torn else None


def parts_of(work: Iterable[tuple[Transaction, list[Item]]]) -> Iterator[Part]:
    """Transactions that hold DDL by themselves, and what lies between them."""
    run: list[Item] = []
    before: Transaction | None = None
    for transaction, items in work:
        if DDL in map(_OPERATION, transaction.changes):
            yield Part(run)
            yield Part(items, None if before is None else emptied(before))
            run = []
        else:
            run += items
        before = transaction
    yield Part(run)


def emptied(transaction: Transaction) -> Transaction:
    """Only its position."""
    return msgspec.structs.replace(transaction, changes=[])


def batches_of(items: Sequence[Item], before: Transaction | None) -> list[Batch]:
    """What is left of a transaction is no complete one."""
    found: list[Batch] = []
    for _, batch_items in groupby(items, lambda item: item.stored.seq):
        transactions = []
        group = list(batch_items)
        for _, own in groupby(group, lambda item: id(item.transaction)):
            part = list(own)
            transaction = part[0].transaction
            if len(part) < len(transaction.changes):
                changes = [item.change for item in part]
                transaction = msgspec.structs.replace(transaction, changes=changes, complete=False)
            transactions.append(transaction)
        batch = group[0].stored.batch
        head = [before] if before is not None and not found else []
        found.append(msgspec.structs.replace(batch, transactions=[*head, *transactions]))
    return found


def alone(item: Item) -> Batch:
    """A batch with this change only."""
    batch, change = item.stored.batch, item.change
    if isinstance(change.detail, Truncate):
        tables = batch.tables
    elif change.table < 0:
        tables = ()
    else:
        tables = (batch.tables[change.table],)
        change = msgspec.structs.replace(change, table=0)
    first_ordinal = item.transaction.first_ordinal
    for number, each in enumerate(item.transaction.changes):
        if each is item.change:
            first_ordinal += number
            break
    transaction = msgspec.structs.replace(item.transaction, changes=[change], first_ordinal=first_ordinal)
    return Batch(tables, [transaction], item.transaction.end, size=0)
