"""The web page, the JavaScript client, and what the service says of itself: files of this package, as they are."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from cdc import __version__
from cdc.api.operation import operation
from cdc.api.responses import answer

STATIC: Final = Path(__file__).parent / "static"

ENDPOINTS: Final = (
    "/health",
    "/ready",
    "/status",
    "/metrics",
    "/stats",
    "/openapi.json",
    "/api/dead-letters",
    "/api/changes/poll",
    "/api/changes/stream",
    "/api/changes/{entityType}/{entityId}",
    "/api/tickets",
    "/publish",
    "/ws",
)

_MEDIA_TYPES: Final = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".ts": "text/plain",
    ".svg": "image/svg+xml",
    ".LICENSE": "text/plain",
}

_HEADERS: Final = {
    # uPlot and the flow's widths set styles from scripts, which `style-src` does not concern
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # kept by the browser, and asked for by ETag: a new version shows at once
}


class ServiceInfo(msgspec.Struct, frozen=True):
    """What `GET /` tells programs."""

    service: str
    version: str
    endpoints: tuple[str, ...]


class Asset(msgspec.Struct, frozen=True):
    """One file, with the headers that go with it."""

    body: bytes
    media_type: str
    etag: str


class Page:
    """Serves what was in the package's folder at the start, and nothing else: a path is only looked up."""

    def __init__(self) -> None:
        self._assets = {file.relative_to(STATIC).as_posix(): _asset(file) for file in _files()}

    def routes(self) -> list[BaseRoute]:
        """The routes of this group."""
        return [Route("/", self.index), Route("/static/{path:path}", self.static)]

    @operation("public", {200: "*/*", 304: "*/*"})
    async def index(self, request: Request) -> Response:
        """The page; for who wants JSON, what this service is."""
        response = _service_info(request) if _wants_json(request) else self._send(request, "index.html")
        response.headers["Vary"] = "Accept"
        return response

    @operation("public", {200: "*/*", 304: "*/*"}, errors=(404,))
    async def static(self, request: Request) -> Response:
        """One file; 304 for who has it."""
        return self._send(request, request.path_params["path"])

    def _send(self, request: Request, name: str) -> Response:
        asset = self._assets.get(name)
        if asset is None:
            raise HTTPException(404, "there is no such file")
        headers = {**_HEADERS, "ETag": asset.etag}
        if asset.etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(asset.body, media_type=asset.media_type, headers=headers)


def _files() -> list[Path]:
    return sorted(file for file in STATIC.rglob("*") if file.suffix in _MEDIA_TYPES)


def _asset(file: Path) -> Asset:
    body = file.read_bytes()
    return Asset(body, _MEDIA_TYPES[file.suffix], f'"{hashlib.sha256(body).hexdigest()[:32]}"')


def _wants_json(request: Request) -> bool:
    """Browsers name text/html, and programs that only look around name nothing."""
    accept = request.headers.get("accept", "")
    return "application/json" in accept and "text/html" not in accept


def _service_info(request: Request) -> Response:
    """A gateway has fewer endpoints than a daemon."""
    there = {getattr(route, "path", "").replace(":path}", "}") for route in request.app.routes}
    return answer(ServiceInfo("cdc", __version__, tuple(path for path in ENDPOINTS if path in there)))
