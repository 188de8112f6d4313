"""Values as JSON, as PostgreSQL's own `to_jsonb` shows them: from the text of a column to an encoded JSON value.

Numbers keep all their digits: they are never parsed. What has no form in JSON (NaN, infinity, types of
users) is a string, as the server wrote it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Final

import msgspec
from psycopg.adapt import Transformer
from psycopg.pq import Format

from cdc.feed.record import Json

Encode = Callable[[bytes], Json]

_encode: Final = msgspec.json.Encoder(decimal_format="number", enc_hook=str).encode
_NUMBER: Final = re.compile(rb"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_TIMESTAMP: Final = re.compile(
    rb"([0-9]{4,}-[0-9]{2}-[0-9]{2}) ([0-9:.]+)([+-][0-9]{2})?(:[0-9]{2})?(:[0-9]{2})?( BC)?"
)


def text(value: bytes) -> Json:
    """A string."""
    return _encode(value.decode("utf-8", "replace"))


def number(value: bytes) -> Json:
    """A number with all its digits; what JSON has no number for is a string."""
    return value if _NUMBER.fullmatch(value) else text(value)


def boolean(value: bytes) -> Json:
    """`t` or `f`."""
    return b"true" if value == b"t" else b"false"


def timestamp(value: bytes) -> Json:
    """ISO 8601: `2026-11-21T10:15:30.5+00:00`."""
    match = _TIMESTAMP.fullmatch(value)
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
    loader = Transformer().get_loader(type_oid, Format.TEXT)
    if not type(loader).__name__.endswith("ArrayLoader"):
        return text

    def array(value: bytes) -> Json:
        try:
            return _encode(loader.load(value))
        except Exception:  # noqa: BLE001 - a value that Python has no type for, such as an infinite date
            return text(value)

    return array


_KNOWN: Final[dict[int, Encode]] = {
    16: boolean,
    20: number, 21: number, 23: number, 26: number,
    700: number, 701: number, 1700: number,
    114: document, 3802: document,
    1114: timestamp, 1184: timestamp,
}  # fmt: skip
"""bool; int8, int2, int4, oid; float4, float8, numeric; json, jsonb; timestamp, timestamptz."""
