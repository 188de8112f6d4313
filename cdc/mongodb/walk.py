"""Reading and building BSON without decoding values: pure functions over bytes.

An event is read many times more often than any of its values is looked at. So values are found by walking over the
top level of a document, and go on as the bytes they came in. Whatever the bytes are: `DecodeError` is all that is
raised. (BSON specification, version 1.1: https://bsonspec.org/spec.html)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from struct import Struct, error
from typing import Final, NamedTuple

from cdc.errors import DecodeError

DOUBLE: Final = 0x01
STRING: Final = 0x02
DOCUMENT: Final = 0x03
ARRAY: Final = 0x04
BINARY: Final = 0x05
UNDEFINED: Final = 0x06
OBJECT_ID: Final = 0x07
BOOLEAN: Final = 0x08
DATE: Final = 0x09
NULL: Final = 0x0A
REGEX: Final = 0x0B
DB_POINTER: Final = 0x0C
CODE: Final = 0x0D
SYMBOL: Final = 0x0E
CODE_WITH_SCOPE: Final = 0x0F
INT32: Final = 0x10
TIMESTAMP: Final = 0x11
INT64: Final = 0x12
DECIMAL128: Final = 0x13
MAX_KEY: Final = 0x7F
MIN_KEY: Final = 0xFF

EMPTY: Final = b"\x05\x00\x00\x00\x00"
"""The document without elements."""

_FIXED: Final = {
    DOUBLE: 8, UNDEFINED: 0, OBJECT_ID: 12, BOOLEAN: 1, DATE: 8, NULL: 0, INT32: 4, TIMESTAMP: 8, INT64: 8,
    DECIMAL128: 16, MAX_KEY: 0, MIN_KEY: 0,
}  # fmt: skip

_PREFIXED: Final = {
    STRING: (4, 1), DOCUMENT: (0, 5), ARRAY: (0, 5), BINARY: (5, 0), DB_POINTER: (16, 1), CODE: (4, 1), SYMBOL: (4, 1),
    CODE_WITH_SCOPE: (0, 14),
}  # fmt: skip
"""Values that begin with an int32 length: what they have beyond that many bytes, and the least length there is."""

_int32: Final = Struct("<i").unpack_from
_int64: Final = Struct("<q").unpack_from
_timestamp: Final = Struct("<II").unpack_from
_pack_int32: Final = Struct("<i").pack
_pack_int64: Final = Struct("<q").pack


class Element(NamedTuple):
    """Where an element is: its value's bytes are `data[start:end]`, the whole element's `data[at:end]`."""

    kind: int
    name: bytes
    at: int
    start: int
    end: int


def document_end(data: bytes, at: int = 0) -> int:
    """Where the document that begins at `at` ends. Checks its length and its last byte, and nothing between."""
    try:
        (length,) = _int32(data, at)
    except error:
        raise DecodeError(f"BSON document truncated at byte {at}") from None
    end: int = at + length
    if at < 0 or length < 5 or end > len(data) or data[end - 1]:
        raise DecodeError(f"BSON document at byte {at}: its length is said to be {length}")
    return end


def value_end(data: bytes, kind: int, start: int, limit: int) -> int:
    """Where a value ends that begins at `start`; it must not pass `limit`."""
    size = _FIXED.get(kind)
    if size is None:
        if kind == REGEX:
            return _past_cstring(data, _past_cstring(data, start, limit), limit)
        if (prefixed := _PREFIXED.get(kind)) is None:
            raise DecodeError(f"no BSON type has the number 0x{kind:02x} (byte {start})")
        if start + 4 > limit:
            raise DecodeError(f"BSON value truncated at byte {start}")
        more, least = prefixed
        (size,) = _int32(data, start)
        if size < least:
            raise DecodeError(f"BSON value at byte {start}: its length is said to be {size}")
        size += more
    if start + size > limit:
        raise DecodeError(f"BSON value truncated at byte {start}")
    return start + size


def elements(data: bytes, at: int = 0) -> Iterator[Element]:
    """The top-level elements of the document or array that begins at `at`, in order, with duplicates."""
    last = document_end(data, at) - 1
    at += 4
    while at < last:
        start = _past_cstring(data, at + 1, last)
        kind = data[at]
        end = value_end(data, kind, start, last)
        yield Element(kind, data[at + 1 : start - 1], at, start, end)
        at = end


def fields(data: bytes, at: int = 0) -> dict[bytes, tuple[int, int, int]]:
    """All top-level elements by name: `(kind, start, end)`. Of elements with one name, the last.

    The fast form of `elements`: for documents of which most fields are wanted.
    """
    last = document_end(data, at) - 1
    at += 4
    found: dict[bytes, tuple[int, int, int]] = {}
    try:
        while at < last:
            start = data.index(0, at, last) + 1
            kind = data[at]
            if kind == DOCUMENT:
                (size,) = _int32(data, start)
                end = start + size
                if size < 5 or end > last:
                    raise DecodeError(f"BSON value at byte {start}: its length is said to be {size}")
            else:
                end = value_end(data, kind, start, last)
            found[data[at + 1 : start - 1]] = (kind, start, end)
            at = end
    except (ValueError, error):
        raise DecodeError(f"BSON document truncated at byte {at}") from None
    return found


def find(data: bytes, name: bytes, at: int = 0) -> Element | None:
    """The first top-level element of that name."""
    for element in elements(data, at):
        if element.name == name:
            return element
    return None


def get_document(data: bytes, name: bytes) -> bytes | None:
    """The first element of that name, which must be a document (or `None` where there is none, or a null)."""
    element = find(data, name)
    if element is None or element.kind == NULL:
        return None
    if element.kind != DOCUMENT:
        raise DecodeError(f"{name.decode('utf-8', 'replace')} is not a document but of type 0x{element.kind:02x}")
    return data[element.start : document_end(data, element.start)]


def array_items_in_python(data: bytes, at: int = 0) -> list[bytes]:
    """The documents in an array of nothing else, such as a cursor's batch. Where `at` is the array's start.

    `items` is the same as a sequence that, compiled, makes a document's object only where it is asked for.
    """
    last = document_end(data, at) - 1
    at += 4
    items: list[bytes] = []
    try:
        while at < last:
            if data[at] != DOCUMENT:
                raise DecodeError(f"array item at byte {at} is no document but of type 0x{data[at]:02x}")
            start = data.index(0, at + 1, last) + 1
            (size,) = _int32(data, start)
            at = start + size
            if size < 5 or at > last:
                raise DecodeError(f"BSON document at byte {start}: its length is said to be {size}")
            items.append(data[start:at])
    except (ValueError, error):
        raise DecodeError(f"BSON array truncated at byte {at}") from None
    return items


def string_at(data: bytes, start: int, end: int) -> str:
    """A string's value. What is not UTF-8 becomes surrogates (`surrogateescape`), so that nothing is lost."""
    return data[start + 4 : end - 1].decode("utf-8", "surrogateescape")


