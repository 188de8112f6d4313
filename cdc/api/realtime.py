"""Live streams of the feed: `/ws`, `/api/changes/stream`, and `/stats` about them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket

from cdc.api.change import Cursor, Name, Names, cursor_of
from cdc.api.feed import Feed
from cdc.api.hub import Hub, TooMany
from cdc.api.operation import operation
from cdc.api.principal import PRINCIPAL, Principal
from cdc.api.requests import read_headers, read_query
from cdc.api.responses import answer, failure
from cdc.api.sse import EventStream
from cdc.api.topic import ALL_CHANNELS
from cdc.api.websocket import WebSocketClient
from cdc.feed.gap import find_gap
from cdc.feed.store import Wanted
from cdc.feed.visibility import Limits

MAX_CHANNELS_SHOWN: Final = 1_000
"""In `/stats`: those with the most subscribers."""


class StreamQuery(msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    """`GET /api/changes/stream`. since: a cursor; left out: from now on."""

    channels: Names | msgspec.UnsetType = msgspec.UNSET
    entity_types: Names | msgspec.UnsetType = msgspec.UNSET
    location_id: Name | msgspec.UnsetType = msgspec.UNSET
    since: Cursor | msgspec.UnsetType = msgspec.UNSET
    ticket: str | msgspec.UnsetType = msgspec.UNSET


class StreamHeaders(msgspec.Struct, frozen=True, rename={"last_event_id": "Last-Event-ID"}):
    """What an EventSource sends when it comes back."""

    last_event_id: Cursor | msgspec.UnsetType = msgspec.UNSET


class StatsAnswer(msgspec.Struct, frozen=True):
    """`GET /stats`: of this gateway, since it started.

    connections: open streams. channels: subscribers by name. sent: events, times the clients that got them; frames:
    what they travelled in. dropped: clients that were disconnected as they did not read. cursor: the newest change
    seen. connected: whether the feed's store answers.
    """

    connections: int
    channels: dict[str, int]
    sent: int
    frames: int
    dropped: int
    cursor: str
    connected: bool


class Realtime:
    """Routes of live streams, and the hub behind them."""

    def __init__(self, feed: Feed, *, version: str, max_clients: int, max_clients_each: int | None = None) -> None:
        """max_clients_each: of one principal."""
        self.hub = Hub(feed, max_clients=max_clients, max_clients_each=max_clients_each or max_clients)
        self._version = version

    def routes(self) -> list[BaseRoute]:
        """The routes of this group."""
        return [
            WebSocketRoute("/ws", self.websocket),
            Route("/api/changes/stream", self.stream, methods=["GET"]),
            Route("/stats", self.stats, methods=["GET"]),
        ]

    @operation("read", {}, tickets=True)
    async def websocket(self, websocket: WebSocket) -> None:
        """Subscriptions to channels, over a WebSocket."""
        principal: Principal = websocket.scope[PRINCIPAL]
        try:
            self.hub.check_room(principal)
        except TooMany:
            await websocket.send_denial_response(_too_many())
            return
        await WebSocketClient(self.hub, principal, websocket.receive, websocket.send).run(self._version)

    @operation("read", {200: "text/event-stream"}, query=StreamQuery, headers=StreamHeaders, tickets=True)
    async def stream(self, request: Request) -> Response:
        """Changes as server-sent events, as they happen. `Last-Event-ID` wins over `since`."""
        hub, feed = self.hub, self.hub.feed
        principal: Principal = request.scope[PRINCIPAL]
        query = read_query(request, StreamQuery)
        wanted = _wanted(query, principal.limits)
        given = read_headers(request, StreamHeaders).last_event_id or query.since
        since = cursor_of(given) if given else None
        gap = None if since is None else await feed.call(find_gap, feed.reader, since, wanted.entity_types)
        cursor = feed.head if since is None else since
        try:
            hub.check_room(principal)
        except TooMany:
            return _too_many()

        async def stream(receive: Receive, send: Send) -> None:
            await EventStream(hub, principal, receive, send).run(wanted, cursor, gap)

        return _StreamResponse(stream)

    @operation("read", {200: StatsAnswer})
    async def stats(self, request: Request) -> Response:
        """What the live streams do."""
        hub, limits = self.hub, request.scope[PRINCIPAL].limits
        return answer(
            StatsAnswer(
                connections=hub.clients,
                channels=_visible(dict(hub.subscribers().most_common(MAX_CHANNELS_SHOWN)), limits),
                sent=hub.stats.sent,
                frames=hub.stats.frames,
                dropped=hub.stats.dropped,
                cursor=str(hub.feed.ring.head),
                connected=hub.feed.connected,
            )
        )


class _StreamResponse(Response):
    def __init__(self, stream: Callable[[Receive, Send], Awaitable[None]]) -> None:
        super().__init__()
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI
        """Respond until one side ends it."""
        await self._stream(receive, send)


def _wanted(query: StreamQuery, limits: Limits) -> Wanted:
    channels = frozenset(query.channels) if query.channels else None
    if channels is None or ALL_CHANNELS in channels:
        channels = limits.channels
    return Wanted(frozenset(query.entity_types) if query.entity_types else None, channels, query.location_id or None)


def _visible(channels: dict[str, int], limits: Limits) -> dict[str, int]:
    if limits.channels is None:
        return channels
    return {name: count for name, count in channels.items() if name in limits.channels}


def _too_many() -> Response:
    return failure(503, "too many clients", hint="try again later, or raise http.max_clients")
