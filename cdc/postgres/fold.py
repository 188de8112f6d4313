"""Folds many changes of a table into the few that have the same effect. Pure: no I/O."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence

from cdc.change import INSERT, UNCHANGED, Change, Row, Value


class FoldError(Exception):
    """The changes do not follow from each other (an insert of a row that is there): apply them one by one."""


KeyOf = Callable[[Row], Hashable]
"""The key columns' values of a row, in a form that can be looked up."""


class Fold:
    """The net effect of a table's changes, by key.

    Applied as deletes, then updates, then inserts. A key may be in `deletes` and in `inserts`: the row was there,
    and another one took its place. Rows in `updates` may have UNCHANGED columns, those in `inserts` never do.
    """

    __slots__ = ("deletes", "inserts", "key_of", "updates")

    def __init__(self, key_of: KeyOf) -> None:
        self.key_of = key_of
        self.deletes: dict[Hashable, Row] = {}
        self.updates: dict[Hashable, Row] = {}
        self.inserts: dict[Hashable, Row] = {}

    def __bool__(self) -> bool:
        """Whether there is anything to apply."""
        return bool(self.inserts or self.updates or self.deletes)

    def add(self, change: Change) -> bool:
        """Take a change; False if it moves a row to another key, which only keeps its meaning by itself.

        Such an update must stay one (as delete and insert it would lose unchanged TOAST): apply what was
        folded so far, then the update. (One function on purpose: it runs for every change.)
        """
        after = change.after
        if after is None:
            self._delete(change)
            return True
        key = self.key_of(after)
        inserts, updates = self.inserts, self.updates
        if change.operation == INSERT:
            if key in inserts or key in updates:
                raise FoldError
            inserts[key] = after
            return True
        old = change.before or change.key
        if old is not None and self.key_of(old) != key:
            return False
        if key in updates:
            updates[key] = merge(after, updates[key])
        elif key in inserts:
            inserts[key] = merge(after, inserts[key])
        elif key in self.deletes:
            raise FoldError
        else:
            updates[key] = after
        return True

    def inserted(self) -> Iterable[Row]:
        """Rows to insert."""
        return self.inserts.values()

    def _delete(self, change: Change) -> None:
        old = change.before or change.key
        assert old is not None
        key = self.key_of(old)
        if self.inserts.pop(key, None) is None:
            if key in self.deletes:
                raise FoldError
            self.updates.pop(key, None)
            self.deletes[key] = old


class Appends:
    """The inserts into a table whose rows have no key: everything else there means one row at a time."""

    __slots__ = ("rows",)

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def __bool__(self) -> bool:
        """Whether there is anything to apply."""
        return bool(self.rows)

    def add(self, change: Change) -> bool:
        """Take an INSERT; False for anything else."""
        if change.operation != INSERT:
            return False
        assert change.after is not None
        self.rows.append(change.after)
        return True

    def inserted(self) -> Iterable[Row]:
        """Rows to insert."""
        return self.rows


def merge(row: Row, earlier: Row) -> Row:
    """The row with its UNCHANGED columns taken from an earlier state of it."""
    if UNCHANGED not in row:
        return row
    return tuple(old if value is UNCHANGED else value for value, old in zip(row, earlier, strict=True))


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
