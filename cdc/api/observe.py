"""Routes that only look: `/ready` and `/metrics` of any process, `/status` of a daemon."""

from __future__ import annotations

import msgspec
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from cdc.api.backend import Backend
from cdc.api.feed import Feed
from cdc.api.operation import operation
from cdc.api.responses import answer
from cdc.status import DaemonStatus, to_json


class Ready(msgspec.Struct, frozen=True):
    """Whether all sources are connected, and the state of each."""

    ready: bool
    sources: dict[str, str]


class Observe:
    """Answers from one status snapshot each; none waits for a pipeline."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def routes(self) -> list[BaseRoute]:
        """The routes of this group."""
        return [
            Route("/ready", self.ready),
            Route("/status", self.status),
        ]

    @operation("overview", {200: Ready, 503: Ready})
    async def ready(self, _request: Request) -> Response:
        """200 once all sources are connected, 503 otherwise, with the states of those that are not."""
        status = self._backend.status()
        return answer(Ready(status.ready, _states(status)), 200 if status.ready else 503)

    @operation("overview", {200: DaemonStatus})
    async def status(self, _request: Request) -> Response:
        """The whole snapshot. 200 also when unhealthy: `healthy` says so."""
        return Response(to_json(self._backend.status()), media_type="application/json")


class FeedReady:
    """`/ready` of a gateway, which has no sources."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed

    def routes(self) -> list[BaseRoute]:
        """The routes of this group."""
        return [Route("/ready", self.ready)]

    @operation("overview", {200: Ready, 503: Ready})
    async def ready(self, _request: Request) -> Response:
        """200 while the feed can be reached, 503 otherwise."""
        return answer(Ready(self._feed.connected, {}), 200 if self._feed.connected else 503)


class Metrics:
    """All numbers of a registry, for Prometheus."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def routes(self) -> list[BaseRoute]:
        """The routes of this group."""
        return [Route("/metrics", self.metrics)]

    @operation("overview", {200: "text/plain"})
    async def metrics(self, request: Request) -> Response:
        """Prometheus's text format, or OpenMetrics where that is asked for."""
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(self._registry), headers={"content-type": content_type})


def _states(status: DaemonStatus) -> dict[str, str]:
    return {name: source.state for name, source in status.sources.items()}
