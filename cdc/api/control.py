"""Routes that change something: pause and resume, hold and release."""

from __future__ import annotations

import asyncio
from typing import Annotated, Final

import msgspec
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from cdc.api.backend import Backend
from cdc.api.responses import answer
from cdc.position import format_position, parse_position

MAX_BODY_BYTES: Final = 64 * 1024
BODY_TIMEOUT_SECONDS: Final = 10.0


class HoldRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of `POST /sinks/{name}/hold`.

    until: a position, as status shows it; `null` for where the sink stands. seconds: after these the hold ends by
    itself, and so does the waiting for it.
    """

    until: str | None
    seconds: Annotated[float, msgspec.Meta(gt=0, le=3600)] = 60.0


class Control:
    """Each route calls one method of the daemon, in a thread: it may wait for a pipeline."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def routes(self) -> list[Route]:
        """The routes of this group."""
        return [
            Route("/pause/{name}", self.pause, methods=["POST"]),
            Route("/resume/{name}", self.resume, methods=["POST"]),
            Route("/sinks/{name}/hold", self.hold, methods=["POST"]),
            Route("/sinks/{name}/release", self.release, methods=["POST"]),
        ]

    async def pause(self, request: Request) -> Response:
        """Pause a source or a sink; said to a paused one, nothing changes."""
        await run_in_threadpool(self._backend.pause, request.path_params["name"])
        return answer({"paused": True})

    async def resume(self, request: Request) -> Response:
        """Let a paused one go on."""
        await run_in_threadpool(self._backend.resume, request.path_params["name"])
        return answer({"paused": False})

    async def hold(self, request: Request) -> Response:
        """Make a sink stand still at a position, until it is released or the time is over."""
        wanted = msgspec.json.decode(await _body(request), type=HoldRequest)
        until = None if wanted.until is None else parse_position(wanted.until)
        position = await run_in_threadpool(self._backend.hold, request.path_params["name"], until, wanted.seconds)
        return answer({"held": True, "position": format_position(position)})

    async def release(self, request: Request) -> Response:
        """Let a held sink go on."""
        await run_in_threadpool(self._backend.release, request.path_params["name"])
        return answer({"held": False})


async def _body(request: Request) -> bytes:
    """The request's body; 413 for a large one, 408 for one that does not come."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_SECONDS):
            async for block in request.stream():
                body += block
                if len(body) > MAX_BODY_BYTES:
                    raise HTTPException(413, f"the body is larger than {MAX_BODY_BYTES} bytes")
    except TimeoutError:
        raise HTTPException(408, "the body did not come in time") from None
    return bytes(body)
