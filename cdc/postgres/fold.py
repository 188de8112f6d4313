"""Folds many changes of a table into the few that have the same effect. Pure: no I/O."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable

from cdc.change import INSERT, Change, Image
from cdc.postgres.row import UNCHANGED, Row, decode_key, decode_row, first_value, merge


class FoldError(Exception):
    """The changes do not follow from each other (an insert of a row that is there): apply them one by one."""


KeyOf = Callable[[Image], Hashable]
"""The key columns' values of a row, in a form that can be looked up."""

Slots = tuple[
    dict[Hashable, Image], dict[Hashable, Image], dict[Hashable, Row], dict[Hashable, list[Image]], KeyOf | None
]
"""Where a fold keeps inserts, updates, deletes and earlier states; and its `KeyOf`, `None` for the first column."""


class Fold:
    """The net effect of a table's changes, by key.

    Applied as deletes, then updates, then inserts. A key may be deleted and inserted: the row was there, and another
    one took its place. Of a row that changed many times only the last state is taken apart.
    """

    __slots__ = ("_deletes", "_earlier", "_inserts", "_key_of", "_updates")

    def __init__(self, key_of: KeyOf) -> None:
        self._key_of = key_of
        self._deletes: dict[Hashable, Row] = {}
        self._updates: dict[Hashable, Image] = {}
        self._inserts: dict[Hashable, Image] = {}
        self._earlier: dict[Hashable, list[Image]] = {}  # apart: a list a row is a lot of garbage to collect

    def __bool__(self) -> bool:
        """Whether there is anything to apply."""
        return bool(self._inserts or self._updates or self._deletes)

    @property
    def slots(self) -> Slots:
        """For the compiled twin of `add`."""
        return (
            self._inserts,
            self._updates,
            self._deletes,
            self._earlier,
            None if self._key_of is first_value else self._key_of,
        )

    def add(self, change: Change) -> bool:
        """Take a change; False if it moves a row to another key, which only keeps its meaning by itself.

        Such an update must stay one (as delete and insert it would lose unchanged TOAST): apply what was
        folded so far, then the update. (One function on purpose: it runs for every change.)
        """
        after = change.after
        if after is None:
            self._delete(change)
            return True
        key = self._key_of(after)
        inserts, updates = self._inserts, self._updates
        if change.operation == INSERT:
            if key in inserts or key in updates:
                raise FoldError
            inserts[key] = after
            return True
        old = change.before or change.key
        if old is not None and self._key_of(old) != key:
            return False
        rows = inserts if key in inserts else updates
        if key in rows:
            self._earlier.setdefault(key, []).append(rows[key])
        elif key in self._deletes:
            raise FoldError
        rows[key] = after
        return True

    def deleted(self) -> Collection[Row]:
        """Rows to delete; only their keys need be known."""
        return self._deletes.values()

    def updated(self) -> Collection[Image]:
        """The last states of rows to update."""
        return self._updates.values()

    def inserted(self) -> Collection[Image]:
        """The last states of rows to insert."""
        return self._inserts.values()

    def row(self, image: Image) -> Row:
        """Take a last state apart; what it leaves out comes from the states before, or is UNCHANGED."""
        row = decode_row(image)
        if UNCHANGED in row:
            for earlier in reversed(self._earlier.get(self._key_of(image), ())):
                row = merge(row, decode_row(earlier))
        return row

    def _delete(self, change: Change) -> None:
        image = change.before or change.key
        assert image is not None
        key = self._key_of(image)
        self._earlier.pop(key, None)
        if self._inserts.pop(key, None) is None:
            if key in self._deletes:
                raise FoldError
            self._updates.pop(key, None)
            self._deletes[key] = old_row(change)


class Appends:
    """The inserts into a table whose rows have no key: everything else there means one row at a time."""

    __slots__ = ("_rows",)

    def __init__(self) -> None:
        self._rows: list[Image] = []

    def __bool__(self) -> bool:
        """Whether there is anything to apply."""
        return bool(self._rows)

    @property
    def slots(self) -> None:
        """There is no compiled twin of `add`."""
        return None

    def add(self, change: Change) -> bool:
        """Take an INSERT; False for anything else."""
        if change.operation != INSERT:
            return False
        assert change.after is not None
        self._rows.append(change.after)
        return True

    def inserted(self) -> Collection[Image]:
        """Rows to insert."""
        return self._rows

    def row(self, image: Image) -> Row:
        """Take a row apart."""
        return decode_row(image)


def old_row(change: Change) -> Row:
    """The row as it was before, as far as the source told."""
    if change.before is not None:
        return decode_row(change.before)
    if change.key is not None:
        return decode_key(change.key)
    assert change.after is not None
    return decode_row(change.after)


def changed_columns(row: Row) -> tuple[int, ...] | None:
    """Indexes of the columns that travelled; `None` for all of them, which is the common case."""
    if UNCHANGED not in row:
        return None
    return tuple(index for index, value in enumerate(row) if value is not UNCHANGED)
