"""The stream's messages as one run of bytes, as libpq hands them out where that is compiled.

Each message is behind its length (u32, little-endian), and without XLogData's header.
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct
from typing import Final

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
