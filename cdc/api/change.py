"""A change as HTTP shows it, and where a reader stands: for the document, and for what routes take."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final

import msgspec

from cdc.api.requests import BadRequest
from cdc.feed.record import ChangeType

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)

_LAST: Final = datetime.max.replace(tzinfo=UTC) - _EPOCH

MAX_CURSOR: Final = 2**63 - 1

Cursor = Annotated[
    str, msgspec.Meta(pattern="^[0-9]{1,19}$", description="A cursor: a decimal number. Opaque: give it back as it is.")
]

_PLACE: Final = "^[0-9]{1,19}(~[0-9]{1,19})?$"

Place = Annotated[
    str, msgspec.Meta(pattern=_PLACE, description="A cursor, maybe with what is known to be missing behind it. Opaque.")
]

Since = Annotated[
    str,
    msgspec.Meta(
        min_length=1,
        max_length=100,
        description="A cursor; a time, which means `recordedAt`; or `now`. Left out: the oldest change that is kept.",
        extra_json_schema={
            "anyOf": [{"pattern": _PLACE}, {"format": "date-time"}, {"const": "now"}],
            "examples": ["4711", "2026-11-21T10:15:30Z", "now"],
        },
    ),
]

Name = Annotated[
    str,
    msgspec.Meta(
        min_length=1,
        max_length=200,
        pattern=r"^[^\u0000-\u001f\u007f,]+(?!\n)$",
        description="No control characters, no comma.",
    ),
]

Names = Annotated[
    tuple[Name, ...], msgspec.Meta(min_length=1, max_length=100, description="Separated by commas. Left out: all.")
]


class Change(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """One change of one entity. An `entityId` of `*` means all of that type.

    `event` is there for what was published under a name of its own. `lookup`: `after` was looked up later, and may show
    what happened since. `truncated`: `before` and `after` were too large.
    """

    id: int
    entity_type: str
    entity_id: str
    change_type: ChangeType
    channel: str
    location_id: str | None
    user_id: str | None
    changed_at: datetime
    recorded_at: datetime
    source: str
    position: str
    version: int
    before: dict[str, Any] | None
    after: dict[str, Any] | None
    changed: tuple[str, ...] | None
    delta: dict[str, Any] | None
    event: str | msgspec.UnsetType = msgspec.UNSET
    lookup: bool | msgspec.UnsetType = msgspec.UNSET
    truncated: bool | msgspec.UnsetType = msgspec.UNSET


class GapFailure(msgspec.Struct, frozen=True):
    """Some of what was asked for is not kept.

    cursor: nothing is missing behind it; `oldest` is the smallest id there. resume: goes on where `since` was, with
    what is left of other entity types in between.
    """

    error: str
    hint: str
    oldest: str
    cursor: Cursor
    resume: Place


def place_of(text: str) -> tuple[int, int]:
    """The id that a place stands for, and the one up to which its reader knows that something is missing."""
    cursor, _, forgiven = text.partition("~")
    return cursor_of(cursor), cursor_of(forgiven or "0")


def place_text(cursor: int, forgiven: int) -> str:
    """What `place_of` reads."""
    return str(cursor) if cursor >= forgiven else f"{cursor}~{forgiven}"


def is_place(text: str) -> bool:
    """Whether it has that form."""
    return re.fullmatch(_PLACE, text) is not None


def cursor_of(text: str) -> int:
    """The id that a cursor stands for. One that is too large for any feed is as large as can be."""
    return min(int(text), MAX_CURSOR)


def moment_of(name: str, text: str) -> int:
    """Microseconds since 1970 of an ISO 8601 time; without an offset it is UTC. Raises `BadRequest`.

    What was recorded is neither older than that nor younger than the year 9999.
    """
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as exc:
        raise BadRequest(
            f"{name}: {text[:40]!r} is neither a cursor nor an ISO 8601 time",
            hint="for example 2026-11-21T10:15:30Z; a + in a URL is written %2B",
        ) from exc
    since_epoch = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - _EPOCH
    return max(timedelta(0), min(since_epoch, _LAST)) // timedelta(microseconds=1)
