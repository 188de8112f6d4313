"""The feed as the log of what was captured: every change of every key is in it once, and in order."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter as Counts
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Final

MAX_PROBLEMS: Final = 5

Entity = tuple[str, str]
"""Type and id."""

Counter = Callable[[Mapping[str, Any]], int | None]
"""How often an entity was changed, as one of its changes (with `after` and `delta`, decoded) tells."""


class FeedCheck:
    """Reads, each time, what was added to a feed in SQLite since the last.

    counters: entity types whose changes count themselves; their values must be 1, 2, 3 ... from the first one seen.
    versioned: whether the versions of a type's entities have to be looked at.
    newest: what the changes told last; rows: how many there were.
    gaps: over how many losses of history, since the last look, each of them may count on once.
    """

    def __init__(self, file: Path, counters: Mapping[str, Counter], versioned: Callable[[str], bool]) -> None:
        self.newest: dict[Entity, int] = {}
        self.rows = 0
        self._file = file
        self._counters = counters
        self._versioned = versioned
        self._versions: dict[Entity, int] = {}
        self._last_id = 0
        self.gaps = 0
        self._jumps: Counts[Entity] = Counts()

    def problems(self) -> list[str]:
        """What cannot be in a feed that has lost and doubled nothing; the first few."""
        found: list[str] = []
        query = """SELECT id, entity_type, entity_id, version, after, delta, change_type
                     FROM data_changes WHERE id > ? ORDER BY id"""
        with closing(sqlite3.connect(f"{self._file.as_uri()}?mode=ro", uri=True)) as connection:
            for row in connection.execute(query, [self._last_id]):
                self._last_id, kind, entity, version, after, delta, change = row
                self.rows += 1
                if self._versioned(kind):
                    found += self._check_version((kind, entity), version)
                if kind in self._counters and change == "UPDATE":
                    found += self._check_counter((kind, entity), after, delta)
        self.gaps = 0
        self._jumps.clear()
        return found[:MAX_PROBLEMS]

    def missing(self, kind: str, before: Mapping[str, int], at_source: Mapping[str, int]) -> list[str]:
        """What is not in the feed of a source at rest; all of the feed must have been looked at.

        before: how often each was changed at a time when the feed had begun, or gone on behind its last gap.
        """
        told = {key: max(self.newest.get((kind, key), 0), before.get(key, 0)) for key in at_source}
        self.newest |= {(kind, key): count for key, count in at_source.items()}  # from here on, gap or not
        return [
            f"feed: {kind} {key} was changed {count} times, but the feed tells of {told[key]}"
            for key, count in at_source.items()
            if count > told[key]
        ][:MAX_PROBLEMS]

    def _check_version(self, entity: Entity, version: int) -> list[str]:
        before = self._versions.get(entity, 0)
        self._versions[entity] = version
        return [] if version == before + 1 else [f"feed: {entity} has version {version} after {before}"]

    def _check_counter(self, entity: Entity, after: str | None, delta: str | None) -> list[str]:
        change = {"after": json.loads(after or "null"), "delta": json.loads(delta or "null")}
        count = self._counters[entity[0]](change)
        before = self.newest.get(entity)
        if count is None:
            return [f"feed: a change of {entity} does not say which"]
        self.newest[entity] = count
        if before is not None and count > before + 1 and self._jumps[entity] < self.gaps:
            self._jumps[entity] += 1
            return []
        return [] if before is None or count == before + 1 else [f"feed: {entity} counts {count} after {before}"]
