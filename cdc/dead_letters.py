"""What operators do with parked changes, beside a running delivery or on the queue's file alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Final, Protocol, TypeVar

import msgspec
import structlog

from cdc import kinds
from cdc.change import Batch
from cdc.discards import Discard, keep
from cdc.errors import CdcError
from cdc.letter import (
    Contents,
    Described,
    Letter,
    LetterId,
    LetterPage,
    LetterQuery,
    LetterState,
    Outcome,
    UnknownLetter,
)
from cdc.parking import Parker, reached_by
from cdc.parking_plan import subject_of
from cdc.parts import Subjects
from cdc.position import Position, format_position
from cdc.queue import Queue
from cdc.queue.parked import ParkedChange, ParkedId, payload_of
from cdc.sink import Subject
from cdc.stats import DeliveryStats

TRY_SECONDS: Final = 3.0
"""So long `retry` waits for what comes of it."""

PAGE_BYTES: Final = 4 * 1024**2
"""A page of changes in full ends behind this."""

T = TypeVar("T")

log = structlog.get_logger()


class Rows(Protocol):
    """What is read of a queue."""

    def parked(self, sink: str) -> list[ParkedChange]:
        """A sink's parked changes, in the order of the source."""
        ...

    def parked_batch(self, sink: str, parked: ParkedId) -> Batch | None:
        """The change itself, as a batch; `None` where it is gone."""
        ...


@dataclass(frozen=True, slots=True)
class Box:
    """The parked changes of one sink.

    kind: of the source's database. queue: where they can be changed, a queue that nobody else has open.
    parker: who else changes them; `None` where nobody does. stats: of the running sink; `None` where no daemon runs.
    """

    sink: str
    kind: str
    rows: Rows
    queue: Queue | None = None
    parker: Parker | None = None
    stats: DeliveryStats | None = None

    def alter(self, action: Callable[[Queue], T]) -> T:
        """Change them while nobody else does."""
        queue = self.queue
        if queue is None:
            raise CdcError(f"the queue of sink {self.sink} cannot be changed", hint="see `cdc status`")
        return action(queue) if self.parker is None else self.parker.alter(lambda: action(queue))

    def tell(self, discards: Sequence[Discard]) -> None:
        """Log what was given up, and let the daemon's log have it where none runs."""
        for discard in discards:
            discard.tell()
        if self.stats is not None:
            self.stats.discarded += len(discards)
        elif self.queue is not None and discards:
            keep(self.queue, discards)


