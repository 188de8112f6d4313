"""Packed transactions of one document each, from a source whose positions and images are BSON (see `cdc.packed`).

All numbers are little-endian. First how many inserts, updates and deletes there are, and where the last change begins
(u32 each). Then the changes: operation, which parts there are (u8 each: 1 after, 2 delta), table (u16), when it was
committed (i64, milliseconds since 1970), and then documents, which begin with their lengths: the position, the key, and
those parts. Each change is a transaction; its position is its end, too.
"""

from __future__ import annotations

from struct import Struct, error
from typing import Final

from cdc.change import Change, Delta, Summary, Transaction
from cdc.packed import NEVER_PACKED, Packed, truncated

_SUMMARY: Final = Struct("<4I")
_CHANGE: Final = Struct("<BBHq")
_LENGTH: Final = Struct("<I")

_AFTER: Final = 1
_DELTA: Final = 2
_SMALLEST: Final = 5


class PackedDocuments(Packed):
    """Inserts, updates and deletes outside of transactions, at least one; `before` is never there. data: as above."""

    __slots__ = ()

    def __init__(self, data: bytes) -> None:
        """Raises `DecodeError` where there is no first or no last change; what lies between is looked at later."""
        try:
            *counts, last_at = _SUMMARY.unpack_from(data)
        except error:
            raise truncated(data) from None
        (first, _), (last, _) = transaction_at(data, _SUMMARY.size), transaction_at(data, last_at)
        count = sum(counts)
        summary = Summary(count, True, (*counts, *NEVER_PACKED), first.position, last.position, last.commit_time)
        super().__init__(data, count, summary)

    def unpacked(self) -> list[Transaction]:
        """All of them, as new objects."""
        return unpack(self.data)


def unpack_in_python(data: bytes) -> list[Transaction]:
    """Take packed transactions apart, behind their summary. Raises only `DecodeError`."""
    at, found = _SUMMARY.size, []
    while at < len(data):
        transaction, at = transaction_at(data, at)
        found.append(transaction)
    return found


def transaction_at(data: bytes, at: int) -> tuple[Transaction, int]:
    """The transaction that begins at a byte, and where it ends. Raises only `DecodeError`."""
    try:
        operation, parts, table, milliseconds = _CHANGE.unpack_from(data, at)
    except error:
        raise truncated(data) from None
    position, at = _document_at(data, at + _CHANGE.size)
    key, at = _document_at(data, at)
    after = delta = None
    if parts & _AFTER:
        after, at = _document_at(data, at)
    if parts & _DELTA:
        delta, at = _document_at(data, at)
    change = Change(operation, table, key, None, after, None if delta is None else Delta(delta))
    return Transaction(position, position, milliseconds * 1000, 0, 0, True, [change]), at


def _document_at(data: bytes, at: int) -> tuple[bytes, int]:
    try:
        (size,) = _LENGTH.unpack_from(data, at)
    except error:
        raise truncated(data) from None
    if not _SMALLEST <= size <= len(data) - at:
        raise truncated(data)
    return data[at : at + size], at + size


try:
    from cdc import _packed
except ImportError:
    unpack = unpack_in_python
else:
    unpack = _packed.unpack_documents
