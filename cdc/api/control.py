"""Routes that change something: pause and resume, resync and replay, hold and release; how much is logged."""

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
from cdc.config import LogLevel
from cdc.position import format_position, parse_position
from cdc.steering import Ordered, Replayed


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


class ResyncRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of `POST /resync/{name}`.

    tables: by their names at the source, of a sink; empty for all. yes: also where the source or the target may be
    another database than before.
    """

    tables: tuple[str, ...] = ()
    yes: bool = False


class ReplayRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename={"since": "from"}):
    """Body of `POST /sinks/{name}/replay`.

    from: a seq, a time as ISO 8601, or how long ago, such as `2h`. dry_run: only say how many changes that are.
    """

    since: str
    dry_run: bool = False


class Logging(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of `POST /log-level`, and its answer."""

    level: LogLevel


class Control:
    """Each route calls one method of the daemon, in a thread: it may wait for a pipeline."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def routes(self) -> list[BaseRoute]:
        """The routes of this group."""
        return [
            Route("/log-level", self.log_level, methods=["POST"]),
            Route("/pause/{name}", self.pause, methods=["POST"]),
            Route("/resume/{name}", self.resume, methods=["POST"]),
            Route("/resync/{name}", self.resync, methods=["POST"]),
            Route("/sinks/{name}/replay", self.replay, methods=["POST"]),
            Route("/sinks/{name}/hold", self.hold, methods=["POST"]),
            Route("/sinks/{name}/release", self.release, methods=["POST"]),
        ]

    @operation("admin", {200: Logging}, body=Logging)
    async def log_level(self, request: Request) -> Response:
        """Log more or less, until the configuration is read again."""
        wanted = await read_body(request, Logging)
        self._backend.set_log_level(wanted.level)
        return answer(wanted)

    @operation("admin", {200: Paused}, errors=(404, 409))
    async def pause(self, request: Request) -> Response:
        """Pause a source or a sink; said to a paused one, nothing changes."""
        await run_in_threadpool(self._backend.pause, request.path_params["name"])
        return answer(Paused(True))

    @operation("admin", {200: Paused}, errors=(404, 409))
    async def resume(self, request: Request) -> Response:
        """Let a paused one go on, and a failed one try again."""
        await run_in_threadpool(self._backend.resume, request.path_params["name"])
        return answer(Paused(False))

    @operation("admin", {200: Ordered}, body=ResyncRequest, errors=(404, 409))
    async def resync(self, request: Request) -> Response:
        """Let a sink, or all sinks of a source, be compared with the source and put right, while the stream goes on."""
        wanted = await read_body(request, ResyncRequest)
        name = request.path_params["name"]
        return answer(await run_in_threadpool(self._backend.resync, name, wanted.tables, yes=wanted.yes))

    @operation("admin", {200: Replayed}, body=ReplayRequest, errors=(404, 409))
    async def replay(self, request: Request) -> Response:
        """Deliver to a mirror once more what the queue keeps from a point on."""
        wanted = await read_body(request, ReplayRequest)
        name = request.path_params["name"]
        return answer(await run_in_threadpool(self._backend.replay, name, wanted.since, dry_run=wanted.dry_run))

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