def int32_at(data: bytes, start: int) -> int:
    """An int32's value, or the length of what begins with one."""
    return _unpacked(_int32, data, start)


def int64_at(data: bytes, start: int) -> int:
    """An int64's value, or a date's: milliseconds since 1970-01-01 UTC."""
    return _unpacked(_int64, data, start)


def timestamp_at(data: bytes, start: int) -> tuple[int, int]:
    """A timestamp's value: seconds since 1970-01-01 UTC, and a counter within the second."""
    try:
        increment, seconds = _timestamp(data, start)
    except error:
        raise DecodeError(f"BSON value truncated at byte {start}") from None
    return seconds, increment


def document(*parts: bytes) -> bytes:
    """Build a document of elements, each as its own bytes (`data[element.at:element.end]`, or `element`)."""
    return joined(parts)


def joined(parts: Iterable[bytes]) -> bytes:
    """`document`, for many parts."""
    content = b"".join(parts)
    return _pack_int32(len(content) + 5) + content + b"\x00"


def element(kind: int, name: bytes, value: bytes) -> bytes:
    """Build an element; `value` is its bytes."""
    if 0 in name:
        raise DecodeError("a BSON field name cannot hold a zero byte")
    return b"%c%b\x00%b" % (kind, name, value)


def string(text: str) -> bytes:
    """The bytes of a string's value; the reverse of `string_at`."""
    content = text.encode("utf-8", "surrogateescape")
    return _pack_int32(len(content) + 1) + content + b"\x00"


def int32(number: int) -> bytes:
    """The bytes of an int32's value."""
    return _pack_int32(number)


def int64(number: int) -> bytes:
    """The bytes of an int64's value."""
    return _pack_int64(number)


def _past_cstring(data: bytes, at: int, limit: int) -> int:
    end = data.find(0, at, limit)
    if end < 0:
        raise DecodeError(f"BSON string truncated at byte {at}")
    return end + 1


def _unpacked(unpack: object, data: bytes, start: int) -> int:
    try:
        (number,) = unpack(data, start)  # type: ignore[operator]
    except error:
        raise DecodeError(f"BSON value truncated at byte {start}") from None
    return int(number)


items: Callable[[bytes, int], Sequence[bytes]]
try:
    from cdc.mongodb import _events
except ImportError:
    array_items = items = array_items_in_python
else:
    array_items, items = _events.array_items, _events.Items
