"""Queue -> sink: the second half of the line, in one thread a sink."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import closing
from typing import Final

import structlog

from cdc.change import Batch
from cdc.config import BatchBounds, SinkConfig
from cdc.errors import FatalError, PermanentError, ResyncRequired, TransientError
from cdc.failpoints import failpoint
from cdc.hold import Hold, Request
from cdc.metrics import APPLY_SECONDS, LATENCY_SECONDS
from cdc.parking import Parker, ParkingBounds
from cdc.portion import Portion, bounded, select
from cdc.position import Position, SourcePosition, format_position
from cdc.pulse import beat
from cdc.queue import Queue, Stored
from cdc.read_ahead import ReadAhead
from cdc.retry import keep_trying
from cdc.sink import Adjustable, Applied, Halted, NeedsFilling, Refreshing, Refused, Sink
from cdc.stats import DeliveryStats, State, count_changes, note_waiting
from cdc.wishes import explained

log = structlog.get_logger()

UPKEEP_SECONDS: Final = 5.0
"""How often a sink is given time for upkeep."""

CATCHING_UP_SECONDS: Final = 0.5
"""The same for one that is not consistent yet: more may wait for that."""

INCONSISTENT: Final = "the mirror is catching up or being resynced: what it has not come to yet is of an earlier time"

REFRESH_SECONDS: Final = 0.25
"""So long tables are put right between two batches, as far as it is known by then what is to be written."""

MAX_REFRESH_SECONDS: Final = 5.0
"""At most, after a batch that took long: half as long as the batch, or the end of a resync might never come."""

READ_SECONDS: Final = 0.2
"""Longest wait for batches. A pause, a hold and a stop wake the queue and need not wait so long."""


class Delivery:
    """Delivers one queue to one sink. The target's own position decides where it goes on.

    stats.position: everything up to there is stored in the target (or there was nothing to store).
    """

    def __init__(
        self, sink: Sink, queue: Queue, stats: DeliveryStats, bounds: BatchBounds, *, parker: Parker | None = None
    ) -> None:
        """With a `parker`, what the target refuses is parked; without, the sink stops there."""
        self._sink = sink
        self._parker = parker
        self._queue = queue
        self._stats = stats
        self._portion = Portion(bounds)
        self._reading = ReadAhead(sink, queue, self._portion, parker)
        self._running = threading.Event()
        self._running.set()
        self._hold = Hold()
        self._log = structlog.get_logger(sink=sink.name)
        # where the target stands, and the last batch given to it: further only inside a large transaction
        self._stored = Position("", 0, 0)
        self._given_seq = 0
        self._upkeep_at = 0.0
        self._apply_seconds = 0.0  # of the batch before
        self._refused_seq = 0  # up to here changes are looked at one by one
        self._fill_wanted = threading.Event()
        self._cut_short = False  # what is at hand will not be completed

    def pause(self) -> None:
        """Stop applying after the batch at hand; the queue keeps what comes."""
        self._running.clear()
        self._queue.wake()

    def resume(self) -> None:
        """Go on where it was."""
        self._running.set()

    def want_filling(self, *, at_once: bool = False) -> None:
        """Let `run` return between two transactions: there is something to copy. From any thread.

        at_once: in the middle of one, too: its end does not come, and nothing that comes is applied before.
        """
        self._cut_short |= at_once
        self._fill_wanted.set()
        self._show_filling()
        self._queue.wake()

    def adopt(self, config: SinkConfig) -> None:
        """Go on with other options, as far as `cdc.reload` lets them change. From any thread."""
        self._portion.bounds = config.batch
        if self._parker is not None:
            self._parker.adopt(ParkingBounds.of(config), config.retry)
        if isinstance(self._sink, Adjustable):
            self._sink.adjust(config)

    def hold(self, until: SourcePosition | None, seconds: float) -> SourcePosition:
        """Let the target reach exactly `until` (`None`: where it is) and stand still there; returns its position.

        All transactions that commit below `until` are applied, none of the others. Goes on by itself after `seconds`.
        Raises `TransientError` if it cannot get there in that time, or the target would not be of one moment there.
        """
        self._hold.ask(until, seconds)
        self._queue.wake()
        return self._hold.wait(seconds)

    def release(self) -> None:
        """End a hold. Harmless without one."""
        self._hold.release()

    def run(self, stop: threading.Event) -> bool:
        """Deliver until `stop` is set, or the sink has to be filled again; whether it has.

        Retries for ever what is transient; raises what is not.
        """
        with self._reading.in_thread(), closing(self._sink):
            while not stop.is_set() and not self._fill_wanted.is_set():
                if self._running.is_set():
                    keep_trying(lambda: self._session(stop), stop, self._waiting)
                else:
                    beat()
                    self._stats.state = State.PAUSED
                    stop.wait(READ_SECONDS)
        wanted = self._fill_wanted.is_set() and not stop.is_set()
        self._fill_wanted.clear()
        self._cut_short = False
        return wanted

    def _session(self, stop: threading.Event) -> None:
        """One connection to the target: until stopped, paused, to be filled, or broken after it got somewhere."""
        self._open()
        first_seq = self._stored.seq

        def wanted() -> bool:
            """Also asked while the target is held: so whoever waits for the parker is served in any case."""
            beat()
            if self._parker is not None and self._parker.asked:
                self._reading.wait()
                self._parker.serve()
            return self._running.is_set() and not stop.is_set()

        try:
            while wanted() and (self._must_end or not self._fill_wanted.is_set()):
                request = self._hold_request()
                self._retry_parked(request)
                self._refresh(request)
                if self._step(request) and request is not None:
                    self._stats.state = State.HELD
                    self._hold.stand(request, request.until or self._stored.source, wanted)
                    self._running_state()
        except NeedsFilling as exc:
            self._log.info("to be filled again", reason=str(exc))
            self._fill_wanted.set()
        except TransientError as exc:
            if self._stored.seq == first_seq:
                raise
            self._waiting(exc, 0.0)
        except _Reopen as exc:
            self._log.info("looking for the change that is refused", error=str(exc))
        except PermanentError as exc:
            raise FatalError(str(exc), hint=exc.hint) from exc
        finally:
            if self._parker is not None:
                self._parker.close()
            self._reading.wait()
            self._sink.close()

    def _hold_request(self) -> Request | None:
        """Whether somebody waits for the target to stand still, so that it can be compared there."""
        request = self._hold.request
        if request is not None and not self._sink.consistent:
            self._hold.refuse(request, INCONSISTENT)
            return None
        return request

    def _open(self) -> None:
        stored = self._sink.open()
        if stored is None:
            gap = ResyncRequired(
                f"the target of sink {self._sink.name} has no position: it was emptied, or never filled"
            )
            raise explained(self._sink.name, gap)
        try:
            after = self._queue.seek(stored)
        except ResyncRequired as exc:
            raise explained(self._sink.name, exc) from exc
        cursor = self._queue.cursor(self._sink.name)
        if cursor is not None and after < cursor[0]:
            self._log.warning("target is older than it was", position=format_position(stored.source))
        self._queue.advance(self._sink.name, after, stored.source)  # what comes after it must be kept
        self._stored = Position(self._queue.queue_id, after, stored.source)
        self._given_seq = after
        self._reading.forget()
        self._upkeep_at = 0.0
        self._stats.position, self._stats.seq = stored.source, after
        self._running_state()
        self._stats.error, self._stats.hint = None, ""
        if self._parker is not None:
            self._parker.open(self._stored)
        self._log.info("delivering", position=format_position(stored.source))

    def _step(self, hold: Request | None) -> bool:
        """Apply what the queue holds next, within bounds. True where the hold wants the target to stand still."""
        until = hold.until if hold else None
        if hold and until is None and not self._in_transaction:
            return True
        captured = self._queue.position  # read before the batches, so that it is not ahead of them
        hurried = hold is not None or self._stats.resync is not None
        stored = self._reading.read(self._given_seq, timeout_seconds=0.01 if hurried else READ_SECONDS)
        if self._cut_short:
            return False
        pieces, cut = select(bounded(stored, self._portion.max_changes), self._given_seq, self._stored.source, until)
        if pieces:
            self._apply(pieces)
        elif not stored and not self._in_transaction:
            self._idle(captured)
        self._upkeep()
        if hold is None or until is None or self._in_transaction:
            return False
        return self._stands_at(hold, until, captured, cut=cut or not stored)

    @property
    def _in_transaction(self) -> bool:
        """Whether the target has the beginning of a transaction, but not its end."""
        return self._given_seq != self._stored.seq

    @property
    def _must_end(self) -> bool:
        """Whether a transaction is under way that is to be completed first."""
        return self._in_transaction and not self._cut_short

    def _stands_at(self, hold: Request, until: SourcePosition, captured: SourcePosition | None, *, cut: bool) -> bool:
        """cut: the next transaction commits at `until` or later, or there is none."""
        if not (isinstance(until, int) and isinstance(self._stored.source, int) and isinstance(captured, int)):
            self._hold.refuse(hold, "this kind of source has no order of positions to stop at")
            return False
        if self._stored.source > until:
            self._hold.refuse(hold, f"the target is past {format_position(until)} already")
            return False
        return cut and captured >= until

    def _apply(self, pieces: Sequence[Stored]) -> None:
        batches: Sequence[Batch] = [piece.batch for piece in pieces]
        last = pieces[-1]
        position = Position(self._queue.queue_id, last.seq, last.batch.position)
        if any(batch.transactions for batch in batches):
            failpoint("delivery.apply.before")
            started = time.monotonic()
            if self._parker is None:
                self._reading.begin(pieces)
                applied = self._sink.apply(batches, position)
            else:
                batches, applied = self._apply_or_park(self._parker, pieces, position)
            self._apply_seconds = time.monotonic() - started
            APPLY_SECONDS.labels(self._sink.name).observe(self._apply_seconds)
            failpoint("delivery.apply.after")
            self._portion.applied(applied)
            self._stats.missing_rows += applied.missing_rows
            self._stats.healed_rows += applied.healed_rows
            self._stats.fallbacks += applied.fallback
            self._count(batches)
        self._given_seq = last.seq
        if last.batch.complete:
            self._stored = position
            self._stats.position, self._stats.seq = position.source, position.seq
            self._queue.advance(self._sink.name, position.seq, position.source)
            if self._parker is not None:
                self._parker.passed(position)

    def _apply_or_park(
        self, parker: Parker, pieces: Sequence[Stored], position: Position
    ) -> tuple[Sequence[Batch], Applied]:
        """Apply what does not have to wait; returns that. Where it has to be, the sink is opened once more."""
        try:
            refused: PermanentError | None = None
            if pieces[0].seq > self._refused_seq:
                batches = [each.batch for each in parker.admit(pieces)]
                self._reading.begin(pieces)  # behind what waits of these
                try:
                    return batches, self._sink.apply(batches, position)
                except Halted as exc:
                    refused = exc
                except Refused as exc:
                    if not exc.undone:
                        raise
                    refused = exc
                self._log.info("looking for the change that is refused", error=str(refused))
                self._reading.wait()
            kept, applied = parker.carefully(pieces, position, refused)
            return [each.batch for each in kept], applied
        except PermanentError as exc:
            self._refused_seq = max(self._refused_seq, pieces[-1].seq)
            raise _Reopen(str(exc)) from exc

    def _retry_parked(self, hold: Request | None) -> None:
        """Between two transactions, and not while somebody waits for the target to stand still."""
        if self._parker is not None and hold is None and not self._in_transaction and self._parker.due:
            self._reading.wait()
            self._parker.retry()

    def _refresh(self, hold: Request | None) -> None:
        """Between two transactions, and not while somebody waits for the target to stand still."""
        position = self._stats.position
        if self._sink.consistent or hold is not None or self._in_transaction or position is None:
            return
        if isinstance(self._sink, Refreshing):
            self._reading.wait()
            seconds = max(REFRESH_SECONDS, min(self._apply_seconds / 2, MAX_REFRESH_SECONDS))
            until = time.monotonic() + seconds
            self._apply_seconds = 0.0
            going_on = True
            while going_on:
                before, self._stats.resync = self._stats.resync, self._sink.refresh(position)
                self._running_state()
                going_on = self._stats.resync not in (None, before) and time.monotonic() < until

    def _count(self, batches: Sequence[Batch]) -> None:
        summaries = [batch.summary for batch in batches if batch.transactions]
        for summary in summaries:
            count_changes(self._stats, summary)
            self._stats.transactions += summary.complete
        newest = summaries[-1] if summaries else None
        if newest is not None and newest.ended:
            self._stats.last_commit_time = newest.commit_time / 1e6
            LATENCY_SECONDS.labels(self._sink.name).observe(max(time.time() - newest.commit_time / 1e6, 0.0))

    def _idle(self, captured: SourcePosition | None) -> None:
        """Nothing is left to apply: the target is as far as the capture."""
        self._stats.caught_up_at = time.time()
        if captured is not None:
            self._stats.position = captured

    def _upkeep(self) -> None:
        now = time.monotonic()
        seconds = UPKEEP_SECONDS if self._sink.consistent else CATCHING_UP_SECONDS
        if now - self._upkeep_at < seconds or self._in_transaction or self._stats.position is None:
            return
        self._reading.wait()
        self._sink.upkeep(self._stats.position)
        self._running_state()
        self._upkeep_at = time.monotonic()

    def _running_state(self) -> None:
        inconsistent = State.CATCHING_UP if self._stats.resync is None else State.RESYNCING
        self._stats.state = State.RUNNING if self._sink.consistent else inconsistent
        if self._fill_wanted.is_set():
            self._show_filling()

    def _show_filling(self) -> None:
        """From when something is ordered on, nobody is to take the mirror for right."""
        if self._stats.state is State.RUNNING:
            self._stats.state = State.STARTING

    def _waiting(self, error: BaseException, seconds: float) -> None:
        note_waiting(self._stats, error)
        self._log.warning("target unavailable", error=str(error), retry_in_seconds=round(seconds, 1))


class _Reopen(Exception):
    """The target refuses something of a batch, it is not known yet what, and the sink is to be opened before it is."""
