"""Keeps applications from crowding out the operator."""

from __future__ import annotations

from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

from cdc.api.responses import failure

OPERATORS: Final = ("/health", "/ready", "/status", "/metrics", "/pause/", "/resume/", "/sinks/")
"""What has to be answered in a flood, too."""


class Crowd:
    """ASGI middleware: 503 to requests and WebSockets beyond a number at a time, but not to the operator's."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit
        self._inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse, or pass on and count."""
        if scope["type"] == "lifespan" or scope["path"].startswith(OPERATORS):
            await self._app(scope, receive, send)
            return
        if self._inside >= self._limit:
            await failure(503, "too many connections", hint="try again later")(scope, receive, send)
            return
        self._inside += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._inside -= 1
