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

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, NamedTuple, Protocol, TypeGuard

import msgspec
import structlog

from cdc.capture import count_changes
from cdc.change import Transaction
from cdc.errors import FatalError, PermanentError
from cdc.parts import Item, Part, Subjects, alone, batches_of, items_of, parts_of
from cdc.position import Position
from cdc.queue import Queue, Stored
from cdc.queue_parked import ParkedChange, ParkedId, payload_of
from cdc.retry import PARKED_ATTEMPTS, parked_wait_seconds
from cdc.sink import Ahead, Applied, Parking, Sink, Subject
from cdc.status import DeliveryStats

RELEASED_CHANGES: Final = 500
RELEASED_BYTES: Final = 4 * 1024**2
"""So much of what has waited behind a change is applied at once."""

RETRY_SECONDS: Final = 0.1
"""So long changes are tried again between two batches; the stream is not to wait for many that fail."""

log = structlog.get_logger()


class ParkingBounds(msgspec.Struct, frozen=True):
    """How many changes of a sink, and bytes of them, may be parked."""

    max_changes: int
    max_bytes: int


class ParkingSink(Sink, Parking, Protocol):
    """A sink whose changes can be parked."""


def can_park(sink: Sink) -> TypeGuard[ParkingSink]:
    """Whether a sink offers what it takes."""
    return isinstance(sink, Parking)


class Clock(NamedTuple):
    """Where time comes from: a clock that never jumps, and unix seconds, for people and over restarts."""

    monotonic: Callable[[], float] = time.monotonic
    unix: Callable[[], float] = time.time


class _Plan(NamedTuple):
    """What can be done now: released are those that wait behind nothing any more; heads were refused before.

    unreached: whether there are some that the target's position has not passed; they come first again.
    """

    released: Sequence[ParkedChange]
    heads: Sequence[ParkedChange]
    unreached: bool


