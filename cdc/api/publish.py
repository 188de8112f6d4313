"""The route by which back ends put events of their own into the feed."""

from __future__ import annotations

import secrets
import time
from hashlib import sha256
from typing import Annotated, Final

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from cdc.api.change import Cursor
from cdc.api.feed import Feed
from cdc.api.operation import operation
from cdc.api.principal import PRINCIPAL, Principal
from cdc.api.requests import BadRequest, read_body, read_headers
from cdc.api.responses import answer
from cdc.feed.event import MAX_NAME_BYTES
from cdc.feed.record import EVENTS, PUBLISHED, ChangeType, Record
from cdc.feed.visibility import view

_TYPES: Final = {event: change_type for change_type, event in EVENTS.items()}

_Name = Annotated[
    str,
    msgspec.Meta(
        min_length=1,
        max_length=200,
        pattern=r"^[^\u0000-\u0020\u007f,*]+(?!\n)$",
        description="No white space, no comma, no `*`.",
    ),
]

_EventName = Annotated[
    str,
    msgspec.Meta(
        max_length=100,
        pattern=r"^(?!(cursor|gap|error|open|message)$)[A-Za-z0-9][A-Za-z0-9_.-]*(?!\n)$",
        description=(
            "Letters, digits, `_`, `-` and `.`; not a name that event streams use themselves: "
            "cursor, gap, error, open, message."
        ),
    ),
]

_Text = Annotated[
    str,
    msgspec.Meta(min_length=1, max_length=1000, pattern=r"^[^\u0000]+$", description="A string without NUL."),
]

_Key = Annotated[
    str,
    msgspec.Meta(
        min_length=1, max_length=255, pattern=r"^[\u0021-\u007e]+$", description="ASCII characters without white space."
    ),
]


class Event(msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    """What a back end tells. entityType: the channel, unless told otherwise. data: the entity as it is now."""

    channel: _Name
    event: _EventName
    id: _Text
    data: Annotated[msgspec.Raw, msgspec.Meta(extra_json_schema={"type": "object"})] | msgspec.UnsetType = msgspec.UNSET
    entity_type: _Name | msgspec.UnsetType = msgspec.UNSET
    location_id: _Text | msgspec.UnsetType = msgspec.UNSET
    user_id: _Text | msgspec.UnsetType = msgspec.UNSET


class PublishHeaders(msgspec.Struct, frozen=True, rename={"idempotency_key": "Idempotency-Key"}):
    """With a key the same event is stored once, as long as it is kept."""

    idempotency_key: _Key | msgspec.UnsetType = msgspec.UNSET


class Published(msgspec.Struct, frozen=True):
    """Where the event is in the feed, and the how manyth of its entity it is."""

    cursor: Cursor
    version: int


class Duplicate(msgspec.Struct, frozen=True):
    """It was stored before."""

    duplicate: bool = True


class Publish:
    """Events go into the feed like any change: every gateway, poll and resume sees them."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed

    def routes(self) -> list[BaseRoute]:
        """The routes of this group."""
        return [Route("/publish", self.publish, methods=["POST"])]

    @operation("publish", {200: Duplicate, 201: Published}, body=Event, headers=PublishHeaders)
    async def publish(self, request: Request) -> Response:
        """Store an event in the feed."""
        key = read_headers(request, PublishHeaders).idempotency_key or secrets.token_hex(16)
        principal: Principal = request.scope[PRINCIPAL]
        record = _record(await read_body(request, Event), _position(principal.name, key))
        if view(record, principal.limits) is None:
            raise HTTPException(403, "the token is limited to other channels or entities")
        stored = await self._feed.publish(record)
        return answer(Duplicate()) if stored is None else answer(Published(str(stored.id), stored.version), 201)


def _record(event: Event, position: str) -> Record:
    """Its scope is what it says about itself, before as after: whoever may see it knew of the entity already."""
    data = _object(event)
    if len(event.id.encode()) > MAX_NAME_BYTES:
        raise BadRequest(f"id: more than {MAX_NAME_BYTES} bytes in UTF-8")
    change_type = _TYPES.get(event.event, ChangeType.EVENT)
    return Record(
        source=PUBLISHED,
        position=position,
        entity_type=event.entity_type or event.channel,
        entity_id=event.id,
        channel=event.channel,
        change_type=change_type,
        event=event.event if change_type is ChangeType.EVENT else None,
        version=1,  # the store counts on
        changed_at=time.time_ns() // 1_000,
        location_id=event.location_id or None,
        user_id=event.user_id or None,
        before=data if change_type is ChangeType.DELETE else None,
        after=None if change_type is ChangeType.DELETE else data,
        scope_before=None if change_type is ChangeType.CREATE else data,
        scope_after=None if change_type is ChangeType.DELETE else data,
    )


def _object(event: Event) -> bytes | None:
    """`data` as it was sent, so that its numbers stay what they are."""
    if event.data is msgspec.UNSET:
        return None
    data = bytes(event.data).strip()
    if not data.startswith(b"{"):
        raise BadRequest("data: Expected `object`")
    return data


def _position(name: str, key: str) -> str:
    """Keys are everybody's own, and nobody else's to see."""
    return sha256(f"{name}\0{key}".encode()).hexdigest()[:32]
