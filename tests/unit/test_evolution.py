"""What becomes of a mirror's table when its source's has another shape: steps, or a copy, or nothing at all."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from cdc.change import Column, Table
from cdc.postgres.evolution import (
    AddColumn,
    DropColumn,
    DropExpression,
    RenameColumn,
    SetDefault,
    SetKey,
    SetNotNull,
    SetType,
    between,
    evolve,
    is_part,
)
from cdc.postgres.shape import REWRITE_OF_TYPES, ColumnShape, TableShape

INT, TEXT, VARCHAR = ("integer", 23), ("text", 25), ("character varying(20)", 1043)
OTHER_REWRITE = 2
"""AT_REWRITE_DEFAULT_VAL: a default had to be computed for each row."""


def column(attnum: int, name: str, kind: tuple[str, int] = INT, **other: Any) -> ColumnShape:
    return ColumnShape(attnum, name, *kind, **other)


ID = column(1, "id", not_null=True)
N, NAME = column(2, "n"), column(3, "name", TEXT)
TWICE = column(4, "twice", generated="s", default="(n * 2)")
C = column(5, "c")


def shape(*columns: ColumnShape, **other: Any) -> TableShape:
    return replace(TableShape(16384, "public", "items", 1, columns, ("id",)), **other)


ITEMS = shape(ID, N, NAME)
SWAPPED = shape(ID, replace(N, name="name"), replace(NAME, name="n"))
WITH_7 = replace(C, default="7", missing="7")
PRICE = replace(TWICE, default="(n * 3)")


@pytest.mark.parametrize(
    ("old", "new", "steps"),
    [
        (ITEMS, ITEMS, []),
        (ITEMS, replace(ITEMS, filenode=2), []),  # TRUNCATE, VACUUM FULL
        (ITEMS, shape(ID, N), [DropColumn("name")]),
        (ITEMS, shape(ID, replace(N, name="m"), NAME), [RenameColumn("n", "m")]),
        (ITEMS, SWAPPED, [
            RenameColumn("n", "cdc_renaming_2"), RenameColumn("name", "cdc_renaming_3"),
            RenameColumn("cdc_renaming_2", "name"), RenameColumn("cdc_renaming_3", "n"),
        ]),
        (ITEMS, shape(ID, replace(NAME, name="n")), [DropColumn("n"), RenameColumn("name", "n")]),
        (ITEMS, shape(ID, N, column(3, "name", VARCHAR)), [SetType(column(3, "name", VARCHAR))]),
        (ITEMS, shape(ID, N, replace(NAME, collation='pg_catalog."C"')),
         [SetType(replace(NAME, collation='pg_catalog."C"'))]),
        (ITEMS, shape(ID, N, NAME, C), [AddColumn(C)]),
        (ITEMS, shape(ID, N, NAME, WITH_7), [AddColumn(WITH_7)]),
        (ITEMS, shape(ID, replace(N, not_null=True), NAME), [SetNotNull("n", True)]),
        (ITEMS, shape(ID, replace(N, default="0"), NAME), [SetDefault("n", "0")]),
        (ITEMS, shape(ID, N, NAME, TWICE), [AddColumn(TWICE)]),
        (shape(ID, N, TWICE), shape(ID, N, PRICE), [DropColumn("twice"), AddColumn(PRICE)]),
        (shape(ID, N, TWICE), shape(ID, N, replace(TWICE, generated="", default=None)), [DropExpression("twice"),
                                                                                          SetDefault("twice", None)]),
        (ITEMS, replace(ITEMS, primary_key=("id", "n")), [SetKey(("id",), ()), SetKey((), ("id", "n"))]),
        (ITEMS, replace(ITEMS, primary_key=()), [SetKey(("id",), ())]),
        (ITEMS, shape(replace(ID, name="key"), N, NAME, primary_key=("key",)), [RenameColumn("id", "key")]),
        (ITEMS, shape(N, NAME, primary_key=("n",)), [DropColumn("id"), SetKey((), ()), SetKey((), ("n",))]),
    ],
)  # fmt: skip
def test_f29_what_is_altered(old: TableShape, new: TableShape, steps: list[Any]) -> None:
    assert evolve(old, new) == (steps, "")


DROPPED_AND_ADDED = shape(ID, NAME, replace(N, attnum=5))
WIDER = shape(ID, column(2, "n", ("bigint", 20)), NAME)


@pytest.mark.parametrize(
    ("new", "because"),
    [
        (replace(ITEMS, oid=16385), "dropped and created again"),
        (replace(WIDER, filenode=2), "column n became bigint"),
        (replace(WIDER, rewrite=REWRITE_OF_TYPES), "rows were rewritten"),
        (replace(ITEMS, rewrite=REWRITE_OF_TYPES), "rows were rewritten"),  # USING, of the same type
        (shape(ID, N, NAME, C, filenode=2), "column c was added, and the rows"),  # DEFAULT random()
        (shape(ID, N, NAME, C, rewrite=OTHER_REWRITE), "column c was added, and the rows"),
        (DROPPED_AND_ADDED, "column n was dropped and added again"),
    ],
)
def test_f31_f32_why_a_table_is_copied_again(new: TableShape, because: str) -> None:
    steps, why = evolve(ITEMS, new)
    assert because in why
    assert not steps


@pytest.mark.parametrize(
    "new",
    [
        replace(DROPPED_AND_ADDED, rewrite=0),  # a trigger tells of each step: what was there before is known
        replace(DROPPED_AND_ADDED, columns=(ID, NAME, column(5, "n", TEXT))),
        replace(WIDER, rewrite=0, filenode=2),
        shape(ID, N, NAME, WITH_7, filenode=2),
        shape(ID, N, NAME, TWICE, filenode=2),
    ],
)
def test_f31_what_is_not_copied_again(new: TableShape) -> None:
    assert evolve(ITEMS, new).copy_because == ""


def test_f27_a_generated_column_that_is_made_again_is_computed_again() -> None:
    again = replace(TWICE, attnum=5)
    assert evolve(shape(ID, N, TWICE), shape(ID, N, again)) == ([DropColumn("twice"), AddColumn(again)], "")


def message(*columns: tuple[str, int], name: str = "items") -> Table:
    return Table("public", name, tuple(Column(each, oid, each == "id") for each, oid in columns))


LATER = shape(ID, replace(N, name="m"), replace(C, not_null=True, default="7"))
IDS, NS, MS, NAMES, CS = ("id", 23), ("n", 23), ("m", 23), ("name", 25), ("c", 23)


@pytest.mark.parametrize(
    ("described", "columns"),
    [
        (message(IDS, NS, NAMES), (ID, N, NAME)),
        (message(IDS, MS, NAMES), (ID, replace(N, name="m"), NAME)),
        (message(IDS, MS), (ID, replace(N, name="m"))),
        (message(IDS, NS, NAMES, CS), (ID, N, NAME, replace(C, default="7"))),  # takes NULL until the end is reached
        (message(IDS, MS, CS), (ID, replace(N, name="m"), replace(C, default="7"))),
        (message(IDS, ("other", 23)), None),  # a name that came and went
        (message(IDS, ("n", 25), NAMES), None),  # a type that came and went
        (message(IDS, NS, MS), None),  # one column by two names
        (message(IDS, CS, MS), None),  # never in this order
    ],
)
def test_f29_f30_a_description_on_the_way_to_the_catalog(
    described: Table, columns: tuple[ColumnShape, ...] | None
) -> None:
    found = between(ITEMS, described, LATER)
    assert (found and found.columns) == columns


def test_f29_what_a_description_leaves_open_is_as_in_the_catalog() -> None:
    longer = column(3, "name", ("character varying(40)", 1043))
    found = between(shape(ID, column(3, "name", VARCHAR)), message(IDS, ("name", 1043)), shape(ID, longer))
    assert found is not None
    assert found.columns == (ID, longer)


@pytest.mark.parametrize("key", [("id",), ("id", "n")])
def test_f33_a_description_without_all_of_the_key_is_of_a_table_without_one(key: tuple[str, ...]) -> None:
    found = between(replace(ITEMS, primary_key=key), message(NS, NAMES), shape(N, NAME, primary_key=()))
    assert found is not None
    assert found.primary_key == ()


def test_a_column_that_is_not_published_stays() -> None:
    found = between(shape(ID, N, TWICE), message(IDS, MS), shape(ID, replace(N, name="m"), TWICE))
    assert found is not None
    assert [each.name for each in found.columns] == ["id", "m", "twice"]
    renamed = shape(ID, N, replace(TWICE, name="double"), replace(C, name="twice"))
    assert between(shape(ID, N, TWICE), message(IDS, NS, ("twice", 23)), renamed) is None, "when it was is not known"


@pytest.mark.parametrize(
    ("later", "right"),
    [
        (ITEMS, True),
        (shape(ID, N), True),
        (shape(ID, N, NAME, C), True),
        (shape(ID, N, NAME, WITH_7), False),  # older rows have 7
        (shape(ID, N, NAME, replace(C, not_null=True)), False),
        (shape(ID, N, C), False),  # `name` may be its old name
        (shape(ID, N, NAME, TWICE), True),
    ],
)
def test_f33_rows_of_an_older_shape(later: TableShape, right: bool) -> None:
    assert is_part(message(IDS, NS, NAMES), later) is right
