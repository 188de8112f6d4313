"""When parked changes are tried again by themselves, and when they were tried often enough."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterable, Sequence
from typing import NamedTuple

import msgspec

from cdc.config import RetryOptions
from cdc.errors import PermanentError
from cdc.queue.parked import ParkedChange, ParkedId
from cdc.retry import Backoff


class Clock(NamedTuple):
    """Where time comes from: a clock that never jumps, and unix seconds, for people and over restarts."""

    monotonic: Callable[[], float] = time.monotonic
    unix: Callable[[], float] = time.time


class Schedule:
    """Of the changes that one sink's target has refused by themselves; those that wait behind them have no time."""

    def __init__(self, retry: RetryOptions, clock: Clock) -> None:
        self.set_retry(retry)
        self._clock = clock
        self._at: dict[ParkedId, float] = {}  # by the monotonic clock

    def set_retry(self, retry: RetryOptions) -> None:
        """For what is refused from now on."""
        self._backoff = Backoff(retry)

    def restore(self, rows: Iterable[ParkedChange], *, at_once: bool) -> None:
        """Take the times that were stored. at_once: somebody may have put the target right."""
        self._at.clear()
        monotonic, unix = self._clock.monotonic(), self._clock.unix()
        for row in rows:
            if row.attempts:
                wait = 0.0 if at_once else row.next_attempt_at - unix
                self._at[row.id] = monotonic + min(max(wait, 0.0), self._backoff.seconds(row.attempts))

    def retain(self, parked: Container[ParkedId]) -> None:
        """Forget all others."""
        self._at = {each: at for each, at in self._at.items() if each in parked}

    def forget(self, parked: ParkedId) -> None:
        """It is not tried again."""
        self._at.pop(parked, None)

    def failed(self, row: ParkedChange, error: PermanentError) -> ParkedChange:
        """It was refused just now: what is to be stored of that."""
        attempts = row.attempts + 1
        wait = self._backoff.seconds(attempts)
        self._at[row.id] = self._clock.monotonic() + wait
        return msgspec.structs.replace(
            row,
            attempts=attempts,
            next_attempt_at=self._clock.unix() + wait,
            error=str(error),
            state="dead" if self._backoff.is_over(attempts) else "retrying",
        )

    def next_of(self, heads: Iterable[Sequence[ParkedChange]]) -> Sequence[ParkedChange]:
        """The one to be tried first; empty where none is due. heads: see `cdc.parking_plan.Plan`."""
        first = min(heads, key=self._due_at, default=())
        return first if first and self._due_at(first) <= self._clock.monotonic() else ()

    def _due_at(self, head: Sequence[ParkedChange]) -> float:
        return min(self._at.get(row.id, 0.0) for row in head if row.attempts)
