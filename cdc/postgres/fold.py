"""Folds many changes of a table into the few that have the same effect. Pure: no I/O."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence

from cdc.change import INSERT, Change, Image
from cdc.postgres.row import UNCHANGED, Row, Value, decode_key, decode_row, merge


class FoldError(Exception):
    """The changes do not follow from each other (an insert of a row that is there): apply them one by one."""


KeyOf = Callable[[Image], Hashable]
"""The key columns' values of a row, in a form that can be looked up."""


class Fold:
    """The net effect of a table's changes, by key.

    Applied as deletes, then updates, then inserts. A key may be deleted and inserted: the row was there, and another
    one took its place. Of a row that changed many times only the last image is taken apart.
    """

    __slots__ = ("_deletes", "_inserts", "_key_of", "_updates")

    def __init__(self, key_of: KeyOf) -> None:
        self._key_of = key_of
        self._deletes: dict[Hashable, Row] = {}
        self._updates: dict[Hashable, list[Image]] = {}
        self._inserts: dict[Hashable, list[Image]] = {}

    def __bool__(self) -> bool:
        """Whether there is anything to apply."""
        return bool(self._inserts or self._updates or self._deletes)

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
        if change.operation == INSERT:
            if key in self._inserts or key in self._updates:
                raise FoldError
            self._inserts[key] = [after]
            return True
        old = change.before or change.key
        if old is not None and self._key_of(old) != key:
            return False
        images = self._updates.get(key) or self._inserts.get(key)
        if images is not None:
            images.append(after)
        elif key in self._deletes:
            raise FoldError
        else:
            self._updates[key] = [after]
        return True

    def deleted(self) -> Iterable[Row]:
        """Rows to delete; only their keys need be known."""
        return self._deletes.values()

    def updated(self) -> Iterator[Row]:
        """Rows to update; columns may be UNCHANGED."""
        return map(_last, self._updates.values())

    def inserted(self) -> Iterator[Row]:
        """Rows to insert, whole."""
        return map(_last, self._inserts.values())

    def _delete(self, change: Change) -> None:
        image = change.before or change.key
        assert image is not None
        key = self._key_of(image)
        if self._inserts.pop(key, None) is None:
            if key in self._deletes:
                raise FoldError
            self._updates.pop(key, None)
            self._deletes[key] = old_row(change)


class Appends:
    """The inserts into a table whose rows have no key: everything else there means one row at a time."""

    __slots__ = ("_images",)

    def __init__(self) -> None:
        self._images: list[Image] = []

    def __bool__(self) -> bool:
        """Whether there is anything to apply."""
        return bool(self._images)

    def add(self, change: Change) -> bool:
        """Take an INSERT; False for anything else."""
        if change.operation != INSERT:
            return False
        assert change.after is not None
        self._images.append(change.after)
        return True

    def inserted(self) -> Iterator[Row]:
        """Rows to insert."""
        return map(decode_row, self._images)


def old_row(change: Change) -> Row:
    """The row as it was before, as far as the source told."""
    if change.before is not None:
        return decode_row(change.before)
    if change.key is not None:
        return decode_key(change.key)
    assert change.after is not None
    return decode_row(change.after)


def _last(images: Sequence[Image]) -> Row:
    """The last state of a row, with what it left out taken from the states before."""
    row = decode_row(images[-1])
    for image in images[-2::-1]:
        if UNCHANGED not in row:
            break
        row = merge(row, decode_row(image))
    return row


def changed_columns(row: Row) -> tuple[int, ...] | None:
    """Indexes of the columns that travelled; `None` for all of them, which is the common case."""
    if UNCHANGED not in row:
        return None
    return tuple(index for index, value in enumerate(row) if value is not UNCHANGED)


def copy_text(rows: Sequence[Row]) -> bytes:
    """Rows in COPY's text format. Values are text already; only what COPY would misread is escaped."""
    if not rows:
        return b""
    nulls = 0
    lines = []
    for row in rows:
        if None in row:
            nulls += row.count(None)
            lines.append(b"\t".join([b"\\N" if value is None else value for value in row]))  # type: ignore[misc]
        else:
            lines.append(b"\t".join(row))  # type: ignore[arg-type]
    lines.append(b"")
    text = b"\n".join(lines)
    # nearly always no value needs escaping: then the special bytes are just those that were put in here
    if (
        text.count(b"\\") == nulls
        and text.count(b"\n") == len(rows)
        and text.count(b"\t") == len(rows) * (len(rows[0]) - 1)
        and b"\r" not in text
    ):
        return text
    return b"".join(b"\t".join(map(_escaped, row)) + b"\n" for row in rows)


def _escaped(value: Value) -> bytes:
    if value is None:
        return b"\\N"
    assert value is not UNCHANGED
    return value.replace(b"\\", b"\\\\").replace(b"\t", b"\\t").replace(b"\n", b"\\n").replace(b"\r", b"\\r")
