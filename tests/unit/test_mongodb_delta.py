"""An update event's description becomes statements that have just its effect."""

from __future__ import annotations

import copy
import datetime as dt
from contextlib import suppress
from typing import Any

import bson
import pytest
from bson import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from cdc.errors import DecodeError
from cdc.mongodb.delta import (
    DeltaError,
    deletion,
    is_insertable,
    is_insertable_in_python,
    replacement,
    replacements,
    replacements_in_python,
    statements,
)
from tests.mongo_model import Document, describe, execute

KEY = bson.encode({"_id": 1})
NAMES = ["a", "b", "c", "0", "9", "10", "x.y", "$d", "", "a$"]

scalars = st.one_of(st.integers(0, 3), st.none(), st.sampled_from(["", "$$ROOT", "$a"]))


def documents(names: list[str]) -> Any:
    values = st.recursive(
        scalars,
        lambda inner: st.one_of(
            st.lists(inner, max_size=4), st.dictionaries(st.sampled_from(names), inner, max_size=3)
        ),
        max_leaves=8,
    )
    return st.dictionaries(st.sampled_from(names), values, max_size=4)


def changed(value: Any, names: list[str], data: st.DataObject) -> Any:
    """A document or array after changes as users make them: new fields come at the end."""
    value = copy.deepcopy(value)
    steps = data.draw(st.integers(1, 4))
    for _ in range(steps):
        if isinstance(value, dict):
            name = data.draw(st.sampled_from(names))
            kind = data.draw(st.sampled_from(["set", "remove", "inside"]))
            if kind == "remove":
                value.pop(name, None)
            elif kind == "inside" and isinstance(value.get(name), dict | list):
                value[name] = changed(value[name], names, data)
            else:
                value[name] = data.draw(documents(names) | scalars | st.lists(scalars, max_size=3))
        elif isinstance(value, list):
            kind = data.draw(st.sampled_from(["cut", "append", "inside"]))
            if kind == "cut":
                del value[data.draw(st.integers(0, len(value))) :]
            elif kind == "append" or not value:
                value += data.draw(st.lists(scalars, min_size=1, max_size=3))
            else:
                at = data.draw(st.integers(0, len(value) - 1))
                inside = value[at]
                value[at] = changed(inside, names, data) if isinstance(inside, dict | list) else data.draw(scalars)
    return value


def apply(parts: list[bytes], document: Document) -> Document:
    for part in parts:
        found = execute(part, document)
        assert found is not None, "matches nothing"
        document = found
    return document


@given(documents(NAMES), st.data())
def test_f70_f71_f72_statements_do_what_the_event_says(fields: Document, data: st.DataObject) -> None:
    before = {"_id": 1, **fields}
    after = {"_id": 1, **changed(fields, NAMES, data)}
    try:
        parts = statements(KEY, describe(before, after, certain=True))
    except DeltaError:
        return  # an array below an odd name is cut
    assert bson.encode(apply(parts, before)) == bson.encode(after)


@given(documents(["a", "b", "c", "0", "9", "10"]), st.data())
def test_f71_f72_without_disambiguated_paths(fields: Document, data: st.DataObject) -> None:
    before = {"_id": 1, **fields}
    after = {"_id": 1, **changed(fields, ["a", "b", "c", "0", "9", "10"], data)}
    parts = statements(KEY, describe(before, after, certain=False))
    assert bson.encode(apply(parts, before)) == bson.encode(after)


def test_f72_a_name_with_dots_is_not_taken_for_a_path() -> None:
    before = {"_id": 1, "x.y": 1}
    (part,) = statements(KEY, describe(before, {"_id": 1, "x.y": 2}, certain=False))
    assert execute(part, before) is None, "there is no x that could hold y"
    (part,) = statements(KEY, describe(before, {"_id": 1, "x.y": 2}, certain=True))
    assert execute(part, before) == {"_id": 1, "x.y": 2}


def test_f71_an_array_that_is_none_is_not_made_one() -> None:
    (part,) = statements(KEY, describe({"_id": 1, "a": [1, 2]}, {"_id": 1, "a": []}, certain=True))
    assert execute(part, {"_id": 1, "a": {}}) is None
    assert execute(part, {"_id": 1}) is None


def test_f70_the_common_update_is_one_statement() -> None:
    description = bson.encode({"updatedFields": {"a": 1, "b.c": 2}, "removedFields": [], "disambiguatedPaths": {}})
    (part,) = statements(KEY, description)
    assert bson.decode(part) == {"q": {"_id": 1}, "u": {"$set": {"a": 1, "b.c": 2}}}


def test_f80_a_description_that_says_more_is_not_guessed_at() -> None:
    empty: list[str] = []
    for fields in ({}, {"a": 1}):
        for names in ((), ("removedFields",), ("removedFields", "truncatedArrays")):
            more = dict.fromkeys(names, empty)
            with pytest.raises(DeltaError):
                statements(KEY, bson.encode({"updatedFields": fields, **more, "reversedArrays": ["a"]}))


