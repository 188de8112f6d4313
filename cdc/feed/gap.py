"""Whether a cursor can still be continued. One place for poll, WebSocket and SSE alike."""

from __future__ import annotations

import msgspec

from cdc.feed.store import FeedReader


class Gap(msgspec.Struct, frozen=True):
    """Some of what was asked for is not there.

    cursor: behind it nothing is missing. oldest: the smallest id that can be behind it.
    """

    oldest: int
    cursor: int


def find_gap(reader: FeedReader, cursor: int, entity_types: frozenset[str] | None) -> Gap | None:
    """What is missing behind a cursor; `None` if nothing is. Blocks.

    Retention removes records of some entity types and leaves others: those that count are `entity_types`, all with
    `None` (nothing that is still there tells which channels the removed ones were of).

    Asked after a scan from `cursor`, it tells whether something was removed before that scan could see it. A cursor
    beyond the end is one of another feed: it missed all that is there.
    """
    removed = [
        pruned.through_id
        for entity_type, pruned in reader.pruned().items()
        if entity_types is None or entity_type in entity_types
    ]
    through = max(removed, default=0)
    if cursor < through:
        return Gap(oldest=through + 1, cursor=through)
    if cursor > (head := reader.head()):
        oldest = reader.oldest() or head + 1
        return Gap(oldest=max(oldest, through + 1), cursor=max(oldest - 1, through))
    return None


def find_gap_at(reader: FeedReader, recorded_at: int, entity_types: frozenset[str] | None) -> Gap | None:
    """The same for a time in microseconds: whether something that was recorded then or later was removed."""
    through = max(
        (
            pruned.through_id
            for entity_type, pruned in reader.pruned().items()
            if pruned.through_recorded_at >= recorded_at and (entity_types is None or entity_type in entity_types)
        ),
        default=0,
    )
    return Gap(oldest=through + 1, cursor=through) if through else None
