"""Where a source, the queue and a sink stand."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import NewType

import msgspec

from cdc.errors import DecodeError

Lsn = NewType("Lsn", int)
"""A byte position in PostgreSQL's write-ahead log.

As a position of a stream it means: every transaction whose commit record starts below it is done.
(The server skips by the same rule when asked to start at an LSN, and a transaction is visible in the
snapshot of a slot if and only if its commit record starts below the slot's consistent point.)
"""

ResumeToken = NewType("ResumeToken", bytes)
"""A MongoDB resume token, as raw BSON. Opaque: tokens have no order that we may rely on."""

SourcePosition = int | bytes
"""An `Lsn` or a `ResumeToken`. Values of different sources are never compared."""


class Position(msgspec.Struct, frozen=True):
    """Where a sink stands, as it is stored in its target together with the data.

    Where `source` is an LSN it decides; otherwise `seq` does, which has a meaning only within the queue
    of that `queue_id`.
    """

    queue_id: str
    seq: int
    source: SourcePosition


def as_lsn(position: SourcePosition) -> Lsn:
    """The position of a PostgreSQL source; raises `TypeError` for a resume token."""
    if not isinstance(position, int):
        raise TypeError("an LSN is wanted, not a resume token")
    return Lsn(position)


def format_lsn(lsn: int) -> str:
    """Format as PostgreSQL does: `16/B374D848`."""
    return f"{lsn >> 32:X}/{lsn & 0xFFFFFFFF:X}"


def parse_lsn(text: str) -> Lsn:
    """Parse PostgreSQL's text form. Raises `DecodeError` on anything else."""
    high, slash, low = text.partition("/")
    try:
        if not slash or len(high) > 8 or len(low) > 8:
            raise ValueError
        return Lsn(int(high, 16) << 32 | int(low, 16))
    except ValueError:
        raise DecodeError(f"not an LSN: {text[:40]!r}") from None


def format_position(position: SourcePosition | None) -> str | None:
    """A form for people and JSON: an LSN in PostgreSQL's notation, a token in hexadecimal."""
    if position is None:
        return None
    return format_lsn(position) if isinstance(position, int) else position.hex()


def describe_position(text: str) -> str:
    """What `format_position` wrote, for a narrow column: of a resume token only when its event happened."""
    try:
        found = re.search(rb"_data\0....82([0-9A-F]{8})", bytes.fromhex(text), re.DOTALL)
    except ValueError:
        return text
    if found is None:
        return text if len(text) <= 20 else f"{text[:20]}…"
    return datetime.fromtimestamp(int(found[1], 16), UTC).strftime("%Y-%m-%d %H:%M:%S")


def parse_position(text: str) -> SourcePosition:
    """Parse what `format_position` wrote. Raises `DecodeError` on anything else."""
    if "/" in text:
        return parse_lsn(text)
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise DecodeError(f"not a position: {text[:40]!r}") from None
