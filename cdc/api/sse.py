"""`/api/changes/stream`: one ordered stream of changes as server-sent events, for whatever speaks plain HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

import msgspec
from starlette.types import Receive, Send

from cdc.api.hub import Hub
from cdc.api.principal import Principal
from cdc.api.subscriber import Ended, Subscriber
from cdc.api.topic import Event
from cdc.feed.gap import Gap
from cdc.feed.store import Wanted

KEEP_ALIVE_SECONDS: Final = 15.0
"""Proxies end a connection on which nothing travels, many after 30 or 60 seconds."""

STREAM: Final = "stream"
"""The name of the only one."""

_HEADERS: Final = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # nginx would keep events back until its buffer is full
]

_ONE_LINE: Final = bytes.maketrans(b"\r\n", b"  ")
"""A line break would end the field. In JSON it can only stand between two tokens."""

_encoder = msgspec.json.Encoder()


def encode_events(channel: str, events: Sequence[Event]) -> bytes:  # noqa: ARG001 - a stream has no channel of its own
    """Events, one after the other."""
    return b"".join(encode(event.event, event, event.cursor) for event in events)


def encode(event: str, data: object, cursor: str) -> bytes:
    """One event."""
    name = event.encode().translate(_ONE_LINE)
    body = _encoder.encode(data).translate(_ONE_LINE)
    return b"id: %b\nevent: %b\ndata: %b\n\n" % (cursor.encode(), name, body)


class EventStream(Subscriber):
    """One response that does not end by itself. All that is wanted is one stream, so that it has one cursor."""

    def __init__(self, hub: Hub, principal: Principal, receive: Receive, send: Send) -> None:
        super().__init__(hub, principal, encode_events, send)
        self._receive = receive

    async def run(self, wanted: Wanted, cursor: int, gap: Gap | None) -> None:
        """Begin the response, and send events until one side ends it. gap: what is missing behind the cursor."""
        try:
            with self.running():
                await self.put({"type": "http.response.start", "status": 200, "headers": _HEADERS})
                await self._put(b": behind %d\n\n" % cursor)
                self.add(STREAM, wanted, cursor)
                if gap is not None:
                    await self.deliver_gap(STREAM, gap)
                async with asyncio.TaskGroup() as tasks:
                    others = [tasks.create_task(each) for each in (self.pull(), self._keep_alive())]
                    while (await self._receive())["type"] != "http.disconnect":
                        pass
                    for task in others:
                        task.cancel()
        except Ended:
            # waits as long as the client does not read: until the server loses patience with it
            await self.put({"type": "http.response.body", "body": b"", "more_body": False})

    async def deliver(self, payload: bytes) -> None:
        """Send events."""
        await self._put(payload)

    async def deliver_cursors(self, cursors: dict[str, int]) -> None:
        """Say how far an idle stream is."""
        for cursor in cursors.values():
            await self._put(encode("cursor", {"cursor": str(cursor)}, str(cursor)))

    async def deliver_gap(self, name: str, gap: Gap) -> None:
        """Say what is missing, and go on behind it."""
        stream = self.streams[name]
        stream.cursor = stream.told = gap.cursor
        cursor = str(gap.cursor)
        await self._put(encode("gap", {"oldest": str(gap.oldest), "cursor": cursor}, cursor))

    async def _keep_alive(self) -> None:
        while True:
            await asyncio.sleep(KEEP_ALIVE_SECONDS)
            await self._put(b": still here\n\n")

    async def _put(self, body: bytes) -> None:
        await self.put({"type": "http.response.body", "body": body, "more_body": True})
