"""A row as pgoutput writes it (TupleData), and taken apart. Pure.

The image travels as it came: the source never looks into it, the queue stores it, and a sink takes apart only what it
needs. Source: PostgreSQL manual, "Logical Replication Message Formats".
"""

from __future__ import annotations

from struct import Struct, error
from typing import Final, Literal

from cdc.errors import DecodeError

UNCHANGED: Final = False
"""A column whose value did not travel (unchanged TOAST, or no part of the key). Not NULL, which is `None`."""

Value = bytes | None | Literal[False]
"""A column's value as the text that the server wrote."""

Row = tuple[Value, ...]
"""One value for each column of the `Table`, in its order."""

_INT16: Final = Struct(">H").pack
_TEXT_HEADER: Final = Struct(">cI").pack
_INT32: Final = Struct(">I").unpack_from

_NULL, _TEXT, _UNCHANGED = b"ntu"
_SHORT_TEXT: Final = b"t\0\0\0"
"""The header of a value below 256 bytes, but for the last byte, its length."""

COUNT_BYTES: Final = 2
"""A row begins with the number of its columns."""


def decode_row_in_python(image: bytes) -> Row:
    """Take a row apart. Raises only `DecodeError`, also where the row ends before or after the image."""
    values = short_texts(image)
    if values is not None:
        return tuple(values)
    row, end = decode_row_at(image, 0)
    if end != len(image):
        raise DecodeError(f"row should end at byte {end}, but has {len(image)}")
    return row


def short_texts(image: bytes) -> list[bytes] | None:
    """The values of a row, if all are texts below 256 bytes (nine of ten rows): faster than going from byte to byte."""
    parts = image.split(_SHORT_TEXT)
    if len(parts.pop(0)) != COUNT_BYTES:
        return None
    try:
        values = [part[1:] for part in parts if part[0] == len(part) - 1]
    except IndexError:
        return None
    # every length is right, and so is their number: it was split at the headers, and nowhere else
    return values if len(values) == len(parts) == image[0] << 8 | image[1] else None


def first_value(image: bytes) -> Value:
    """The first column. Raises only `DecodeError`."""
    if len(image) > 6 and image.startswith(_SHORT_TEXT, 2) and len(value := image[7 : 7 + image[6]]) == image[6]:
        return value
    row, _ = decode_row_at(image, 0, 1)
    if not row:
        raise DecodeError("row without columns")
    return row[0]


def decode_key(image: bytes) -> Row:
    """Take a key image apart: columns outside the key come as NULL, but are unknown; a key column is never NULL."""
    return tuple([UNCHANGED if value is None else value for value in decode_row(image)])


def decode_row_at(data: bytes, at: int, limit: int = 0xFFFF) -> tuple[Row, int]:
    """Take the row apart that starts at byte `at`, or its first `limit` columns, and tell where that ends."""
    values: list[Value] = []
    append = values.append
    try:
        count = data[at] << 8 | data[at + 1]
        at += 2
        for _ in range(min(count, limit)):
            if data[at] == _TEXT:
                start = at + 5
                at = start + _INT32(data, at + 1)[0]
                append(data[start:at])
            else:
                append(_ABSENT[data[at]])
                at += 1
    except (IndexError, error):
        raise _truncated(data) from None
    except KeyError:
        raise DecodeError(f"column kind {data[at]:#04x} at byte {at} (binary values were not asked for)") from None
    if at > len(data):  # a slice beyond the end is silently short
        raise _truncated(data)
    return tuple(values), at


def encode_row(row: Row) -> bytes:
    """The image of a row: what `decode_row` takes apart."""
    parts = [_INT16(len(row))]
    for value in row:
        if value is None:
            parts.append(b"n")
        elif value is UNCHANGED:
            parts.append(b"u")
        else:
            parts += (_TEXT_HEADER(b"t", len(value)), value)
    return b"".join(parts)


def merge(row: Row, earlier: Row) -> Row:
    """The row with its UNCHANGED columns taken from an earlier state of it."""
    if UNCHANGED not in row:
        return row
    return tuple([old if value is UNCHANGED else value for value, old in zip(row, earlier, strict=True)])


def _truncated(data: bytes) -> DecodeError:
    return DecodeError(f"row truncated at byte {len(data)}")


_ABSENT: Final[dict[int, Value]] = {_NULL: None, _UNCHANGED: UNCHANGED}

try:
    from cdc.postgres import _row
except ImportError:
    decode_row = decode_row_in_python
else:
    decode_row = _row.decode_row
