"""What comes with a request, as frozen structs; what cannot be understood is a `BadRequest` that names it."""

from __future__ import annotations

import asyncio
from typing import Any, Final, TypeVar, get_args, get_origin

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request

from cdc.choices import hint_of, is_of_form
from cdc.errors import CdcError

S = TypeVar("S", bound=msgspec.Struct)

MAX_BODY_BYTES: Final = 64 * 1024
BODY_TIMEOUT_SECONDS: Final = 10.0


class BadRequest(CdcError):
    """A parameter or a body is not what is expected."""


def read_query(request: Request, kind: type[S]) -> S:
    """The query's parameters. Those of a list type are separated by commas."""
    lists = {field.encode_name for field in msgspec.structs.fields(kind) if _is_list(field.type)}
    values: dict[str, Any] = {}
    for name, text in request.query_params.multi_items():
        if name in values:
            raise BadRequest(f"{name}: given twice", hint="lists are separated by commas")
        values[name] = text.split(",") if name in lists else text
    return _convert(values, kind, "a parameter")


def read_headers(request: Request, kind: type[S]) -> S:
    """Those of the headers that the struct names."""
    names = [field.encode_name for field in msgspec.structs.fields(kind)]
    return _convert({name: request.headers[name] for name in names if name in request.headers}, kind, "a header")


async def read_body(request: Request, kind: type[S]) -> S:
    """The body, which is JSON. 413 for a large one, 408 for one that does not come."""
    body = await _body(request)
    try:
        msgspec.json.decode(body)  # all of it, also what `kind` takes as it is
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as exc:
        raise _refusal(exc, kind, "the body") from exc
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise BadRequest(f"the body is not JSON: {exc}") from exc


def _convert(values: dict[str, Any], kind: type[S], what: str) -> S:
    try:
        return msgspec.convert(values, kind, strict=False)
    except msgspec.ValidationError as exc:
        raise _refusal(exc, kind, what) from exc


def _is_list(kind: Any) -> bool:
    return get_origin(kind) in {tuple, frozenset} or any(_is_list(each) for each in get_args(kind))


def _refusal(error: msgspec.ValidationError, kind: type[msgspec.Struct], what: str) -> BadRequest:
    """Turn msgspec's `... - at `$.limit`` into `limit: ...`, and a pattern into what its field says of itself."""
    reason, _, where = str(error).partition(" - at `")
    path = where.rstrip("`").removeprefix("$").removeprefix(".")
    fields = {field.encode_name: field.type for field in msgspec.structs.fields(kind)}
    if not path:
        return BadRequest(f"{what}: {reason}", hint=f"known are: {', '.join(fields)}")
    name, in_list, _ = path.partition("[")
    described = _descriptions(fields.get(name))
    hint = hint_of(str(error), kind) or (described[-1 if in_list else 0] if described else "")
    if is_of_form(reason):
        reason = "not of the expected form"
    elif " of length >= 1" in reason:
        reason = "empty"
    return BadRequest(f"{path}: {reason}", hint=hint)


def _descriptions(kind: Any) -> list[str]:
    """What the annotations of a type say to people, from the outside in."""
    own = [meta.description for meta in getattr(kind, "__metadata__", ()) if isinstance(meta, msgspec.Meta)]
    return [text for text in own if text] + [text for each in get_args(kind) for text in _descriptions(each)]


async def _body(request: Request) -> bytes:
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
