"""Which collections are captured, which stream holds them all, and which token still fits."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc.change import TableName
from cdc.config import TableGlobs
from cdc.mongodb.scope import Scope, covers, scope_of
from tests.mongo_source import configure

globs = st.text("ab.*?", min_size=1, max_size=6) | st.sampled_from(
    ["*", "a.*", "*.b", "[ab].*", "a[.]b", "[!a]b*", "a?b"]
)
names = st.builds(TableName, st.text("ab", min_size=1, max_size=3), st.text("ab.", min_size=1, max_size=4))


def passes(pipeline: list[dict[str, Any]], target: TableName, event: dict[str, Any]) -> bool:
    """What the server would let through."""
    if (target.schema and event["ns.db"] != target.schema) or (target.name and event.get("ns.coll") != target.name):
        return bool(event["operationType"] == "rename")  # a server shows those by their other end too
    return all(holds(stage["$match"], event) for stage in pipeline)


def holds(condition: dict[str, Any], event: dict[str, Any]) -> bool:
    return all(holds_one(name, wanted, event) for name, wanted in condition.items())


def holds_one(name: str, wanted: Any, event: dict[str, Any]) -> bool:
    if name == "$and":
        return all(holds(inner, event) for inner in wanted)
    if name in {"$or", "$nor"}:
        return any(holds(inner, event) for inner in wanted) == (name == "$or")
    value = event.get(name)
    if isinstance(wanted, str):
        return value == wanted
    if "$in" in wanted:
        return value in wanted["$in"]
    return value is not None and re.search(wanted["$regex"], value, re.DOTALL) is not None


@given(st.lists(globs, min_size=1, max_size=3), st.lists(globs, max_size=2), names)
def test_server_lets_through_what_is_captured(include: list[str], exclude: list[str], name: TableName) -> None:
    scope = Scope(TableGlobs(include=tuple(include), exclude=tuple(exclude)))
    event = {"operationType": "insert", "ns.db": name.schema, "ns.coll": name.name}
    assert passes(scope.pipeline(), scope.target, event) == scope.match(name)
    if scope.match(name):
        assert scope.match_database(name.schema)
        target = scope.target
        assert target.schema in {"", name.schema}
        assert target.name in {"", name.name}


@given(st.lists(globs, min_size=1, max_size=3), st.lists(globs, max_size=2), names, names)
def test_f66_server_lets_renames_through(
    include: list[str], exclude: list[str], start: TableName, end: TableName
) -> None:
    scope = Scope(TableGlobs(include=tuple(include), exclude=tuple(exclude)))
    if scope.match(start) or scope.match(end):
        event = {"operationType": "rename", "ns.db": start.schema, "ns.coll": start.name,
                 "to.db": end.schema, "to.coll": end.name}  # fmt: skip
        assert passes(scope.pipeline(), scope.target, event)


@pytest.mark.parametrize(
    ("include", "target"),
    [
        (("shop.orders",), ("shop", "orders")),
        (("shop.orders", "shop.orders"), ("shop", "orders")),
        (("shop.a", "shop.b"), ("shop", "")),
        (("shop.*",), ("shop", "")),
        (("shop.a", "other.a"), ("", "")),
        (("*",), ("", "")),
        (("sho?.a",), ("", "")),
        (("shop*",), ("", "")),
    ],
)
def test_stream_is_as_narrow_as_can_be(include: tuple[str, ...], target: tuple[str, str]) -> None:
    assert Scope(TableGlobs(include=include)).target == TableName(*target)


def test_what_is_never_captured() -> None:
    scope = Scope(TableGlobs(include=("*",)))
    for name in ("admin.x", "config.x", "local.x", "shop.system.views", "shop.cdc_positions"):
        assert not scope.match(TableName(*name.split(".", 1)))


@pytest.mark.parametrize(
    ("url", "rename", "left_out"),
    [
        ("mongodb://h/shop_backup", {}, {"shop_backup"}),
        ("mongodb://h,h2/other", {}, {"other"}),
        ("mongodb://elsewhere/shop_backup", {}, set()),
        ("mongodb://h/", {"shop": "x", "shop.a": "y.b"}, {"x", "y.b"}),
    ],
)
def test_f117_what_the_sinks_write_is_left_out(url: str, rename: dict[str, str], left_out: set[str]) -> None:
    sinks = {"mirror": {"from": "shop", "url": url, "rename": rename}}
    config = configure("mongodb://h/shop", "*", sinks=sinks)
    scope = scope_of(config, config.sources["shop"])
    assert scope.foreign == left_out
    assert scope.match(TableName("x", "orders")) == ("x" not in left_out)
    assert scope.match(TableName("y", "b")) == ("y.b" not in left_out)
    assert scope.match(TableName("y", "c"))


@given(st.lists(globs, min_size=1, max_size=2), st.lists(globs, min_size=1, max_size=2), names)
def test_f61_covering_is_never_claimed_wrongly(wide: list[str], narrow: list[str], name: TableName) -> None:
    if covers(TableGlobs(include=tuple(wide)), TableGlobs(include=tuple(narrow))) and any(
        fnmatchcase(str(name), glob) for glob in narrow
    ):
        assert any(fnmatchcase(str(name), glob) for glob in wide)


def test_f61_wider_and_narrower() -> None:
    def of(*include: str, exclude: tuple[str, ...] = ()) -> TableGlobs:
        return TableGlobs(include=include, exclude=exclude)

    assert covers(of("shop.*"), of("shop.orders"))
    assert covers(of("*"), of("shop.*", "x.?"))
    assert covers(of("shop.*"), of("shop.*", exclude=("shop.tmp",)))
    assert not covers(of("shop.orders"), of("shop.*"))
    assert not covers(of("shop.*", exclude=("shop.tmp",)), of("shop.*"))
    assert not covers(of("shop.?"), of("shop.*"))
