"""What has to be done to a table of one shape so that it has another, with the rows that it then has. Pure.

Columns are told apart by `attnum`. Where the source has computed values anew, no DDL on the mirror would compute the
same (`random()`, USING): such a table is copied again, and nothing else is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec

from cdc.change import Table
from cdc.postgres.shape import REWRITE_OF_TYPES, ColumnShape, TableShape


class DropColumn(NamedTuple):
    """The column is gone."""

    name: str


class RenameColumn(NamedTuple):
    """The column has another name."""

    name: str
    new_name: str


class SetType(NamedTuple):
    """The column has another type, in which the values that are there have the same text without being written."""

    column: ColumnShape


class AddColumn(NamedTuple):
    """A new column; rows that are there have `column.missing`."""

    column: ColumnShape


class DropExpression(NamedTuple):
    """A generated column is none any more, and keeps its values."""

    name: str


class SetNotNull(NamedTuple):
    """The column takes NULL no longer, or again."""

    name: str
    not_null: bool


class SetDefault(NamedTuple):
    """The column has another default, or none. Replicated rows have all values: it only matters later."""

    name: str
    default: str | None


class SetKey(NamedTuple):
    """The table has another primary key. `old`: the one that it had."""

    old: tuple[str, ...]
    columns: tuple[str, ...]


Step = DropColumn | RenameColumn | SetType | AddColumn | DropExpression | SetNotNull | SetDefault | SetKey


class Evolution(NamedTuple):
    """The steps, in order; or why no steps would do (`copy_because`)."""

    steps: Sequence[Step]
    copy_because: str = ""


def evolve(old: TableShape, new: TableShape) -> Evolution:
    """What makes the new shape out of the old one."""
    if old.oid != new.oid:
        return Evolution((), "it was dropped and created again")
    rewritten = old.filenode != new.filenode if new.rewrite is None else new.rewrite != 0
    if new.rewrite is not None and new.rewrite & REWRITE_OF_TYPES:
        return Evolution((), "its rows were rewritten")
    before = {column.attnum: column for column in old.columns}
    if new.rewrite is None and (name := _made_anew(before, new)):
        return Evolution((), f"column {name} was dropped and added again")
    for column in new.columns:
        if rewritten and (reason := _computed(before.get(column.attnum), column)):
            return Evolution((), reason)
    return Evolution(list(_steps(before, old, new)))


def _made_anew(before: dict[int, ColumnShape], new: TableShape) -> str:
    """A column that looks as one which is gone: its first values were taken for those of the other. Empty if none."""
    after = {column.attnum for column in new.columns}
    gone = {(column.name, column.type_oid) for column in before.values() if column.attnum not in after}
    added = (column for column in new.columns if column.attnum not in before and not column.generated)
    return next((column.name for column in added if (column.name, column.type_oid) in gone), "")


def _computed(old: ColumnShape | None, new: ColumnShape) -> str:
    """Why a column of a rewritten table may have values that only the source knows; empty if it cannot."""
    if new.generated:
        return ""
    if old is None:
        return "" if new.missing is not None else f"column {new.name} was added, and the rows were rewritten"
    if (old.type, old.collation) != (new.type, new.collation):
        return f"column {new.name} became {new.type}, and the rows were rewritten"
    return ""


def renames(old: TableShape, new: TableShape) -> list[RenameColumn]:
    """The columns that have another name by now; none where it is another table."""
    if old.oid != new.oid:
        return []
    before = {column.attnum: column for column in old.columns}
    kept = [(before[column.attnum], column) for column in new.columns if column.attnum in before]
    return list(_renames(kept))


def _steps(before: dict[int, ColumnShape], old: TableShape, new: TableShape) -> Iterator[Step]:
    after = {column.attnum: column for column in new.columns}
    remade = {  # a generated column with another expression
        attnum
        for attnum in before.keys() & after.keys()
        if after[attnum].generated and _generation(before[attnum]) != _generation(after[attnum])
    }
    for column in old.columns:
        if column.attnum not in after or column.attnum in remade:
            yield DropColumn(column.name)
    kept = [(before[attnum], after[attnum]) for attnum in sorted(before.keys() & after.keys() - remade)]
    yield from _renames(kept)
    key = tuple({was.name: column.name for was, column in kept}.get(name, "") for name in old.primary_key)
    another_key = key != new.primary_key
    if another_key:  # before a column of it takes NULL
        yield SetKey(key if all(key) else (), ())
    for was, column in kept:
        yield from _changes(was, column)
    for column in new.columns:
        if column.attnum not in before or column.attnum in remade:
            yield AddColumn(column)
    if another_key and new.primary_key:
        yield SetKey((), new.primary_key)


def _generation(column: ColumnShape) -> tuple[str, str | None, str]:
    return column.generated, column.default, column.type


def _renames(kept: Sequence[tuple[ColumnShape, ColumnShape]]) -> Iterator[RenameColumn]:
    """By way of names that nobody has, where one takes another's."""
    renamed = [(was.name, column.name, column.attnum) for was, column in kept if was.name != column.name]
    taken = {name for name, _, _ in renamed}
    for name, new_name, attnum in renamed:
        yield RenameColumn(name, f"cdc_renaming_{attnum}" if new_name in taken else new_name)
    for _, new_name, attnum in renamed:
        if new_name in taken:
            yield RenameColumn(f"cdc_renaming_{attnum}", new_name)


