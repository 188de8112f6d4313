"""Work beside a thread: in order, one piece at a time, with its errors."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from functools import partial

import pytest

from cdc.feed.beside import Beside


@pytest.fixture
def beside() -> Iterator[Beside]:
    made = Beside("test")
    yield made
    made.end()


def test_pieces_go_on_in_order_beside_their_caller(beside: Beside) -> None:
    done: list[tuple[int, bool]] = []
    go = threading.Event()

    def piece(number: int) -> None:
        assert go.wait(60)
        done.append((number, threading.current_thread() is threading.main_thread()))

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


def test_an_error_is_raised_by_what_comes_next_and_nothing_else_begins(beside: Beside) -> None:
    begun: list[str] = []
    beside.begin(fail)
    with pytest.raises(LookupError):
        beside.begin(partial(begun.append, "another"))
    assert begun == []
    beside.begin(fail)
    with pytest.raises(LookupError):
        beside.wait()
    beside.wait()


def test_the_end_waits_whatever_becomes_of_it_and_leaves_no_thread(beside: Beside) -> None:
    ended = threading.Event()

    def late() -> None:
        time.sleep(0.05)
        ended.set()
        fail()

    before = threading.active_count()
    beside.begin(late)
    beside.end()
    assert ended.is_set()
    assert threading.active_count() == before
    done: list[str] = []
    beside.begin(partial(done.append, "again"))
    beside.end()
    assert done == ["again"]
