"""Cluster times: the moments by which reads without a snapshot and the stream of changes are compared.

A resume token is opaque but for one thing that the manual promises from version 4.0 on: tokens are hexadecimal strings
that sort as their events do. They can because they begin with the cluster time, and that is all that is read here, to
answer one question: is the stream past everything that was there at some moment? (Two positions within one moment are
never compared: events of a transaction share theirs.)
"""

from __future__ import annotations

from typing import Final

from cdc.errors import DecodeError
from cdc.mongodb import walk
from cdc.position import SourcePosition

NEVER: Final = 2**64 - 1
"""Behind every moment there is."""

_TIMESTAMP: Final = "82"
"""How a key string says that a timestamp follows."""

_PREFIX: Final = 18

_TOKEN_HEAD: Final = b"\x02_data\x00"
_TOKEN_TIME: Final = slice(17, 33)


def moment(position: SourcePosition) -> int:
    """The cluster time of a position, as a number: seconds in the upper 32 bits, the counter in the lower.

    position: a resume token, or what `encode_moment` made. Raises `DecodeError` for anything else.
    """
    if not isinstance(position, bytes):
        raise DecodeError("a resume token is wanted, not an LSN")
    if position[4:11] == _TOKEN_HEAD and position[15:17] == b"82" and len(position) > _TOKEN_TIME.stop:
        return _timestamp(position[_TOKEN_TIME])  # asked for each transaction while a copy is being caught up with
    for element in walk.elements(position):
        if element.name == b"clusterTime" and element.kind == walk.TIMESTAMP:
            seconds, increment = walk.timestamp_at(position, element.start)
            return seconds << 32 | increment
        if element.name == b"_data" and element.kind == walk.STRING:
            return _leading_timestamp(walk.string_at(position, element.start, element.end))
    raise DecodeError("neither a resume token nor a cluster time")


def encode_moment(number: int) -> bytes:
    """A position that only says when: `moment` reads it, no stream can start there."""
    return walk.document(walk.element(walk.TIMESTAMP, b"clusterTime", number.to_bytes(8, "little")))


def has_passed(position: SourcePosition, end: SourcePosition) -> bool:
    """Whether a stream that stands at `position` has sent every event of the moment `end`, and of all before it.

    False while in doubt: at the same moment there may be more to come.
    """
    return moment(position) > moment(end)


def format_moment(number: int) -> str:
    """For people: seconds since 1970-01-01 UTC, and the counter, as servers log them."""
    return f"{number >> 32}:{number & 0xFFFFFFFF}"


def _leading_timestamp(data: str) -> int:
    if not data.startswith(_TIMESTAMP) or len(data) < _PREFIX:
        raise DecodeError(f"not a resume token that sorts: {data[:40]!r}")
    return _timestamp(data[2:_PREFIX].encode("ascii", "replace"))


def _timestamp(digits: bytes) -> int:
    try:
        return int(digits, 16)
    except ValueError:
        raise DecodeError(f"not a resume token that sorts: {digits!r}") from None