class Parker:
    """The parked changes of one sink. Lives in its delivery's thread."""

    def __init__(
        self, sink: ParkingSink, queue: Queue, stats: DeliveryStats, bounds: ParkingBounds, clock: Clock | None = None
    ) -> None:
        self._sink = sink
        self._queue = queue
        self._stats = stats
        self._bounds = bounds
        self._clock = clock or Clock()
        self._log = log.bind(sink=sink.name)
        self._rows: dict[ParkedId, ParkedChange] = {}
        self._due: dict[ParkedId, float] = {}  # by the monotonic clock
        self._subjects = Subjects()
        self._bytes = 0
        self._stored_seq = 0
        self._ahead: Ahead | None = None
        self._plan: _Plan | None = None
        self._restarted = True

    def open(self, stored_seq: int) -> None:
        """Begin where the target stands. What it never came to is forgotten: it comes again."""
        self._ahead = self._sink.ahead()
        reached = stored_seq if self._ahead is None else max(stored_seq, self._ahead.seq)
        rows = self._queue.parked(self._sink.name)
        if any(row.seq > reached for row in rows):
            self._queue.unpark_after(self._sink.name, reached)
        self._rows.clear()
        self._due.clear()
        self._subjects = Subjects()
        self._bytes = 0
        self._stored_seq = stored_seq
        self._plan = None
        monotonic, unix = self._clock.monotonic(), self._clock.unix()
        for row in rows:
            if row.seq <= reached:
                self._add(row)
                if row.attempts:  # at a start at once: somebody may have put the target right
                    wait = 0.0 if self._restarted else row.next_attempt_at - unix
                    self._due[row.id] = monotonic + min(max(wait, 0.0), parked_wait_seconds(row.attempts))
        self._restarted = False
        self._publish()
        if self._rows:
            self._log.warning("changes are parked", parked=self._stats.parked, dead=self._stats.dead)

    def passed(self, seq: int) -> None:
        """The target's position is stored: what was parked up to there counts."""
        self._stored_seq = seq
        if self._ahead is not None and seq >= self._ahead.seq:
            self._ahead = None
        if self._plan is not None and self._plan.unreached:
            self._plan = None

    # the stream

    def admit(self, pieces: Sequence[Stored]) -> Sequence[Stored]:
        """Leave out, and park durably, what has to wait behind parked changes."""
        if not self._rows or not any(self._subjects.concern(piece.batch) for piece in pieces):
            return pieces
        self._wait_behind(item for piece in pieces if self._subjects.concern(piece.batch) for item in items_of(piece))
        return self.without_parked(pieces)

    def without_parked(self, pieces: Sequence[Stored]) -> Sequence[Stored]:
        """The same without the changes that are parked. Transactions stay, if need be empty: they are positions."""
        seqs = {seq for seq, _ in self._rows}
        return [self._unparked(piece) if piece.seq in seqs else piece for piece in pieces]

    def carefully(self, pieces: Sequence[Stored], position: Position) -> None:
        """Apply what was refused as a whole, without moving the position; park what is refused by itself."""
        for part in parts_of(self._new_to_target(pieces)):
            self._narrow(part, position)

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

    def _narrow(self, part: Part, position: Position) -> None:
        items = self._wait_behind(part.items)
        if not items:
            return
        try:
            self._count(self._sink.apply_part(batches_of(items, part.before), position))
        except PermanentError as exc:
            if len(items) == 1:
                self._refused(items[0], exc)
                return
            middle = len(items) // 2
            self._narrow(Part(items[:middle], part.before), position)
            self._narrow(Part(items[middle:], part.before), position)

    def _wait_behind(self, items: Iterable[Item]) -> Sequence[Item]:
        """Park what has to wait; return the rest."""
        free: list[Item] = []
        waiting: list[tuple[ParkedChange, bytes]] = []
        for item in items:
            if item.id in self._rows:
                continue
            subject = self._subject(item)
            if self._subjects.block(subject):
                waiting.append(self._new(item, subject))
                self._subjects.add(subject)  # what comes next may have to wait behind it
            else:
                free.append(item)
        for row, _ in waiting:
            self._subjects.add(Subject(row.tables, row.key), -1)  # `_add` counts it
        self._park(waiting)
        return free

    def _refused(self, item: Item, error: PermanentError) -> None:
        row, payload = self._new(item, self._subject(item))
        row = self._failed(row, error)
        self._park([(row, payload)])
        self._plan = None
        tables = ", ".join(map(str, row.tables))
        self._log.warning("parked", tables=tables, seq=row.seq, ordinal=row.ordinal, error=str(error))

    def _subject(self, item: Item) -> Subject:
        return self._sink.subject_of(item.stored.batch.tables, item.change)

    def _new(self, item: Item, subject: Subject) -> tuple[ParkedChange, bytes]:
        payload = payload_of(alone(item))
        row = ParkedChange(
            seq=item.stored.seq,
            ordinal=item.ordinal,
            position=item.transaction.position,
            tables=subject.tables,
            key=subject.key,
            size=len(payload),
            created_at=self._clock.unix(),
        )
        return row, payload

    def _park(self, new: Sequence[tuple[ParkedChange, bytes]]) -> None:
        """Durable on return. Raises `FatalError` where that would be too much."""
        if not new:
            return
        count, size = len(self._rows) + len(new), self._bytes + sum(row.size for row, _ in new)
        if count > self._bounds.max_changes or size > self._bounds.max_bytes:
            raise FatalError(
                f"more than {self._bounds.max_changes} changes or {self._bounds.max_bytes} bytes would be parked: "
                "the sink stops, so that none is forgotten",
                hint="correct what the target refuses (see the log), or raise max_parked; then start again",
            )
        self._queue.park(self._sink.name, new)
        for row, _ in new:
            self._add(row)
        self._publish()

    def _unparked(self, piece: Stored) -> Stored:
        ordinal = 0
        kept: list[Transaction] = []
        for transaction in piece.batch.transactions:
            changes = [
                change
                for number, change in enumerate(transaction.changes, ordinal)
                if (piece.seq, number) not in self._rows
            ]
            ordinal += len(transaction.changes)
            whole = len(changes) == len(transaction.changes)
            kept.append(transaction if whole else msgspec.structs.replace(transaction, changes=changes))
        return Stored(piece.seq, msgspec.structs.replace(piece.batch, transactions=kept))

    # what is parked

    @property
    def due(self) -> bool:
        """Whether `retry` has something to do."""
        if not self._rows:
            return False
        plan = self._planned()
        now = self._clock.monotonic()
        return bool(plan.released) or any(self._due.get(row.id, 0.0) <= now for row in plan.heads)

    def retry(self) -> None:
        """Try what is due, and apply what is released by that. Between two transactions only."""
        begin = time.monotonic()
        while self.due:
            plan = self._planned()
            if plan.released:
                self._try(plan.released)
                continue
            if time.monotonic() - begin > RETRY_SECONDS:
                return
            now = self._clock.monotonic()
            self._try([next(row for row in plan.heads if self._due.get(row.id, 0.0) <= now)])

    def _planned(self) -> _Plan:
        if self._plan is None:
            self._plan = self._make_plan()
        return self._plan

    def _make_plan(self) -> _Plan:
        """The order of the source decides: nothing overtakes what it would have to wait behind."""
        waiting = Subjects()
        released: list[ParkedChange] = []
        heads: list[ParkedChange] = []
        size = 0
        for _, row in sorted(self._rows.items()):
            subject = Subject(row.tables, row.key)
            if row.seq > self._stored_seq or waiting.block(subject):
                waiting.add(subject)
            elif row.attempts or row.state == "dead":
                waiting.add(subject)
                if row.state != "dead":
                    heads.append(row)
            elif row.key is None:
                if not released:
                    released.append(row)
                break
            else:
                size += row.size
                if released and (size > RELEASED_BYTES or len(released) >= RELEASED_CHANGES):
                    break
                released.append(row)
        return _Plan(released, heads, any(seq > self._stored_seq for seq, _ in self._rows))

    def _try(self, rows: Sequence[ParkedChange]) -> None:
        """Apply rows that nothing holds back, in order; those that are refused wait, and those behind them."""
        failed = Subjects()
        self._try_part(rows, failed)
        self._plan = None
        self._publish()

    def _try_part(self, rows: Sequence[ParkedChange], failed: Subjects) -> None:
        rows = [row for row in rows if not failed.block(Subject(row.tables, row.key))]
        if not rows:
            return
        ids = [row.id for row in rows]
        batches = self._queue.parked_batches(self._sink.name, ids)
        try:
            self._count(self._sink.apply_parked(batches))
        except PermanentError as exc:
            if len(rows) == 1:
                self._failed_again(rows[0], exc)
                failed.add(Subject(rows[0].tables, rows[0].key))
                return
            middle = len(rows) // 2
            self._try_part(rows[:middle], failed)
            self._try_part(rows[middle:], failed)
            return
        self._queue.unpark(self._sink.name, ids)
        for row in rows:
            self._remove(row)
        for batch in batches:
            count_changes(self._stats.changes, batch)
        self._log.info("applied parked changes", changes=len(rows), left=len(self._rows))

    def _failed_again(self, row: ParkedChange, error: PermanentError) -> None:
        row = self._failed(row, error)
        self._rows[row.id] = row
        self._queue.retried(self._sink.name, row)
        facts = {"seq": row.seq, "ordinal": row.ordinal, "attempts": row.attempts, "error": row.error}
        if row.state == "dead":
            self._log.error("a parked change is dead", **facts)
        else:
            self._log.info("a parked change is still refused", **facts)

    def _failed(self, row: ParkedChange, error: PermanentError) -> ParkedChange:
        attempts = row.attempts + 1
        wait = parked_wait_seconds(attempts)
        self._due[row.id] = self._clock.monotonic() + wait
        return msgspec.structs.replace(
            row,
            attempts=attempts,
            next_attempt_at=self._clock.unix() + wait,
            error=str(error),
            state="dead" if attempts >= PARKED_ATTEMPTS else "retrying",
        )

    # counting

    def _add(self, row: ParkedChange) -> None:
        if row.id not in self._rows:
            self._rows[row.id] = row
            self._bytes += row.size
            self._subjects.add(Subject(row.tables, row.key))

    def _remove(self, row: ParkedChange) -> None:
        del self._rows[row.id]
        self._due.pop(row.id, None)
        self._bytes -= row.size
        self._subjects.add(Subject(row.tables, row.key), -1)

    def _publish(self) -> None:
        rows = self._rows.values()
        self._stats.parked = len(rows)
        self._stats.dead = sum(row.state == "dead" for row in rows)
        self._stats.parked_oldest_at = min((row.created_at for row in rows), default=None)

    def _count(self, applied: Applied) -> None:
        self._stats.missing_rows += applied.missing_rows
        self._stats.healed_rows += applied.healed_rows
