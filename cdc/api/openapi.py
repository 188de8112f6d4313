"""`/openapi.json`: what the routes declare about themselves, as OpenAPI 3.1."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from http import HTTPStatus
from typing import Any, Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from cdc.api.operation import Operation, declared_by, operation
from cdc.api.responses import Failure

_REFERENCE: Final = "#/components/schemas/{name}"
_ERRORS: Final = {"public": (), "any": (401, 403)}
"""What a route answers to those who may not. All others: 401, 403, and 503 where what it needs is away."""


class Document:
    """The description of a set of routes, and of its own."""

    def __init__(self, routes: Sequence[BaseRoute], *, version: str, guarded: bool) -> None:
        self._routes = [*routes, *self.routes()]
        self._version = version
        self._guarded = guarded
        self._encoded = msgspec.json.encode(self._describe())

    def routes(self) -> list[BaseRoute]:
        """The routes of this group."""
        return [Route("/openapi.json", self.get)]

    @operation("public", {200: dict[str, Any]})
    async def get(self, _request: Request) -> Response:
        """This document; WebSockets are beyond what it can describe."""
        return Response(self._encoded, media_type="application/json")

    def _describe(self) -> dict[str, Any]:
        operations = [
            (route, found) for route in self._routes if isinstance(route, Route) and (found := declared_by(route))
        ]
        schemas = _Schemas(found for _, found in operations)
        paths: dict[str, dict[str, Any]] = {}
        for route, found in operations:
            for method in sorted(route.methods or ()):
                if method != "HEAD":
                    paths.setdefault(route.path_format, {})[method.lower()] = self._operation(route, found, schemas)
        return {
            "openapi": "3.1.0",
            "info": {"title": "cdc", "version": self._version},
            "paths": paths,
            "components": {
                "schemas": schemas.components,
                "securitySchemes": {
                    "token": {"type": "http", "scheme": "bearer"},
                    "ticket": {"type": "apiKey", "in": "query", "name": "ticket"},
                },
            },
        }

    def _operation(self, route: Route, found: Operation, schemas: _Schemas) -> dict[str, Any]:
        text = inspect.getdoc(route.endpoint) or ""
        described: dict[str, Any] = {
            "operationId": route.endpoint.__qualname__,
            "summary": text.partition("\n")[0],
            "description": text,
            "parameters": [
                *({"name": name, "in": "path", "required": True, "schema": _PATH} for name in route.param_convertors),
                *schemas.parameters("query", found.query),
                *schemas.parameters("header", found.headers),
            ],
            "responses": {str(status): schemas.answer(status, kind) for status, kind in _answers(found).items()},
        }
        if found.body is not None:
            described["requestBody"] = {"required": True, "content": schemas.content(found.body)}
        if self._guarded and found.access != "public":
            described["security"] = [{"token": []}, *([{"ticket": []}] if found.tickets else [])]
        return described


_PATH: Final = {"type": "string", "minLength": 1}


def _answers(found: Operation) -> dict[int, Any]:
    """By status, what it answers, errors included."""
    errors = {*found.errors, *_ERRORS.get(found.access, (401, 403, 503))}
    if found.query or found.headers:
        errors.add(400)
    if found.body:
        errors |= {400, 408, 413}
    return dict(sorted({**dict.fromkeys(errors, Failure), **found.answers}.items()))


class _Schemas:
    """JSON Schema of all structs that occur."""

    def __init__(self, operations: Iterable[Operation]) -> None:
        kinds: list[Any] = []
        for found in operations:
            given = (found.query, found.headers, found.body, *_answers(found).values())
            kinds += [kind for kind in given if kind is not None and not isinstance(kind, str) and kind not in kinds]
        references, self.components = msgspec.json.schema_components(kinds, ref_template=_REFERENCE)
        self._references = list(zip(kinds, references, strict=True))

    def parameters(self, where: str, kind: type[msgspec.Struct] | None) -> list[dict[str, Any]]:
        """One for each field of a struct. Lists are separated by commas."""
        if kind is None:
            return []
        schema = self.components[kind.__name__]
        return [
            {
                "name": name,
                "in": where,
                "required": name in schema["required"],
                "schema": member,
                **({"style": "form", "explode": False} if member.get("type") == "array" else {}),
            }
            for name, member in schema["properties"].items()
        ]

    def content(self, kind: Any) -> Mapping[str, Any]:
        """Of a body or an answer: JSON of that type, or a media type."""
        if isinstance(kind, str):
            return {kind: {"schema": {"type": "string"}}}
        reference = next(reference for each, reference in self._references if each is kind)
        return {"application/json": {"schema": reference}}

    def answer(self, status: int, kind: Any) -> dict[str, Any]:
        """One of the answers."""
        return {"description": HTTPStatus(status).phrase, "content": self.content(kind)}
