"""What the daemon tells the service manager that has started it, and when."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

import structlog

from cdc.capture import QUEUE_FULL
from cdc.errors import CdcError
from cdc.notify import Notifier
from cdc.pulse import Pulse
from cdc.stats import State
from cdc.status import DaemonStatus, SourceStatus

log = structlog.get_logger()

STATUS_SECONDS: Final = 3.0
"""Between two status lines, at least."""

_ROUND_SECONDS: Final = 0.5

_PROBLEM_CHARACTERS: Final = 150


class Supervision:
    """Looks at the daemon twice a second, and tells what has changed.

    Ready once each source is settled; alive while no thread has been silent for half of the watchdog's time.
    reload_error: why the last reload was refused; empty where it was not, or there was none.
    """

    def __init__(
        self, notifier: Notifier, status: Callable[[], DaemonStatus], pulses: Callable[[], Mapping[str, Pulse]]
    ) -> None:
        self._notifier = notifier
        self._status = status
        self._pulses = pulses
        self._ready = self._stopping = False
        self.reload_error = ""
        self._told, self._told_at = "", 0.0
        self._hanging: set[str] = set()
        watchdog = notifier.watchdog_seconds
        self._round_seconds = min(_ROUND_SECONDS, watchdog / 4) if watchdog else _ROUND_SECONDS

    async def run(self) -> None:
        """Until it is cancelled; ends at once where nobody listens."""
        while self._notifier.is_heard:
            self._look()
            await asyncio.sleep(self._round_seconds)

    @contextmanager
    def reloading(self) -> Iterator[None]:
        """Around reading the configuration again. A `CdcError` ends that: it is logged, and kept in `reload_error`."""
        if self._ready:
            self._notifier.reloading()
        try:
            yield
            self.reload_error = ""
        except CdcError as exc:
            log.error("not reloaded: all stays as it was", error=str(exc), hint=exc.hint)
            self.reload_error = str(exc)
        finally:
            if self._ready:
                self._notifier.ready()

    def stop(self) -> None:
        """The daemon drains from now on."""
        self._stopping = True
        self._notifier.stopping()

    def _look(self) -> None:
        status, is_new = self._status(), False
        if not (self._ready or self._stopping) and all(map(is_settled, status.sources.values())):
            self._ready = is_new = self._notifier.ready()
        line, now = status_line(status), time.monotonic()
        due = is_new or now - self._told_at >= STATUS_SECONDS
        if due and line != self._told and self._notifier.status(line):
            self._told, self._told_at = line, now
        self._feed()

    def _feed(self) -> None:
        """A thread that hangs is told of once, with the place where it does."""
        if (watchdog := self._notifier.watchdog_seconds) is None:
            return
        hanging = {name: pulse for name, pulse in self._pulses().items() if pulse.silent_seconds > watchdog / 2}
        for name in hanging.keys() - self._hanging:
            log.error("a thread hangs: the watchdog is no longer fed", name=name, stack=hanging[name].stack())
        self._hanging = set(hanging)
        if not hanging:
            self._notifier.alive()


def is_settled(source: SourceStatus) -> bool:
    """Whether a source has connected, or does not try to: paused, failed for good, or no room for what it would send.

    One that is tried again and again is not: the service is starting up as long as nothing was captured.
    """
    return source.connected_at is not None or source.state in {State.PAUSED, State.FAILED} or source.error == QUEUE_FULL


def status_line(status: DaemonStatus) -> str:
    """How the daemon is, in one line."""
    sources, sinks = status.sources.values(), status.sinks.values()
    well = sum(source.state is State.RUNNING for source in sources), sum(sink.state is State.RUNNING for sink in sinks)
    parts = [f"{well[0]} of {len(sources)} sources and {well[1]} of {len(sinks)} sinks run"]
    known = [source.lag_seconds for source in sources] + [sink.lag_seconds for sink in sinks]
    lags = [seconds for seconds in known if seconds is not None]
    if lags and max(lags) >= 1:
        parts.append(f"{max(lags):.0f} s behind")
    if parked := sum(sink.parked for sink in sinks):
        parts.append(f"{parked} changes parked")
    if status.problems:
        parts.append(status.problems[0][:_PROBLEM_CHARACTERS])
    return ", ".join(parts)
