"""What may pass of batches that come while changes are parked, and what has to wait behind those. Pure: no I/O."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from operator import attrgetter, is_
from typing import Final, NamedTuple

from cdc.change import DDL, Change, Transaction
from cdc.packed_rows import PackedRows, Span
from cdc.parking_plan import subject_of
from cdc.parts import Item, Subjects, sifted
from cdc.queue import Stored
from cdc.queue.parked import ParkedChange, ParkedCount, ParkedId
from cdc.sink import Parking, Subject

_STORED: Final = attrgetter("stored")


class ParkedRows:
    """The parked changes of a sink, and what they are about.

    size: bytes that they take. version: another one whenever what `subjects` counts has changed.
    """

    def __init__(self) -> None:
        self.subjects = Subjects()
        self.size = 0
        self.version = 0
        self._rows: dict[ParkedId, ParkedChange] = {}
        self._dead = self._waiting = 0
        self._oldest_at: float | None = None  # also where it has to be looked for: see `count`

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[ParkedChange]:
        return iter(self._rows.values())

    def __contains__(self, parked: object) -> bool:
        return parked in self._rows

    def add(self, row: ParkedChange) -> None:
        """One that is there already stays as it is."""
        if row.id not in self._rows:
            self._rows[row.id] = row
            self.size += row.size
            self.subjects.add(subject_of(row))
            self.version += 1
            self._tally(row, 1)
            if self._oldest_at is not None:
                self._oldest_at = min(self._oldest_at, row.created_at)

    def replace(self, row: ParkedChange) -> None:
        """The same change, tried once more."""
        self._tally(self._rows[row.id], -1)
        self._rows[row.id] = row
        self._tally(row, 1)

    def remove(self, row: ParkedChange) -> None:
        """It waits no more."""
        row = self._rows.pop(row.id)
        self.size -= row.size
        self._tally(row, -1)
        if row.created_at == self._oldest_at:
            self._oldest_at = None
        self.subjects.add(subject_of(row), -1)
        self.version += 1

    def clear(self) -> None:
        """Nothing is parked."""
        self._rows.clear()
        self.subjects = Subjects()
        self.size = self._dead = self._waiting = 0
        self._oldest_at = None
        self.version += 1

    @property
    def count(self) -> ParkedCount:
        """How many there are. Looks through them only after the oldest one has gone."""
        if self._oldest_at is None:
            self._oldest_at = min((row.created_at for row in self), default=None)
        return ParkedCount(len(self), self._dead, self._oldest_at, self._waiting)

    def _tally(self, row: ParkedChange, one: int) -> None:
        if row.state == "dead":
            self._dead += one
        elif not row.attempts:
            self._waiting += one


class Admission(NamedTuple):
    """What may pass of `given`, and what has to wait, as long as the parked rows are of this version.

    has_ddl: whether there are changes of tables as such.
    """

    version: int
    given: Sequence[Stored]
    admitted: Sequence[Stored]
    waiting: Sequence[tuple[Item, Subject]]
    has_ddl: bool

    def holds_for(self, pieces: Sequence[Stored], version: int) -> bool:
        """Whether it is about these very pieces."""
        return version == self.version and len(pieces) == len(self.given) and all(map(is_, pieces, self.given))


def admission(pieces: Sequence[Stored], parked: ParkedRows, sink: Parking, *, again: bool) -> Admission:
    """Tell what waits for what is parked, or for what comes before it in these pieces.

    again: whether some of these changes may be parked themselves. They wait already, and are told nothing of.
    """
    look = _Look(parked, sink, again=again)
    version, admitted = parked.version, list(map(look.admitted, pieces))
    return Admission(version, pieces, admitted, look.waiting, look.has_ddl)


def apart(
    items: Iterable[Item], parked: ParkedRows, sink: Parking
) -> tuple[Sequence[Item], Sequence[tuple[Item, Subject]]]:
    """What may pass of changes, and what has to wait; without those that are parked themselves."""
    if not parked:
        return list(items), ()
    free: list[Item] = []
    waiting: list[tuple[Item, Subject]] = []
    behind = Subjects()
    for stored, own in groupby(items, _STORED):
        is_free = parked.subjects.quick_look(stored.batch, sink.free_of, behind).is_free
        for item in own:
            if item.id in parked:
                continue
            if is_free(item.change):
                free.append(item)
                continue
            subject = sink.subject_of(stored.batch.tables, item.change)
            if parked.subjects.block(subject) or behind.block(subject):
                waiting.append((item, subject))
                if not parked.subjects.covers(subject):
                    behind.add(subject)
            else:
                free.append(item)
    return free, waiting


class _Look:
    """One look at what comes."""

    def __init__(self, parked: ParkedRows, sink: Parking, *, again: bool) -> None:
        self.waiting: list[tuple[Item, Subject]] = []
        self.has_ddl = False
        self._parked = parked
        self._sink = sink
        self._again = again
        self._behind = Subjects()

    def admitted(self, piece: Stored) -> Stored:
        """What may pass of the next piece."""
        batch, subjects, behind = piece.batch, self._parked.subjects, self._behind
        if not (subjects.concern(batch) or behind.concern(batch) or batch.has_ddl):
            return piece

        def passes(transaction: Transaction, change: Change, place: ParkedId) -> bool:
            self.has_ddl |= change.operation == DDL
            if self._again and place in self._parked:
                return False
            subject = self._sink.subject_of(batch.tables, change)
            if not (subjects.block(subject) or (behind and behind.block(subject))):
                return True
            if not subjects.covers(subject):
                behind.add(subject)  # what comes next may have to wait behind it
            self.waiting.append((Item(piece, transaction, change, place), subject))
            return False

        if self._again:
            return sifted(piece, passes)
        look = subjects.quick_look(batch, self._sink.free_of, behind)
        transactions = batch.transactions
        if look.marks is None or not isinstance(transactions, PackedRows):
            return sifted(piece, passes, look.is_free)
        return sifted(piece, passes, look.is_free, self._marked(transactions, look.marks))

    def _marked(self, packed: PackedRows, marks: frozenset[bytes]) -> Iterator[Span]:
        """Where packed transactions have to be looked at."""
        for span in packed.spans(marks):
            yield span
            if self._behind:  # what comes next may have to wait behind that, whatever its bytes
                yield packed.rest(span)
                return
