"""When two `_id`s are one document for the server, though their bytes differ.

Numbers of all types compare by value, exactly: 1, 1.0, Int64(1) and Decimal128("1") are one `_id`; the double 0.1 is
not Decimal128("0.1"); 0.0 is -0.0, and every NaN every other. Strings and symbols are one type, all other types are
equal byte by byte only; in documents the order of fields counts, and numbers inside are equal across their types. (The
manual's "Comparison/Sort Order".) Collections with a collation are another matter: there more strings may be equal.
"""

from __future__ import annotations

from collections.abc import Hashable
from decimal import Decimal, DecimalException
from math import inf
from struct import Struct
from typing import Final

from bson.decimal128 import Decimal128

from cdc.errors import DecodeError
from cdc.mongodb import walk

_NAN: Final = "NaN"
"""Every NaN. No other key is a `str`."""

_INFINITE: Final = (inf, -inf)

_double: Final = Struct("<d").unpack
_OBJECT_ID: Final = b"\x07_id\x00"
_INT32: Final = b"\x10_id\x00"
_INT64: Final = b"\x12_id\x00"
_STRING: Final = b"\x02_id\x00"


def key_of(document_key: bytes) -> Hashable:
    """What is equal for two document keys if and only if the server takes their `_id`s for one.

    document_key: a document with an `_id`, such as `Change.key`; what else it holds (a shard key) does not matter.
    A number's key is a number, that of most other types the bytes of `{_id: value}`. Raises `DecodeError`.
    """
    head = document_key[4:9]
    size = len(document_key)
    if head == _OBJECT_ID and size == 22:
        return document_key
    if (head == _INT32 and size == 14) or (head == _INT64 and size == 18):
        return int.from_bytes(document_key[9:-1], "little", signed=True)
    if head == _STRING and size == 14 + int.from_bytes(document_key[9:13], "little"):
        return document_key
    return _rarer_key(document_key)


def key_bytes(document_key: bytes) -> bytes:
    """The same as bytes, which can be stored. Raises `DecodeError`."""
    return repr(_canonical(key_of(document_key))).encode()


def id_only(document_key: bytes) -> bytes:
    """The document `{_id: value}` of a document key. Raises `DecodeError` where there is no `_id`."""
    head = document_key[4:9]
    size = len(document_key)
    if (
        (head == _OBJECT_ID and size == 22)
        or (head == _INT32 and size == 14)
        or (head == _INT64 and size == 18)
        or (head == _STRING and size == 14 + int.from_bytes(document_key[9:13], "little"))
    ):
        return document_key
    found = _id(document_key)
    if found.at == 4 and found.end == len(document_key) - 1:
        return document_key
    return walk.document(document_key[found.at : found.end])


def same_bytes(document_key: bytes, image: bytes) -> bool:
    """Whether a document has its `_id` in just these bytes."""
    if image.startswith(document_key[4:-1], 4):  # servers put `_id` first, and it is mostly all of a key
        return True
    key, own = _id(document_key), _id(image)
    return document_key[key.at : key.end] == image[own.at : own.end]


def _id(document: bytes) -> walk.Element:
    found = walk.find(document, b"_id")
    if found is None:
        raise DecodeError("a document key without _id")
    return found


def _rarer_key(document_key: bytes) -> Hashable:
    found = _id(document_key)
    value = _value(document_key, found)
    if isinstance(value, bytes):  # in the form of the fast ways
        return walk.document(walk.element(value[0], b"_id", value[1:]))
    return value


def _value(data: bytes, found: walk.Element) -> Hashable:
    kind, start, end = found.kind, found.start, found.end
    if kind in {walk.INT32, walk.INT64}:
        return int.from_bytes(data[start:end], "little", signed=True)
    if kind == walk.DOUBLE:
        (number,) = _double(data[start:end])
        return number if number == number else _NAN  # noqa: PLR0124 - NaN is what differs from itself
    if kind == walk.DECIMAL128:
        return _decimal(data[start:end])
    if kind == walk.DOCUMENT:
        return (kind, *((each.name, _value(data, each)) for each in walk.elements(data, start)))
    if kind == walk.ARRAY:
        return (kind, *(_value(data, each) for each in walk.elements(data, start)))
    return bytes((walk.STRING if kind == walk.SYMBOL else kind,)) + data[start:end]


def _canonical(key: Hashable) -> object:
    """Equal keys become values that print alike."""
    if isinstance(key, tuple):
        return tuple(map(_canonical, key))
    if isinstance(key, int | float | Decimal):
        return str(float(key)) if key in _INFINITE else key.as_integer_ratio()
    return key


def _decimal(value: bytes) -> Hashable:
    """Python's numbers of all types are equal, and hash alike, where their values are exactly the same."""
    try:
        number = Decimal128.from_bid(value).to_decimal()
    except DecimalException:  # more digits than the format allows: the server reads that as zero
        return 0
    return _NAN if number.is_nan() else number
