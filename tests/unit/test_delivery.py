"""Which part of the queue goes to a sink, with or without a hold."""

from __future__ import annotations

import pytest

from cdc.change import INSERT, Batch, Change, Transaction
from cdc.delivery import _bounded, _select
from cdc.queue import Stored


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
    pieces, cut = _select(QUEUE, 2, 100, None)
    assert pieces == QUEUE
    assert not cut


def test_what_the_target_has_is_left_out() -> None:
    pieces, cut = _select(QUEUE, 2, 105, None)
    assert positions(pieces) == [(3, [110], 115), (4, [120], 125), (5, [130, 140], 145)]
    assert not cut
    pieces, _ = _select(QUEUE, 2, 125, None)
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
    pieces, cut = _select(QUEUE, 2, 100, until)
    assert positions(pieces) == expected
    assert cut


def test_a_hold_behind_the_end_cuts_nothing() -> None:
    assert _select(QUEUE, 2, 100, 141) == (QUEUE, False)


def test_an_unfinished_transaction_below_the_hold_is_not_cut() -> None:
    queue = [stored(3, 100, 110, complete=False)]
    assert _select(queue, 2, 100, 200) == (queue, False)
    pieces, cut = _select(queue, 2, 100, 110)
    assert positions(pieces) == [(2, [100], 105)]
    assert pieces[0].batch.complete
    assert cut


def test_opaque_positions_are_never_compared() -> None:
    assert _select(QUEUE, 2, b"token", None) == (QUEUE, False)


def test_a_target_transaction_is_bounded_but_never_empty() -> None:
    assert _bounded(QUEUE, 1) == QUEUE[:1]
    assert _bounded(QUEUE, 3) == QUEUE[:2]
    assert _bounded(QUEUE, 100) == QUEUE
    assert _bounded([], 1) == []
