"""A queue's file as it is read where no daemon is there to ask: nothing on disk is changed by that."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import msgspec

from cdc.change import Batch
from cdc.position import SourcePosition
from cdc.queue import parked as parked_rows
from cdc.queue.format import (
    connect,
    corrupt,
    count,
    is_ours,
    load_cursors,
    load_facts,
    load_state,
    parked_batch,
    translated,
)
from cdc.queue.parked import ParkedChange, ParkedCount, ParkedId
from cdc.queue.stats import QueueStats, stats_of


class QueueOnDisk(msgspec.Struct, frozen=True):
    """A queue as its file tells."""

    queue_id: str
    position: SourcePosition | None
    cursors: dict[str, tuple[int, SourcePosition | None]]
    stats: QueueStats
    facts: dict[str, str]
    parked: dict[str, ParkedCount]


def read_status(path: Path, *, max_bytes: int = 0, min_free_bytes: int = 0) -> QueueOnDisk:
    """Read a queue's file without its lock, with or without a daemon at work, and also after its death.

    The bounds (0: none) only serve `stats`.
    """
    with _reading(path) as connection:
        connection.execute("BEGIN")
        state = load_state(connection, path)
        return QueueOnDisk(
            queue_id=state.queue_id,
            position=state.position,
            cursors=load_cursors(connection),
            stats=stats_of(path, count(connection, state), max_bytes, min_free_bytes),
            facts=load_facts(connection),
            parked=parked_rows.counts(connection),
        )


class ParkedInFile:
    """The parked changes in a queue's file, read as `read_status` does."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def parked(self, sink: str) -> list[ParkedChange]:
        """A sink's parked changes, in the order of the source."""
        with _reading(self._path) as connection:
            return parked_rows.listed(connection, sink)

    def parked_batch(self, sink: str, parked: ParkedId) -> Batch | None:
        """A parked change as a batch, `None` if it is gone."""
        with _reading(self._path) as connection:
            return parked_batch(self._path, connection, sink, parked)


@contextmanager
def _reading(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection that changes nothing on disk."""
    log = path.with_name(path.name + "-wal")
    in_log = log.exists() and log.stat().st_size > 0
    # a log is read with the help of its index (-shm), which `mode=ro` alone would rebuild on disk
    options = "mode=ro&readonly_shm=1" if in_log else "mode=ro&immutable=1"
    with translated(path), closing(connect(path, options)) as connection:
        if not is_ours(connection, path):
            raise corrupt(path, "it is empty")
        yield connection
