"""Values as JSON, as PostgreSQL's own `to_jsonb` shows them: from the text of a column to an encoded JSON value.

Numbers keep all their digits: they are never parsed. What has no form in JSON (NaN, infinity, types of
users) is a string, as the server wrote it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache, partial
from typing import Final

import msgspec
from psycopg.postgres import types

from cdc.feed.record import Json

Encode = Callable[[bytes], Json]

_encode: Final = msgspec.json.Encoder().encode
_NUMBER: Final = re.compile(rb"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?").fullmatch
_TIMESTAMP: Final = re.compile(
    rb"([0-9]{4,}-[0-9]{2}-[0-9]{2}) ([0-9:.]+)([+-][0-9]{2})?(:[0-9]{2})?(:[0-9]{2})?( BC)?"
).fullmatch
_ARRAY: Final = re.compile(rb"(?:(?:\[[-0-9]+:[-0-9]+\])+=)?(\{.*\})", re.DOTALL)
"""Bounds stand before one that does not begin with 1."""
_ESCAPED: Final = re.compile(rb"\\(.)", re.DOTALL)


def text(value: bytes) -> Json:
    """A string."""
    return _encode(value.decode("utf-8", "replace"))


def number(value: bytes) -> Json:
    """A number with all its digits; what JSON has no number for is a string."""
    return value if _NUMBER(value) else text(value)


def boolean(value: bytes) -> Json:
    """`t` or `f`."""
    return b"true" if value == b"t" else b"false"


def timestamp(value: bytes) -> Json:
    """ISO 8601: `2026-11-21T10:15:30.5+00:00`."""
    match = _TIMESTAMP(value)
    if match is None:
        return text(value)
    day, time, hours, minutes, rest, era = match.groups(b"")
    zone = hours + (minutes or b":00") + rest if hours else b""
    return b'"%sT%s%s%s"' % (day, time, zone, era)


def document(value: bytes) -> Json:
    """`json` and `jsonb`, without blanks between tokens; numbers keep their digits."""
    try:
        return msgspec.json.format(value, indent=-1)
    except msgspec.DecodeError:  # deeper than the library goes
        return text(value)


@cache
def encoder(type_oid: int) -> Encode:
    """What encodes the values of a type, by its OID (those of built-in types are the same everywhere)."""
    if (known := _KNOWN.get(type_oid)) is not None:
        return known
    info = types.get(type_oid)
    if info is None or info.array_oid != type_oid:
        return text
    return partial(_array, encoder(info.oid), info.delimiter.encode(), _tokens(info.delimiter.encode()))


def _array(encode: Encode, delimiter: bytes, tokens: re.Pattern[bytes], value: bytes) -> Json:
    """An array in braces, of any number of dimensions: as the manual's "Array Input and Output Syntax" has it."""
    match = _ARRAY.fullmatch(value)
    if match is None:
        return text(value)

    def shown(token: re.Match[bytes]) -> Json:
        sign, quoted, plain = token.groups()
        if sign is not None:
            return b"," if sign == delimiter else b"[" if sign == b"{" else b"]"
        if quoted is not None:
            return encode(_ESCAPED.sub(rb"\1", quoted))
        return b"null" if plain == b"NULL" else encode(plain)

    return tokens.sub(shown, match[1])


def _tokens(delimiter: bytes) -> re.Pattern[bytes]:
    """Braces and delimiters; items in quotes; other items."""
    return re.compile(rb'([{}%b])|"((?:[^"\\]|\\.)*)"|([^{}"%b]+)' % (delimiter, delimiter), re.DOTALL)


_KNOWN: Final[dict[int, Encode]] = {
    16: boolean,
    20: number, 21: number, 23: number, 26: number,
    700: number, 701: number, 1700: number,
    114: document, 3802: document,
    1114: timestamp, 1184: timestamp,
}  # fmt: skip
"""bool; int8, int2, int4, oid; float4, float8, numeric; json, jsonb; timestamp, timestamptz."""