def test_f70_what_is_common_is_said_as_it_came() -> None:
    for fields in ({"b": 1}, {"a": 1, "b": {"$x": 1}}, {"b": 1, "a": 1}, {"1": 2}, {"a.b": 1}, {"": 1}, {"$a": 1}):
        before = {"_id": 1, "a": {}} if "a.b" in fields else {"_id": 1}
        after = {**before, **fields} if "a.b" not in fields else {"_id": 1, "a": {"b": 1}}
        parts = statements(KEY, describe(before, after, certain=True))
        assert bson.encode(apply(parts, before)) == bson.encode(after)
        assert (parts == [bson.encode({"q": {"_id": 1}, "u": {"$set": fields}})]) == (
            not fields.keys() & {"", "$a"} and list(fields) == sorted(fields)
        )


@given(st.binary(max_size=30), st.integers(0, 200), st.integers(0, 255))
def test_malformed_descriptions_are_a_typed_error(noise: bytes, at: int, byte: int) -> None:
    good = describe({"a": [1, 2], "b": 1, "x.y": {}}, {"a": [1], "c": {"d": 1}, "x.y": {"z": 1}}, certain=True)
    bad = good[: at % len(good)] + bytes([byte]) + good[at % len(good) + 1 :]
    for data in (noise, bad, good[: at % len(good)]):
        with suppress(DecodeError, DeltaError):
            statements(KEY, data)


PLAIN = {"_id": 1, "a": "$5", "zero": 0, "t": Timestamp(1, 0), "d": {"$x": 1, "t": Timestamp(0, 0)}}


def test_f73_a_replacement_is_the_document_itself() -> None:
    image = bson.encode({**PLAIN, "zeros": [bson.Int64(0), 0.0], "text": "\n$no\0"})
    (part,) = replacement(KEY, image)
    assert part == bson.encode({"q": {"_id": 1}, "u": bson.decode(image), "upsert": True})
    assert is_insertable(image)


@pytest.mark.parametrize("odd", [{"$d": 1}, {"t": Timestamp(0, 0)}], ids=str)
def test_f72_f73_what_a_replacement_cannot_be_is_a_pipeline(odd: Document) -> None:
    """F72, F73: names with dollars, and timestamps that the server would fill in."""
    image = bson.encode({**PLAIN, **odd})
    parts = replacement(KEY, image)
    wanted = {"q": {"_id": 1}, "u": [{"$replaceWith": {"$literal": bson.decode(image)}}], "upsert": True}
    assert [bson.decode(part) for part in parts] == [wanted, wanted]
    assert is_insertable(image) == ("$d" in odd)


def test_a_deletion() -> None:
    assert deletion(KEY) == bson.encode({"q": {"_id": 1}, "limit": 1})


ANY = {
    "_id": Timestamp(0, 0), "": 1.5, "s": "$x", "d": {"a": Timestamp(0, 0)}, "l": [Timestamp(0, 0)], "b": b"\0" * 9,
    "n": None, "o": bson.ObjectId(), "t": True, "r": bson.Regex("a", "i"), "c": bson.Code("x"),
    "w": dt.datetime(2024, 5, 1, tzinfo=dt.UTC),
    "i": 1, "z": Timestamp(1, 0), "long": bson.Int64(0), "dec": bson.Decimal128("1"), "min": bson.MinKey(),
    "scoped": bson.Code("x", {"a": 1}), "x": bson.Binary(b"\x11a\0" + b"\0" * 8, 4),
}  # fmt: skip


@given(
    st.lists(st.sampled_from(sorted(ANY)), max_size=6, unique=True),
    st.sampled_from([{}, {}, {"$a": 1}, {"zero": Timestamp(0, 0)}]),
    st.integers(0, 300),
    st.binary(max_size=2),
)
def test_f72_f73_compiled_or_not_documents_are_written_alike(
    names: list[str], odd: Document, at: int, noise: bytes
) -> None:
    """The same functions twice where nothing was compiled. Damaged documents are damaged for both."""
    good = bson.encode({**{name: ANY[name] for name in names}, **odd})
    for image in (good, good[:at] + noise + good[at + len(noise) :], good[:at]):
        for own in (KEY, bson.encode({"_id": bson.Int64(1)}), bson.encode({"_id": "a", "shard": 1}), image):
            documents = [(own, good), (own, image)]
            assert tried(replacements, documents) == tried(replacements_in_python, documents)
        assert tried(is_insertable, image) == tried(is_insertable_in_python, image)


def tried(function: Any, argument: Any) -> Any:
    try:
        return function(argument)
    except DecodeError as exc:
        return str(exc)