def _changes(old: ColumnShape, new: ColumnShape) -> Iterator[Step]:
    if old.generated and not new.generated:
        yield DropExpression(new.name)
    if (old.type, old.collation) != (new.type, new.collation):
        yield SetType(new)
    if old.not_null != new.not_null:
        yield SetNotNull(new.name, new.not_null)
    if old.default != new.default:
        yield SetDefault(new.name, new.default)


def between(old: TableShape, described: Table, new: TableShape) -> TableShape | None:
    """The shape that a Relation message describes, on the way from `old` to what the catalog says (`new`).

    The message has names and types alone; the rest comes from the two others. What might have come later and could
    refuse a row is left out: NOT NULL is followed where the source says when it came. `None`: not on this way.
    """
    earlier = {(column.name, column.type_oid): column for column in old.columns}
    later = {(column.name, column.type_oid): column for column in new.columns}
    was = {column.attnum: column for column in old.columns}
    columns: dict[int, ColumnShape] = {}
    for each in described.columns:
        identity = (each.name, each.type_oid)
        column = later.get(identity) or earlier.get(identity)
        if column is None or column.attnum in columns:
            return None
        known = was.get(column.attnum)
        not_null = column.not_null and known is not None and known.not_null
        columns[column.attnum] = msgspec.structs.replace(column, not_null=not_null)
    if list(columns) != sorted(columns):
        return None
    for column in new.columns:  # not published
        if column.attnum in was and column.attnum not in columns:
            columns[column.attnum] = was[column.attnum]
    names = [column.name for column in columns.values()]
    if len(set(names)) < len(names):
        return None
    return msgspec.structs.replace(
        new,
        schema=described.schema,
        name=described.name,
        columns=tuple(columns[attnum] for attnum in sorted(columns)),
        primary_key=_described_key(old, described, new, columns),
    )


def _described_key(
    old: TableShape, described: Table, new: TableShape, columns: dict[int, ColumnShape]
) -> tuple[str, ...]:
    """The key on the way: what identifies a row, if that is it; its columns' order is that of the one or the other."""
    kept = tuple(columns[attnum].name for attnum in _key(old) if attnum in columns)
    kept = kept if len(kept) == len(old.primary_key) else ()
    sent = described.primary_key
    if not sent:  # none, or a deferrable one
        return kept if set(kept) == set(new.primary_key) else ()
    in_order = tuple(column.name for column in described.columns if column.name in sent)
    return next((key for key in (kept, new.primary_key) if set(key) == sent), in_order)


def is_part(described: Table, later: TableShape) -> bool:
    """Whether rows of an older shape can be written into a table that has followed since, and are right there.

    What is more may have been dropped, and what is less may be its new name. Columns that came later must have been
    NULL in the rows that there were.
    """
    before, after = {column.name for column in described.columns}, {column.name for column in later.described().columns}
    added = [column for column in later.columns if column.name in after - before]
    if added and before - after:
        return False
    return not any(column.not_null or (column.missing or column.default) is not None for column in added)


def _key(shape: TableShape) -> list[int]:
    attnums = {column.name: column.attnum for column in shape.columns}
    return [attnums[name] for name in shape.primary_key]
