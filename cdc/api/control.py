"""Routes that change something: pause and resume, hold and release."""

from __future__ import annotations

from typing import Annotated

import msgspec
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from cdc.api.backend import Backend
from cdc.api.operation import operation
from cdc.api.requests import read_body
from cdc.api.responses import answer
from cdc.position import format_position, parse_position


class HoldRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of `POST /sinks/{name}/hold`.

    until: a position, as status shows it; `null` for where the sink stands. seconds: after these the hold ends by
    itself, and so does the waiting for it.
    """

    until: str | None
    seconds: Annotated[float, msgspec.Meta(gt=0, le=3600)] = 60.0


class Paused(msgspec.Struct, frozen=True):
    """Whether the source or sink is paused now."""

    paused: bool


class Held(msgspec.Struct, frozen=True, omit_defaults=True):
    """Whether the sink is held now, and where."""

    held: bool
    position: str | msgspec.UnsetType = msgspec.UNSET


class Control:
    """Each route calls one method of the daemon, in a thread: it may wait for a pipeline."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def routes(self) -> list[BaseRoute]:
        """The routes of this group."""
        return [
            Route("/pause/{name}", self.pause, methods=["POST"]),
            Route("/resume/{name}", self.resume, methods=["POST"]),
            Route("/sinks/{name}/hold", self.hold, methods=["POST"]),
            Route("/sinks/{name}/release", self.release, methods=["POST"]),
        ]

    @operation("admin", {200: Paused}, errors=(404, 409))
    async def pause(self, request: Request) -> Response:
        """Pause a source or a sink; said to a paused one, nothing changes."""
        await run_in_threadpool(self._backend.pause, request.path_params["name"])
        return answer(Paused(True))

    @operation("admin", {200: Paused}, errors=(404, 409))
    async def resume(self, request: Request) -> Response:
        """Let a paused one go on."""
        await run_in_threadpool(self._backend.resume, request.path_params["name"])
        return answer(Paused(False))

    @operation("admin", {200: Held}, body=HoldRequest, errors=(404, 409))
    async def hold(self, request: Request) -> Response:
        """Make a sink stand still at a position, until it is released or the time is over."""
        wanted = await read_body(request, HoldRequest)
        until = None if wanted.until is None else parse_position(wanted.until)
        position = await run_in_threadpool(self._backend.hold, request.path_params["name"], until, wanted.seconds)
        return answer(Held(True, format_position(position) or msgspec.UNSET))

    @operation("admin", {200: Held}, errors=(404, 409))
    async def release(self, request: Request) -> Response:
        """Let a held sink go on."""
        await run_in_threadpool(self._backend.release, request.path_params["name"])
        return answer(Held(False))
