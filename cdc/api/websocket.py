"""`/ws`: subscriptions to channels, over one WebSocket. What travels is in `docs/http-api.md`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Final

import msgspec
from starlette.websockets import WebSocket

from cdc import __version__
from cdc.api.filters import ALL_CHANNELS
from cdc.api.hub import Hub
from cdc.api.principal import PRINCIPAL
from cdc.api.subscriber import Ended, Subscriber
from cdc.api.topic import Event
from cdc.errors import TransientError
from cdc.feed.gap import Gap, find_gap
from cdc.feed.store import FeedReader, Wanted

MAX_SUBSCRIPTIONS: Final = 100
MAX_MESSAGE_BYTES: Final = 64 * 1024
"""Of a message that a client sends; a longer one ends the connection with 1009."""

MAX_MESSAGES: Final = 100
PER_SECONDS: Final = 5.0
"""A client that sends more messages in this time is disconnected."""

WRITE_TEXT: Final = "cdc.write_text"
"""An extension of ASGI: the scope has a function that sends a text message which is encoded already."""

WriteText = Callable[[bytes], bool]
"""Returns at once; False where it cannot send without waiting."""

Channel = Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
Channels = Annotated[tuple[Channel, ...], msgspec.Meta(min_length=1, max_length=MAX_SUBSCRIPTIONS)]
Cursor = Annotated[str, msgspec.Meta(max_length=19, pattern=r"^[0-9]+$")]


class Subscribe(msgspec.Struct, frozen=True, tag="subscribe"):
    """Begin, now or behind a cursor."""

    channels: Channels
    since: Annotated[dict[Channel, Cursor], msgspec.Meta(max_length=MAX_SUBSCRIPTIONS)] = {}


class Unsubscribe(msgspec.Struct, frozen=True, tag="unsubscribe"):
    """End some."""

    channels: Channels


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    """Is answered by a pong with the same id."""

    id: int | Annotated[str, msgspec.Meta(max_length=100)] | None = None


_decoder = msgspec.json.Decoder(Subscribe | Unsubscribe | Ping)
_encoder = msgspec.json.Encoder()


class _Events(msgspec.Struct, frozen=True, tag="events"):
    channel: str
    events: Sequence[Event]


def encode_events(channel: str, events: Sequence[Event]) -> bytes:
    """A frame of events of one subscription."""
    return _encoder.encode(_Events(channel, events))


class WebSocketClient(Subscriber):
    """One connection, from its acceptance to its end."""

    def __init__(self, hub: Hub, websocket: WebSocket) -> None:
        super().__init__(hub, websocket.scope[PRINCIPAL], encode_events, websocket.send)
        self._receive = websocket.receive
        self._write: WriteText | None = websocket.scope.get("extensions", {}).get(WRITE_TEXT)
        self._messages = 0
        self._counting_since = 0.0

    async def run(self) -> None:
        """Accept it, and serve it until one side ends it."""
        try:
            with self.running():
                await self._receive()  # websocket.connect
                await self.put({"type": "websocket.accept"})
                await self._say({"type": "welcome", "version": __version__})
                async with asyncio.TaskGroup() as tasks:
                    pulling = tasks.create_task(self.pull(), name="websocket:pull")
                    await self._listen()
                    pulling.cancel()
        except Ended as ended:
            await self.put({"type": "websocket.close", "code": ended.code, "reason": ended.reason})

    async def deliver(self, payload: bytes) -> None:
        """Send events: as they are, where the server can do that."""
        if not self.deliver_now(payload):
            await self.put({"type": "websocket.send", "text": payload.decode()})

    def deliver_now(self, payload: bytes) -> bool:
        """Send events, if the client takes them."""
        return self._write is not None and self._write(payload)

    async def deliver_cursors(self, cursors: dict[str, int]) -> None:
        """Say how far idle channels are."""
        await self._say({"type": "cursors", "cursors": _as_text(cursors)})

    async def deliver_gap(self, name: str, gap: Gap) -> None:
        """End the subscription; the client may begin it again behind the gap."""
        self.remove(name)
        await self._say({"type": "gap", "channel": name, "oldest": str(gap.oldest), "cursor": str(gap.cursor)})

    async def _listen(self) -> None:
        while (message := await self._receive())["type"] == "websocket.receive":
            self._check_rate()
            text = message.get("text")
            if text is None:
                self.end(1003, "only text frames are understood")
                continue
            try:
                await self._handle(_decoder.decode(text))
            except msgspec.DecodeError as exc:
                await self._refuse(f"the message is not understood: {exc}", 'for example {"type": "ping"}')

    def _check_rate(self) -> None:
        now = time.monotonic()
        if now - self._counting_since > PER_SECONDS:
            self._counting_since, self._messages = now, 0
        self._messages += 1
        if self._messages > MAX_MESSAGES:
            self.end(1008, "too many messages")

    async def _handle(self, message: Subscribe | Unsubscribe | Ping) -> None:
        match message:
            case Subscribe():
                await self._subscribe(message)
            case Unsubscribe():
                ended = [channel for channel in message.channels if self.remove(channel)]
                await self._say({"type": "unsubscribed", "channels": ended})
            case Ping():
                await self._say({"type": "pong", "id": message.id})

    async def _subscribe(self, message: Subscribe) -> None:
        allowed = [channel for channel in dict.fromkeys(message.channels) if await self._allows(channel)]
        if len(self.streams.keys() | allowed) > MAX_SUBSCRIPTIONS:
            await self._refuse(f"more than {MAX_SUBSCRIPTIONS} subscriptions", "unsubscribe from others first")
            return
        since = {channel: int(message.since[channel]) for channel in allowed if channel in message.since}
        feed = self.hub.feed
        try:
            cursors = dict.fromkeys(allowed, feed.head) | since
            wanted = {channel: (self._wanted(channel), cursor) for channel, cursor in since.items()}
            gaps = await feed.call(_find_gaps, feed.reader, wanted) if since else {}
        except TransientError as exc:
            await self._refuse(str(exc), exc.hint or "subscribe again later")
            return
        for channel in allowed:
            self.remove(channel)
        for channel, gap in gaps.items():
            del cursors[channel]
            await self.deliver_gap(channel, gap)
        await self._say({"type": "subscribed", "cursors": _as_text(cursors)})
        for channel, cursor in cursors.items():
            self.add(channel, self._wanted(channel), cursor)

    async def _allows(self, channel: str) -> bool:
        channels = self.principal.limits.channels
        if channels is None or channel in channels or channel == ALL_CHANNELS:
            return True
        await self._refuse("the token does not allow this channel", "", channel=channel)
        return False

    def _wanted(self, channel: str) -> Wanted:
        if channel == ALL_CHANNELS:
            return Wanted(channels=self.principal.limits.channels)
        return Wanted(channels=frozenset({channel}))

    async def _refuse(self, error: str, hint: str, **more: str) -> None:
        await self._say({"type": "error", "error": error, "hint": hint, **more})

    async def _say(self, message: Mapping[str, object]) -> None:
        await self.put({"type": "websocket.send", "text": _encoder.encode(message).decode()})


def _find_gaps(reader: FeedReader, since: Mapping[str, tuple[Wanted, int]]) -> dict[str, Gap]:
    """By channel. None, if nothing at all is missing behind the first cursor, and the last is not beyond the end."""
    cursors = [cursor for _, cursor in since.values()]
    if all(find_gap(reader, cursor, Wanted()) is None for cursor in (min(cursors), max(cursors))):
        return {}
    return {
        channel: gap
        for channel, (wanted, cursor) in since.items()
        if (gap := find_gap(reader, cursor, wanted)) is not None
    }


def _as_text(cursors: Mapping[str, int]) -> dict[str, str]:
    return {channel: str(cursor) for channel, cursor in cursors.items()}
