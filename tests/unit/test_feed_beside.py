"""Work beside a thread: in order, one piece at a time, with its errors."""

from __future__ import annotations

import threading
from functools import partial

import pytest

from cdc.feed.beside import Beside


def test_pieces_go_on_in_order_beside_their_caller() -> None:
    done: list[tuple[int, bool]] = []
    go = threading.Event()

    def piece(number: int) -> None:
        assert go.wait(60)
        done.append((number, threading.current_thread() is threading.main_thread()))

    with Beside("test") as beside:
        beside.begin(partial(piece, 1))
        assert done == []
        go.set()
        for number in range(2, 20):
            beside.begin(partial(piece, number))
            assert [one for one, _ in done[: number - 1]] == list(range(1, number)), "one began before another was done"
        beside.wait()
        assert len(done) == 19
    assert not any(here for _, here in done)


def fail() -> None:
    raise LookupError("piece")


def test_an_error_is_raised_by_what_comes_next_and_nothing_else_begins() -> None:
    begun: list[str] = []
    with Beside("test") as beside:
        beside.begin(fail)
        with pytest.raises(LookupError):
            beside.begin(partial(begun.append, "another"))
    assert begun == []


def test_the_end_waits_and_raises() -> None:
    done: list[str] = []
    with Beside("test") as beside:
        beside.begin(partial(done.append, "piece"))
    assert done == ["piece"]
    with pytest.raises(LookupError), Beside("test") as beside:
        beside.begin(fail)


def test_an_error_of_the_caller_goes_before_that_of_a_piece() -> None:
    ended = threading.Event()

    def late() -> None:
        ended.set()
        fail()

    def work() -> None:
        with Beside("test") as beside:
            beside.begin(late)
            raise KeyError

    with pytest.raises(KeyError):
        work()
    assert ended.is_set()
