"""Which part of the queue goes to a sink, with or without a hold."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from cdc.change import INSERT, Batch, Change, Transaction
from cdc.config import BatchBounds
from cdc.delivery import INCONSISTENT, Delivery
from cdc.errors import TransientError
from cdc.pipeline import FillThenDeliver
from cdc.portion import MAX_FOLDING, Portion, bounded, select
from cdc.position import Position, SourcePosition
from cdc.queue import Queue, Stored
from cdc.sink import Applied, NeedsFilling
from cdc.stats import DeliveryStats, ResyncStatus, State
from cdc.testing import MemorySink
from tests.batches import batch
from tests.beside import running
from tests.processes import wait_until


def transaction(position: int, *, complete: bool = True, changes: int = 1) -> Transaction:
    return Transaction(position, position + 5, 0, 1, 0, complete, [Change(INSERT, 0, None, None, b"1")] * changes)


def stored(seq: int, *positions: int, complete: bool = True) -> Stored:
    transactions = [transaction(position) for position in positions]
    if not complete:
        transactions[-1] = transaction(positions[-1], complete=False)
    end = next((each.end for each in reversed(transactions) if each.complete), 0)
    return Stored(seq, Batch((), transactions, end, 10))


def positions(pieces: list[Stored]) -> list[tuple[int, list[object], object]]:
    return [(piece.seq, [each.position for each in piece.batch.transactions], piece.batch.position) for piece in pieces]


QUEUE = [stored(3, 100, 110), stored(4, 120), stored(5, 130, 140)]


def test_everything_is_new() -> None:
    pieces, cut = select(QUEUE, 2, 100, None)
    assert pieces == QUEUE
    assert not cut


def test_what_the_target_has_is_left_out() -> None:
    pieces, cut = select(QUEUE, 2, 105, None)
    assert positions(pieces) == [(3, [110], 115), (4, [120], 125), (5, [130, 140], 145)]
    assert not cut
    pieces, _ = select(QUEUE, 2, 125, None)
    assert positions(pieces)[:2] == [(3, [], 115), (4, [], 125)]


@pytest.mark.parametrize(
    ("until", "expected"),
    [
        (100, []),
        (105, [(2, [100], 105)]),
        (110, [(2, [100], 105)]),
        (115, [(3, [100, 110], 115)]),
        (121, [(3, [100, 110], 115), (4, [120], 125)]),
        (140, [(3, [100, 110], 115), (4, [120], 125), (4, [130], 135)]),
    ],
)
def test_a_hold_cuts_before_the_first_transaction_at_its_position(until: int, expected: list[object]) -> None:
    pieces, cut = select(QUEUE, 2, 100, until)
    assert positions(pieces) == expected
    assert cut


def test_more_is_read_where_many_changes_become_few_rows() -> None:
    portion = Portion(BatchBounds(max_changes=100, max_bytes=1000))
    for rows, expected in (
        (50, 200),
        (None, 100),
        (1, MAX_FOLDING * 100),
        (0, MAX_FOLDING * 100),
        (100, 100),
        (150, 100),
    ):
        portion.applied(Applied(changes=100, rows=rows))
        assert (portion.max_changes, portion.max_bytes) == (expected, 10 * expected)


def test_a_hold_behind_the_end_cuts_nothing() -> None:
    assert select(QUEUE, 2, 100, 141) == (QUEUE, False)


def test_an_unfinished_transaction_below_the_hold_is_not_cut() -> None:
    queue = [stored(3, 100, 110, complete=False)]
    assert select(queue, 2, 100, 200) == (queue, False)
    pieces, cut = select(queue, 2, 100, 110)
    assert positions(pieces) == [(2, [100], 105)]
    assert pieces[0].batch.complete
    assert cut


def test_opaque_positions_are_never_compared() -> None:
    assert select(QUEUE, 2, b"token", None) == (QUEUE, False)


def test_a_target_transaction_is_bounded_but_never_empty() -> None:
    assert bounded(QUEUE, 1) == QUEUE[:1]
    assert bounded(QUEUE, 3) == QUEUE[:2]
    assert bounded(QUEUE, 100) == QUEUE
    assert bounded([], 1) == []


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[Queue]:
    queue = Queue(tmp_path / "shop.queue", max_bytes=10**9, min_free_bytes=0)
    queue.begin(0)
    yield queue
    queue.close()


class Watched(MemorySink):
    """Notes what happens to it while it prepares."""

    def __init__(self) -> None:
        super().__init__("mirror")
        self.prepared = 0
        self.disturbed: list[str] = []
        self._preparing = False

    def prepare(self, batches: Sequence[Batch]) -> None:
        self._preparing = True
        threading.Event().wait(0.05)  # long enough for the delivery to come to its upkeep
        self._preparing = False
        self.prepared += 1

    def upkeep(self, position: SourcePosition) -> None:
        if self._preparing:
            self.disturbed.append("upkeep")

    def close(self) -> None:
        if self._preparing:
            self.disturbed.append("close")
        super().close()


def test_a_sink_is_left_alone_while_it_prepares(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    """Upkeep may connect again, with other plans."""
    monkeypatch.setattr("cdc.delivery.UPKEEP_SECONDS", 0.0)
    for number in range(1, 21):
        queue.append(batch(number, size=1000))
    sink = Watched()
    sink.position = Position(queue.queue_id, 0, 0)
    delivery = Delivery(sink, queue, DeliveryStats("mirror", "shop"), BatchBounds(max_bytes=1500))
    with running(delivery):
        wait_until(lambda: len(sink.transactions) == 20, what="all to arrive")
    assert sink.prepared > 5
    assert not sink.disturbed


class Growing(MemorySink):
    """Wants to be filled before its third transaction."""

    filled = 0

    def apply(self, batches: Sequence[Batch], position: Position) -> Applied:
        if self.filled < 2 and any(each.xid == 3 for batch in batches for each in batch.transactions):
            raise NeedsFilling("a table is new")
        return super().apply(batches, position)


def test_a_sink_that_needs_it_is_filled_in_mid_stream(queue: Queue) -> None:
    """Before the stream, where the sink says so, and when somebody else wants it."""
    for number in range(1, 6):
        queue.append(batch(number, size=1000))
    sink = Growing("mirror")
    stats = DeliveryStats("mirror", "shop")
    delivery = Delivery(sink, queue, stats, BatchBounds(max_bytes=10))

    filling, may_fill = threading.Event(), threading.Event()
    may_fill.set()

    def fill(_stop: threading.Event) -> None:
        filling.set()
        assert may_fill.wait(60)
        sink.position = sink.position or Position(queue.queue_id, 0, 0)
        sink.filled += 1

    with running(FillThenDeliver(fill, delivery, queue, stats)):
        wait_until(lambda: len(sink.transactions) == 5, what="all to arrive")
        assert sink.filled == 2
        wait_until(lambda: stats.state is State.RUNNING, what="the stream")
        may_fill.clear()
        filling.clear()
        delivery.want_filling()
        assert stats.state is State.STARTING  # at once: nobody is to see a mirror that is as it should be
        assert filling.wait(60)
        assert stats.state is State.STARTING
        may_fill.set()
        wait_until(lambda: sink.filled == 3, what="the sink to be filled once more")
        queue.append(batch(6))
        wait_until(lambda: len(sink.transactions) == 6, what="the stream to go on")
    assert [each.xid for each in sink.transactions] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("until", [None, 1000])
def test_a_mirror_that_is_not_consistent_cannot_be_held(queue: Queue, until: int | None) -> None:
    """While it is resynced, say: compared there, it would differ."""
    sink = MemorySink("mirror")
    sink.position, sink.consistent = Position(queue.queue_id, 0, 0), False
    delivery = Delivery(sink, queue, DeliveryStats("mirror", "shop"), BatchBounds())
    with running(delivery), pytest.raises(TransientError, match=INCONSISTENT):
        delivery.hold(until, 20)


class Stale(MemorySink):
    """Is put right in ten parts. log: what happened to it."""

    def __init__(self) -> None:
        super().__init__("mirror")
        self.consistent = False
        self.log: list[str] = []
        self._parts = 0

    def apply(self, batches: Sequence[Batch], position: Position) -> Applied:
        self.log.append("batch")
        return super().apply(batches, position)

    def refresh(self, position: SourcePosition) -> ResyncStatus | None:
        self.log.append("part")
        self._parts += 1
        self.consistent = self._parts == 10
        return None if self.consistent else ResyncStatus(0, 1, self._parts, 10, 0)


@pytest.mark.parametrize(
    ("seconds", "log"), [(60.0, ["part"] * 10 + ["batch"] * 5), (1e-9, ["part", "batch"] * 5 + ["part"] * 5)]
)
def test_a_resync_and_the_stream_share_the_time(
    queue: Queue, monkeypatch: pytest.MonkeyPatch, seconds: float, log: list[str]
) -> None:
    for bound in ("REFRESH_SECONDS", "MAX_REFRESH_SECONDS"):
        monkeypatch.setattr(f"cdc.delivery.{bound}", seconds)
    for number in range(1, 6):
        queue.append(batch(number, size=1000))
    sink = Stale()
    sink.position = Position(queue.queue_id, 0, 0)
    with running(Delivery(sink, queue, DeliveryStats("mirror", "shop"), BatchBounds(max_bytes=10))):
        wait_until(lambda: len(sink.log) == 15, what=lambda: str(sink.log))
    assert sink.log == log
