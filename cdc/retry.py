"""What to do about an error. Pure, but for the waiting itself."""

from __future__ import annotations

import threading
from collections.abc import Callable
from enum import Enum
from typing import Final

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    stop_when_event_set,
    wait_exponential,
    wait_random,
    wait_random_exponential,
)

from cdc.config import RetryOptions
from cdc.errors import PermanentError, TransientError
from cdc.pulse import elsewhere

MAX_WAIT_SECONDS: Final = 30.0


class Decision(Enum):
    """What an error means for the pipeline that it happened in."""

    TRANSIENT = "the same again, after a while, for ever"
    PERMANENT = "one change is refused: narrow it down, then park it or stop"
    FATAL = "stop this pipeline; a person has to act"


def decide(error: BaseException) -> Decision:
    """Sort an error. What nobody expected is fatal: going on could lose something."""
    if isinstance(error, TransientError):
        return Decision.TRANSIENT
    if isinstance(error, PermanentError):
        return Decision.PERMANENT
    return Decision.FATAL


class Backoff:
    """When a parked change is tried again, and when it was tried often enough."""

    def __init__(self, options: RetryOptions) -> None:
        steady, jitter = (share * options.initial for share in (0.8, 0.2))
        self._wait = wait_exponential(multiplier=steady, max=0.8 * options.max) + wait_random_exponential(
            multiplier=jitter, max=0.2 * options.max
        )
        self._stop = stop_after_attempt(options.attempts)

    def seconds(self, attempts: int) -> float:
        """How long it waits after that many attempts (1 or more): twice as long each time, with a fifth of jitter."""
        return self._wait(_after(attempts))

    def is_over(self, attempts: int) -> bool:
        """Whether it is dead: a person has to act."""
        return self._stop(_after(attempts))


def _after(attempts: int) -> RetryCallState:
    """What tenacity's strategies look at. Nothing is called, and nobody sleeps: these waits outlive the process."""
    state = RetryCallState(Retrying(), None, (), {})
    state.attempt_number = attempts
    return state


def keep_trying(
    session: Callable[[], None], stop: threading.Event, waiting: Callable[[BaseException, float], None]
) -> None:
    """Run `session` until it returns, or `stop` is set; after a transient error again, with backoff and jitter.

    A session that got somewhere before it failed should return instead of raising: the next one starts without delay.
    waiting: told the error and the seconds until the next attempt.
    """

    def before_sleep(state: RetryCallState) -> None:
        assert state.outcome is not None
        error = state.outcome.exception()
        assert error is not None
        waiting(error, state.upcoming_sleep)

    def sleep(seconds: float) -> None:
        with elsewhere():
            stop.wait(seconds)

    retrying = Retrying(
        retry=retry_if_exception(lambda error: decide(error) is Decision.TRANSIENT and not stop.is_set()),
        wait=wait_exponential(multiplier=0.1, max=MAX_WAIT_SECONDS) + wait_random(0, 0.2),
        stop=stop_when_event_set(stop),
        sleep=sleep,
        before_sleep=before_sleep,
        reraise=True,
    )
    try:
        retrying(session)
    except TransientError:
        if not stop.is_set():
            raise
