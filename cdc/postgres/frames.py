"""The stream's messages as one run of bytes, as libpq hands them out where that is compiled.

Each message is behind its length (u32, little-endian), and without XLogData's header.
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from cdc.postgres import _frames
else:
    try:
        from cdc.postgres import _frames
    except ImportError:
        _frames = None

compiled = _frames
"""What takes messages from libpq and packs them. `None` where no C compiler was there: then they come one by one."""

DATA_AT: Final = 25
"""Size of XLogData's header, behind which a message begins that comes by itself."""

_LENGTH: Final = Struct("<I")

LENGTH_BYTES: Final = _LENGTH.size
"""In front of a message, of which the first byte says what it is."""

BEGIN: Final = ord("B")


class Frames:
    """Messages of the stream, in order; those of a `list` are the same, each behind its header."""

    __slots__ = ("data",)

    def __init__(self, data: bytes) -> None:
        self.data = data


def behind(data: bytes, at: int) -> int:
    """Where the message ends that begins at a place, if there is one."""
    return at + LENGTH_BYTES + int(_LENGTH.unpack_from(data, at)[0]) if at < len(data) else at


def messages(data: bytes, at: int, end: int) -> Iterator[bytes]:
    """The messages between two places where one begins."""
    while at < end:
        start, at = at + LENGTH_BYTES, behind(data, at)
        yield data[start:at]
