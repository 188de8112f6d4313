"""The server's order and equality of values, as Python keys that hash and compare the same way.

Source: the manual's "Comparison/Sort Order". Numbers of all types are one class and compare exactly; NaN equals itself
and comes before all other numbers; sub-documents compare element by element: type class, field name, value.
"""

from __future__ import annotations

import struct
import unicodedata
from collections.abc import Callable
from typing import Any, Final

from bson.decimal128 import Decimal128

from . import raw

Key = tuple[Any, ...]
Fold = Callable[[bytes], bytes]
"""What a collation makes of a string before it is compared."""

NUMBER: Final = 10
LOWEST: Final[Key] = (-2,)
HIGHEST: Final[Key] = (128,)

_CLASSES: Final = {
    0xFF: -1, 0x06: 0, 0x0A: 5, 0x01: 10, 0x10: 10, 0x12: 10, 0x13: 10, 0x02: 15, 0x0E: 15, 0x03: 20, 0x04: 25,
    0x05: 30, 0x07: 35, 0x08: 40, 0x09: 45, 0x11: 47, 0x0B: 50, 0x0C: 55, 0x0D: 60, 0x0F: 65, 0x7F: 127,
}  # fmt: skip
_double = struct.Struct("<d").unpack
_int64 = struct.Struct("<q").unpack
_uint64 = struct.Struct("<Q").unpack


def type_class(kind: int) -> int:
    """The class of types within which values are compared ("type bracketing")."""
    return _CLASSES[kind]


def key_of(value: raw.Value, fold: Fold | None = None) -> Key:
    """A key that equals and orders as the server orders `value`."""
    kind, payload = value
    if kind == 0x07:
        return (35, payload)
    if kind in {0x02, 0x0E}:
        return (15, fold(payload[4:-1]) if fold else payload[4:-1])
    if kind == 0x10 or kind == 0x12:
        return (NUMBER, 1, int.from_bytes(payload, "little", signed=True))
    return _rarer_key(kind, payload, fold)


def _rarer_key(kind: int, payload: bytes, fold: Fold | None) -> Key:
    rank = _CLASSES[kind]
    if kind == 0x01:
        number = _double(payload)[0]
        return (NUMBER, 0) if number != number else (NUMBER, 1, number)
    if kind == 0x13:
        decimal = Decimal128.from_bid(payload).to_decimal()
        return (NUMBER, 0) if decimal.is_nan() else (NUMBER, 1, decimal)
    if kind in {0x03, 0x04}:
        return (rank, tuple([(_CLASSES[k], n, key_of((k, p), fold)) for n, k, p in raw.elements(payload)]))
    if kind == 0x05:
        return (rank, len(payload) - 5, payload[4], payload[5:])
    if kind == 0x09:
        return (rank, _int64(payload)[0])
    if kind == 0x11:
        return (rank, _uint64(payload)[0])
    if kind == 0x0B:
        return (rank, *payload[:-1].split(b"\0"))
    return (rank, payload)


def fold_of(collation: dict[str, Any] | None) -> Fold | None:
    """How a collation compares strings; None if byte by byte. Only strengths 1 and 2 are emulated."""
    if not collation or collation.get("locale") in {None, "simple"}:
        return None
    strength = collation.get("strength", 3)
    if strength > 2:
        return None
    keep_accents = strength == 2

    def fold(text: bytes) -> bytes:
        folded = unicodedata.normalize("NFD", text.decode("utf-8", "surrogateescape").casefold())
        if not keep_accents:
            folded = "".join(char for char in folded if not unicodedata.combining(char))
        return folded.encode("utf-8", "surrogateescape")

    return fold
