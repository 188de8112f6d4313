"""What is written for a change, read by cursor, and shown to applications."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import lru_cache
from typing import Any, Final

import msgspec

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)

Json = bytes
"""A JSON value, encoded: it is built once, and passed on as it is."""

ALL: Final = "*"
"""The `entity_id` of a change that concerns every entity of its type: TRUNCATE, or the drop of a collection."""

PUBLISHED: Final = "@publish"
"""The `source` of events that were published over HTTP. (No source of the configuration can have that name.)"""


class ChangeType(StrEnum):
    """What happened to an entity. EVENT: nothing in a database; a back end published it under a name of its own."""

    CREATE = "CREATE"
    UPDATE = "UPDATE"
    DELETE = "DELETE"
    EVENT = "EVENT"


EVENTS: Final = {ChangeType.CREATE: "created", ChangeType.UPDATE: "updated", ChangeType.DELETE: "deleted"}
"""How realtime clients call them."""


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the feed.

    id: the cursor; ascending in commit order, and never given twice. 0 until it is stored.
    source, position: where it comes from; together unique, so that a replay adds nothing.
    channel: what realtime clients subscribe to.
    event: the name that it was published under (EVENT only).
    version: 1, 2, 3 ... for each entity of a source.
    changed_at: commit time at the source; recorded_at: when it was stored, never less than that of an earlier id.
        Both in microseconds since 1970-01-01 UTC.
    before, after: the entity as JSON objects, as far as it is known.
    changed: names of changed fields; `None` where the source cannot tell.
    delta: MongoDB's `updateDescription`.
    lookup: `after` was looked up later, and may show what happened since.
    truncated: `before` and `after` were larger than the limit, and left out.
    scope_before, scope_after: JSON objects of the fields that decide who may see it.
    """

    source: str
    position: str
    entity_type: str
    entity_id: str
    channel: str
    change_type: ChangeType
    version: int
    changed_at: int
    id: int = 0
    recorded_at: int = 0
    event: str | None = None
    location_id: str | None = None
    user_id: str | None = None
    before: Json | None = None
    after: Json | None = None
    changed: tuple[str, ...] | None = None
    delta: Json | None = None
    lookup: bool = False
    truncated: bool = False
    scope_before: Json | None = None
    scope_after: Json | None = None

    @property
    def event_name(self) -> str:
        """`created`, `updated`, `deleted`, or what it was published as."""
        return self.event or EVENTS.get(self.change_type, "event")


class EntityState(msgspec.Struct, frozen=True, kw_only=True):
    """What is kept of an entity outside of retention, so that its version goes on and its DELETE has a location.

    key: unambiguous for the entities of one type and source (`entity_id` is for people).
    scope: JSON object of the fields that decide who may see it, as last known.
    known: the last known document (MongoDB: BSON, without excluded fields); `None` where it is not needed or not exact.
    """

    entity_type: str
    key: str
    version: int
    location_id: str | None = None
    scope: Json | None = None
    known: bytes | None = None


BEGINNING: Final = ("", "")
"""Type and channel, which no record has, of what earlier feeds had: `Pruned` up to where this one begins."""


class Pruned(msgspec.Struct, frozen=True):
    """What retention has removed of one entity type on one channel.

    through_id: the largest id removed; through_recorded_at: when that was recorded (microseconds).
    rows: how many in all.
    """

    through_id: int
    through_recorded_at: int
    rows: int


def as_json(record: Record) -> dict[str, Any]:
    """The form of HTTP: camelCase, times in ISO 8601. To be encoded by msgspec, which takes `Raw` as it is."""
    found: dict[str, Any] = {
        "id": record.id,
        "entityType": record.entity_type,
        "entityId": record.entity_id,
        "changeType": record.change_type,
        "channel": record.channel,
        "locationId": record.location_id,
        "userId": record.user_id,
        "changedAt": iso_time(record.changed_at),
        "recordedAt": iso_time(record.recorded_at),
        "source": record.source,
        "position": record.position,
        "version": record.version,
        "before": _raw(record.before),
        "after": _raw(record.after),
        "changed": record.changed,
        "delta": _raw(record.delta),
    }
    if record.event is not None:
        found["event"] = record.event
    if record.lookup:
        found["lookup"] = True
    if record.truncated:
        found["truncated"] = True
    return found


def numbered(records: Sequence[Record], first_id: int, recorded_at: int) -> list[Record]:
    """The records as a store keeps them."""
    replace = msgspec.structs.replace
    return [replace(each, id=id_, recorded_at=recorded_at) for id_, each in enumerate(records, first_id)]


def iso_time(microseconds: int) -> str:
    """`2026-11-21T10:15:30.123456Z`."""
    seconds, rest = divmod(microseconds, 1_000_000)
    return f"{_second(seconds)}.{rest:06}Z"


@lru_cache(64)  # many changes are of one second
def _second(seconds: int) -> str:
    return (_EPOCH + timedelta(seconds=seconds)).replace(tzinfo=None).isoformat()


def _raw(value: Json | None) -> msgspec.Raw | None:
    return None if value is None else msgspec.Raw(value)
