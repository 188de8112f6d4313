"""The oplog: everything that was changed, in order, bounded; and the cluster's time, which it defines."""

from __future__ import annotations

import asyncio
import bisect
import time
from dataclasses import dataclass, field
from typing import Final

import bson

from .deltas import Description, Difference, describe

_COMPACT_AT: Final = 4096


@dataclass(slots=True)
class Entry:
    """One change. `operation` is the event's operationType; documents are bytes."""

    operation: str
    db: str
    coll: str
    uuid: bytes | None
    key: bytes | None = None
    document: bytes | None = None
    difference: Difference | None = None
    before: bytes | None = None
    """The pre-image, where the collection keeps them."""

    after: bytes | None = None
    to: tuple[str, str] | None = None
    """Where a collection was renamed to."""

    details: bytes | None = None
    """`operationDescription`."""

    state_before: bytes | None = None
    """`stateBeforeChange` of a modify event."""

    transaction: bytes | None = None
    """The elements `txnNumber` and `lsid` of an event, if it belongs to a transaction."""

    timestamp: int = 0
    index: int = 0
    wall_ms: int = 0
    _description: Description | None = field(default=None, repr=False)

    @property
    def description(self) -> Description:
        """What an update changed."""
        if self._description is None:
            assert self.difference is not None
            self._description = describe(self.difference)
        return self._description

    @property
    def position(self) -> tuple[int, int]:
        """Where the entry stands in the order of all."""
        return self.timestamp, self.index


class Oplog:
    """Entries with absolute numbers: `first` is the oldest kept, `end` the number that the next one gets."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._entries: list[Entry] = []
        self._dropped = 0
        """Entries at the list's start that are gone but not yet cut off."""

        self.first = 0
        self.truncated = False
        self.last_timestamp = int(time.time()) << 32 | 1
        self._waiting: set[asyncio.Future[None]] = set()
        self._held: tuple[int, int] | None = None
        """End and time beyond which nothing counts as committed by a majority."""

    @property
    def end(self) -> int:
        """The number of the entry to come."""
        return self.first + len(self._entries) - self._dropped

    @property
    def majority(self) -> tuple[int, int]:
        """The number and the time up to which entries are committed by a majority: change streams see no further."""
        return self._held or (self.end, self.last_timestamp)

    def hold_majority(self, *, hold: bool) -> None:
        """Let the majority stay where it is from now on, or catch up."""
        self._held = self.majority if hold else None
        self.wake()

    @property
    def oldest_timestamp(self) -> int:
        """The time of the oldest entry; resuming from before it is impossible once something was dropped."""
        entries = self._entries
        return entries[self._dropped].timestamp if self._dropped < len(entries) else self.last_timestamp

    def tick(self) -> int:
        """Advance the cluster's time and return it."""
        seconds = int(time.time())
        if seconds > self.last_timestamp >> 32:
            self.last_timestamp = seconds << 32 | 1
        else:
            self.last_timestamp += 1
        return self.last_timestamp

    def note(self) -> None:
        """Write a no-op, as an idle server does: only time advances."""
        self.tick()
        self.wake()

    def append(self, entries: list[Entry]) -> None:
        """Add entries that belong together: they share one time and count their index."""
        timestamp = self.tick()
        wall_ms = int(time.time() * 1000)
        for index, entry in enumerate(entries):
            entry.timestamp = timestamp
            entry.index = index
            entry.wall_ms = wall_ms
        self._entries += entries
        surplus = self.end - self.first - self._size
        if surplus > 0:
            self.truncate(surplus)
        if self._waiting:
            self.wake()

    def truncate(self, count: int) -> None:
        """Forget the oldest entries."""
        count = min(count, self.end - self.first)
        self.first += count
        self._dropped += count
        self.truncated = self.truncated or count > 0
        if self._dropped > _COMPACT_AT and self._dropped * 2 > len(self._entries):
            del self._entries[: self._dropped]
            self._dropped = 0

    def entry(self, number: int) -> Entry:
        """The entry of an absolute number between `first` and `end`."""
        return self._entries[number - self.first + self._dropped]

    def find(self, timestamp: int, index: int = 0) -> int:
        """The number of the first entry that is not before a position."""
        at = bisect.bisect_left(self._entries, (timestamp, index), lo=self._dropped, key=lambda entry: entry.position)
        return self.first + at - self._dropped

    async def wait(self, timeout_seconds: float) -> None:
        """Return when something was appended, or after the time."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.add(waiter)
        try:
            await asyncio.wait_for(waiter, timeout_seconds)
        except TimeoutError:
            pass
        finally:
            self._waiting.discard(waiter)

    def wake(self) -> None:
        """Let everybody who waits look again."""
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)


def to_timestamp(value: int) -> bson.Timestamp:
    """The BSON value of a time that is kept as one number."""
    return bson.Timestamp(value >> 32, value & 0xFFFFFFFF)


def from_timestamp(value: bson.Timestamp) -> int:
    """A BSON timestamp as one number."""
    return value.time << 32 | value.inc
