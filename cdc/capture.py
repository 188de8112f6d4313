"""Source -> queue -> confirm: the first half of the line, in one thread a source."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

import structlog

from cdc.change import Batch
from cdc.errors import HistoryLost, ResyncRequired, TransientError
from cdc.failpoints import failpoint
from cdc.position import SourcePosition, format_position
from cdc.pulse import beat
from cdc.queue import Queue
from cdc.retry import keep_trying
from cdc.source import Source
from cdc.stats import CaptureStats, State, count_changes, note_waiting
from cdc.wishes import Wish, explained, is_allowed, restart_fact, resync_fact

log = structlog.get_logger()

QUEUE_FULL: Final = "the queue is full: nothing is read until a sink has caught up"

READ_SECONDS: Final = 0.2
"""Longest wait for changes, and so the delay of a stop, a pause, or a status update that is due."""

FULL_SECONDS: Final = 30.0
"""After so long without room the connection is closed: an idle reader keeps the server from shutting down."""


class Capture:
    """Reads one source into its queue, and confirms upstream only what is durable there.

    applied: asks for the position of the slowest target; `None` while there is none.
    resyncs: whether the stream may begin anew by itself where the source has lost history; a person may say so, too.
    restarted: told of that, before anything follows that gap.
    """

    def __init__(
        self,
        source: Source,
        queue: Queue,
        stats: CaptureStats,
        *,
        applied: Callable[[], SourcePosition | None],
        resyncs: bool = False,
        restarted: Callable[[], None] = lambda: None,
    ) -> None:
        self._source = source
        self._queue = queue
        self._stats = stats
        self._applied = applied
        self._resyncs = resyncs
        self._restarted = restarted
        self._gap: ResyncRequired | None = None
        self._running = threading.Event()
        self._running.set()
        self._log = structlog.get_logger(source=source.name)

    def pause(self) -> None:
        """Disconnect, and stay so; the source's server keeps the changes."""
        self._running.clear()

    def resume(self) -> None:
        """Go on where it was."""
        self._running.set()

    def run(self, stop: threading.Event) -> None:
        """Capture until `stop` is set. Retries for ever what is transient; raises what is not."""
        try:
            while not stop.is_set():
                beat()
                if not self._running.is_set():
                    self._stats.state = State.PAUSED
                    stop.wait(READ_SECONDS)
                elif self._has_room():
                    self._keep_capturing(stop)
                else:
                    stop.wait(READ_SECONDS)
        finally:
            self._source.close()

    def _keep_capturing(self, stop: threading.Event) -> None:
        try:
            keep_trying(lambda: self._session(stop), stop, self._waiting)
        except ResyncRequired as exc:
            by_itself = self._resyncs and isinstance(exc, HistoryLost)
            if not by_itself and not is_allowed(self._queue, self._source.name, exc):
                raise explained(self._source.name, exc) from exc
            self._gap = exc

    def _session(self, stop: threading.Event) -> None:
        """Stream until stopped, paused, full for long, or broken after it got somewhere."""
        progressed = False
        try:
            self._connect()
            full_since: float | None = None
            while self._running.is_set() and not stop.is_set():
                beat()
                if self._has_room():
                    full_since = None
                    progressed |= self._read()
                elif full_since is None:
                    full_since = time.monotonic()
                elif time.monotonic() - full_since > FULL_SECONDS:
                    return
                else:
                    stop.wait(0.01)
                self._confirm()
            self._finish()
        except TransientError as exc:
            if not progressed:
                raise
            self._waiting(exc, 0.0)
        finally:
            self._source.close()

    def _connect(self) -> None:
        if self._gap is not None:
            position = self._begin_anew(self._gap)
        else:
            position = self._source.open(self._queue.position)
            if self._queue.position is None:
                self._queue.begin(position)
        if self._queue.get(restart_fact(self._source.name)) is not None:
            self._queue.set(restart_fact(self._source.name), None)
        self._stats.connected_at = time.time()
        self._stats.received = position
        self._streaming()
        self._log.info("streaming", position=format_position(position))

    def _begin_anew(self, gap: ResyncRequired) -> SourcePosition:
        """What was captured before can still be delivered where it surely is of the same database."""
        queue, beginning = self._queue, self._source.restart()
        before = queue.position
        if before is None:
            queue.begin(beginning.position)
        same = isinstance(gap, HistoryLost) and before is not None
        if same and isinstance(before, int) and isinstance(beginning.position, int):
            same = before <= beginning.position
        wish = Wish(anew=not same).encode()
        facts: dict[str, str | None] = {resync_fact(sink): wish for sink in queue.sinks}
        queue.restart(beginning.position, {**beginning.facts, **facts}, keep=same)
        self._gap = None
        self._restarted()
        self._log.warning(
            "the stream begins anew: changes are missing",
            gap=str(gap),
            after=format_position(before),
            before=format_position(beginning.position),
            sinks=queue.sinks,
        )
        return beginning.position

    def _read(self) -> bool:
        batch = self._source.read(READ_SECONDS)
        if batch is None:
            return False
        failpoint("capture.append.before")
        self._queue.append(batch)
        failpoint("capture.append.after")
        self._count(batch)
        return True

    def _has_room(self) -> bool:
        """While the queue is full nothing is read, not even into libpq's buffer; status still goes out."""
        if self._queue.has_room:
            if self._stats.state is State.WAITING and self._stats.error == QUEUE_FULL:
                self._streaming()
            return True
        if self._stats.state is not State.WAITING and self._queue.stats().full:
            self._stats.state = State.WAITING
            self._stats.error = QUEUE_FULL
            self._stats.hint = "see why its sinks are behind, or raise max_bytes in [queue]"
            self._log.warning(QUEUE_FULL)
        return False

    def _confirm(self) -> None:
        durable = self._queue.position
        if durable is not None:
            failpoint("capture.confirm.before")
            self._source.confirm(durable=durable, applied=self._applied())
            failpoint("capture.confirm.after")
            self._stats.confirmed = durable
        self._source.observe(self._stats)
        if self._stats.confirmed == self._stats.server_end:
            self._stats.caught_up_at = time.time()

    def _finish(self) -> None:
        """Before an orderly end, confirm what came last: the server need not send it again."""
        if self._queue.flush(timeout_seconds=5.0):
            self._confirm()

    def _streaming(self) -> None:
        self._stats.state = State.RUNNING
        self._stats.error = None
        self._stats.hint = ""

    def _waiting(self, error: BaseException, seconds: float) -> None:
        note_waiting(self._stats, error)
        self._log.warning("source unavailable", error=str(error), retry_in_seconds=round(seconds, 1))

    def _count(self, batch: Batch) -> None:
        self._stats.bytes += batch.size
        self._stats.received = batch.position
        if not batch.transactions:
            return
        summary = batch.summary
        self._stats.transactions += summary.complete
        self._stats.last_commit_time = summary.commit_time / 1e6
        count_changes(self._stats, summary)
