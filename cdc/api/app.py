"""The ASGI application: routes, guard, and what each error becomes."""

from __future__ import annotations

from typing import Final

import msgspec
import structlog
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response

from cdc.api.backend import Backend, UnknownName
from cdc.api.control import Control
from cdc.api.guard import Guard
from cdc.api.observe import Observe
from cdc.api.responses import failure
from cdc.config import Token
from cdc.errors import CdcError, DecodeError, TransientError

log = structlog.get_logger()


def create_app(backend: Backend, token: Token | None = None) -> Starlette:
    """Build the application; with a token, everything but `/health` asks for it."""
    return Starlette(
        routes=[*Observe(backend).routes(), *Control(backend).routes()],
        middleware=[Middleware(Guard, token=token)],
        exception_handlers={
            HTTPException: _http_error,
            msgspec.DecodeError: _bad_body,
            CdcError: _refused,
            Exception: _unexpected,
        },
    )


async def _http_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return failure(error.status_code, error.detail)


async def _bad_body(_request: Request, error: Exception) -> Response:
    return failure(400, f"the body is not what is expected: {error}", hint='for example {"until": "16/B374D848"}')


async def _refused(_request: Request, error: Exception) -> Response:
    assert isinstance(error, CdcError)
    return failure(_STATUS.get(type(error), 409), str(error), error.hint)


_STATUS: Final = {UnknownName: 404, DecodeError: 400, TransientError: 504}
"""Whatever else is refused conflicts with the state that things are in."""


async def _unexpected(request: Request, error: Exception) -> Response:
    log.error("request failed", path=request.url.path, exc_info=error)
    return failure(500, f"unexpected: {type(error).__name__}", hint="the daemon's log tells more")
