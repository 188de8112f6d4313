"""Rows are taken apart exactly, whatever they hold, or refused."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from struct import pack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc.errors import DecodeError
from cdc.postgres.row import (
    UNCHANGED,
    Row,
    Value,
    decode_key,
    decode_row,
    decode_row_at,
    decode_row_in_python,
    encode_row,
    first_value,
    merge,
)

values: st.SearchStrategy[Value] = st.one_of(
    st.none(),
    st.just(UNCHANGED),
    st.binary(max_size=6),
    st.sampled_from([b"t\0\0\0", b"\0\0\0\1", b"t" * 300, b"n" * 255, b"u" * 256, b"x" * 70_000, b"t\0\0\0\1t"]),
)
rows: st.SearchStrategy[Row] = st.lists(values, max_size=9).map(tuple)
images = rows.map(encode_row)


@given(rows)
def test_a_row_is_read_as_it_was_written(row: Row) -> None:
    image = encode_row(row)
    assert decode_row(image) == row
    assert decode_row_at(b"before" + image + b"behind", 6) == (row, 6 + len(image))


@given(rows.filter(bool), st.integers(1, 10))
def test_the_first_columns_are_read_alone(row: Row, limit: int) -> None:
    image = encode_row(row)
    assert decode_row_at(image, 0, limit)[0] == row[:limit]
    assert first_value(image) == row[0]


def strictly(image: bytes) -> Row | None:
    """The plain way to read a row, for comparison."""
    row, end = decode_row_at(image, 0)
    return row if end == len(image) else None


@given(st.one_of(st.binary(max_size=40), images), st.data())
def test_damaged_rows_are_refused_or_read_the_plain_way(image: bytes, draw: st.DataObject) -> None:
    damaged = bytearray(image[:2000])
    for _ in range(draw.draw(st.integers(0, 3))):
        if damaged:
            byte = draw.draw(st.sampled_from(list(b"tnu\0\1\2\7x")))
            damaged[draw.draw(st.integers(0, len(damaged) - 1))] = byte
    expected: Row | None = None
    with contextlib.suppress(DecodeError):
        expected = strictly(bytes(damaged))
    if expected is None:
        with pytest.raises(DecodeError):
            decode_row(bytes(damaged))
    else:
        assert decode_row(bytes(damaged)) == expected
    with contextlib.suppress(DecodeError):
        first_value(bytes(damaged))


@pytest.mark.parametrize(
    "image",
    [
        b"",
        b"\0",
        encode_row((b"1", b"2"))[:-1],
        encode_row((b"1", b"2")) + b"n",
        encode_row((None,))[:-1] + b"nt\0\0\0\1x",  # as many values as columns, but not in their places
        pack(">H", 1) + b"t\0\0\0\2xt\0\0\0\0",
    ],
)
def test_rows_that_end_elsewhere_are_refused(image: bytes) -> None:
    with pytest.raises(DecodeError):
        decode_row(image)


def test_a_binary_column_is_refused_with_its_byte_offset() -> None:
    with pytest.raises(DecodeError, match="byte 2"):
        decode_row(pack(">H", 1) + b"b" + pack(">I", 1) + b"\1")


def test_outside_the_key_nothing_is_known() -> None:
    assert decode_key(encode_row((b"1", None, b"2"))) == (b"1", UNCHANGED, b"2")


def test_what_did_not_travel_comes_from_the_earlier_row() -> None:
    assert merge((b"1", UNCHANGED, None), (b"0", b"toast", b"x")) == (b"1", b"toast", None)


@given(
    st.binary(max_size=40)
    | st.tuples(images, st.integers(0, 40), st.binary(max_size=3)).map(
        lambda it: it[0][: it[1]] + it[2] + it[0][it[1] :]
    )
)
def test_compiled_or_not_a_row_is_the_same(image: bytes) -> None:
    def found(decode: Callable[[bytes], Row]) -> object:
        try:
            return decode(image)
        except DecodeError as exc:
            return str(exc)

    assert found(decode_row) == found(decode_row_in_python)
