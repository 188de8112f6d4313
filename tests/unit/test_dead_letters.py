"""What operators do with parked changes, whatever their sink is doing meanwhile."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path

import pytest
import structlog

from cdc.change import Batch, Change, Transaction
from cdc.config import BatchBounds, RetryOptions
from cdc.dead_letters import Box, Office
from cdc.delivery import Delivery
from cdc.desk import Desk
from cdc.errors import DecodeError, FatalError, TransientError
from cdc.letter import LetterId
from cdc.queue import Queue
from cdc.queue.parked import ParkedChange, payload_of
from cdc.stats import State
from tests.beside import running
from tests.processes import wait_until
from tests.unit.test_parking import World, change, drop


class Impatient(World):
    """Gives up soon."""

    retry = RetryOptions(attempts=2)


Standing = Callable[[World], AbstractContextManager[None]]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr("cdc.delivery.READ_SECONDS", 0.01)
    found = Impatient(tmp_path)
    yield found
    found.queue.close()


def office(world: World) -> Office:
    return Office(lambda: {"mirror": Box("mirror", "", world.queue, world.queue, world.parker, world.stats)})


def retry(world: World, *ids: tuple[int, int]) -> list[tuple[str, str]]:
    wanted = [LetterId("mirror", *each) for each in ids] or None
    return [(each.id, each.fate) for each in office(world).retry(wanted, "ann")]


def discard(world: World, *ids: tuple[int, int]) -> list[str]:
    letters = [LetterId("mirror", *each) for each in ids]
    return [each.fate for each in office(world).discard(letters, reason="a mistake", who="ann")]


def parked(world: World) -> list[tuple[int, int]]:
    return [row.id for row in world.queue.parked("mirror")]


def dead_one(world: World) -> None:
    """Key 7: a dead change at 1.0, and two behind it; key 8 flows."""
    world.sink.bad = {b"7:1"}
    world.commit([change(7, 1)], [change(8, 1)], [change(7, 2)])
    world.commit([change(7, 3)])
    world.deliver()
    die(world)


def die(world: World) -> None:
    while not world.stats.dead:
        world.later()
        world.deliver()


@contextmanager
def delivering(world: World) -> Iterator[None]:
    with world.delivering():
        wait_until(lambda: world.stats.state is State.RUNNING, what="the sink to run")
        yield


@contextmanager
def paused(world: World) -> Iterator[None]:
    delivery = Delivery(world.sink, world.queue, world.stats, BatchBounds(), parker=world.parker)
    delivery.pause()
    with running(delivery):
        wait_until(lambda: world.stats.state is State.PAUSED, what="the pause")
        yield


@contextmanager
def failed(world: World) -> Iterator[None]:
    opened = world.sink.open

    def refuse() -> None:
        raise FatalError("the login is refused")

    world.sink.open = refuse  # type: ignore[method-assign]
    with pytest.raises(FatalError):
        Delivery(world.sink, world.queue, world.stats, BatchBounds(), parker=world.parker).run(threading.Event())
    yield
    world.sink.open = opened  # type: ignore[method-assign]


@contextmanager
def restarted(world: World) -> Iterator[None]:
    """The daemon is there, the sink has not begun (it may have to wait for its source)."""
    world.restart()
    yield


def test_f89_a_dead_change_is_tried_at_once_and_those_behind_it_follow(world: World) -> None:
    dead_one(world)
    world.sink.bad = set()
    with delivering(world):
        assert retry(world, (1, 0)) == [("mirror:1.0", "applied")]
        wait_until(lambda: not world.stats.parked, what="those behind it")
    assert world.sink.values(7) == [1, 2, 3]
    assert world.stats.dead == 0


def test_f89_one_that_is_refused_again_begins_anew(world: World) -> None:
    dead_one(world)
    attempts = world.stats.parked_attempts
    with delivering(world):
        assert retry(world) == [("mirror:1.0", "refused")], "all that were refused"
    first, *_ = world.queue.parked("mirror")
    assert (first.state, first.attempts, first.error) == ("retrying", 1, "mirror: a row is refused")
    assert world.stats.parked_attempts == attempts + 1
    die(world)
    assert world.queue.parked("mirror")[0].attempts == 2


def test_one_that_waits_is_told_for_whom(world: World) -> None:
    dead_one(world)
    with delivering(world):
        outcomes = office(world).retry([LetterId("mirror", 2, 0), LetterId("mirror", 9, 9), LetterId("b", 1, 0)], "ann")
    assert [(each.fate, each.reason.split()[-1]) for each in outcomes] == [
        ("unknown", "longer"),
        ("waiting", "mirror:1.0"),
        ("unknown", "longer"),
    ]


def test_f89_what_waits_behind_a_discarded_change_is_applied(world: World) -> None:
    dead_one(world)
    with structlog.testing.capture_logs() as logs, delivering(world):
        assert discard(world, (1, 0), (5, 5)) == ["discarded", "unknown"]
        wait_until(lambda: not world.stats.parked, what="those behind it")
    assert world.sink.values(7) == [2, 3]
    assert world.stats.discarded == 1
    (told,) = [each for each in logs if each["event"] == "discarded a parked change"]
    assert (told["id"], told["tables"], told["by"], told["reason"]) == ("mirror:1.0", "shop.orders", "ann", "a mistake")
    world.restart()
    world.deliver()
    assert world.sink.values(7) == [2, 3], "for good"


@pytest.mark.parametrize("act", [retry, discard])
def test_f90_a_drop_that_waits_for_a_dead_change_is_released(world: World, act: Callable[..., object]) -> None:
    """Without a person it would wait for ever."""
    world.sink.bad = {b"1:1"}
    world.commit([change(1, 1)], [drop()], [change(2, 1)])
    world.deliver()
    die(world)
    assert [row[2] for row in world.sink.rows] == []
    world.sink.bad = set()
    with delivering(world):
        act(world, (1, 0))
        wait_until(lambda: not world.stats.parked, what="the drop and what follows it")
    assert [row[2] for row in world.sink.rows] == [b"1:1", b"drop", b"2:1"][act is discard :]


@pytest.mark.parametrize("standing", [paused, failed, restarted])
def test_f89_a_sink_that_stands_still_finds_what_was_asked_for(world: World, standing: Standing) -> None:
    world.sink.bad = {b"7:1", b"8:1"}
    world.commit([change(7, 1)], [change(7, 2)], [change(8, 1)], [change(8, 2)])
    world.deliver()
    die(world)
    world.sink.bad = set()
    with standing(world):
        assert (world.stats.parked, world.stats.dead) == (4, 2)
        assert retry(world, (1, 0)) == [("mirror:1.0", "due")]
        assert discard(world, (1, 2)) == ["discarded"]
        assert (world.stats.parked, world.stats.dead) == (3, 0)
        assert parked(world) == [(1, 0), (1, 1), (1, 3)]
    world.deliver(lambda: not world.stats.parked)
    assert (world.sink.values(7), world.sink.values(8)) == ([1, 2], [2])


def test_f89_a_change_is_not_discarded_while_the_target_may_get_it_again(world: World) -> None:
    """Its batch is not passed: given up now, it would be applied when it comes again."""
    world.sink.bad = {b"7:1"}
    world.commit([change(7, 1)], [change(7, 2)])
    before = world.sink.position
    world.deliver()
    world.sink.position = before
    world.queue.advance("mirror", 0, b"begin")
    assert discard(world, (1, 0)) == ["unsettled"]
    assert parked(world) == [(1, 0), (1, 1)]


def test_while_the_target_is_held_nothing_is_applied_and_operators_are_heard(world: World) -> None:
    dead_one(world)
    delivery = Delivery(world.sink, world.queue, world.stats, BatchBounds(), parker=world.parker)
    with running(delivery, wake=delivery.release):
        delivery.hold(None, 60)
        assert discard(world, (1, 0)) == ["discarded"]
        assert world.sink.values(7) == []
        delivery.release()
        wait_until(lambda: not world.stats.parked, what="the rest to be applied")


@pytest.mark.parametrize("seed", range(4))
def test_f89_f90_at_random_with_operators(world: World, seed: int) -> None:
    """Nothing is lost but what was discarded, and nothing overtakes."""
    choose = random.Random(seed)
    given: dict[int, list[int]] = {key: [] for key in range(6)}
    places: dict[tuple[int, int], tuple[int, int]] = {}
    discarded: set[tuple[int, int]] = set()
    for number in range(1, 9):
        changes: list[list[Change]] = []
        for _ in range(choose.randrange(1, 20)):
            key, value = choose.randrange(6), len(places) + 1
            places[number, len(changes)] = (key, value)
            given[key].append(value)
            changes.append([change(key, value)])
            if choose.random() < 0.2:
                world.sink.bad.add(b"%d:%d" % (key, value))
        world.commit(*changes)
        world.sink.fail_at = world.sink.calls + choose.randrange(1, 60)
        with world.delivering():
            for _ in range(3):
                there = parked(world)
                if there and choose.random() < 0.5:
                    each = choose.choice(there)
                    if discard(world, each) == ["discarded"]:
                        discarded.add(places[each])
                elif choose.random() < 0.5:
                    office(world).retry(None, "ann")
        world.deliver()
        world.later(choose.choice([0, 1, 400]))
    world.sink.bad = set()
    office(world).retry(None, "ann")
    world.deliver(lambda: not world.stats.parked)
    for key, values in given.items():
        seen = list(dict.fromkeys(world.sink.values(key)))
        assert seen == [value for value in values if (key, value) not in discarded]


class TestDesk:
    def test_who_is_not_heard_in_time_has_asked_for_nothing(self) -> None:
        desk, done, woken = Desk(), [], threading.Event()
        desk.own(lambda: None)
        with pytest.raises(TransientError):
            desk.ask(lambda: done.append(1), seconds=0.01, wake=woken.set)
        assert woken.is_set()
        desk.serve()
        desk.leave()
        assert done == []

    def test_who_waits_when_the_owner_leaves_is_served(self) -> None:
        desk, woken = Desk(), threading.Event()
        desk.own(lambda: None)
        with ThreadPoolExecutor(1) as thread:
            asked = thread.submit(desk.ask, lambda: desk.owned, seconds=60, wake=woken.set)
            assert woken.wait(60)
            desk.leave()
            assert asked.result(60) is False

    def test_errors_are_the_askers(self) -> None:
        desk = Desk()
        with pytest.raises(ZeroDivisionError):
            desk.ask(lambda: 1 / 0, seconds=1, wake=lambda: None)

        def fail() -> None:
            raise FatalError("no")

        with pytest.raises(FatalError):
            desk.own(fail)
        assert not desk.owned


@pytest.mark.parametrize("text", ["", "mirror", "mirror:1", "mirror:1.x", "Mirror:1.2", "mirror:1.2.3", "mirror:-1.2"])
def test_ids_that_are_none(text: str) -> None:
    with pytest.raises(DecodeError, match="not the id"):
        LetterId.parse(text)


def test_ids_are_read_as_they_are_written() -> None:
    assert LetterId.parse("mirror:1207.3") == LetterId("mirror", 1207, 3)
    assert str(LetterId("mirror", 1207, 3)) == "mirror:1207.3"


@pytest.mark.parametrize(("stands_at", "fate"), [(None, "unsettled"), (150, "unsettled"), (151, "discarded")])
def test_f89_a_target_that_stands_at_an_lsn_has_passed_what_commits_below_it(
    tmp_path: Path, stands_at: int | None, fate: str
) -> None:
    with closing(Queue(tmp_path / "shop.queue", max_bytes=10**9, min_free_bytes=0)) as queue:
        queue.begin(100)
        queue.register("mirror")
        batch = Batch((), [Transaction(150, 160, 0, 0, 0, True, [change(7, 1)])], 160, 0)
        row = ParkedChange(
            place=150, ordinal=0, position=150, tables=(), keys=(b"7",), size=1, created_at=0.0, state="dead"
        )
        queue.park("mirror", [(row, payload_of(batch))])
        if stands_at is not None:
            queue.advance("mirror", 1, stands_at)
        letters = Office(lambda: {"mirror": Box("mirror", "", queue, queue)})
        (outcome,) = letters.discard([LetterId("mirror", 150, 0)], reason="x", who="ann")
        assert outcome.fate == fate
