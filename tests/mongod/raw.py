"""BSON as bytes: documents are walked without being decoded and built from parts, so that no type changes."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import Any, Final

import bson
from bson.binary import UuidRepresentation
from bson.codec_options import CodecOptions, DatetimeConversion

from .errors import CommandError

Value = tuple[int, bytes]
"""A BSON value: its type byte and its payload."""

Element = tuple[bytes, int, bytes]
"""Name, type byte, payload."""

DOUBLE: Final = 0x01
STRING: Final = 0x02
OBJECT: Final = 0x03
ARRAY: Final = 0x04
BINARY: Final = 0x05
BOOL: Final = 0x08
DATE: Final = 0x09
NULL: Final = 0x0A
INT32: Final = 0x10
TIMESTAMP: Final = 0x11
INT64: Final = 0x12
DECIMAL: Final = 0x13

CODEC: Final[CodecOptions[dict[str, Any]]] = CodecOptions(
    document_class=dict,
    datetime_conversion=DatetimeConversion.DATETIME_AUTO,
    unicode_decode_error_handler="surrogateescape",
    uuid_representation=UuidRepresentation.UNSPECIFIED,
)
EMPTY: Final = b"\x05\x00\x00\x00\x00"
NULL_VALUE: Final[Value] = (NULL, b"")
NO_TIMESTAMP: Final = b"\0" * 8

_FIXED: Final = {0x01: 8, 0x06: 0, 0x07: 12, 0x08: 1, 0x09: 8, 0x0A: 0, 0x10: 4, 0x11: 8, 0x12: 8, 0x13: 16, 0x7F: 0}
_FIXED[0xFF] = 0
_STRINGS: Final = frozenset((0x02, 0x0D, 0x0E))
_int32 = struct.Struct("<i")
unpack_int32 = _int32.unpack_from
pack_int32 = _int32.pack
pack_int64 = struct.Struct("<q").pack
_ARRAY_NAMES: Final = [str(index).encode() for index in range(4096)]


def value_end(raw: bytes, kind: int, at: int) -> int:
    """Where the value of type `kind` that begins at `at` ends; `CommandError` 22 for a type that does not exist."""
    size = _FIXED.get(kind)
    if size is not None:
        return at + size
    if kind in _STRINGS:
        return at + 4 + int(unpack_int32(raw, at)[0])
    if kind in {0x03, 0x04, 0x0F}:
        return at + int(unpack_int32(raw, at)[0])
    if kind == 0x05:
        return at + 5 + int(unpack_int32(raw, at)[0])
    if kind == 0x0B:
        return raw.index(b"\0", raw.index(b"\0", at) + 1) + 1
    if kind == 0x0C:
        return at + 16 + int(unpack_int32(raw, at)[0])
    raise CommandError(22, f"Unrecognized BSON type {kind}")


def elements(raw: bytes) -> Iterator[Element]:
    """The elements of a document or an array, in order, duplicates included."""
    at = 4
    end = len(raw) - 1
    while at < end:
        kind = raw[at]
        stop = raw.index(b"\0", at + 1)
        after = value_end(raw, kind, stop + 1)
        yield raw[at + 1 : stop], kind, raw[stop + 1 : after]
        at = after


def find_value(raw: bytes, name: bytes) -> Value | None:
    """The first element of that name."""
    start = 6 + len(name)
    if raw[5:start] == name + b"\0":  # nearly always so for _id
        return raw[4], raw[start : value_end(raw, raw[4], start)]
    for found, kind, payload in elements(raw):
        if found == name:
            return kind, payload
    return None


def array_name(index: int) -> bytes:
    """The element name of an array's position."""
    return _ARRAY_NAMES[index] if index < 4096 else str(index).encode()


def element(name: bytes, kind: int, payload: bytes) -> bytes:
    """One element's bytes."""
    return bytes((kind,)) + name + b"\0" + payload


def wrap(body: bytes) -> bytes:
    """A document with these elements."""
    return pack_int32(len(body) + 5) + body + b"\0"


def document(parts: Iterable[Element]) -> bytes:
    """A document with these elements."""
    return wrap(b"".join([bytes((kind,)) + name + b"\0" + payload for name, kind, payload in parts]))


def array(values: Iterable[Value]) -> bytes:
    """An array of these values."""
    return document((array_name(index), kind, payload) for index, (kind, payload) in enumerate(values))


def document_array(documents: list[bytes]) -> bytes:
    """An array of these documents, copied byte for byte."""
    parts: list[bytes] = []
    for index, raw in enumerate(documents):
        parts += (b"\x03", array_name(index), b"\0", raw)
    return wrap(b"".join(parts))


def string(text: str | bytes) -> Value:
    """A string value."""
    data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")
    return STRING, pack_int32(len(data) + 1) + data + b"\0"


def string_element(name: bytes, text: str | bytes) -> bytes:
    """A string element."""
    return element(name, *string(text))


def fields(mapping: dict[str, Any]) -> bytes:
    """The elements of a mapping, to be put into a larger document."""
    return bson.encode(mapping, codec_options=CODEC)[4:-1]


def encode(mapping: dict[str, Any]) -> bytes:
    """A document from Python values."""
    return bson.encode(mapping, codec_options=CODEC)


def decode(raw: bytes) -> dict[str, Any]:
    """Python values of a document: for matching only, because it loses duplicates and invalid text."""
    try:
        return bson.decode(raw, codec_options=CODEC)
    except bson.errors.InvalidBSON as exc:
        raise CommandError(22, f"invalid BSON: {exc}") from exc


def encode_value(value: Any) -> Value:
    """One Python value."""
    raw = bson.encode({"": value}, codec_options=CODEC)
    return raw[4], raw[6:-1]


def decode_value(value: Value) -> Any:
    """One value as Python's."""
    return decode(document([(b"", *value)]))[""]


def has_operators(raw: bytes) -> bool:
    """Whether a document's first field is an operator; the fields of a DBRef are none."""
    return raw[5:6] == b"$" and raw[5:9] not in {b"$ref", b"$id\0", b"$db\0"}


def array_documents(raw: bytes) -> list[bytes]:
    """The documents in an array of documents; `CommandError` 14 if something else is among them."""
    found = []
    for _, kind, payload in elements(raw):
        if kind != OBJECT:
            raise CommandError(14, "BSON field must be an array of objects")
        found.append(payload)
    return found


def values_at(raw: bytes, path: list[bytes]) -> Iterator[Value]:
    """The values at a dotted path, through arrays as queries and indexes see them; none where it is missing."""
    head, *rest = path
    value = find_value(raw, head)
    if value is None:
        return
    if not rest:
        yield value
    elif value[0] == OBJECT:
        yield from values_at(value[1], rest)
    elif value[0] == ARRAY:
        if rest[0].isdigit():
            yield from values_at(value[1], rest)
        for _, kind, payload in elements(value[1]):
            if kind == OBJECT:
                yield from values_at(payload, rest)
