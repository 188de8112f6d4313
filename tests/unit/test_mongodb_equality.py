"""Two `_id`s have one key if and only if they are one document for the server."""

from __future__ import annotations

import math
from contextlib import suppress
from datetime import datetime
from decimal import Decimal
from fractions import Fraction
from typing import Any

import bson
import pytest
from bson import Binary, Code, DBRef, Decimal128, Int64, MaxKey, MinKey, ObjectId, Regex, Timestamp
from hypothesis import given
from hypothesis import strategies as st

from cdc.errors import DecodeError
from cdc.mongodb import walk
from cdc.mongodb.equality import id_only, key_of, same_bytes

ONE = [1, 1.0, Int64(1), Decimal128("1"), Decimal128("1.000"), Decimal128("10E-1")]
GROUPS: list[list[Any]] = [
    ONE,
    [True],
    [False],
    [0, 0.0, -0.0, Int64(0), Decimal128("0"), Decimal128("-0"), Decimal128("0E+3")],
    [math.nan, -math.nan, Decimal128("NaN"), Decimal128("-NaN"), Decimal128("sNaN")],
    [math.inf, Decimal128("Infinity")],
    [-math.inf, Decimal128("-Infinity")],
    [0.5, Decimal128("0.5"), Decimal128("0.50")],
    [0.1],
    [Decimal128("0.1")],
    [Decimal128(Decimal("0.1000000000000000055511151231257827"))],
    [2**53, float(2**53), Int64(2**53)],
    [2**53 + 1],
    [Int64(-(2**63)), -(2.0**63)],
    [Int64(2**63 - 1)],
    [2.0**63],
    [Decimal128("1E+6144")],
    [None],
    [MinKey()],
    [MaxKey()],
    ["1"],
    [""],
    ["a\0"],
    ["a"],
    ["A"],
    ["é"],
    ["e\u0301"],
    [Binary(b"a")],
    [Binary(b"a", 0x80)],
    [Binary(b"")],
    [Code("a")],
    [ObjectId("0" * 24)],
    [ObjectId("1" * 24)],
    [Timestamp(0, 1)],
    [datetime(1970, 1, 1, 0, 0, 0, 1000)],  # noqa: DTZ001 - BSON's dates have no zone
    [{}],
    [{"a": 1, "b": 2}, {"a": 1.0, "b": Decimal128("2.0")}],
    [{"b": 2, "a": 1}],
    [{"a": True, "b": 2}],
    [{"a": [1, "x"]}, {"a": [1.0, "x"]}],
    [{"a": {"0": 1, "1": "x"}}],
    [{"a": ["x", 1]}],
    [{"a": math.nan}, {"a": Decimal128("NaN")}],
    [{"$ref": "c", "$id": 1}, DBRef("c", 1)],
    [{"": 0}, {"": -0.0}],
    [Regex("a")],
]
VALUES = [(number, value) for number, group in enumerate(GROUPS) for value in group]


def key(value: Any) -> Any:
    return key_of(bson.encode({"_id": value}))


@pytest.mark.parametrize(("number", "value"), VALUES, ids=repr)
def test_f74_ids_are_one_document_as_the_server_says(number: int, value: Any) -> None:
    for other_number, other in VALUES:
        equal = key(value) == key(other)
        assert equal == (number == other_number), (value, other)
        if equal:
            assert hash(key(value)) == hash(key(other))


scalars = st.one_of(
    st.integers(-3, 3),
    st.integers(-(2**63), 2**63 - 1).map(Int64),
    st.sampled_from([0.0, -0.0, 1.0, 0.1, 0.5, math.nan, math.inf, 2.0**53, 2.0**63, 1e308, 5e-324]),
    st.floats(width=64),
    st.sampled_from(["0", "1", "1.0", "0.1", "0.5", "NaN", "Infinity", "9007199254740993", "1E-6176"]).map(Decimal128),
    st.booleans(),
    st.none(),
    st.sampled_from(["", "a", "1"]),
    st.binary(max_size=2),
)
values = st.recursive(
    scalars, lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.sampled_from("ab"), inner))
)


def same(one: Any, other: Any) -> bool:
    """The obvious model: by value for numbers, by type and value for all else, item by item."""
    numbers = [number(value) for value in (one, other)]
    if None not in numbers:
        return numbers[0] == numbers[1]
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(same(a, b) for a, b in zip(one.values(), other.values(), strict=True))
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return type(one) is type(other) and bool(one == other)


def number(value: Any) -> Fraction | str | None:
    if isinstance(value, Decimal128):
        value = value.to_decimal()
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        return None
    if value != value:
        return "NaN"
    return str(float(value)) if value in {math.inf, -math.inf} else Fraction(value)


@given(values, values)
def test_f74_keys_agree_with_a_slow_model(one: Any, other: Any) -> None:
    assert (key(one) == key(other)) == same(one, other)
    assert key(one) == key(one)


def test_f74_symbols_and_strings_are_one_type() -> None:
    text = bson.encode({"_id": "a"})
    symbol = text[:4] + b"\x0e" + text[5:]
    assert key_of(text) == key_of(symbol)
    assert key_of(text) != key_of(text[:4] + b"\x0d" + text[5:])


def test_f74_the_key_is_that_of_the_id_alone() -> None:
    for value in (ObjectId(), "a", 5, 5.0, {"a": 1}, None):
        with_shard_key = bson.encode({"region": "eu", "_id": value, "zip": 5})
        assert key_of(with_shard_key) == key(value)
        assert id_only(with_shard_key) == bson.encode({"_id": value})
    alone = bson.encode({"_id": 1})
    assert id_only(alone) is alone


def test_f73_the_bytes_of_an_id_are_told_from_its_value() -> None:
    assert same_bytes(bson.encode({"_id": 1}), bson.encode({"_id": 1, "a": 1}))
    assert not same_bytes(bson.encode({"_id": 1}), bson.encode({"_id": 1.0, "a": 1}))


@given(st.one_of(st.binary(max_size=40), values.map(lambda value: bson.encode({"_id": value})[:-2])))
def test_malformed_keys_are_a_typed_error(data: bytes) -> None:
    with suppress(DecodeError):
        key_of(data)
        id_only(data)


@pytest.mark.parametrize("document", [b"", walk.EMPTY, bson.encode({"id": 1})])
def test_a_key_without_id_is_refused(document: bytes) -> None:
    with pytest.raises(DecodeError):
        key_of(document)
