"""Manual re-sync: given rows or documents are read from the source again, and put right on the mirror.

While the stream runs this must neither overtake a change that is still in the queue (the stream would then take the row
back, or stumble over it) nor be overtaken (an older image would be written over a newer one). So it is done while the
mirror stands still, with images that are right exactly where it stands. Each kind of database has its own way to get
those, described where it is done.
"""

from __future__ import annotations

from collections import Counter
from enum import StrEnum
from typing import Final

import msgspec

MAX_ROWS: Final = 10_000
"""More than that is a case for copying the table again."""


class Action(StrEnum):
    """What was done to a row of the mirror, or would be."""

    EQUAL = "equal"
    INSERTED = "inserted"
    REPLACED = "replaced"
    DELETED = "deleted"
    ABSENT = "absent"
    """It was asked for by its key, and is on neither side."""
    CHANGING = "still changing"
    """It was written at the source each time it was looked at: left to the stream."""


_WRITES: Final = frozenset({Action.INSERTED, Action.REPLACED, Action.DELETED})


class Wanted(msgspec.Struct, frozen=True):
    """Which rows: those with these keys, and those that a condition holds for, on either side.

    ids, where: as a person writes them for that kind of database.
    """

    ids: tuple[str, ...] = ()
    where: str | None = None


class SyncedRow(msgspec.Struct, frozen=True):
    """One row, by its key in a form for people."""

    key: str
    action: Action


class ResyncReport(msgspec.Struct, frozen=True):
    """What was done to each row that was asked for. dry_run: it was not done."""

    table: str
    rows: tuple[SyncedRow, ...]
    dry_run: bool

    @property
    def settled(self) -> bool:
        """Whether every row is now known to be right; in a dry run, whether all of them were."""
        unsettled = {Action.CHANGING, *(_WRITES if self.dry_run else ())}
        return not any(row.action in unsettled for row in self.rows)

    def lines(self) -> list[str]:
        """For people: a line for each row that is not equal, and a summary."""
        would = "would be " if self.dry_run else ""
        names = {action: would + action if action in _WRITES else str(action) for action in Action}
        told = [f"{row.key}: {names[row.action]}" for row in self.rows if row.action is not Action.EQUAL]
        counts = Counter(row.action for row in self.rows)
        summary = ", ".join(f"{counts[action]} {names[action]}" for action in Action if counts[action])
        return [*told, f"{self.table}: {summary or 'no row found on either side'}"]