class Office:
    """Implements `cdc.letter.DeadLetters`. Any thread may call any method."""

    def __init__(self, boxes: Callable[[], Mapping[str, Box]]) -> None:
        """boxes: by sink, those that can be had now."""
        self._boxes = boxes

    def list(self, query: LetterQuery) -> LetterPage:
        """One page of them."""
        boxes = self._boxes()
        chosen = [_box(boxes, query.sink)] if query.sink else list(boxes.values())
        after = LetterId.parse(query.after) if query.after else None
        if after is not None:
            names = [box.sink for box in chosen]
            chosen = chosen[names.index(after.sink) :] if after.sink in names else []
        letters: list[Letter] = []
        size = 0
        for box in chosen:
            shelf = _Shelf(box)
            for row in shelf.rows:
                if after is not None and after.sink == box.sink and row.id <= after[1:]:
                    continue
                if query.state and shelf.state(row) not in query.state:
                    continue
                if len(letters) == query.limit or (query.full and size > PAGE_BYTES):
                    return LetterPage(letters=letters, has_more=True)
                found = shelf.letter(row, full=query.full)
                if found is not None:
                    letters.append(found)
                    size += row.size
        return LetterPage(letters=letters, has_more=False)

    def get(self, letter: LetterId) -> Letter:
        """One of them, with its contents."""
        shelf = _Shelf(_box(self._boxes(), letter.sink))
        found = next((shelf.letter(row, full=True) for row in shelf.rows if row.id == letter[1:]), None)
        if found is None:
            raise UnknownLetter(f"there is no parked change {letter}", hint="see `cdc dead-letters list`")
        return found

    def retry(self, letters: Collection[LetterId] | None, who: str, *, sink: str = "") -> Sequence[Outcome]:
        """Make them due now, and wait a little for what comes of it."""
        boxes = self._boxes()
        if sink:
            _box(boxes, sink)
        asked = dict.fromkeys(boxes) if letters is None else _by_sink(letters)
        wanted = {name: ids for name, ids in asked.items() if sink in {"", name}}
        known: dict[str, Sequence[ParkedId]] = {}
        for name, ids in wanted.items():
            if (box := boxes.get(name)) is not None:
                known[name] = box.alter(partial(_revive, sink=name, ids=ids))
                if known[name]:
                    log.info("parked changes are to be tried again", sink=name, changes=len(known[name]), by=who)
        deadline = time.monotonic() + TRY_SECONDS
        for name in known:
            if (parker := boxes[name].parker) is not None:
                parker.wait_tried(max(deadline - time.monotonic(), 0.0))
        return [
            outcome
            for name, ids in wanted.items()
            for outcome in _tried(boxes.get(name), name, ids or known[name], known.get(name, ()))
        ]

    def discard(self, letters: Collection[LetterId], *, reason: str, who: str) -> Sequence[Outcome]:
        """Give them up."""
        boxes = self._boxes()
        outcomes: list[Outcome] = []
        for sink, ids in _by_sink(letters).items():
            box = boxes.get(sink)
            rows = {} if box is None else box.alter(partial(_unpark, sink=sink, ids=ids))
            outcomes += (_discarded(LetterId(sink, *each), rows.get(each)) for each in ids)
            if box is not None:
                gone = [(each, row) for each, row in rows.items() if isinstance(row, ParkedChange)]
                box.tell([_given_up(LetterId(sink, *each), row, reason=reason, who=who) for each, row in gone])
        return outcomes


_UNSETTLED: Final = "its sink has not passed it for good, and may still get it again: let it run first"


def _revive(queue: Queue, *, sink: str, ids: Collection[ParkedId] | None) -> Sequence[ParkedId]:
    """Those of `ids` that are there; of all, those that were refused, or are due already."""
    rows = queue.parked(sink)
    if ids is None:
        behind = _behind(rows)
        found = [row.id for row in rows if row.attempts or row.state == "dead" or row.id not in behind]
    else:
        found = [row.id for row in rows if row.id in ids]
    if found:
        queue.revive(sink, found)
    return found


def _unpark(queue: Queue, *, sink: str, ids: Collection[ParkedId]) -> dict[ParkedId, ParkedChange | str]:
    """Those of `ids` that were there, and are gone; or why they are not."""
    seq, position = queue.cursor(sink) or (0, None)
    reached = 0 if position is None else reached_by(Position(queue.queue_id, seq, position))
    rows = [row for row in queue.parked(sink) if row.id in ids]
    gone = [row.id for row in rows if row.place < reached]
    if gone:
        queue.unpark(sink, gone)
    return {row.id: row if row.place < reached else _UNSETTLED for row in rows}


def _tried(box: Box | None, sink: str, ids: Collection[ParkedId], known: Collection[ParkedId]) -> Iterator[Outcome]:
    shelf = None if box is None else _Shelf(box)
    rows = {} if shelf is None else {row.id: row for row in shelf.rows}
    for each in ids:
        letter, row = LetterId(sink, *each), rows.get(each)
        if shelf is None or each not in known:
            yield _unknown(letter)
        elif row is None:
            yield Outcome(str(letter), "applied")
        elif row.attempts:
            yield Outcome(str(letter), "refused", row.error)
        elif each in shelf.behind:
            yield Outcome(str(letter), "waiting", f"behind {LetterId(sink, *shelf.behind[each])}")
        else:
            yield Outcome(str(letter), "due", "as soon as its sink delivers")


