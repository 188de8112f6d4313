"""Finds the next frame of a stream: made once for all streams that stand at the same place."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import Final

from cdc.api.feed import Feed
from cdc.api.topic import MAX_EVENTS, Frame, Topic
from cdc.feed.gap import Gap, find_gap
from cdc.feed.store import Scan

RING_RECORDS: Final = 2_000
"""How many of the records in memory are looked at for one frame."""

MAX_FRAMES: Final = 200
"""How many are kept. Streams that keep up stand all at the same place; those that came back together do, too."""


class Frames:
    """The next frame for any topic and cursor: from memory, or from the store for a stream that is further behind."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed
        self._kept: OrderedDict[tuple[Topic, int], Frame] = OrderedDict()
        self._reading: dict[tuple[Topic, int], asyncio.Future[Frame | Gap]] = {}

    async def behind(self, topic: Topic, cursor: int) -> Frame | Gap:
        """The next frame behind `cursor`, perhaps without events. Raises `TransientError` while the store is away."""
        return self.at_hand(topic, cursor) or await self._older(topic, cursor)

    def at_hand(self, topic: Topic, cursor: int) -> Frame | None:
        """The same from memory alone; `None` where it is not there."""
        return self._kept.get((topic, cursor)) or self._recent(topic, cursor)

    def _recent(self, topic: Topic, cursor: int) -> Frame | None:
        ring = self._feed.ring
        records = ring.after(cursor, RING_RECORDS)
        if records is None:
            return None
        through = records[-1].id if len(records) == RING_RECORDS else ring.head
        return self._keep(topic, cursor, topic.frame(records, max(cursor, through)))

    async def _older(self, topic: Topic, cursor: int) -> Frame | Gap:
        """Read from the store; those who want the same meanwhile wait for the same answer."""
        key = (topic, cursor)
        reading = self._reading.get(key)
        if reading is None:
            reading = self._reading[key] = asyncio.ensure_future(self._read(topic, cursor))
            reading.add_done_callback(lambda _: self._reading.pop(key))
        return await asyncio.shield(reading)  # whoever leaves must not take the answer from the others

    async def _read(self, topic: Topic, cursor: int) -> Frame | Gap:
        found = await self._feed.call(self._scan, topic, cursor)
        if isinstance(found, Gap):
            return found
        return self._keep(topic, cursor, topic.frame(found.records, found.cursor))

    def _scan(self, topic: Topic, cursor: int) -> Scan | Gap:
        reader = self._feed.reader
        found = reader.scan(cursor, topic.wanted, MAX_EVENTS)
        # only now: what was removed before this scan could see it has been noted
        return find_gap(reader, cursor, topic.wanted) or found

    def _keep(self, topic: Topic, cursor: int, frame: Frame) -> Frame:
        if frame.cursor > cursor:
            self._kept[topic, cursor] = frame
            if len(self._kept) > MAX_FRAMES:
                self._kept.popitem(last=False)
        return frame
