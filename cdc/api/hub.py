"""Who is connected to the feed's live streams, and when they look for news."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final, Protocol

import msgspec
import structlog

from cdc.api.feed import Feed
from cdc.api.filters import ALL_CHANNELS
from cdc.api.frames import Frames
from cdc.api.principal import Principal
from cdc.api.topic import Encode, Topic
from cdc.feed.record import Record
from cdc.feed.store import Wanted
from cdc.feed.visibility import Limits

SLICE: Final = 50
"""How many clients are woken at once; between two slices the event loop does what else there is to do."""

SHARE: Final = 3
"""The next round begins no sooner than so many times the CPU time of the last one: that leaves time for the rest."""

SEND_SECONDS: Final = 10.0
"""Who has not taken a frame after this time is disconnected."""

TICK_SECONDS: Final = 1.0
IDLE_SECONDS: Final = 10.0
"""So often an idle stream is told its cursors."""

log = structlog.get_logger()


class Client(Protocol):
    """One open stream, to its hub.

    sending_since: since when it has been waiting to get rid of a frame (monotonic); `None` while it is not.
    """

    principal: Principal
    sending_since: float | None

    def wake(self) -> None:
        """There may be something behind its cursors. Must not block."""
        ...

    def tell_cursors(self) -> None:
        """It may be time to say how far it is."""
        ...

    def end(self, code: int, reason: str) -> None:
        """Let it end. code: as a WebSocket closes."""
        ...


class Stats(msgspec.Struct):
    """Counters since the start. sent: events, times clients. frames: likewise. dropped: clients that did not read."""

    sent: int = 0
    frames: int = 0
    dropped: int = 0


class Hub:
    """All open streams of a gateway. Lives in the event loop.

    Streams pull: each has a cursor for each topic, and looks for what is behind it when it is woken. So there is no
    buffer that could overflow, and nothing is lost or doubled however often it is woken or not.
    """

    def __init__(self, feed: Feed, *, max_clients: int, max_clients_each: int) -> None:
        """max_clients_each: of one principal."""
        self.feed = feed
        self.frames = Frames(feed)
        self.stats = Stats()
        self._max_clients = max_clients
        self._max_clients_each = max_clients_each
        self._clients: set[Client] = set()
        self._running: asyncio.Task[None] | None = None
        self._names: Counter[str] = Counter()
        self._topics: dict[Hashable, Topic] = {}
        self._audiences: dict[Topic, set[Client]] = {}
        self._stirred: set[Topic] = set()
        self._news = asyncio.Event()
        feed.watch(self)

    @property
    def clients(self) -> int:
        """How many are connected."""
        return len(self._clients)

    def subscribers(self) -> Counter[str]:
        """How many streams there are of each channel."""
        found: Counter[str] = Counter()
        for topic, audience in self._audiences.items():
            for channel in topic.wanted.channels or (ALL_CHANNELS,):
                found[channel] += len(audience)
        return found

    def has_room(self, principal: Principal) -> bool:
        """Whether there is a place for another client of this principal."""
        return len(self._clients) < self._max_clients and self._names[principal.name] < self._max_clients_each

    @contextmanager
    def joined(self, client: Client) -> Iterator[None]:
        """Count a client while it is connected."""
        name = client.principal.name
        self._clients.add(client)
        self._names[name] += 1
        if self._running is None:
            self._running = asyncio.create_task(self._run(), name="realtime")
        try:
            yield
        finally:
            self._clients.remove(client)
            self._names -= Counter([name])
            if not self._clients:
                self._running.cancel()
                self._running = None

    def join_topic(self, client: Client, channel: str, wanted: Wanted, limits: Limits, encode: Encode) -> Topic:
        """The topic of a new stream; the client is woken from now on when something of it is new."""
        where = None if limits.where is None else frozenset(limits.where.items())
        key = (channel, wanted, limits.channels, where, encode)
        topic = self._topics.get(key)
        if topic is None:
            topic = self._topics[key] = Topic(key, channel, wanted, limits, encode=encode, head=self.feed.head)
        self._audiences.setdefault(topic, set()).add(client)
        return topic

    def leave_topic(self, client: Client, topic: Topic) -> None:
        """Undo `join_topic`."""
        audience = self._audiences[topic]
        audience.discard(client)
        if not audience:
            del self._audiences[topic]
            if self._topics.get(topic.key) is topic:
                del self._topics[topic.key]

    def news(self, records: Sequence[Record], before: int) -> None:
        """Note which topics have something new."""
        newest = {record.channel: record.id for record in records}
        if not newest:
            return
        for topic in self._audiences:
            channels = newest.keys() if topic.wanted.channels is None else topic.wanted.channels & newest.keys()
            if channels:
                topic.note(max(newest[channel] for channel in channels), before)
                self._stirred.add(topic)
        if self._stirred:
            self._news.set()

    def reset(self) -> None:
        """End all streams: their clients come back with their cursors, and hear of the gap."""
        self._topics.clear()  # what they know is of the old place
        self._end(self._clients, 1012, "the feed has lost its place")

    def stop(self) -> None:
        """End all streams, as the feed ends."""
        self._end(self._clients, 1012, "the service restarts")

    async def _run(self) -> None:
        """As long as there are clients."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._rounds(), name="realtime:rounds")
            tasks.create_task(self._ticks(), name="realtime:ticks")

    async def _rounds(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            started = time.thread_time()
            stirred, self._stirred = self._stirred, set()
            clients = list(dict.fromkeys(client for topic in stirred for client in self._audiences.get(topic, ())))
            for first in range(0, len(clients), SLICE):
                for client in clients[first : first + SLICE]:
                    client.wake()
                await asyncio.sleep(0)  # they send now
            await asyncio.sleep((SHARE - 1) * (time.thread_time() - started))

    async def _ticks(self) -> None:
        ticks = 0
        while True:
            await asyncio.sleep(TICK_SECONDS)
            ticks += 1
            now, unix = time.monotonic(), time.time()
            slow = [each for each in self._clients if each.sending_since and now - each.sending_since > SEND_SECONDS]
            self.stats.dropped += len(slow)
            self._end(slow, 1013, "reads too slowly")
            expired = [each for each in self._clients if (each.principal.expires_at or unix) < unix]
            self._end(expired, 4401, "the token has expired")
            if ticks % (IDLE_SECONDS // TICK_SECONDS) == 0:
                for client in list(self._clients):
                    client.tell_cursors()

    def _end(self, clients: Iterable[Client], code: int, reason: str) -> None:
        ending = list(clients)
        if ending:
            log.info("streams end", count=len(ending), reason=reason)
        for client in ending:
            client.end(code, reason)
