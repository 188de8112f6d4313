"""The stream's messages as one run of bytes, as libpq hands them out where that is compiled.

Each message is behind its length (u32, little-endian), and without XLogData's header.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from struct import Struct
from typing import Any, Final, NamedTuple

from psycopg import pq

_LENGTH: Final = Struct("<I")

LENGTH_BYTES: Final = _LENGTH.size
"""In front of a message, of which the first byte says what it is."""

BEGIN: Final = ord("B")


class Frames:
    """Messages of the stream, in order; those of a `list` are the same, each behind its header."""

    __slots__ = ("data",)

    def __init__(self, data: bytes) -> None:
        self.data = data

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self.data)


def messages(data: bytes, at: int, end: int) -> Iterator[bytes]:
    """The messages between two places where one begins."""
    while at < end:
        start = at + LENGTH_BYTES
        at = start + _LENGTH.unpack_from(data, at)[0]
        yield data[start:at]


class Libpq(NamedTuple):
    """Addresses of two functions of the very libpq that psycopg is linked with."""

    get_copy_data: int
    free: int


def find_libpq() -> Libpq | None:
    """`None` where psycopg is not compiled."""
    module = sys.modules.get(pq.PGconn.__module__)
    if pq.__impl__ == "python" or module is None or module.__file__ is None:
        return None
    try:
        library = ctypes.CDLL(module.__file__)  # it is loaded: this finds what it is linked with
        return Libpq(_address(library.PQgetCopyData), _address(library.PQfreemem))
    except (OSError, AttributeError):
        return None


def _address(function: Any) -> int:
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    return address
