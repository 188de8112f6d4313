"""What every process that answers HTTP has."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from cdc.api.operation import operation
from cdc.api.responses import answer


class Alive(msgspec.Struct, frozen=True):
    """It can only be true."""

    alive: bool = True


class Service:
    """Routes that need neither a daemon nor a feed."""

    def routes(self) -> list[BaseRoute]:
        """The routes of this group."""
        return [Route("/health", self.health)]

    @operation("public", {200: Alive})
    async def health(self, _request: Request) -> Response:
        """200 as long as the process lives and its event loop turns."""
        return answer(Alive())
