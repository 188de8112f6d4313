"""In what order a copy's keys, indexes and constraints are built, and what at the same time."""

from __future__ import annotations

import pytest

from cdc.change import TableName
from cdc.postgres.bookkeeping import PendingEntry
from cdc.postgres.building import INDEX, build_order

A, B, C = (TableName("public", name) for name in "abc")


def waves(*entries: tuple[str, str, tuple[TableName, ...]], alone: str = "") -> list[str]:
    """The names of what may be under way together, if each wave ends at once. Entries: name, kind, tables."""
    pending = [PendingEntry(number, kind, name, tables, "") for number, (name, kind, tables) in enumerate(entries)]
    order = build_order(pending, lambda entry: entry.name in alone)
    order.prepare()
    found = []
    while order.is_active():
        ready = order.get_ready()
        found.append("".join(sorted(entry.name for entry in ready)))
        order.done(*ready)
    return found


def test_what_is_about_different_tables_does_not_wait() -> None:
    assert waves(("p", "PRIMARY KEY", (A,)), ("q", "PRIMARY KEY", (B,)), ("u", "CONSTRAINT", (A,))) == ["pq", "u"]


def test_indexes_of_one_table_are_built_together_between_what_locks_it() -> None:
    key, foreign_key = ("p", "PRIMARY KEY", (A,)), ("f", "FK CONSTRAINT", (A, B))
    indexes = [(name, INDEX, (A,)) for name in "xyz"]
    assert waves(key, *indexes, foreign_key, ("t", "TRIGGER", (A,)), ("w", INDEX, (A,))) == ["p", "xyz", "f", "t", "w"]


def test_a_foreign_key_waits_for_both_tables_and_what_follows_there_for_it() -> None:
    entries = [("p", "PRIMARY KEY", (A,)), ("x", INDEX, (B,)), ("f", "FK CONSTRAINT", (A, B)), ("a", "ANALYZE", (B,))]
    assert waves(*entries, ("c", "ANALYZE", (C,))) == ["cpx", "f", "a"]


@pytest.mark.parametrize("kind", [INDEX, "RULE"])
def test_what_must_be_alone_divides_what_comes_before_from_what_comes_after(kind: str) -> None:
    entries = [("p", "PRIMARY KEY", (A,)), ("x", INDEX, (B,)), ("!", kind, ()), ("y", INDEX, (B,)), ("z", INDEX, (A,))]
    assert waves(*entries, alone="!") == ["px", "!", "yz"]


def test_nothing_has_an_order_too() -> None:
    assert waves() == []
