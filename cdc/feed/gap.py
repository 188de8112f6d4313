"""Whether a cursor can still be continued. One place for poll, WebSocket and SSE alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import msgspec

from cdc.feed.record import BEGINNING, Pruned
from cdc.feed.store import FeedReader, Wanted


class Gap(msgspec.Struct, frozen=True):
    """Some of what was asked for is not there.

    cursor: behind it nothing is missing. oldest: the smallest id that can be behind it.
    """

    oldest: int
    cursor: int


def find_gap(reader: FeedReader, cursor: int, wanted: Wanted) -> Gap | None:
    """What is missing behind a cursor; `None` if nothing is. Blocks.

    Retention removes records of some entity types and leaves others: those count that were `wanted`, by their type and
    channel (nothing that is still there tells which locations the removed ones had).

    Asked after a scan from `cursor`, it tells whether something was removed before that scan could see it. A cursor
    beyond the end, or from before the beginning, is one of another feed: it missed all that is there. 0 is of none.
    """
    pruned = reader.pruned()
    through = max((each.through_id for each in _removed(pruned, wanted)), default=0)
    if cursor > 0 and BEGINNING in pruned:
        through = max(through, pruned[BEGINNING].through_id)
    if cursor < through:
        return Gap(oldest=through + 1, cursor=through)
    if cursor > (head := reader.head()):
        oldest = reader.oldest() or head + 1
        return Gap(oldest=max(oldest, through + 1), cursor=max(oldest - 1, through))
    return None


def find_gap_at(reader: FeedReader, recorded_at: int, wanted: Wanted) -> Gap | None:
    """The same for a time in microseconds: whether something that was recorded then or later was removed."""
    missed = [each.through_id for each in _removed(reader.pruned(), wanted) if each.through_recorded_at >= recorded_at]
    return Gap(oldest=max(missed) + 1, cursor=max(missed)) if missed else None


def _removed(pruned: Mapping[tuple[str, str], Pruned], wanted: Wanted) -> Iterator[Pruned]:
    for (entity_type, channel), each in pruned.items():
        if (
            (entity_type, channel) != BEGINNING
            and (wanted.entity_types is None or entity_type in wanted.entity_types)
            and (wanted.channels is None or channel in wanted.channels)
        ):
            yield each
