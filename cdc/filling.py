"""Filling a mirror: the initial copy as a part of the pipeline, that waits, retries and shows how far it is."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import structlog

from cdc.capture import Capture
from cdc.config import CopyOptions
from cdc.copy import Copy, CopyProgress
from cdc.errors import TransientError
from cdc.position import Position
from cdc.queue import Queue
from cdc.retry import keep_trying
from cdc.sink import Mirror
from cdc.source import Source
from cdc.status import CaptureStats, CopyStatus, DeliveryStats, State

log = structlog.get_logger()


def filled_fact(sink: str) -> str:
    """The queue's fact that a mirror was complete once."""
    return f"filled:{sink}"


def fill(
    source: Source,
    mirror: Mirror,
    queue: Queue,
    *,
    stats: DeliveryStats,
    options: CopyOptions,
    stop: threading.Event,
    progress: CopyProgress | None = None,
) -> None:
    """Copy the tables that the mirror does not have; return when it has all of them, or `stop` is set.

    The queue must have begun: what changes from then on comes by the stream. Retries for ever what is transient; but a
    mirror that was complete once is not kept waiting for a source that is away.
    """
    progress = progress or CopyProgress()

    def attempt() -> None:
        try:
            tables = source.tables()
        except TransientError as exc:
            if queue.get(filled_fact(mirror.name)) is None:
                raise
            log.warning("not looking for new tables", sink=mirror.name, error=str(exc))
            return
        assert queue.position is not None
        if not set(tables) <= mirror.copied().keys():
            _copying(stats, progress)
        start = Position(queue.queue_id, queue.stats().last_seq, queue.position)
        copy = Copy(
            source, mirror, tables, start, workers=options.workers, chunk_bytes=options.chunk_bytes, progress=progress
        )
        if copy.run(stop).complete:
            queue.set(filled_fact(mirror.name), "yes")

    keep_trying(attempt, stop, partial(_waiting, stats))


@contextmanager
def capturing(source: Source, queue: Queue, stats: CaptureStats) -> Iterator[None]:
    """Run a capture beside the block, which begins once the queue has: a copy without the daemon.

    Raises what the capture fails with, at the latest when the block is done.
    """
    stop = threading.Event()
    capture = Capture(source, queue, stats, applied=lambda: None)
    with ThreadPoolExecutor(1, "capture") as thread:
        done = thread.submit(capture.run, stop)
        try:
            while queue.position is None and not done.done():
                stop.wait(0.05)
            if not done.done():
                yield
        finally:
            stop.set()
        done.result()


def _copying(stats: DeliveryStats, progress: CopyProgress) -> None:
    def status() -> CopyStatus:
        return progress.snapshot().status()

    stats.copy = status
    stats.error, stats.hint = None, ""
    stats.state = State.COPYING


def _waiting(stats: DeliveryStats, error: BaseException, seconds: float) -> None:
    stats.error, stats.hint = str(error), getattr(error, "hint", "")
    stats.state = State.WAITING
    stats.retries += 1
    log.warning("copy interrupted", sink=stats.name, error=str(error), retry_in_seconds=round(seconds, 1))
