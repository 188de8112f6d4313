"""The ASGI application: routes, guard, and what each error becomes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

import structlog
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from cdc import __version__
from cdc.api.backend import Backend, UnknownName
from cdc.api.changes import Changes
from cdc.api.control import Control
from cdc.api.feed import Feed
from cdc.api.guard import Guard
from cdc.api.keyring import Keyring
from cdc.api.letters import Letters
from cdc.api.observe import FeedReady, Metrics, Observe
from cdc.api.openapi import Document
from cdc.api.origins import Origins
from cdc.api.page import Page
from cdc.api.publish import Publish
from cdc.api.realtime import Realtime
from cdc.api.requests import BadRequest
from cdc.api.responses import failure
from cdc.api.service import Service
from cdc.api.tickets import Tickets
from cdc.errors import CdcError, DecodeError, TransientError
from cdc.http_config import Http
from cdc.letter import UnknownLetter
from cdc.metrics import registry
from cdc.status import HttpStatus

log = structlog.get_logger()


class Group(Protocol):
    """Routes that belong together."""

    def routes(self) -> list[BaseRoute]:
        """Each endpoint declares what it is (`cdc.api.operation`)."""
        ...


def create_app(
    backend: Backend | None = None,
    http: Http = Http(),  # noqa: B008 - frozen
    feed: Feed | None = None,
    keyring: Keyring | None = None,
    http_status: Callable[[], HttpStatus] = HttpStatus,
) -> Starlette:
    """Build the application.

    backend: the daemon; `None` for a gateway that has none. feed: what applications read; `None` where there is none.
    keyring: of `http`, for who wants to change it later. http_status: of the server, for its metrics.
    """
    tickets = Tickets()
    groups: list[Group] = [Service(), Page(), tickets]
    realtime = None
    if backend is not None:
        groups += [Observe(backend), Control(backend), Letters(backend.dead_letters)]
    if feed is not None:
        realtime = Realtime(feed, http)
        groups += [realtime, Changes(feed), Publish(feed)]
        groups += [FeedReady(feed)] if backend is None else []
    status = None if backend is None else backend.status
    groups.append(Metrics(registry(status, None if realtime is None else realtime.status, http_status)))
    routes = [route for group in groups for route in group.routes()]
    routes += Document(routes, version=__version__, guarded=http.guarded).routes()
    return Starlette(
        routes=routes,
        middleware=[
            Middleware(Origins, allowed=http.origins, local=not http.guarded),
            *([_cors(http)] if http.origins else []),
            Middleware(Guard, routes=routes, keyring=keyring or Keyring(http), tickets=tickets),
        ],
        exception_handlers={HTTPException: _http_error, CdcError: _refused, Exception: _unexpected},
    )


def _cors(http: Http) -> Middleware:
    """Credentials are headers that a page sets itself, and never cookies."""
    return Middleware(
        CORSMiddleware,
        allow_origins=http.origins,
        allow_methods=("GET", "POST"),
        allow_headers=("Authorization", "Content-Type", "Idempotency-Key", "Last-Event-ID"),
        max_age=600,
    )


async def _http_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    answer = failure(error.status_code, error.detail)
    answer.headers.update(error.headers or {})
    return answer


async def _refused(_request: Request, error: Exception) -> Response:
    assert isinstance(error, CdcError)
    return failure(_STATUS.get(type(error), 409), str(error), error.hint)


_STATUS: Final = {UnknownName: 404, UnknownLetter: 404, BadRequest: 400, DecodeError: 400, TransientError: 503}
"""Whatever else is refused conflicts with the state that things are in."""


async def _unexpected(request: Request, error: Exception) -> Response:
    log.error("request failed", path=request.url.path, exc_info=error)
    return failure(500, f"unexpected: {type(error).__name__}", hint="the daemon's log tells more")
