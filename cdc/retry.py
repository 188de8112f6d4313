"""What to do about an error. Pure, but for the waiting itself."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from enum import Enum
from typing import Final

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    sleep_using_event,
    stop_when_event_set,
    wait_exponential,
    wait_random,
)

from cdc.errors import PermanentError, TransientError

MAX_WAIT_SECONDS: Final = 30.0

PARKED_INITIAL_SECONDS: Final = 1.0
PARKED_FACTOR: Final = 2.0
PARKED_MAX_SECONDS: Final = 300.0
PARKED_ATTEMPTS: Final = 20
"""Of a parked change, the one that parked it included: about an hour. Then it is dead, and a person has to act."""


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


def parked_wait_seconds(attempts: int) -> float:
    """How long a parked change waits after that many attempts (1 or more): exponential, with a fifth of jitter."""
    seconds = PARKED_INITIAL_SECONDS * PARKED_FACTOR ** min(attempts - 1, 30)
    return min(seconds, PARKED_MAX_SECONDS) * random.uniform(0.8, 1.0)  # noqa: S311 - no secret


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

    retrying = Retrying(
        retry=retry_if_exception(lambda error: decide(error) is Decision.TRANSIENT and not stop.is_set()),
        wait=wait_exponential(multiplier=0.1, max=MAX_WAIT_SECONDS) + wait_random(0, 0.2),
        stop=stop_when_event_set(stop),
        sleep=sleep_using_event(stop),
        before_sleep=before_sleep,
        reraise=True,
    )
    try:
        retrying(session)
    except TransientError:
        if not stop.is_set():
            raise
