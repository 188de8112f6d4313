"""What all routes share of a feed: one reader, one publisher, and one thread that follows what is new."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, ParamSpec, Protocol, TypeVar

from cdc.api.follower import Follower
from cdc.api.ring import Ring
from cdc.errors import TransientError
from cdc.feed.place import Place, reader, writer
from cdc.feed.record import PUBLISHED, Record
from cdc.feed.store import FeedReader, FeedWriter

P = ParamSpec("P")
T = TypeVar("T")

THREADS: Final = 4
"""For calls of the store: so many at a time; the others wait their turn."""


class Watcher(Protocol):
    """Is told of everything that is new, in the event loop. Must not block."""

    @property
    def clients(self) -> int:
        """For how many it wants to know; while there are none it need not be told."""
        ...

    def news(self, records: Sequence[Record], before: int) -> None:
        """All records behind the cursor `before`, up to the feed's new head."""
        ...

    def reset(self) -> None:
        """The feed's place was lost: it is another feed now, or what is new was removed before it could be read.

        Whoever holds a cursor must begin again with it, and will hear of the gap.
        """
        ...

    def stop(self) -> None:
        """The feed ends."""
        ...


class Feed:
    """A feed, for an event loop: `start` it there, and `stop` it there.

    ring: what is new, from when somebody has begun to watch. ends: how often all who waited were told to end.
    """

    def __init__(self, reader: FeedReader, publisher: FeedWriter, ring: Ring | None = None) -> None:
        self.reader = reader
        self.publisher = publisher
        self.ring = ring or Ring()
        self.ends = 0
        self._watchers: list[Watcher] = []
        self._advanced = asyncio.Event()
        self._publishing = asyncio.Lock()
        self._pool = ThreadPoolExecutor(THREADS, "feed")
        self._follower: Follower | None = None

    @classmethod
    def at(cls, place: Place) -> Feed:
        """The feed that is kept there. Does not connect yet."""
        return cls(reader(place), writer(place, PUBLISHED))

    @property
    def head(self) -> int:
        """The last id that was seen; raises `TransientError` as long as the store was never reached."""
        if self._follower is None or not self._follower.located:
            raise TransientError("the feed is not there yet", hint="is its database running?")
        return self.ring.head

    @property
    def connected(self) -> bool:
        """Whether the store answered when it was last asked."""
        return self._follower is not None and self._follower.connected

    def watch(self, watcher: Watcher) -> None:
        """Tell somebody all that is new, from now on."""
        self._watchers.append(watcher)

    async def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a blocking method of `reader` in one of the feed's threads."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, lambda: function(*args, **kwargs))

    async def publish(self, record: Record) -> Record | None:
        """Store one record, as `FeedWriter.publish` does: one at a time."""
        async with self._publishing:
            return await self.call(self.publisher.publish, record)

    async def prune(self, entity_type: str | None, recorded_before: int, rows: int) -> int:
        """Remove old records, as `FeedWriter.prune` does."""
        async with self._publishing:
            return await self.call(self.publisher.prune, entity_type, recorded_before, rows)

    async def news(self, after: int, timeout_seconds: float, ends: int) -> bool:
        """Wait until the feed is beyond `after`; False if it is not in time, or waiting has ended.

        ends: as of when somebody began. Records that nobody asked for count too.
        """
        try:
            async with asyncio.timeout(timeout_seconds):
                while self.ring.head <= after and self.ends == ends:
                    await self._advanced.wait()
        except TimeoutError:
            return False
        return self.ring.head > after

    def start(self) -> None:
        """Begin to follow. Call it in the event loop."""
        self._follower = Follower(self.reader, asyncio.get_running_loop(), self._restart, self._take, self._skip)
        self._follower.start()

    def end_streams(self) -> None:
        """Tell the clients that it ends, and let those that wait for news have their answers.

        A server that is about to stop waits for them no longer than for other requests.
        """
        self.ends += 1
        self._wake()
        for watcher in self._watchers:
            watcher.stop()

    async def stop(self) -> None:
        """End the streams and the follower, and disconnect."""
        self.end_streams()
        if self._follower is not None:
            self._follower.stop()
            await asyncio.to_thread(self._follower.join)
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        self._pool.shutdown()
        self.reader.close()
        self.publisher.close()

    def _restart(self, head: int) -> None:
        self.ring.restart(head)
        if self._follower is not None and self._follower.located:  # or else nobody has a place to lose
            for watcher in self._watchers:
                watcher.reset()
        self._wake()

    def _take(self, records: Sequence[Record], cursor: int) -> None:
        before = self.ring.head
        self.ring.extend(records, cursor)
        for watcher in self._watchers:
            watcher.news(records, before)
        self._wake()

    def _skip(self, head: int) -> bool:
        """Whoever comes later reads from the store what `ring` does not hold."""
        if any(watcher.clients for watcher in self._watchers):
            return False
        self.ring.restart(head)
        self._wake()
        return True

    def _wake(self) -> None:
        advanced, self._advanced = self._advanced, asyncio.Event()
        advanced.set()
