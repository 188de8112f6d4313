"""What streams of the feed have in common: a selection of records, and the frames that they become."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Final, Protocol

import msgspec

from cdc.feed.record import EVENTS, ChangeType, Record, iso_time
from cdc.feed.store import Wanted
from cdc.feed.visibility import Limits, view

MAX_EVENTS: Final = 200
MAX_FRAME_BYTES: Final = 128 * 1024
"""One event may be larger; it then travels alone."""


class Encode(Protocol):
    """Puts events into one frame."""

    def __call__(self, channel: str, events: Sequence[Event]) -> bytes:
        """channel: as it was subscribed to."""
        ...


class Event(msgspec.Struct, frozen=True, rename="camel"):
    """A change as realtime clients get it: `docs/http-api.md`."""

    channel: str
    event: str
    id: str
    data: msgspec.Raw | None
    cursor: str
    entity_type: str
    change_type: ChangeType
    version: int
    changed_at: str
    location_id: str | None
    user_id: str | None
    changed: tuple[str, ...] | None


class Frame(msgspec.Struct, frozen=True):
    """What a topic has behind some cursor.

    cursor: everything up to it is in the frame. payload: `None` if there was nothing. events: how many.
    """

    cursor: int
    payload: bytes | None
    events: int


class Topic:
    """One selection of the feed, encoded in one way: shared by all streams that want the same.

    last: no record behind it, up to the feed's head, is of this topic (`where` apart).
    """

    def __init__(
        self, key: Hashable, channel: str, wanted: Wanted, limits: Limits, *, encode: Encode, head: int
    ) -> None:
        """key: for whoever keeps topics. head: of the feed, as it is now; what comes later is to be told to `note`."""
        self.key = key
        self.channel = channel
        self.wanted = wanted
        self.last = head
        self._limits = limits
        self._encode = encode
        self._quiet = (head, head)

    def note(self, newest: int, before: int) -> None:
        """Behind `before` came records that may be of this topic, the newest with that id; until `before` none."""
        self._quiet = (self.last, before)
        self.last = newest

    def skip(self, cursor: int, head: int) -> int:
        """How far a stream at `cursor` is really: past what is known not to be of this topic."""
        if cursor >= self.last:
            return max(cursor, head)
        start, end = self._quiet
        return max(cursor, end) if cursor >= start else cursor

    def frame(self, records: Sequence[Record], cursor: int) -> Frame:
        """A frame of the first of these records, all up to `cursor`, as many as fit into one."""
        events: list[Event] = []
        size = 0
        for record in records:
            seen = view(record, self._limits) if self._is_wanted(record) else None
            if seen is None:
                continue
            event = _event(seen)
            size += len(event.data or b"") + 300
            if events and (len(events) == MAX_EVENTS or size > MAX_FRAME_BYTES):
                return self._encoded(events, int(events[-1].cursor))
            events.append(event)
        return self._encoded(events, cursor)

    def _encoded(self, events: Sequence[Event], cursor: int) -> Frame:
        return Frame(cursor, self._encode(self.channel, events) if events else None, len(events))

    def _is_wanted(self, record: Record) -> bool:
        wanted = self.wanted
        return (
            (wanted.channels is None or record.channel in wanted.channels)
            and (wanted.entity_types is None or record.entity_type in wanted.entity_types)
            and (wanted.location_id is None or record.location_id == wanted.location_id)
        )


def _event(record: Record) -> Event:
    data = record.before if record.change_type is ChangeType.DELETE else record.after
    return Event(
        channel=record.channel,
        event=record.event or EVENTS.get(record.change_type, "event"),
        id=record.entity_id,
        data=None if data is None else msgspec.Raw(data),
        cursor=str(record.id),
        entity_type=record.entity_type,
        change_type=record.change_type,
        version=record.version,
        changed_at=iso_time(record.changed_at),
        location_id=record.location_id,
        user_id=record.user_id,
        changed=record.changed,
    )
