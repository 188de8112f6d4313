"""Filling a mirror: the initial copy as a part of the pipeline, that waits, retries and shows how far it is."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Final

import structlog

from cdc.capture import Capture
from cdc.change import TableName
from cdc.config import CopyOptions
from cdc.copy import Copy, CopyProgress, CopyResult
from cdc.errors import ResyncRequired, TransientError
from cdc.position import Position
from cdc.queue import Queue
from cdc.retry import keep_trying
from cdc.sink import Mirror
from cdc.source import Source
from cdc.status import CaptureStats, CopyStatus, DeliveryStats, State, note_waiting

log = structlog.get_logger()


FILLED: Final = "yes"
GROWING: Final = "growing"
"""Complete once, and now tables that are new are copied."""


def filled_fact(sink: str) -> str:
    """The queue's fact that a mirror was complete once: `FILLED` or `GROWING`."""
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
    mirror that is complete is not kept waiting for a source that is away. Raises `ResyncRequired` where the target
    is no longer what it was, or the queue does not have what it needs next.
    """
    filling = _Filling(source, mirror, queue, stats=stats, options=options, progress=progress or CopyProgress())
    keep_trying(lambda: filling.attempt(stop), stop, partial(_waiting, stats))


class _Filling:
    """One mirror, and what it is filled from."""

    def __init__(
        self,
        source: Source,
        mirror: Mirror,
        queue: Queue,
        *,
        stats: DeliveryStats,
        options: CopyOptions,
        progress: CopyProgress,
    ) -> None:
        self._source = source
        self._mirror = mirror
        self._queue = queue
        self._stats = stats
        self._options = options
        self._progress = progress

    def attempt(self, stop: threading.Event) -> None:
        """Fill once."""
        self._check_target()
        if (tables := self._tables()) is None:
            return
        while True:
            result = self._copy(tables, stop)
            if not result.complete:
                return
            # a snapshot publishes all tables that there are: what it published must be copied too
            latest = self._source.tables() if result.copied else tables
            if set(latest) <= set(tables):
                break
            tables = latest
        self._note(FILLED)

    def _check_target(self) -> None:
        """A target that was filled once and has lost that is not filled again: it may be another one, or restored."""
        stored = self._mirror.stored_position()
        try:
            if stored is not None:
                self._queue.seek(stored)
            elif self._fact is not None:
                raise ResyncRequired(
                    "the target has no position: it was emptied, or restored from before it was filled"
                )
        except ResyncRequired as exc:
            name = self._mirror.name
            hint = f"`cdc drop {name}`, then `cdc run`: it is copied again"
            raise ResyncRequired(f"sink {name}: {exc}", hint=hint) from exc

    def _tables(self) -> Sequence[TableName] | None:
        """The tables to mirror; `None` where the source is away, and the mirror had all when it was last here."""
        try:
            return self._source.tables()
        except TransientError as exc:
            if self._fact != FILLED:
                raise
            log.warning("not looking for new tables", sink=self._mirror.name, error=str(exc))
            return None

    def _copy(self, tables: Sequence[TableName], stop: threading.Event) -> CopyResult:
        self._mirror.mirror_only(tables)
        if not set(tables) <= self._mirror.copied().keys():
            if self._fact == FILLED:
                self._note(GROWING)
            _copying(self._stats, self._progress)
        queue, options = self._queue, self._options
        assert queue.position is not None
        start = Position(queue.queue_id, queue.stats().last_seq, queue.position)
        return Copy(
            self._source,
            self._mirror,
            tables,
            start,
            workers=options.workers,
            chunk_bytes=options.chunk_bytes,
            progress=self._progress,
        ).run(stop)

    @property
    def _fact(self) -> str | None:
        return self._queue.get(filled_fact(self._mirror.name))

    def _note(self, value: str) -> None:
        if self._fact != value:
            self._queue.set(filled_fact(self._mirror.name), value)


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
    note_waiting(stats, error)
    log.warning("copy interrupted", sink=stats.name, error=str(error), retry_in_seconds=round(seconds, 1))
