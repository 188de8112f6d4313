"""The HTTP server inside the daemon's event loop: uvicorn, without its own signals, logs and lifespan."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import uvicorn
from starlette.types import ASGIApp

from cdc.errors import FatalError

MAX_CONNECTIONS: Final = 100
MAX_HEADER_BYTES: Final = 64 * 1024


class Server:
    """Listens from the moment it is made; `serve` answers until `stop`."""

    def __init__(self, app: ASGIApp, address: tuple[str, int]) -> None:
        """Raises `FatalError` where the address cannot be listened on."""
        self._socket = _listen(address)
        self._uvicorn = _Uvicorn(
            uvicorn.Config(
                app,
                http="h11",
                ws="none",
                lifespan="off",
                access_log=False,
                log_config=None,
                server_header=False,
                limit_concurrency=MAX_CONNECTIONS,
                h11_max_incomplete_event_size=MAX_HEADER_BYTES,
                timeout_keep_alive=5,
                timeout_graceful_shutdown=1,
            )
        )

    @property
    def address(self) -> tuple[str, int]:
        """Where this machine reaches it: the port is the real one, a wildcard host is the loopback."""
        host, port = self._socket.getsockname()[:2]
        return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port  # noqa: S104 - compared, not bound

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
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone: they are the daemon's, which drains first."""
        yield


def _listen(address: tuple[str, int]) -> socket.socket:
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    try:
        return socket.create_server(address, family=family)
    except OSError as exc:
        raise FatalError(
            f"cannot listen on {address[0]}:{address[1]}: {exc.strerror or exc}",
            hint="set daemon.http to a free address of this machine",
        ) from exc