def _unknown(letter: LetterId) -> Outcome:
    return Outcome(str(letter), "unknown", "there is no such parked change, or no longer")


def _discarded(letter: LetterId, row: ParkedChange | str | None) -> Outcome:
    if row is None:
        return _unknown(letter)
    return Outcome(str(letter), "unsettled", row) if isinstance(row, str) else Outcome(str(letter), "discarded")


def _given_up(letter: LetterId, row: ParkedChange, *, reason: str, who: str) -> Discard:
    return Discard(
        id=str(letter),
        sink=letter.sink,
        tables=", ".join(map(str, row.tables)),
        state=row.state,
        error=row.error,
        reason=reason,
        by=who,
        at=_moment(time.time()).isoformat(timespec="seconds"),
    )


def _by_sink(letters: Collection[LetterId]) -> dict[str, list[ParkedId]]:
    found: dict[str, list[ParkedId]] = {}
    for sink, *each in sorted(set(letters)):
        found.setdefault(sink, []).append((each[0], each[1]))
    return found


def _box(boxes: Mapping[str, Box], sink: str) -> Box:
    if sink not in boxes:
        raise UnknownLetter(f"no sink with a queue is called {sink!r}", hint=f"one of: {', '.join(boxes) or 'none'}")
    return boxes[sink]


class _Shelf:
    """The parked changes of one sink as they are at one moment, and who waits for whom."""

    def __init__(self, box: Box) -> None:
        self._box = box
        self.rows = box.rows.parked(box.sink)
        self.behind = _behind(self.rows)

    def state(self, row: ParkedChange) -> LetterState:
        if row.state == "dead":
            return "dead"
        return "waiting" if not row.attempts and row.id in self.behind else "retrying"

    def letter(self, row: ParkedChange, *, full: bool) -> Letter | None:
        """`None` where it is gone by now. full: with its contents."""
        batch = self._box.rows.parked_batch(self._box.sink, row.id)
        if batch is None:
            return None
        state = self.state(row)
        described = kinds.describe(self._box.kind, batch)
        return Letter(
            id=str(LetterId(self._box.sink, *row.id)),
            sink=self._box.sink,
            state=state,
            behind=str(LetterId(self._box.sink, *self.behind[row.id])) if state == "waiting" else None,
            tables=tuple(map(str, row.tables)),
            operation=described.operation,
            key=described.key,
            error=row.error,
            attempts=row.attempts,
            next_attempt_at=_next_attempt(row) if state == "retrying" else None,
            parked_at=_moment(row.created_at),
            size=row.size,
            contents=_contents(row, batch, described) if full else msgspec.UNSET,
        )


def _contents(row: ParkedChange, batch: Batch, described: Described) -> Contents:
    return Contents(
        position=format_position(row.position) or "",
        committed_at=_moment(batch.transactions[0].commit_time / 1e6),
        change=described.change,
        stored=payload_of(batch),
    )


def _next_attempt(row: ParkedChange) -> datetime:
    """Now, where it was not tried since it had no more to wait for."""
    return _moment(row.next_attempt_at if row.attempts else time.time())


def _behind(rows: Sequence[ParkedChange]) -> dict[ParkedId, ParkedId]:
    """Who waits -> the refused change that it waits for, by way of others perhaps."""
    everything = Subjects()
    queues: dict[ParkedId, Subjects] = {}  # by their heads
    of_the_same: dict[Subject, ParkedId] = {}
    found: dict[ParkedId, ParkedId] = {}
    for row in rows:
        subject = subject_of(row)
        head = row.id
        if everything.block(subject):
            head = found[row.id] = of_the_same.get(subject) or next(
                each for each, queue in queues.items() if queue.block(subject)
            )
        everything.add(subject)
        queues.setdefault(head, Subjects()).add(subject)
        of_the_same[subject] = head
    return found


def _moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
