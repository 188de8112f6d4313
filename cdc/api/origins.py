"""Protection from web pages that a browser has open: those of other origins, and those that rebind their name to us."""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from cdc.api.responses import failure

_SAFE_METHODS = frozenset({"GET", "HEAD"})


class Origins:
    """ASGI middleware that answers 403 to what a page of a foreign origin must not do: POST, and open a WebSocket.

    What such a page may GET it cannot read, since it gets no CORS headers. `local`: nobody needs a token, and only this
    machine reaches us; so no web page may come by a name of its own either.
    """

    def __init__(self, app: ASGIApp, allowed: Collection[str], *, local: bool) -> None:
        self._app = app
        self._allowed = frozenset(allowed)
        self._local = local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse, or pass on."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if self._local and not _is_address(_host(headers)):
            # a web page may have pointed its own name at 127.0.0.1, and is then no "other origin"
            answer = failure(403, "the Host header is no IP address and not localhost", hint="or set [[http.tokens]]")
        elif scope.get("method") not in _SAFE_METHODS and self._foreign(headers):
            answer = failure(403, "a web page of another origin must not do this", hint="or add it to http.origins")
        else:
            await self._app(scope, receive, send)
            return
        await answer(scope, receive, send)

    def _foreign(self, headers: Headers) -> bool:
        """Whether a browser says that another site's page sends this. Programs send no Origin."""
        origin = headers.get("origin")
        if origin is None or origin in self._allowed:
            return False
        return origin.lower().partition("://")[2] != headers.get("host", "").lower()


def _host(headers: Headers) -> str:
    try:
        return urlsplit(f"//{headers.get('host', '')}").hostname or ""
    except ValueError:
        return ""


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    return True
