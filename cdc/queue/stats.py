"""How full a queue is."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from cdc.errors import FatalError
from cdc.queue.orders import Contents


class QueueStats(msgspec.Struct, frozen=True):
    """What a queue holds.

    bytes: of the stored batches.
    oldest_seconds: age of the oldest batch, `None` where there is none.
    last_seq, pruned_seq: of the newest batch and of the last one that is gone; 0 before the first.
    free_disk_bytes: including the pages that the file keeps for reuse; min_free_bytes: of them that are left alone.
    full: the source must wait.
    removed: the file is no longer where it was: what it holds is gone once the process has ended.
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
    removed: bool = False


def measure_free_disk(path: Path, contents: Contents) -> int:
    """Bytes that the queue at `path` may still grow by, with the pages that its file keeps for reuse.

    Raises `FatalError` where the file is no longer there: what would be written could not be read after a restart.
    """
    try:
        disk = os.statvfs(path)
    except OSError as exc:
        raise FatalError(
            f"{path} was removed while the daemon runs, or cannot be reached: {exc.strerror}",
            hint="put the disk right; then restart the daemon, which tells what is missing",
        ) from exc
    return disk.f_bavail * disk.f_frsize + contents.free_bytes


def stats_of(path: Path, contents: Contents, max_bytes: int, min_free_bytes: int) -> QueueStats:
    """What the file holds, by the bounds (0: none)."""
    try:
        free_disk_bytes, removed = measure_free_disk(path, contents), False
    except FatalError:
        free_disk_bytes, removed = 0, True
    return QueueStats(
        batches=contents.batches,
        bytes=contents.bytes,
        oldest_seconds=contents.oldest_seconds,
        last_seq=contents.last_seq,
        pruned_seq=contents.state.pruned_seq,
        max_bytes=max_bytes,
        free_disk_bytes=free_disk_bytes,
        full=removed or free_disk_bytes < min_free_bytes or 0 < max_bytes <= contents.bytes,
        min_free_bytes=min_free_bytes,
        removed=removed,
    )
