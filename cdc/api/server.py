"""The HTTP server inside the daemon's event loop: uvicorn, without its own signals, logs and lifespan."""

from __future__ import annotations

import asyncio
import resource
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import uvicorn
from starlette.types import ASGIApp

from cdc.api.certificate import Certificate
from cdc.api.connections import Connections, Http, WebSocket
from cdc.api.crowd import Crowd
from cdc.api.handshakes import Handshakes
from cdc.api.listener import listen
from cdc.api.websocket import MAX_MESSAGE_BYTES

MAX_CONNECTIONS: Final = 2_000
MAX_HEADER_BYTES: Final = 64 * 1024

RESERVE: Final = 100
"""Connections beyond the limit: for what an operator asks, and for those who are still asking."""

PING_SECONDS: Final = 20.0
"""Between two pings of a WebSocket, and for the answer: so that a client that has vanished is noticed."""


class Server:
    """Listens from the moment it is made; `serve` answers until `stop`."""

    def __init__(
        self,
        app: ASGIApp,
        address: tuple[str, int],
        *,
        max_connections: int = MAX_CONNECTIONS,
        certificate: Certificate | None = None,
    ) -> None:
        """Raises `FatalError` where the address cannot be listened on. certificate: `None` answers without TLS."""
        self.certificate = certificate
        self._socket = listen(address)
        _allow_files(max_connections + 2 * RESERVE)
        connections = Connections(max_connections + RESERVE)
        self._uvicorn = _Uvicorn(
            uvicorn.Config(
                Crowd(app, max_connections),
                http=type("WatchedHttp", (Http,), {"watched_by": connections}),
                ws=WebSocket,
                ws_max_size=MAX_MESSAGE_BYTES,
                ws_ping_interval=PING_SECONDS,
                ws_ping_timeout=PING_SECONDS,
                ws_per_message_deflate=False,  # each client would take CPU, and 100 KB, of its own
                lifespan="off",
                access_log=False,
                log_config=None,
                server_header=False,
                h11_max_incomplete_event_size=MAX_HEADER_BYTES,
                timeout_keep_alive=5,
                timeout_graceful_shutdown=1,
                ssl_context_factory=None if certificate is None else self._front_context,
            ),
            connections,
        )

    @property
    def address(self) -> tuple[str, int]:
        """Where this machine reaches it: the port is the real one, a wildcard host is the loopback."""
        host, port = self._socket.getsockname()[:2]
        return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port  # noqa: S104 - compared, not bound

    def _front_context(self, *_: object) -> ssl.SSLContext:
        """Every connection begins with it, and goes on with that of today's certificate."""
        assert self.certificate is not None
        context = self.certificate.context
        context.sni_callback = self._take_context
        return context

    def _take_context(self, connection: ssl.SSLObject, _name: str | None, _front: ssl.SSLContext) -> None:
        """Called with each handshake, also where the client names nobody."""
        assert self.certificate is not None
        connection.context = self.certificate.context

    async def serve(self) -> None:
        """Answer until `stop`."""
        await self._uvicorn.serve(sockets=[self._socket])

    def stop(self) -> None:
        """Let `serve` end: requests at hand get a second."""
        self._uvicorn.should_exit = True

    def close(self) -> None:
        """Stop listening. Safe to call twice."""
        self._socket.close()


class _Uvicorn(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, connections: Connections) -> None:
        super().__init__(config)
        self._connections = connections
        self._accepting: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen; with TLS by ourselves, so that handshakes are watched as well as what comes after them."""
        if self.config.ssl is None:
            await super().startup(sockets)
            return
        assert sockets is not None
        handshakes = Handshakes(self.config.ssl, self._new_protocol, self._room)
        self._accepting = asyncio.create_task(handshakes.accept(sockets[0]), name="handshakes")
        self.servers = []
        self.started = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept nobody any more, and end what is open."""
        if self._accepting is not None:
            self._accepting.cancel()
        await super().shutdown(sockets)

    def _new_protocol(self) -> asyncio.Protocol:
        protocol: asyncio.Protocol = self.config.http_protocol_class(  # type: ignore[call-arg]
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        return protocol

    def _room(self) -> int:
        return self._connections.limit - len(self.server_state.connections)

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second."""
        if counter % 10 == 0:
            self._connections.sweep(self.server_state.connections)
        return await super().on_tick(counter)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone: they are the daemon's, which drains first."""
        yield


def _allow_files(wanted: int) -> None:
    """Raise the limit of open files, as far as that is allowed: often it is 1,024, and a client takes one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted += 1_000  # for all else that the process has open
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
        )
