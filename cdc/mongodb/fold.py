"""Folds the changes of a batch into the few writes that have the same effect. Pure: no I/O.

What may be used, and what not:

- The image of an INSERT or of a replacement is the document as it was then. The image of an UPDATE was looked up later:
  it may hold changes whose events are yet to come. Since those are applied too, the document ends as it should; but in
  the meantime it may meet a unique index, against a document whose own change has not come yet. Then, as for everything
  that folding does not get through, the changes are applied in source order, updates by their deltas.
- An UPDATE without an image (looked up when the document was gone, or not at all) is no delete: its delta counts.
- The target may be further than the changes (a replay after a crash, a copy that was made meanwhile). So an insert may
  find its document, and a delete may not.
- DDL is a barrier: everything before it is applied first.
- An `_id` may come back in other bytes that are equal for the server (1 as 1.0): then the old document is deleted
  first, for a replacement keeps the bytes of the `_id` that it finds.
"""

from __future__ import annotations

from collections.abc import Container, Hashable, Iterable, Iterator, Sequence
from itertools import chain
from operator import attrgetter
from typing import TYPE_CHECKING, Final

import msgspec

from cdc.change import DDL, DELETE, INSERT, MESSAGE, Batch, Change, Table, TableName, Transaction, count_changes
from cdc.mongodb.equality import key_of, same_bytes
from cdc.mongodb.folded import Folded

_CHANGES: Final = attrgetter("changes")
_OPERATION: Final = attrgetter("operation")


class Segment(msgspec.Struct, frozen=True):
    """What lies between two barriers.

    work: transactions in source order, beside the tables that their changes are of.
    ddl: the change at its end, if that is what ended it, `table` what it is about (`None`: no collection), and
        `position` its transaction's.
    through: the position of the last transaction before it, if there is one.
    whole: whether it is a transaction by itself: then it must not be repeated after what follows it.
    """

    work: Sequence[tuple[tuple[Table, ...], Sequence[Transaction]]]
    ddl: Change | None = None
    table: TableName | None = None
    position: bytes = b""
    through: bytes | None = None
    whole: bool = True

    @property
    def size(self) -> int:
        """The number of its changes, without that of collections as such at its end."""
        return sum(count_changes(transactions) for _, transactions in self.work)

    def changes(self) -> Iterator[tuple[TableName, Change]]:
        """All changes in source order."""
        for tables, transactions in self.work:
            for change in chain.from_iterable(map(_CHANGES, transactions)):
                if change.operation != MESSAGE:
                    yield tables[change.table].qualified, change


class FoldInPython:
    """The net effect of one collection's changes, by `_id`. To be applied as deletes, replaces, inserts, deltas.

    `Fold` is the same, compiled where it can be.
    """

    __slots__ = ("_born", "_deltas", "_died", "_last")

    def __init__(self) -> None:
        self._last: dict[Hashable, Change] = {}
        self._deltas: dict[Hashable, list[Change]] = {}
        self._born: set[Hashable] = set()
        self._died: set[Hashable] = set()

    def __bool__(self) -> bool:
        """Whether there is anything to apply."""
        return bool(self._last or self._deltas)

    def add(self, change: Change) -> None:
        """Take a change, in a single function: it runs for every change."""
        assert change.key is not None
        key = key_of(change.key)
        if change.after is None and change.operation != DELETE:
            self._deltas.setdefault(key, []).append(change)
            return
        if change.operation == INSERT:
            if key not in self._last and key not in self._deltas:
                self._born.add(key)
        elif change.operation == DELETE:
            self._died.add(key)
        self._last[key] = change
        if self._deltas:
            self._deltas.pop(key, None)

    def folded(self) -> Folded:
        """The effect of all that was added."""
        folded = Folded([], [], [], [], 0)
        born, died = self._born, self._died
        for key, change in self._last.items():
            assert change.key is not None
            after = change.after
            if after is None:
                folded.deletes.append(change.key)
                folded.expected_deletes += key not in born
            elif key in died or not (type(key) is bytes or same_bytes(change.key, after)):
                folded.deletes.append(change.key)
                folded.expected_deletes += key not in born
                folded.inserts.append((change.key, after))
            elif key in born:
                folded.inserts.append((change.key, after))
            else:
                folded.replaces.append((change.key, after))
        for changes in self._deltas.values():
            folded.deltas += changes
        return folded


