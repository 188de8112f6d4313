"""The newest records of the feed, in memory: what most readers want is read from the store once, for all of them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from operator import attrgetter
from typing import Final

from cdc.feed.record import Record

MAX_RECORDS: Final = 20_000
MAX_BYTES: Final = 16 * 1024 * 1024

_OVERHEAD_BYTES: Final = 600
"""What a record weighs besides its images, roughly."""

_id = attrgetter("id")


class Ring:
    """All records with `floor < id <= head`, and no others. Bounded by number and by bytes: the oldest go first."""

    def __init__(self, max_records: int = MAX_RECORDS, max_bytes: int = MAX_BYTES) -> None:
        self.floor = 0
        self.head = 0
        self._max_records = max_records
        self._max_bytes = max_bytes
        self._records: list[Record] = []
        self._bytes = 0

    def restart(self, head: int) -> None:
        """Forget everything; go on behind `head`."""
        self.floor = self.head = head
        self._records.clear()
        self._bytes = 0

    def extend(self, records: Sequence[Record], head: int) -> None:
        """Add what is behind `head` so far, in order of ids, up to the new `head`."""
        self._records += records
        self._bytes += sum(map(_size, records))
        self.head = head
        surplus = self._surplus()
        if surplus:
            self._bytes -= sum(map(_size, self._records[:surplus]))
            self.floor = self._records[surplus - 1].id
            del self._records[:surplus]

    def after(self, cursor: int, limit: int) -> Sequence[Record] | None:
        """The first `limit` records behind `cursor`; `None` if some of them are not here any more."""
        if cursor < self.floor:
            return None
        start = bisect_right(self._records, cursor, key=_id)
        return self._records[start : start + limit]

    def _surplus(self) -> int:
        """How many to drop. A quarter at once: dropping from the front of a list moves all others."""
        if len(self._records) > self._max_records:
            return len(self._records) - self._max_records * 3 // 4
        surplus, size = 0, self._bytes
        if size > self._max_bytes:
            while size > self._max_bytes * 3 // 4 and surplus < len(self._records):
                size -= _size(self._records[surplus])
                surplus += 1
        return surplus


def _size(record: Record) -> int:
    return _OVERHEAD_BYTES + sum(len(image or b"") for image in (record.before, record.after, record.delta))
