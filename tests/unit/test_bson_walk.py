"""Walking over BSON: the same as a full decoder says, and `DecodeError` for everything else."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import bson
import pytest
from bson import Binary, Code, DBRef, Decimal128, Int64, MaxKey, MinKey, ObjectId, Regex, Timestamp
from bson.raw_bson import RawBSONDocument
from hypothesis import given
from hypothesis import strategies as st

from cdc.errors import DecodeError
from cdc.mongodb import walk

VALUES: list[Any] = [
    1.5, "text é", {"a": {"b": 1}}, [1, "x", None], Binary(b"\x00\x01", 5), ObjectId(), True, None,
    dt.datetime(2024, 2, 29, 12, tzinfo=dt.UTC), Regex("^a.b$", "im"), Code("f()"), Code("f(x)", {"x": 1}), 7,
    Int64(2**40),
    Timestamp(1_700_000_000, 3), Decimal128("-1.50"), MinKey(), MaxKey(), DBRef("c", 1), "", {}, [],
]  # fmt: skip
OLD_TYPES = [(0x06, b""), (0x0C, b"\x02\x00\x00\x00a\x00" + bytes(12)), (0x0E, b"\x02\x00\x00\x00a\x00")]
"""undefined, DBPointer and symbol: no driver writes them, old documents hold them."""

EVERYTHING = bson.encode({f"field {number}": value for number, value in enumerate(VALUES)})

documents = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats()
    | st.text(st.characters(codec="utf-8"))
    | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(codec="utf-8", exclude_characters="\0")), inner)
    ),
    max_leaves=8,
).map(lambda value: bson.encode({"a": value, "b": 1, "c": value}))


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_every_type_is_stepped_over(value: Any) -> None:
    data = bson.encode({"first": value, "last": 42})
    assert list(walk.fields(data)) == [b"first", b"last"]
    kind, start, end = walk.fields(data)[b"first"]
    assert walk.document(walk.element(kind, b"first", data[start:end])) == bson.encode({"first": value})
    found = walk.find(data, b"last")
    assert found is not None
    assert walk.int32_at(data, found.start) == 42


@pytest.mark.parametrize(("kind", "value"), OLD_TYPES)
def test_old_types_are_stepped_over(kind: int, value: bytes) -> None:
    data = walk.document(walk.element(kind, b"old", value), walk.element(walk.INT32, b"last", walk.int32(1)))
    assert [element.name for element in walk.elements(data)] == [b"old", b"last"]


@given(documents)
def test_elements_make_up_the_document(data: bytes) -> None:
    assert walk.joined(data[element.at : element.end] for element in walk.elements(data)) == data
    assert walk.fields(data) == {e.name: (e.kind, e.start, e.end) for e in walk.elements(data)}


@given(documents.flatmap(lambda data: st.tuples(st.just(data), st.integers(0, len(data) - 1))))
def test_truncated_documents_are_refused(cut: tuple[bytes, int]) -> None:
    data, length = cut
    for read in (walk.fields, lambda data: list(walk.elements(data)), walk.array_items, walk.array_items_in_python):
        with pytest.raises(DecodeError):
            read(data[:length])


@given(st.binary(max_size=60) | st.tuples(documents, st.integers(0, 200), st.integers(0, 255)).map(
    lambda parts: parts[0][: parts[1]] + bytes([parts[2]]) + parts[0][parts[1] + 1 :]
))  # fmt: skip
def test_nothing_but_decode_errors(data: bytes) -> None:
    for read in (walk.fields, lambda data: list(walk.elements(data)), walk.array_items, lambda d: walk.find(d, b"a")):
        with suppress(DecodeError):
            read(data)
    for compiled in (walk.array_items, lambda data: list(walk.items(data, 0))):
        assert items_or_none(compiled, data) == items_or_none(walk.array_items_in_python, data)


def items_or_none(read: Callable[[bytes], list[bytes]], data: bytes) -> list[bytes] | None:
    with suppress(DecodeError):
        return read(data)
    return None


def test_array_items_are_the_documents_themselves() -> None:
    inner = [bson.encode({"n": number, "x": "y" * number}) for number in range(12)]
    data = bson.encode({"batch": [RawBSONDocument(document) for document in inner]})
    for read in (walk.array_items, walk.array_items_in_python, walk.items):
        found = read(data, walk.fields(data)[b"batch"][1])
        assert (len(found), list(found), found[11]) == (12, inner, inner[11])
        with pytest.raises(IndexError):
            found[12]
        with pytest.raises(DecodeError, match="no document"):
            read(bson.encode({"0": 1}), 0)


def test_values() -> None:
    data = bson.encode({"s": "é\0x", "l": Int64(-5), "t": Timestamp(7, 9), "i": -3, "d": {"x": 1}, "n": None})
    found = walk.fields(data)
    assert walk.string_at(data, *found[b"s"][1:]) == "é\0x"
    assert walk.int64_at(data, found[b"l"][1]) == -5
    assert walk.timestamp_at(data, found[b"t"][1]) == (7, 9)
    assert walk.int32_at(data, found[b"i"][1]) == -3
    assert walk.get_document(data, b"d") == bson.encode({"x": 1})
    assert walk.get_document(data, b"n") is None
    assert walk.get_document(data, b"missing") is None
    with pytest.raises(DecodeError, match="i is not a document"):
        walk.get_document(data, b"i")
    for read in (walk.int32_at, walk.int64_at, walk.timestamp_at):
        with pytest.raises(DecodeError):
            read(data, len(data) - 1)


def test_built_documents() -> None:
    built = walk.document(
        walk.element(walk.STRING, b"s", walk.string("x")),
        walk.element(walk.INT64, b"l", walk.int64(1)),
        walk.element(walk.DOCUMENT, b"d", walk.EMPTY),
    )
    assert built == bson.encode({"s": "x", "l": Int64(1), "d": {}})
    with pytest.raises(DecodeError):
        walk.element(walk.NULL, b"a\0b", b"")
