"""The values of a feed's records and states in COPY's binary format, column by column."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import chain, repeat
from typing import Any, Final

from psycopg import postgres

Fields = Mapping[str, Sequence[bytes]]
"""Values by column, each with its length before it."""

SINCE_1970: Final = 946_684_800_000_000
"""PostgreSQL counts microseconds from 2000-01-01 on."""

_TYPES: Final = {
    "id": "int8", "version": "int8", "changed_at": "timestamptz", "recorded_at": "timestamptz", "changed": "text[]",
    "lookup": "bool", "truncated": "bool", "before": "json", "after": "json", "delta": "json", "scope_before": "json",
    "scope_after": "json", "key": "bytea", "known": "bytea",
}  # fmt: skip
"""Of the columns whose values are no texts."""

_SIGNATURE: Final = b"PGCOPY\n\xff\r\n\0" + bytes(8)
_END: Final = b"\xff\xff"
_NULL: Final = b"\xff\xff\xff\xff"
_INT8: Final = struct.Struct("!Iq").pack
_EMPTY: Final = struct.pack("!iiI", 0, 0, postgres.types["text"].oid)


def copy_fields(columns: Mapping[str, Sequence[Any]]) -> Fields:
    """The values of records or entities' states by column; `None` is NULL."""
    return {name: _COLUMNS[_TYPES.get(name, "text")](values) for name, values in columns.items()}


def copy_data(fields: Fields) -> bytes:
    """Rows in COPY's binary format."""
    head = len(fields).to_bytes(2, "big")
    return b"".join((_SIGNATURE, *chain.from_iterable(zip(repeat(head), *fields.values(), strict=False)), _END))


def text(value: str) -> str:
    """A text that PostgreSQL can hold: NUL is shown by its symbol."""
    return value.replace("\0", "\N{SYMBOL FOR NULL}") if "\0" in value else value


def text_field(value: str) -> bytes:
    """One text."""
    return _blob(text(value).encode())


def texts_in_python(values: Sequence[str | None]) -> list[bytes]:
    """Of `text`."""
    return [_NULL if value is None else text_field(value) for value in values]


def blobs_in_python(values: Sequence[bytes | None]) -> list[bytes]:
    """Of `bytea` and `json`."""
    return [_NULL if value is None else _blob(value) for value in values]


def numbers_in_python(values: Sequence[int | None]) -> list[bytes]:
    """Of `int8`."""
    return [_NULL if value is None else _INT8(8, value) for value in values]


def _blob(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data


def _times(values: Sequence[int | None]) -> list[bytes]:
    return numbers([None if value is None else value - SINCE_1970 for value in values])


def _arrays(values: Sequence[tuple[str, ...] | None]) -> list[bytes]:
    return [_NULL if value is None else _blob(_array(value)) for value in values]


@lru_cache(1024)  # the same fields change again and again
def _array(names: tuple[str, ...]) -> bytes:
    """As `array_recv` in PostgreSQL's `arrayfuncs.c` reads it: dimensions, no NULLs, element type; length, bound."""
    items = [text_field(name) for name in names]
    head = struct.pack("!iiIii", 1, 0, postgres.types["text"].oid, len(items), 1) if items else _EMPTY
    return head + b"".join(items)


def _flags(values: Sequence[bool | None]) -> list[bytes]:
    return [_FLAGS[value] for value in values]


_FLAGS: Final = {False: b"\0\0\0\1\0", True: b"\0\0\0\1\1", None: _NULL}

try:
    from cdc.postgres import _feed
except ImportError:
    texts, blobs, numbers = texts_in_python, blobs_in_python, numbers_in_python
else:
    texts, blobs, numbers = _feed.texts, _feed.blobs, _feed.numbers

_COLUMNS: Final[dict[str, Callable[[Any], Sequence[bytes]]]] = {
    "text": texts,
    "json": blobs,
    "bytea": blobs,
    "int8": numbers,
    "timestamptz": _times,
    "bool": _flags,
    "text[]": _arrays,
}
