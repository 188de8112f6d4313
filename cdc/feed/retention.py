"""Retention: records are removed when they are older than their type's time, a few at a time."""

from __future__ import annotations

import time
from typing import Final

import structlog

from cdc.feed.options import FeedOptions
from cdc.feed.record import PUBLISHED
from cdc.feed.store import FeedWriter

ROWS: Final = 1_000
"""Removed in one transaction, which keeps other writers waiting."""

log = structlog.get_logger()


class Retention:
    """Knows how long the records of one source are kept, and what was published into its feed.

    What other sources wrote has a time of its own, which only their daemons know.
    """

    def __init__(self, source: str, options: FeedOptions) -> None:
        self._sources = (source, PUBLISHED)
        self._seconds = options.retentions
        self._default = options.default_retention

    def enforce(self, writer: FeedWriter, *, seconds: float | None = None) -> int:
        """Remove what is too old; what is left after that many seconds waits for the next time.

        Returns how many records were removed.
        """
        until = None if seconds is None else time.monotonic() + seconds
        removed = 0
        for entity_type in writer.entity_types():
            kept_seconds = self._seconds.get(entity_type, self._default)
            if kept_seconds is not None:
                recorded_before = int((time.time() - kept_seconds) * 1e6)
                removed += remove(writer, entity_type, recorded_before, self._sources, until=until)
        if removed:
            log.info("pruned", records=removed)
        return removed


def remove(
    writer: FeedWriter,
    entity_type: str | None,
    recorded_before: int,
    sources: tuple[str, ...] | None = None,
    *,
    until: float | None = None,
) -> int:
    """Remove all that `FeedWriter.prune` would, or as much as can be until then (by the monotonic clock)."""
    removed = 0
    while until is None or time.monotonic() < until:
        rows = writer.prune(entity_type, recorded_before, ROWS, sources)
        removed += rows
        if rows < ROWS:
            break
    return removed
