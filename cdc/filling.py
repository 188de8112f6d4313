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
from cdc.change import TableName, table_name
from cdc.config import CopyOptions
from cdc.copy import Copy, CopyResult
from cdc.copy_progress import CopyProgress
from cdc.errors import HistoryLost, ResyncRequired, TransientError, UnknownTable
from cdc.position import Position
from cdc.queue import Queue
from cdc.retry import keep_trying
from cdc.sink import Mirror
from cdc.source import Source
from cdc.stats import CaptureStats, CopyStatus, DeliveryStats, State, note_waiting
from cdc.wishes import Wish, end_of, explained, replay_fact, resync_fact

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
    resyncs: bool = False,
) -> bool:
    """Copy the tables that the mirror does not have; return when it has all of them, or `stop` is set.

    Returns whether all that belongs to them is built too, such as indexes; else that waits for the stream.

    The queue must have begun: what changes from then on comes by the stream. Retries for ever what is transient; but a
    mirror that is complete is not kept waiting for a source that is away. Raises `ResyncRequired` where the target
    is no longer what it was, or the queue does not have what it needs next. But first a `Wish` is granted that the
    mirror be made right again; resyncs: the mirror is so by itself where the queue has lost what its target needs.
    """
    filling = _Filling(source, mirror, queue, stats=stats, options=options, progress=progress or CopyProgress())
    filling.resyncs = resyncs
    keep_trying(lambda: filling.attempt(stop), stop, partial(_waiting, stats))
    return filling.finished


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
        self.resyncs = False
        self.finished = False

    def attempt(self, stop: threading.Event) -> None:
        """Fill once."""
        if (wish := Wish.read(self._queue, self._mirror.name)) is not None:
            self._grant(wish)
        self._replay()
        self._check_target()
        if (tables := self._tables()) is None:
            return
        while True:
            result = self._copy(tables, stop)
            self.finished = result.finished
            if not result.complete:
                return
            # a snapshot publishes all tables that there are: what it published must be copied too
            latest = self._source.tables() if result.copied else tables
            if set(latest) <= set(tables):
                break
            tables = latest
        self._note(FILLED)

    def _grant(self, wish: Wish) -> None:
        """Let the mirror be made right again: beside the stream, or by a copy where that cannot be."""
        mirror, queue = self._mirror, self._queue
        stored = mirror.stored_position()
        anew = wish.anew or not self._reaches(stored)
        if stored is None and not mirror.copied():
            queue.set(filled_fact(mirror.name), None)  # nothing is there: as at the first time
        else:
            tables = None if anew or wish.tables is None else [table_name(each) for each in wish.tables]
            self._order(tables, anew=anew)
        queue.set(resync_fact(mirror.name), None)

    def _order(self, tables: Sequence[TableName] | None, *, anew: bool) -> None:
        """A wish that cannot be granted is dropped: else it would stop the sink, now and after each start."""
        try:
            resync = self._mirror.want_resync(tables, end_of(self._queue), anew=anew)
        except UnknownTable as exc:
            log.error("resync refused", sink=self._mirror.name, error=str(exc), hint=exc.hint)
            return
        log.info(
            "resync begins",
            sink=self._mirror.name,
            beside_the_stream=[str(table) for table in resync.refreshed],
            copied_again=[str(table) for table in resync.copied_again],
        )

    def _reaches(self, stored: Position | None) -> bool:
        try:
            return stored is not None and self._queue.seek(stored) >= 0
        except ResyncRequired:
            return False

    def _replay(self) -> None:
        """Take the mirror back, if that is wanted: what follows is delivered once more."""
        mirror, queue = self._mirror, self._queue
        if (wanted := queue.get(replay_fact(mirror.name))) is None:
            return
        position = queue.rewind(mirror.name, int(wanted))
        mirror.rewind(position)
        log.info("delivered again", sink=mirror.name, after_seq=position.seq)
        queue.set(replay_fact(mirror.name), None)

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
            if not self.resyncs or not isinstance(exc, HistoryLost):
                raise explained(name, type(exc)(f"sink {name}: {exc}")) from exc
            log.warning("the queue has not what the target needs", sink=name, error=str(exc))
            self._grant(Wish())

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
        options = self._options
        return Copy(
            self._source,
            self._mirror,
            tables,
            end_of(self._queue),
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
