"""How full a queue is."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from cdc.queue.orders import Contents


class QueueStats(msgspec.Struct, frozen=True):
    """What a queue holds.

    bytes: of the stored batches.
    oldest_seconds: age of the oldest batch, `None` where there is none.
    last_seq, pruned_seq: of the newest batch and of the last one that is gone; 0 before the first.
    free_disk_bytes: including the pages that the file keeps for reuse; min_free_bytes: of them that are left alone.
    full: the source must wait.
    """

    batches: int
    bytes: int
    oldest_seconds: float | None
    last_seq: int
    pruned_seq: int
    max_bytes: int
    free_disk_bytes: int
    full: bool
    min_free_bytes: int = 0


def measure_free_disk(path: Path, contents: Contents) -> int:
    """Bytes that the queue at `path` may still grow by, with the pages that its file keeps for reuse."""
    disk = os.statvfs(path)
    return disk.f_bavail * disk.f_frsize + contents.free_bytes


def stats_of(path: Path, contents: Contents, max_bytes: int, min_free_bytes: int) -> QueueStats:
    """What the file holds, by the bounds (0: none)."""
    free_disk_bytes = measure_free_disk(path, contents)
    return QueueStats(
        batches=contents.batches,
        bytes=contents.bytes,
        oldest_seconds=contents.oldest_seconds,
        last_seq=contents.last_seq,
        pruned_seq=contents.state.pruned_seq,
        max_bytes=max_bytes,
        free_disk_bytes=free_disk_bytes,
        full=free_disk_bytes < min_free_bytes or 0 < max_bytes <= contents.bytes,
        min_free_bytes=min_free_bytes,
    )
