"""Rows as JSON objects, and records as COPY takes them: compiled or not the same."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc.feed.event import masked
from cdc.postgres import copy_fields as fields
from cdc.postgres.json_object import JsonObject, JsonObjectInPython, Shown
from cdc.postgres.json_values import encoder
from cdc.postgres.row import UNCHANGED, Value

INT8, BOOL, NUMERIC, TEXT, JSONB, TIME = 20, 16, 1700, 25, 3802, 1184
COLUMNS: list[Shown] = [
    (index, b'"%s":' % name, encoder(oid))
    for index, (name, oid) in enumerate(
        [(b"id", INT8), (b"on", BOOL), (b"n%", NUMERIC), (b"name", TEXT), (b"more", JSONB), (b"at", TIME)]
    )
]
SECRET: Shown = (6, b'"secret":', partial(masked, mask="redact"))

numbers = st.sampled_from([b"0", b"-0", b"10", b"01", b"-", b"", b"1.", b".5", b"1.50", b"-12.030", b"1e5", b"1.5E-7",
                           b"NaN", b"Infinity", b"1_000", b" 1", b"1x"])  # fmt: skip
texts = st.text(max_size=8).map(str.encode) | st.sampled_from([b'"', b"a\\b", b"\x7f", b"\x1f", b"\xff", "é".encode()])
values: st.SearchStrategy[Value] = st.one_of(st.none(), st.just(UNCHANGED), numbers, texts)


@given(st.lists(values, min_size=7, max_size=7).map(tuple), st.booleans())
def test_a_row_is_the_same_object(row: tuple[Value, ...], is_masked: bool) -> None:
    columns = [*COLUMNS, SECRET] if is_masked else COLUMNS
    assert JsonObject(columns).of(row) == JsonObjectInPython(columns).of(row)


def test_a_row_is_an_object() -> None:
    shown = JsonObject([*COLUMNS, SECRET]).of((b"7", b"t", b"1.50", b'say "hi"', None, UNCHANGED, b"x"))
    assert shown == b'{"id":7,"on":true,"n%":1.50,"name":"say \\"hi\\"","more":null,"secret":"***"}'
    assert json.loads(shown)["name"] == 'say "hi"'
    assert JsonObject([]).of(()) == JsonObjectInPython([]).of(()) == b"{}"


@given(st.lists(st.none() | st.text(max_size=9) | st.just("a\0b")))
def test_texts(given_values: list[str | None]) -> None:
    assert fields.texts(given_values) == fields.texts_in_python(given_values)


@given(st.lists(st.none() | st.binary(max_size=9)))
def test_blobs(given_values: list[bytes | None]) -> None:
    assert fields.blobs(given_values) == fields.blobs_in_python(given_values)


@given(st.lists(st.none() | st.integers(-(2**63), 2**63 - 1)))
def test_numbers(given_values: list[int | None]) -> None:
    assert fields.numbers(given_values) == fields.numbers_in_python(given_values)


@pytest.mark.parametrize(
    ("encode", "value"),
    [(fields.numbers, 2**63), (fields.texts, "\ud800"), (fields.blobs, "text"), (fields.texts, b"bytes")],
)
def test_what_is_no_such_value_is_refused(encode: Any, value: object) -> None:
    with pytest.raises((OverflowError, UnicodeEncodeError, TypeError, AttributeError)):
        encode([value])
