"""Packed transactions of rows, from a source whose positions are numbers (see `cdc.packed`).

All numbers are little-endian. First the summary: how many transactions there are, how many of them end here, how many
inserts, updates and deletes there are (u32 each), the positions of the first and the last transaction (u64), when the
last one was committed (i64), and whether it ends (u8). Then each transaction: position, end (u64), commit time
(i64), xid, first ordinal, number of changes (u32), whether it is complete (u8); and behind it its changes: operation
(u8), table (u16), which parts there are (u8: 1 key, 2 before, 4 after), and each of these behind its length (u32).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import chain
from struct import Struct, error
from typing import Final

import msgspec

from cdc.change import Change, Image, Operation, Summary, Transaction
from cdc.packed import NEVER_PACKED, Packed, truncated

_SUMMARY: Final = Struct("<5IQQq?")
SUMMARY_BYTES: Final = _SUMMARY.size
"""Where the first transaction begins."""

_TRANSACTION: Final = Struct("<QQqIII?")
_CHANGE: Final = Struct("<BHB")
_LENGTH: Final = Struct("<I")

_PARTS: Final = 3

Span = tuple[int, int]
"""Where one or more transactions stand: from a byte up to another one."""


class PackedRows(Packed):
    """Whole transactions, or a part of one; of inserts, updates and deletes only. data: as above."""

    __slots__ = ()

    def __init__(self, data: bytes) -> None:
        """Raises `DecodeError` where that is no summary; what follows is looked at later."""
        try:
            count, complete, *counts, first, last, commit_time, ended = _SUMMARY.unpack_from(data)
        except error:
            raise truncated(data) from None
        super().__init__(data, count, Summary(complete, ended, (*counts, *NEVER_PACKED), first, last, commit_time))

    def unpacked(self) -> list[Transaction]:
        """All of them, as new objects."""
        return unpack(self.data)

    def spans(self, marks: frozenset[bytes]) -> list[Span]:
        """Where the transactions are that have any of these byte strings in their images, in order; perhaps others."""
        search = _pattern(marks).search
        found: list[int] = []
        match = search(self.data, SUMMARY_BYTES)
        while match is not None:
            found.append(match.start())
            match = search(self.data, match.start() + 1)  # one that only looks like it may overlap
        return transactions_at(self.data, found) if found else []

    def rest(self, span: Span) -> Span:
        """Where all transactions are that come later."""
        return span[1], len(self.data)

    def part(self, span: Span) -> list[Transaction]:
        """The transactions that are there."""
        start, end = span
        return unpack(self.data[:SUMMARY_BYTES] + self.data[start:end])

    def altered(
        self, spans: Iterable[Span], alter: Callable[[Sequence[Transaction]], Sequence[Transaction] | None]
    ) -> PackedRows | None:
        """The same with what `alter` makes of the transactions in some places, in order: as many, with less changes.

        It returns `None` for what is to stay, and so does this where all stays. A span is taken when the one before it
        is dealt with.
        """
        counts = list(self._summary.counts)
        pieces: list[bytes] = []
        at = SUMMARY_BYTES
        for span in spans:
            was = self.part(span)
            now = alter(was)
            if now is None:
                continue
            for sign, some in ((-1, was), (1, now)):
                for change in chain.from_iterable(each.changes for each in some):
                    counts[change.operation] += sign
            pieces += (self.data[at : span[0]], *map(_pack, now))
            at = span[1]
        if not pieces:
            return None
        head = _SUMMARY.pack(
            *(self._count, self._summary.complete, *counts[: len(Operation) - len(NEVER_PACKED)]),
            *(self._summary.first, self._summary.last, self._summary.commit_time, self._summary.ended),
        )
        return PackedRows(b"".join((head, *pieces, self.data[at:])))


def packed_part(head: Transaction, counts: Sequence[int], changes: bytes) -> PackedRows:
    """A part of a transaction that goes on later. head: without its changes, which are packed, so many of each kind."""
    summary = _SUMMARY.pack(1, 0, *counts, head.position, head.position, head.commit_time, False)
    return PackedRows(b"".join((summary, _head(head, sum(counts)), changes)))


def unpack_in_python(data: bytes) -> list[Transaction]:
    """Take packed transactions apart, behind their summary. Raises only `DecodeError`."""
    at, found = SUMMARY_BYTES, []
    try:
        while at < len(data):
            position, end, commit_time, xid, first_ordinal, count, complete = _TRANSACTION.unpack_from(data, at)
            at += _TRANSACTION.size
            changes = []
            for _ in range(count):
                change, at = change_at(data, at)
                changes.append(change)
            found.append(Transaction(position, end, commit_time, xid, first_ordinal, complete, changes))
    except error:
        raise truncated(data) from None
    return found


def change_at(data: bytes, at: int) -> tuple[Change, int]:
    """The change that begins at a byte, and where it ends."""
    operation, table, parts = _CHANGE.unpack_from(data, at)
    at += _CHANGE.size
    images: list[Image | None] = [None] * _PARTS
    for part in range(_PARTS):
        if parts >> part & 1:
            start = at + _LENGTH.size
            at = start + _LENGTH.unpack_from(data, at)[0]
            if at > len(data):
                raise truncated(data)
            images[part] = data[start:at]
    key, before, after = images
    return Change(operation, table, key, before, after), at


def transactions_at_in_python(data: bytes, places: Sequence[int]) -> list[Span]:
    """Where the transactions are in which these bytes stand, both in order. Raises only `DecodeError`."""
    found: list[Span] = []
    at = SUMMARY_BYTES
    try:
        for place in places:
            while at <= place:
                start, at = at, _end(data, at)
                if place < at:
                    found.append((start, at))
    except error:
        raise truncated(data) from None
    return found


def _end(data: bytes, at: int) -> int:
    """Where the transaction ends that begins at a byte."""
    count = _TRANSACTION.unpack_from(data, at)[5]
    at += _TRANSACTION.size
    for _ in range(count):
        _, at = change_at(data, at)
    return at


def _head(transaction: Transaction, changes: int) -> bytes:
    position, end, commit_time, xid, first_ordinal, complete, _ = msgspec.structs.astuple(transaction)
    return _TRANSACTION.pack(position, end, commit_time, xid, first_ordinal, changes, complete)


def _pack(transaction: Transaction) -> bytes:
    pieces = [_head(transaction, len(transaction.changes))]
    for change in transaction.changes:
        images = (change.key, change.before, change.after)
        parts = sum(1 << part for part, image in enumerate(images) if image is not None)
        pieces.append(_CHANGE.pack(change.operation, change.table, parts))
        pieces += (part for image in images if image is not None for part in (_LENGTH.pack(len(image)), image))
    return b"".join(pieces)


@lru_cache(maxsize=64)
def _pattern(marks: frozenset[bytes]) -> re.Pattern[bytes]:
    """What finds any of them."""
    return re.compile(b"|".join(map(re.escape, sorted(marks))))


try:
    from cdc import _packed
except ImportError:
    unpack, transactions_at = unpack_in_python, transactions_at_in_python
else:
    unpack, transactions_at = _packed.unpack_rows, _packed.rows_at
