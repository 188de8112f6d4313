"""Resume tokens: opaque to clients, ordered as the events are, in the form that real servers give them.

A token is the hexadecimal form of a sort key of: cluster time, version, token type (high water mark or event), index in
the transaction, whether it is an invalidate, collection UUID, document key (version 1) or operation type and document
key (version 2, from 7.0), and the fragment's number in a split event.
"""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass
from typing import Any, Final

from . import raw
from .errors import CommandError
from .raw import OBJECT, Value

_END: Final = b"\x04"
_TYPES: Final = {
    0xFF: 0x0A, 0x06: 0x0F, 0x0A: 0x14, 0x01: 0x1E, 0x10: 0x1E, 0x12: 0x1E, 0x13: 0x1E, 0x02: 0x3C, 0x0E: 0x3C,
    0x03: 0x46, 0x04: 0x50, 0x05: 0x5A, 0x07: 0x64, 0x08: 0x6E, 0x09: 0x78, 0x11: 0x82, 0x0B: 0x8C, 0x0C: 0x96,
    0x0D: 0xA0, 0x0F: 0xAA, 0x7F: 0xF0,
}  # fmt: skip
_MALFORMED: Final = "Invalid advance ({0}) past end of buffer[{1}] at offset: {2}"


@dataclass(frozen=True, slots=True)
class Token:
    """Where a token points: `index` is that of the operation in its transaction."""

    timestamp: int
    index: int = 0
    high_water_mark: bool = False
    from_invalidate: bool = False
    text: str = ""


def integer(number: int) -> bytes:
    """A whole number as a sort key."""
    if number == 0:
        return b"\x29"
    shifted = abs(number) << 1
    size = (shifted.bit_length() + 7) // 8
    if number > 0:
        return bytes((0x2A + size,)) + shifted.to_bytes(size, "big")
    return bytes((0x28 - size,)) + bytes(255 - byte for byte in shifted.to_bytes(size, "big"))


def high_water_mark(timestamp: int, version: int) -> str:
    """The token before all events of that time."""
    start = b"\x82" + timestamp.to_bytes(8, "big") + integer(version)
    return (start + b"\x29\x29\x6e" + (b"\x14" if version >= 2 else b"") + _END).hex().upper()


def event(timestamp: int, index: int, version: int, uuid: bytes | None, identifier: bytes, *, invalidate: bool) -> str:
    """An event's token; `identifier` is a sort key made by `document_key` or `operation`, or empty."""
    parts = [b"\x82", timestamp.to_bytes(8, "big"), integer(version), b"\x2c\x01\x00", integer(index)]
    parts.append(b"\x6f" if invalidate else b"\x6e")
    if uuid is not None:
        parts += (b"\x5a\x10\x04", uuid)
    elif version >= 2:
        parts.append(b"\x14")
    parts += (identifier, _END)
    return b"".join(parts).hex().upper()


def fragment(token: str, number: int) -> str:
    """The token of a split event's fragment, counted from 0."""
    return token[:-2] + (integer(number) + _END).hex().upper()


def document_key(document: bytes) -> bytes:
    """The sort key of a document."""
    parts = [b"\x46"]
    for name, kind, payload in raw.elements(document):
        parts += (bytes((_TYPES[kind],)), name, b"\0", _value(kind, payload))
    parts.append(b"\0")
    return b"".join(parts)


def operation(name: str, what: bytes, value: Value | None) -> bytes:
    """The sort key that identifies an event from version 2 on: its type, and what it was done to."""
    start = _operation_start(name, b"" if value is None else what)
    return start + b"\0" if value is None else b"".join((start, document_key(value[1]), b"\0"))


@functools.lru_cache(maxsize=1000)
def _operation_start(name: str, what: bytes) -> bytes:
    field = b"\x46" + what + b"\0" if what else b""
    return b"\x46\x3coperationType\0\x3c" + name.encode() + b"\0" + field


def _value(kind: int, payload: bytes) -> bytes:
    start = bytes((_TYPES[kind],))
    if kind == OBJECT:
        return document_key(payload)
    if kind in {0x10, 0x12}:
        return integer(int.from_bytes(payload, "little", signed=True))
    if kind in {0x02, 0x0E}:
        return start + payload[4:-1].replace(b"\0", b"\0\xff") + b"\0"
    if kind == 0x04:
        return start + b"".join(_value(inner, part) for _, inner, part in raw.elements(payload)) + b"\0"
    if kind == 0x05:
        return start + bytes((min(len(payload) - 5, 255), payload[4])) + payload[5:]
    if kind == 0x08:
        return b"\x6f" if payload == b"\x01" else b"\x6e"
    if kind == 0x01:
        number = struct.unpack("<d", payload)[0]
        return (
            integer(int(number))
            if number == number and number.is_integer() and abs(number) < 2**53
            else start + payload
        )
    if kind in {0x09, 0x11}:
        return start + payload[::-1]
    return start + payload


def parse(value: Any) -> Token:
    """Read a client's token; `CommandError` 40647, 9, 15, 50795 ... as servers answer for those that are none."""
    data = value.get("_data") if isinstance(value, dict) else None
    if not isinstance(data, str):
        raise CommandError(40647, f"Bad resume token: _data of missing or of wrong type. Expected string, got {value}")
    try:
        key = bytes.fromhex(data)
    except ValueError as exc:
        raise CommandError(9, "resume token string was not a valid hex string") from exc
    if not key:
        raise CommandError(40649, "invalid empty resume token")
    if key[0] != 0x82:
        raise CommandError(260, "Invalid resume token: does not begin with a timestamp")
    if len(key) < 9:
        raise CommandError(15, _MALFORMED.format(8, len(key) - 1, 0))
    timestamp = int.from_bytes(key[1:9], "big")
    version, at = _read_integer(key, 9)
    if version not in {1, 2}:
        raise CommandError(50795, "Invalid Resume Token: only supports version 0, 1 and 2")
    kind, at = _read_integer(key, at)
    index, at = _read_integer(key, at)
    if at >= len(key) or key[at] not in b"\x6e\x6f":
        raise CommandError(50870, "Resume Token fromInvalidate is not a boolean.")
    return Token(timestamp, index, kind == 0, key[at] == 0x6F, data.upper())


def _read_integer(key: bytes, at: int) -> tuple[int, int]:
    if at >= len(key):
        raise CommandError(50796, "Resume Token does not contain version")
    size = key[at] - 0x2A
    if size == -1:
        return 0, at + 1
    if not 0 < size <= 9:
        raise CommandError(50854, "Invalid resume token: wrong type for version")
    if at + 1 + size > len(key):
        raise CommandError(15, _MALFORMED.format(size, len(key) - at - 1, at))
    return int.from_bytes(key[at + 1 : at + 1 + size], "big") >> 1, at + 1 + size
