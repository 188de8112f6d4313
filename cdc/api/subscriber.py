"""What a WebSocket and an event stream have in common: cursors, and a loop that sends what is behind them."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final

import structlog
from starlette.types import Message, Send
from starlette.websockets import WebSocketDisconnect

from cdc.api.hub import Hub
from cdc.api.principal import Principal
from cdc.api.topic import Encode, Frame, Topic
from cdc.errors import TransientError
from cdc.feed.gap import Gap
from cdc.feed.store import Wanted

AWAY_SECONDS: Final = 1.0
"""How long a stream waits that cannot read what is behind it, as the store is away."""

log = structlog.get_logger()


class Ended(Exception):
    """The stream has to end. code: as a WebSocket closes."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


@dataclass(eq=False, slots=True)
class Stream:
    """How far a client is in one topic. told: the cursor that it was told, or has of the last event."""

    topic: Topic
    cursor: int
    told: int


class Subscriber(ABC):
    """One client of a hub."""

    def __init__(self, hub: Hub, principal: Principal, encode: Encode, send: Send) -> None:
        self.hub = hub
        self.principal = principal
        self.sending_since: float | None = None
        self.streams: dict[str, Stream] = {}
        self._encode = encode
        self._send = send
        self._woken = asyncio.Event()
        self._idle = False
        self._due = False
        self._task: asyncio.Task[object] | None = None
        self._ended: Ended | None = None

    def wake(self) -> None:
        """Look for what is behind the cursors: at once, or (waking a task takes longer than sending) in the task."""
        if not (self._idle and self._send_now()):
            self._woken.set()

    def tell_cursors(self) -> None:
        """Say how far the streams are, if they have moved without events."""
        self._due = True
        self._woken.set()

    def end(self, code: int, reason: str) -> None:
        """End the task that is in `running`, once."""
        if self._ended is None and self._task is not None:
            self._ended = Ended(code, reason)
            self.sending_since = None
            self._task.cancel()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around the life of a stream, in its task: raises `Ended` where `end` was called meanwhile."""
        self._task = asyncio.current_task()
        assert self._task is not None
        try:
            with self.hub.joined(self):
                yield
        except asyncio.CancelledError:
            if self._ended is None or self._task.uncancel():
                raise
            raise self._ended from None
        finally:
            for stream in self.streams.values():
                self.hub.leave_topic(self, stream.topic)

    def add(self, name: str, wanted: Wanted, cursor: int) -> None:
        """Begin a stream behind `cursor`."""
        topic = self.hub.join_topic(self, name, wanted, self.principal.limits, self._encode)
        self.streams[name] = Stream(topic, cursor, cursor)
        self.wake()

    def remove(self, name: str) -> bool:
        """End a stream; False if there is none."""
        stream = self.streams.pop(name, None)
        if stream is not None:
            self.hub.leave_topic(self, stream.topic)
        return stream is not None

    async def pull(self) -> None:
        """Send what is behind the cursors, whenever there is something. Until cancelled."""
        try:
            while True:
                self._idle = True
                await self._woken.wait()
                self._idle = False
                self._woken.clear()
                await self._catch_up()
                if self._due:
                    self._due = False
                    await self._tell()
        except Exception as exc:
            log.error("a stream failed", exc_info=exc)
            self.end(1011, "unexpected")

    @abstractmethod
    async def deliver(self, payload: bytes) -> None:
        """Send a frame."""

    def deliver_now(self, payload: bytes) -> bool:  # noqa: ARG002 - for those who can
        """Send a frame; False, and nothing is sent, where that has to wait."""
        return False

    @abstractmethod
    async def deliver_cursors(self, cursors: dict[str, int]) -> None:
        """Send how far streams have come without events."""

    @abstractmethod
    async def deliver_gap(self, name: str, gap: Gap) -> None:
        """Send that changes are missing behind the stream's cursor. The stream is removed, or goes on behind them."""

    async def put(self, message: Message) -> None:
        """Give a message to the server, which waits as long as the client has not taken what was sent before."""
        self.sending_since = time.monotonic()
        with suppress(OSError, WebSocketDisconnect):  # it is gone: whoever receives hears of it, too
            await self._send(message)
        self.sending_since = None

    def _send_now(self) -> bool:
        """Send what is at hand; False where something is left for the task to do."""
        for stream in self.streams.values():
            stream.cursor = stream.topic.skip(stream.cursor, self.hub.feed.head)
            if stream.cursor < stream.topic.last:
                frame = self.hub.frames.at_hand(stream.topic, stream.cursor)
                if frame is None or (frame.payload is not None and not self.deliver_now(frame.payload)):
                    return False
                self._took(stream, frame)
        return all(stream.cursor >= stream.topic.last for stream in self.streams.values())

    def _took(self, stream: Stream, frame: Frame) -> None:
        stream.cursor = frame.cursor
        if frame.payload is not None:
            stream.told = frame.cursor
            self.hub.stats.frames += 1
            self.hub.stats.sent += frame.events

    async def _catch_up(self) -> None:
        try:
            while await self._turn():
                await asyncio.sleep(0)
        except TransientError:
            await asyncio.sleep(AWAY_SECONDS)
            self.wake()

    async def _tell(self) -> None:
        moved = {name: stream for name, stream in self.streams.items() if stream.cursor > stream.told}
        if moved:
            for stream in moved.values():
                stream.told = stream.cursor
            await self.deliver_cursors({name: stream.cursor for name, stream in moved.items()})

    async def _turn(self) -> bool:
        """One frame of each stream; whether there may be more at once."""
        more = False
        for name, stream in tuple(self.streams.items()):
            stream.cursor = stream.topic.skip(stream.cursor, self.hub.feed.head)
            if stream.cursor < stream.topic.last:
                more |= await self._advance(name, stream)
        return more

    async def _advance(self, name: str, stream: Stream) -> bool:
        before = stream.cursor
        found = await self.hub.frames.behind(stream.topic, before)
        if self.streams.get(name) is not stream:  # it was unsubscribed meanwhile
            return False
        if isinstance(found, Gap):
            await self.deliver_gap(name, found)
            return True
        self._took(stream, found)
        if found.payload is not None:
            await self.deliver(found.payload)
        return before < found.cursor < stream.topic.last
