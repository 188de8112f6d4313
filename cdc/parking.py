"""Parked changes: what the target refuses waits, with what depends on it, while everything else flows on.

A change that the target refuses for good is written to the queue's file before the target's position moves past it, and
so are all later changes about the same (`cdc.sink.Subject`), in order, untried. The first of them is tried again now
and then, by itself; when that succeeds, those behind it follow. After so many attempts it is dead: it stays, with those
behind it, until a person acts. There is a bound for what may be parked, behind which the sink stops: nothing is ever
forgotten. While something is parked, the transactions that it came in are torn on the target.

Whatever is done here may be interrupted at any moment: rows of batches that the target has not passed come again, and
those that are applied twice change nothing the second time (`cdc.sink.Parking.apply_parked`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, TypeGuard, TypeVar

import msgspec
import structlog

from cdc.admission import Admission, ParkedRows, admission, apart
from cdc.change import Batch, Change, Transaction
from cdc.config import RetryOptions, SinkConfig
from cdc.desk import Desk
from cdc.errors import FatalError, PermanentError
from cdc.letter import LetterId
from cdc.narrowing import Narrowing, ParkingSink
from cdc.parking_plan import Plan, make_plan, subject_of
from cdc.parking_schedule import Clock, Schedule
from cdc.parts import Item, Subjects, alone, items_of, sifted
from cdc.position import Position
from cdc.queue import Queue, Stored
from cdc.queue.parked import ParkedChange, payload_of
from cdc.sink import Ahead, Applied, Halted, Parking, Sink, Subject
from cdc.stats import DeliveryStats, count_changes, note_parked

RETRY_SECONDS: Final = 0.1
RELEASE_SECONDS: Final = 1.0
"""So long changes are tried again between two batches, and those applied that have waited behind them: the stream is
not to wait for many that fail."""

ASK_SECONDS: Final = 5.0
"""So long an operator waits for a batch at hand."""

log = structlog.get_logger()

T = TypeVar("T")


class ParkingBounds(msgspec.Struct, frozen=True):
    """How many changes of a sink, and bytes of them, may be parked."""

    max_changes: int
    max_bytes: int

    @classmethod
    def of(cls, sink: SinkConfig) -> ParkingBounds:
        """As it is configured."""
        return cls(sink.max_parked, sink.max_parked_bytes)


def can_park(sink: Sink) -> TypeGuard[ParkingSink]:
    """Whether a sink offers what it takes."""
    return isinstance(sink, Parking)


class Parker:
    """The parked changes of one sink: always what the queue's file says, which nobody else may change.

    Lives in its delivery's thread; between `close` and `open` in that of whoever alters something.
    """

    def __init__(
        self,
        sink: ParkingSink,
        queue: Queue,
        stats: DeliveryStats,
        bounds: ParkingBounds,
        clock: Clock | None = None,
        *,
        retry: RetryOptions = RetryOptions(),  # noqa: B008 - frozen
    ) -> None:
        self._sink = sink
        self._queue = queue
        self._stats = stats
        self._bounds = bounds
        self._clock = clock or Clock()
        self._schedule = Schedule(retry, self._clock)
        self._log = structlog.get_logger(sink=sink.name)
        self._rows = ParkedRows()
        self._reached = 0
        self._ahead: Ahead | None = None
        self._plan: Plan | None = None
        self._foreseen: Admission | None = None
        self._steady = True  # a target's own equality may change with its tables
        self._narrowing = Narrowing(sink, self)
        self._restarted = True
        self._desk = Desk()
        self._tried = threading.Event()  # all that has no more to wait for
        self._tried.set()
        self._see(queue.parked(sink.name))

    def adopt(self, bounds: ParkingBounds, retry: RetryOptions) -> None:
        """For what is refused from now on. From any thread."""
        self._bounds = bounds
        self._schedule.set_retry(retry)

    def open(self, stored: Position) -> None:
        """Begin where the target stands. What it never came to is forgotten: it comes again."""
        self._ahead = self._sink.ahead()
        self._foreseen, self._steady = None, False
        self._reached = reached_by(stored)
        self._desk.own(self._begin)
        if self._rows:
            self._log.warning("changes are parked", parked=self._stats.parked, dead=self._stats.dead)

    def _begin(self) -> None:
        reached = self._reached if self._ahead is None else max(self._reached, self._ahead.seq + 1)
        settled = set(self._sink.settled())
        rows = self._queue.parked(self._sink.name)
        gone = {row.id for row in rows if row.place >= reached or (row.position, row.ordinal) in settled}
        if gone:
            self._queue.unpark(self._sink.name, sorted(gone))
        self._see(row for row in rows if row.id not in gone)
        self._schedule.restore(self._rows, at_once=self._restarted)
        self._restarted = False

    def close(self) -> None:
        """The target is left alone. Safe to call twice."""
        self._tried.set()
        self._desk.leave()

    def passed(self, stored: Position) -> None:
        """The target's position is stored: what was parked up to there counts."""
        self._reached = reached_by(stored)
        self._narrowing.passed()
        if self._ahead is not None and stored.seq >= self._ahead.seq:
            self._ahead = None
        if self._plan is not None and self._plan.unreached:
            self._plan = None

    # operators

    def alter(self, action: Callable[[], T]) -> T:
        """Let `action` change this sink's rows in the queue's file while nobody else does. From any thread.

        Raises `TransientError`, and changes nothing, where the delivery has no moment for that.
        """

        def alone() -> T:
            result = action()
            self._see(self._queue.parked(self._sink.name))
            self._schedule.retain(self._rows)
            if self._desk.owned and self._planned().released:
                self._tried.clear()
            return result

        return self._desk.ask(alone, seconds=ASK_SECONDS, wake=self._queue.wake)

    def wait_tried(self, seconds: float) -> None:
        """Wait until all was tried that was made due by `alter`, if it can be tried now. From any thread."""
        self._tried.wait(seconds)

    @property
    def asked(self) -> bool:
        """Whether somebody waits for `serve`."""
        return self._desk.asked

    def serve(self) -> None:
        """Let those act who wait for it. Only the queue's file is changed by that."""
        self._desk.serve()

    # the stream

    def foresee(self, pieces: Sequence[Stored]) -> Sequence[Stored]:
        """What `admit` will probably return for these. From another thread, while the target is busy with others."""
        self._foreseen = self._look_at(pieces) if self._rows and self._steady else None
        return pieces if self._foreseen is None else self._foreseen.admitted

    def admit(self, pieces: Sequence[Stored]) -> Sequence[Stored]:
        """Leave out, and park durably, what has to wait behind parked changes. The very pieces that were foreseen."""
        foreseen, self._foreseen = self._foreseen, None
        if not self._rows:
            return pieces
        if foreseen is None or not foreseen.holds_for(pieces, self._rows.version):
            foreseen = self._look_at(pieces)
        self._steady = self._ahead is None and not foreseen.has_ddl
        self._park([self._new(item, subject) for item, subject in foreseen.waiting])
        return foreseen.admitted

    def _look_at(self, pieces: Sequence[Stored]) -> Admission:
        return admission(pieces, self._rows, self._sink, again=self._ahead is not None)

    def carefully(
        self, pieces: Sequence[Stored], position: Position, refused: PermanentError | None = None
    ) -> tuple[Sequence[Stored], Applied]:
        """Apply what was refused as a whole, and park what is refused by itself; returns what is not parked.

        refused: how it was refused, if it was just now. Raises `PermanentError` where the sink is to be opened again,
        to call this with all that it then has not.
        """
        self._narrowing.apply(self._new_to_target(pieces), position, refused)
        applied = self._narrowing.finish(pieces, position)
        return [
            sifted(piece, lambda _transaction, _change, place: place not in self._rows) for piece in pieces
        ], applied

    def _new_to_target(self, pieces: Sequence[Stored]) -> Iterator[tuple[Transaction, list[Item]]]:
        """Transactions, without those that were applied when the target was opened."""
        ahead = self._ahead
        for piece in pieces:
            items = items_of(piece)
            for transaction in piece.batch.transactions:
                own = [next(items) for _ in transaction.changes]
                if ahead is None:
                    yield transaction, own
                elif transaction.complete and transaction.position == ahead.position:
                    ahead = self._ahead = None

    def wait_behind(self, items: Iterable[Item]) -> Sequence[Item]:
        """Park what has to wait; return the rest."""
        free, waiting = apart(items, self._rows, self._sink)
        self._park([self._new(item, subject) for item, subject in waiting])
        return free

    def refused(self, item: Item, error: PermanentError) -> None:
        """Park a change that the target refuses by itself."""
        row, payload = self._new(item, self._subject(item))
        row = self._schedule.failed(row, error)
        self._park([(row, payload)])
        self._plan = None
        tables = ", ".join(map(str, row.tables))
        self._log.warning("parked", id=self._letter(row), tables=tables, error=str(error))

    def _subject(self, item: Item) -> Subject:
        return self._sink.subject_of(item.stored.batch.tables, item.change)

    def _new(self, item: Item, subject: Subject) -> tuple[ParkedChange, bytes]:
        payload = payload_of(alone(item))
        place, ordinal = item.id
        row = ParkedChange(
            place=place,
            ordinal=ordinal,
            position=item.transaction.position,
            tables=subject.tables,
            keys=subject.keys,
            size=len(payload),
            created_at=self._clock.unix(),
        )
        return row, payload

    def _park(self, new: Sequence[tuple[ParkedChange, bytes]]) -> None:
        """Durable on return. Raises `FatalError` where that would be too much."""
        if not new:
            return
        count, size = len(self._rows) + len(new), self._rows.size + sum(row.size for row, _ in new)
        if count > self._bounds.max_changes or size > self._bounds.max_bytes:
            raise FatalError(
                f"more than {self._bounds.max_changes} changes or {self._bounds.max_bytes} bytes would be parked: "
                "the sink stops, so that none is forgotten",
                hint="see `cdc dead-letters list`; correct what the target refuses, then "
                f"`cdc resume {self._sink.name}`; or raise max_parked, max_parked_bytes",
            )
        self._queue.park(self._sink.name, new)
        for row, _ in new:
            self._rows.add(row)
        self._publish()

    # what is parked

    @property
    def due(self) -> bool:
        """Whether `retry` has something to do."""
        return bool(self._next())

    def retry(self) -> None:
        """Try what is due, and apply what is released by that. Between two transactions only."""
        begin = time.monotonic()
        while rows := self._next():
            if time.monotonic() - begin > (RELEASE_SECONDS if self._planned().released else RETRY_SECONDS):
                return
            self._try(rows)
        self._tried.set()

    def _next(self) -> Sequence[ParkedChange]:
        """What is released, or else the head that is due first."""
        if not self._rows:
            return ()
        plan = self._planned()
        return plan.released or self._schedule.next_of(plan.heads)

    def _planned(self) -> Plan:
        if self._plan is None:
            self._plan = make_plan(self._rows, self._reached, together=self._sink.all_or_nothing)
        return self._plan

    def _try(self, rows: Sequence[ParkedChange]) -> None:
        """Apply rows that nothing holds back, in order; those that are refused wait, and those behind them."""
        failed = Subjects()
        todo = [rows]
        while todo:
            part = [row for row in todo.pop() if not _waits(row, failed)]
            if part:
                todo += reversed(self._try_part(part, failed))
        self._plan = None
        self._publish()

    def _try_part(self, rows: Sequence[ParkedChange], failed: Subjects) -> Sequence[Sequence[ParkedChange]]:
        """Return what is left of them to be tried, in order."""
        batches = self._queue.parked_batches(self._sink.name, [row.id for row in rows])
        try:
            self.applied(self._sink.apply_parked(batches))
        except PermanentError as exc:
            if isinstance(exc, Halted):
                at = _place_of(exc.change, batches)
            elif len(rows) > 1:
                middle = len(rows) // 2
                return rows[:middle], rows[middle:]
            else:
                at = 0
            self._released(rows[:at], batches[:at])
            self._stats.parked_attempts += 1
            self._failed_again(rows[at], exc)
            failed.add(subject_of(rows[at]))
            return (rows[at + 1 :],)
        self._released(rows, batches)
        return ()

    def _released(self, rows: Sequence[ParkedChange], batches: Sequence[Batch]) -> None:
        """They are applied."""
        if not rows:
            return
        self._stats.parked_attempts += len(rows)
        self._queue.unpark(self._sink.name, [row.id for row in rows])
        for row in rows:
            self._rows.remove(row)
            self._schedule.forget(row.id)
        for batch in batches:
            count_changes(self._stats, batch.summary)
        self._log.info("applied parked changes", changes=len(rows), left=len(self._rows))

    def _failed_again(self, row: ParkedChange, error: PermanentError) -> None:
        row = self._schedule.failed(row, error)
        self._rows.replace(row)
        self._queue.retried(self._sink.name, row)
        facts = {"id": self._letter(row), "attempts": row.attempts, "error": row.error}
        if row.state == "dead":
            self._log.error("a parked change is dead", **facts)
        else:
            self._log.info("a parked change is still refused", **facts)

    def _letter(self, row: ParkedChange) -> str:
        """As operators call it, in `cdc dead-letters`."""
        return str(LetterId(self._sink.name, *row.id))

    # counting

    def applied(self, applied: Applied) -> None:
        """Count what was done to rows."""
        self._stats.missing_rows += applied.missing_rows
        self._stats.healed_rows += applied.healed_rows

    def _see(self, rows: Iterable[ParkedChange]) -> None:
        """Take these for all that there are."""
        self._rows.clear()
        self._plan = None
        for row in rows:
            self._rows.add(row)
        self._publish()

    def _publish(self) -> None:
        note_parked(self._stats, self._rows.count)


def _place_of(change: Change, batches: Sequence[Batch]) -> int:
    """Which of the batches, of one change each, holds it."""
    return next(number for number, batch in enumerate(batches) if batch.transactions[0].changes[0] is change)


def _waits(row: ParkedChange, failed: Subjects) -> bool:
    """Whether a change has to wait behind those that failed; then later ones have to wait behind it as well."""
    subject = subject_of(row)
    if not failed.block(subject):
        return False
    failed.add(subject)
    return True


def reached_by(stored: Position) -> int:
    """What is parked at lower places was passed by a target that stands there."""
    return stored.source if isinstance(stored.source, int) else stored.seq + 1
