"""Keeps connections from holding what others need: those that dawdle, and those that do not read, are cut off."""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import Collection, Hashable
from http import HTTPStatus
from typing import Any, Final

import structlog
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Frame, Opcode
from websockets.http11 import Request

from cdc.api.websocket import WRITE_TEXT

REQUEST_SECONDS: Final = 10.0
"""For the head of a request to arrive."""

STALLED_SECONDS: Final = 15.0
"""For a client to take something of a response that waits for it."""

CLOSING_SECONDS: Final = 5.0
"""For a client to take what was sent before its connection is closed."""

MAX_FRAGMENTS: Final = 1_000
"""Of one message. (Its bytes are limited, too; a fragment may be empty.)"""

log = structlog.get_logger()


class Connections:
    """Watches over all connections of a server. `sweep` is to be called about every second, in the event loop."""

    def __init__(self, limit: int) -> None:
        """limit: of open connections. Beyond it, one that has not asked for anything yet makes room for a new one."""
        self.limit = limit
        self._concerns: dict[asyncio.Protocol, tuple[Hashable, float]] = {}

    def admit(self, newcomer: Http, others: Collection[asyncio.Protocol]) -> None:
        """Make room for a new connection, or end it if all others are at work."""
        if len(others) > self.limit:
            idle = (other for other in others if isinstance(other, Http) and other.is_waiting and other is not newcomer)
            next(idle, newcomer).transport.abort()

    def sweep(self, protocols: Collection[asyncio.Protocol]) -> None:
        """Cut off those about which there was the same concern for too long."""
        now = time.monotonic()
        known, self._concerns = self._concerns, {}
        for protocol in list(protocols):
            found = _concern(protocol)
            if found is None:
                continue
            concern, seconds = found
            before, since = known.get(protocol, (concern, now))
            self._concerns[protocol] = (concern, since if before == concern else now)
            if before == concern and now - since > seconds:
                log.info("connection cut off", concern=concern[0])
                protocol.transport.abort()  # type: ignore[attr-defined]


def _concern(protocol: Any) -> tuple[tuple[str, int], float] | None:
    """What is wrong with a connection, if anything, and how many seconds it may be so."""
    if protocol.transport.is_closing():
        return ("does not take its last bytes", 0), CLOSING_SECONDS
    if isinstance(protocol, Http):
        if protocol.flow.write_paused:
            return ("does not read", id(protocol.cycle)), STALLED_SECONDS
        if protocol.is_waiting:
            return ("does not finish its request", id(protocol.cycle)), REQUEST_SECONDS
    return None


class Http(H11Protocol):
    """HTTP/1.1. A server sets `watched_by` on a class of its own."""

    watched_by: Connections

    @property
    def is_waiting(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count it."""
        super().connection_made(transport)
        self.watched_by.admit(self, self.connections)


class WebSocket(WebSocketsSansIOProtocol):
    """A WebSocket whose buffers are bounded, also against a client that never reads."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.close_timeout = CLOSING_SECONDS

    async def send(self, message: Any) -> None:
        """Send it; a close frame at once, behind what a slow client has not read: nothing else follows it."""
        if message["type"] == "websocket.close":
            self.writable.set()
        await super().send(message)
        if message["type"] == "websocket.http.response.body" and self.close_sent:
            self.handshake_complete = True  # by a refusal; uvicorn would log each as an error of the application

    def handle_connect(self, event: Request) -> None:
        """Offer `write_text` to the application."""
        super().handle_connect(event)
        if self.response.status_code == HTTPStatus.SWITCHING_PROTOCOLS:
            extensions: dict[str, object] = {**(self.scope["extensions"] or {}), WRITE_TEXT: self.write_text}
            self.scope["extensions"] = extensions  # type: ignore[typeddict-item]

    def write_text(self, payload: bytes) -> bool:
        """Send a text message that is encoded already, as thousands of clients may get the same.

        False, and nothing is sent, where `send` would have to wait, or there is nobody any more.
        """
        if not self.writable.is_set() or self.close_sent or self.transport.is_closing():
            return False
        self.transport.writelines((_text_header(len(payload)), payload))
        return True

    def handle_ping(self) -> None:
        """Answer, unless the client does not read its answers."""
        if self.writable.is_set():
            super().handle_ping()
        else:
            self.conn.data_to_send()  # only the pong is in there

    def handle_cont(self, event: Frame) -> None:
        """Take one more fragment of a message."""
        if len(self.frames) < MAX_FRAGMENTS:
            super().handle_cont(event)
        elif not self.close_sent:
            self.conn.fail(1009, "too many fragments")
            self.handle_parser_exception()


def _text_header(size: int) -> bytes:
    """RFC 6455, section 5.2: of a whole text message of that many bytes, as a server sends it."""
    first = 0x80 | Opcode.TEXT
    if size < 126:
        return struct.pack("!BB", first, size)
    if size < 65536:
        return struct.pack("!BBH", first, 126, size)
    return struct.pack("!BBQ", first, 127, size)