def add_all_in_python(transactions: Sequence[Transaction], takers: Sequence[Fold | list[Change]]) -> None:
    """Give each change to the fold or list of its table."""
    adders = [taker.append if isinstance(taker, list) else taker.add for taker in takers]
    for change in chain.from_iterable(map(_CHANGES, transactions)):
        if change.operation != MESSAGE:
            adders[change.table](change)


if TYPE_CHECKING:
    Fold = FoldInPython
    add_all = add_all_in_python
else:
    try:
        from cdc.mongodb._mirror import Fold, add_all
    except ImportError:
        Fold, add_all = FoldInPython, add_all_in_python


def segments(batches: Sequence[Batch], after: bytes | None = None) -> list[Segment]:
    """Cut batches at each DDL. The last segment has none; it may be empty.

    after: the position of a transaction that is applied already, with all before it; ignored if it is not among these.
    """
    if after is None and not any(batch.has_ddl for batch in batches):
        return [Segment([(batch.tables, batch.transactions) for batch in batches if batch.transactions])]
    work = [(batch.tables, [transaction]) for batch in batches for transaction in batch.transactions]
    if after is not None:
        work = work[max((n for n, (_, (each,)) in enumerate(work, 1) if is_through(each, after)), default=0) :]
    found: list[Segment] = []
    begin = 0
    through: bytes | None = None
    for number, (tables, (transaction,)) in enumerate(work):
        changes = transaction.changes
        position = transaction.position
        assert isinstance(position, bytes)
        if len(changes) == 1 and transaction.complete:
            if changes[0].operation == DDL:
                found.append(Segment(work[begin:number], changes[0], _table(tables, changes[0]), position, through))
                begin = number + 1
        elif DDL in map(_OPERATION, changes):
            # what makes a collection, or empties it before all of its documents: first that, then the writes
            rest = [change for change in changes if change.operation != DDL]
            made = [change for change in changes if change.operation == DDL]
            for n, ddl in enumerate(made):
                found.append(Segment(() if n else work[begin:number], ddl, _table(tables, ddl), position, whole=False))
            work[number] = (tables, [msgspec.structs.replace(transaction, changes=rest)])
            begin = number
        through = position
    found.append(Segment(work[begin:]))
    return found


def is_through(transaction: Transaction, position: bytes) -> bool:
    """Whether a position is a transaction's. Parts of it are not it, though they may have the same one."""
    return transaction.complete and transaction.position == position


def _table(tables: tuple[Table, ...], ddl: Change) -> TableName | None:
    return tables[ddl.table].qualified if ddl.table >= 0 else None


def fold(segment: Segment, in_order: Container[TableName]) -> dict[TableName, Folded | list[Change]]:
    """Each collection's final states; of those that are `in_order` all changes, as they came."""
    folds: dict[TableName, Fold] = {}
    ordered: dict[TableName, list[Change]] = {}
    for tables, transactions in segment.work:
        names = [table.qualified for table in tables]
        add_all(
            transactions,
            [ordered.setdefault(name, []) if name in in_order else folds.setdefault(name, Fold()) for name in names],
        )
    return {
        **{table: folding.folded() for table, folding in folds.items() if folding},
        **{table: changes for table, changes in ordered.items() if changes},
    }


def runs(changes: Iterable[tuple[TableName, Change]]) -> Iterator[tuple[TableName, list[Change]]]:
    """Neighbours of one collection that one command can carry: deletes, or others."""
    current: tuple[TableName, bool] | None = None
    run: list[Change] = []
    for table, change in changes:
        kind = (table, change.operation == DELETE)
        if kind != current:
            if current is not None:
                yield current[0], run
            current, run = kind, []
        run.append(change)
    if current is not None:
        yield current[0], run
