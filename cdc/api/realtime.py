"""Live streams of the feed: `/ws`, `/api/changes/stream`, and `/stats` about them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket

from cdc.api.change import cursor_of
from cdc.api.feed import Feed
from cdc.api.filters import Filters
from cdc.api.hub import Hub
from cdc.api.operation import operation
from cdc.api.principal import PRINCIPAL, Principal
from cdc.api.requests import read_headers, read_query
from cdc.api.responses import answer, failure
from cdc.api.sse import EventStream
from cdc.api.websocket import WebSocketClient
from cdc.feed.gap import find_gap
from cdc.http_config import Http
from cdc.status import StreamsStatus

MAX_CHANNELS_SHOWN: Final = 1_000
"""In `/stats`: those with the most subscribers."""


StreamSince = Annotated[
    str, msgspec.Meta(pattern="^[0-9]{1,19}$", description="A cursor (for times, poll once). Left out: now.")
]


class StreamQuery(Filters, frozen=True, rename="camel", forbid_unknown_fields=True):
    """What `GET /api/changes/stream` takes. Without `since` it begins now."""

    since: StreamSince | msgspec.UnsetType = msgspec.UNSET
    ticket: str | msgspec.UnsetType = msgspec.UNSET


LastEventId = Annotated[
    str, msgspec.Meta(pattern="^[0-9]{0,19}$", description="The cursor that came last; empty: nothing yet.")
]


class StreamHeaders(msgspec.Struct, frozen=True):
    """`Last-Event-ID` wins over `since`: it is what an EventSource sends when it comes back."""

    last_event_id: LastEventId | msgspec.UnsetType = msgspec.field(default=msgspec.UNSET, name="Last-Event-ID")


class Realtime:
    """Routes of live streams, and the hub behind them."""

    def __init__(self, feed: Feed, http: Http) -> None:
        self._feed = feed
        self._hub = Hub(feed, max_clients=http.max_clients, max_clients_each=http.max_clients_each)

    def routes(self) -> list[BaseRoute]:
        """The routes of this group."""
        return [
            WebSocketRoute("/ws", self.websocket),
            Route("/api/changes/stream", self.stream, methods=["GET"]),
            Route("/stats", self.stats, methods=["GET"]),
        ]

    def status(self) -> StreamsStatus:
        """A snapshot of all streams."""
        return StreamsStatus(
            connections=self._hub.clients,
            channels=dict(self._hub.subscribers().most_common(MAX_CHANNELS_SHOWN)),
            sent=self._hub.stats.sent,
            frames=self._hub.stats.frames,
            dropped=self._hub.stats.dropped,
            cursor=str(self._feed.ring.head),
            connected=self._feed.connected,
        )

    @operation("read", {}, tickets=True)
    async def websocket(self, websocket: WebSocket) -> None:
        """Subscriptions to channels, over a WebSocket."""
        principal: Principal = websocket.scope[PRINCIPAL]
        if not self._hub.has_room(principal):
            await websocket.send_denial_response(_too_many())
            return
        await WebSocketClient(self._hub, websocket).run()

    @operation("read", {200: "text/event-stream"}, query=StreamQuery, headers=StreamHeaders, tickets=True)
    async def stream(self, request: Request) -> Response:
        """Changes as server-sent events, as they happen."""
        hub, feed = self._hub, self._feed
        principal: Principal = request.scope[PRINCIPAL]
        query, headers = read_query(request, StreamQuery), read_headers(request, StreamHeaders)
        wanted = query.wanted(principal.limits)
        since = headers.last_event_id or query.since
        gap, cursor = None, feed.head
        if since:
            cursor = cursor_of(since)
            gap = await feed.call(find_gap, feed.reader, cursor, wanted)
        if not hub.has_room(principal):
            return _too_many()

        async def stream(receive: Receive, send: Send) -> None:
            await EventStream(hub, principal, receive, send).run(wanted, cursor, gap)

        return _StreamResponse(stream)

    @operation("read", {200: StreamsStatus})
    async def stats(self, request: Request) -> Response:
        """What the live streams do. Who is limited to channels sees the others' names nowhere."""
        status, limits = self.status(), request.scope[PRINCIPAL].limits
        if limits.channels is not None:
            seen = {name: count for name, count in status.channels.items() if name in limits.channels}
            status = msgspec.structs.replace(status, channels=seen)
        return answer(status)


class _StreamResponse(Response):
    def __init__(self, stream: Callable[[Receive, Send], Awaitable[None]]) -> None:
        super().__init__()
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI
        """Respond until one side ends it."""
        await self._stream(receive, send)


def _too_many() -> Response:
    return failure(503, "too many clients", hint="try again later, or raise http.max_clients")
