"""Which parked changes can be tried. Pure: no I/O."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from operator import attrgetter
from typing import Final, NamedTuple

from cdc.parts import Subjects
from cdc.queue.parked import ParkedChange
from cdc.sink import Subject

RELEASED_CHANGES: Final = 500
RELEASED_BYTES: Final = 4 * 1024**2
"""So much of what has waited behind a change is applied at once."""

_ID: Final = attrgetter("id")
_POSITION: Final = attrgetter("position")


class Plan(NamedTuple):
    """What can be done now: released are those that wait behind nothing any more; heads begin with a refused one.

    A head is what a transaction has parked that waits behind nothing else: a target may only take it together.
    unreached: whether there are some that the target's position has not passed; they come first again.
    """

    released: Sequence[ParkedChange]
    heads: Sequence[Sequence[ParkedChange]]
    unreached: bool


def make_plan(parked: Iterable[ParkedChange], reached: int, *, together: bool) -> Plan:
    """The order of the source decides: nothing overtakes what it would have to wait behind.

    reached: what stands at lower places was passed by the target. together: whether changes of whole tables may be
        released with others.
    """
    waiting = Subjects()
    released = _Released(together=together)
    heads: list[Sequence[ParkedChange]] = []
    unreached = False
    for _, rows in groupby(sorted(parked, key=_ID), _POSITION):
        head: list[ParkedChange] = []
        behind_head = Subjects()
        for row in rows:
            subject = subject_of(row)
            unreached |= row.place >= reached
            if row.place >= reached or row.state == "dead" or waiting.block(subject):
                waiting.add(subject)
            elif row.attempts or behind_head.block(subject):
                behind_head.add(subject)
                head.append(row)
            elif not released.take(row):
                waiting.add(subject)
        for row in head:
            waiting.add(subject_of(row))
        if head:
            heads.append(head)
    return Plan(released.rows, heads, unreached)


def subject_of(row: ParkedChange) -> Subject:
    """What a parked change is about."""
    return Subject(row.tables, row.keys)


class _Released:
    """Rows that are applied together, within bounds."""

    def __init__(self, *, together: bool) -> None:
        self.rows: list[ParkedChange] = []
        self._size = 0
        self._together = together

    def take(self, row: ParkedChange) -> bool:
        """Whether there is room for one more."""
        if self.rows:
            alone = not self._together and (row.keys is None or self.rows[-1].keys is None)
            if alone or self._size >= RELEASED_BYTES or len(self.rows) >= RELEASED_CHANGES:
                return False
        self._size += row.size
        self.rows.append(row)
        return True
