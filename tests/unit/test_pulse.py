"""Whether a thread is alive, and what does not count as hanging."""

from __future__ import annotations

import threading
import time

import pytest

from cdc.errors import TransientError
from cdc.pulse import Pulse, beat, elsewhere
from cdc.retry import keep_trying


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What time it is: tests change it."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_silence_grows_until_the_next_beat(clock: list[float]) -> None:
    pulse = Pulse()
    with pulse.felt():
        clock[0] += 5
        assert pulse.silent_seconds == 5
        beat()
        assert pulse.silent_seconds == 0
        clock[0] += 1
        assert pulse.silent_seconds == 1


def test_nobody_has_to_be_felt_before_the_block_or_after_it(clock: list[float]) -> None:
    pulse = Pulse()
    clock[0] += 5
    assert pulse.silent_seconds == 0
    with pulse.felt():
        pass
    clock[0] += 5
    assert pulse.silent_seconds == 0
    beat()  # of nobody
    assert pulse.silent_seconds == 0


def test_waiting_for_others_is_not_silence(clock: list[float]) -> None:
    pulse = Pulse()
    with pulse.felt():
        with elsewhere():
            clock[0] += 5
            assert pulse.silent_seconds == 0
            with elsewhere():
                pass
            beat()
            clock[0] += 5
            assert pulse.silent_seconds == 0  # still within the outer wait
        clock[0] += 5
        assert pulse.silent_seconds == 5


def test_a_beat_counts_for_its_own_thread_alone(clock: list[float]) -> None:
    pulse = Pulse()
    with pulse.felt():
        clock[0] += 5
        other = threading.Thread(target=beat)
        other.start()
        other.join()
        assert pulse.silent_seconds == 5


def test_the_pause_between_two_attempts_is_not_silence() -> None:
    pulse, stop, failures = Pulse(), threading.Event(), [TransientError("away")]
    observed: list[float] = []

    class Watched(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            observed.append(pulse._at)
            return True

    def session() -> None:
        if failures:
            raise failures.pop()

    with pulse.felt():
        stop = Watched()
        keep_trying(session, stop, lambda error, seconds: None)
    assert observed == [float("inf")]


def test_the_stack_tells_where_a_thread_is() -> None:
    pulse, inside, leave = Pulse(), threading.Event(), threading.Event()

    def hang_here() -> None:
        with pulse.felt():
            inside.set()
            leave.wait(30)

    thread = threading.Thread(target=hang_here)
    thread.start()
    inside.wait(30)
    assert "hang_here" in pulse.stack()
    leave.set()
    thread.join()
