"""Who may talk to the daemon: tokens, and protection from web pages that a browser on this machine has open."""

from __future__ import annotations

import hmac
import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from cdc.api.responses import failure
from cdc.config import Token

_SAFE_METHODS = frozenset({"GET", "HEAD"})


class Guard:
    """ASGI middleware that answers 401 or 403 before anything else looks at a request.

    With a token, everything but `/health` needs `Authorization: Bearer TOKEN`. Without one the address is loopback, and
    a browser is the way in from outside: requests from other origins and for DNS names are refused.
    """

    def __init__(self, app: ASGIApp, token: Token | None) -> None:
        self._app = app
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse, or pass on."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if self._token is not None and scope["path"] != "/health" and not self._authorized(headers):
            answer = failure(401, "the token is missing or wrong", hint="send Authorization: Bearer TOKEN")
            answer.headers["WWW-Authenticate"] = "Bearer"
        elif self._token is None and not _is_address(_host(headers)):
            # a web page may have pointed its own name at 127.0.0.1, and is then no "other origin"
            answer = failure(403, "the Host header is no IP address and not localhost", hint="or set a http_token")
        elif scope.get("method") not in _SAFE_METHODS and _cross_origin(headers):
            answer = failure(403, "a web page of another origin must not do this")
        else:
            await self._app(scope, receive, send)
            return
        await answer(scope, receive, send)

    def _authorized(self, headers: Headers) -> bool:
        assert self._token is not None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(given.strip().encode(), self._token.reveal().encode())
        return same and scheme.lower() == "bearer"


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


def _cross_origin(headers: Headers) -> bool:
    """Whether a browser says that another site's page sends this. Programs send no Origin."""
    origin = headers.get("origin")
    return origin is not None and origin.lower().partition("://")[2] != headers.get("host", "").lower()
