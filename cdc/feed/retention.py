"""Retention: records are removed when they are older than their type's time, a few at a time."""

from __future__ import annotations

import time
from typing import Final

import structlog

from cdc.feed.options import FeedOptions
from cdc.feed.store import FeedWriter

ROWS: Final = 1_000
"""Removed in one transaction, which keeps other writers waiting."""

log = structlog.get_logger()


class Retention:
    """Knows how long records of each type are kept."""

    def __init__(self, options: FeedOptions) -> None:
        self._seconds = options.retentions
        self._default = options.default_retention

    def enforce(self, writer: FeedWriter, *, until: float) -> int:
        """Remove what this writer's source wrote too long ago. until: by the monotonic clock; the rest waits.

        Returns how many records were removed.
        """
        removed = 0
        for entity_type in writer.entity_types():
            seconds = self._seconds.get(entity_type, self._default)
            if seconds is None:
                continue
            recorded_before = int((time.time() - seconds) * 1e6)
            while time.monotonic() < until:
                rows = writer.prune(entity_type, recorded_before, ROWS)
                removed += rows
                if rows < ROWS:
                    break
        if removed:
            log.info("pruned", records=removed)
        return removed
