"""A pipeline: one thread's worth of work, its stats, and the switch that a person turns."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Generic, Protocol, TypeVar

import structlog

from cdc.config import Config, SinkConfig, SourceConfig
from cdc.delivery import Delivery
from cdc.errors import CdcError, FatalError
from cdc.logs import redact
from cdc.parking import Parker, ParkingBounds, can_park
from cdc.pulse import Pulse, beat, elsewhere
from cdc.queue import Queue
from cdc.sink import Sink
from cdc.source import Source
from cdc.stats import CaptureStats, DeliveryStats, State

log = structlog.get_logger()

_POLL_SECONDS: Final = 0.1


def paused_fact(name: str) -> str:
    """The queue's fact that keeps a source or a sink paused over restarts."""
    return f"paused:{name}"


@dataclass(frozen=True, slots=True)
class Wiring:
    """What only the command line can build: `cdc` knows neither sinks nor databases.

    source: also given the queue, for small facts that have to survive a restart.
    fill: blocks until the sink can take the stream (a mirror has every table) or `stop` is set; retries what is
        transient.
    reload: reads the configuration again.
    """

    source: Callable[[Config, SourceConfig, Queue], Source]
    sink: Callable[[Config, SinkConfig], Sink]
    fill: Callable[[Config, Sink, Queue, DeliveryStats, threading.Event], None]
    reload: Callable[[], Config]


class Worker(Protocol):
    """What runs in a pipeline's thread; `pause` and `resume` come from others."""

    def run(self, stop: threading.Event) -> None:
        """Work until `stop` is set; raise what a person has to look at."""
        ...

    def pause(self) -> None:
        """Stand still soon. May come before `run`."""
        ...

    def resume(self) -> None:
        """Go on."""
        ...


Stats = TypeVar("Stats", bound=CaptureStats | DeliveryStats)


class Pipeline(Generic[Stats]):
    """One source's capture, or one sink's delivery: its stats, and what is there once it could be assembled.

    failure: what it has failed with; it stands still then until it is told to try again.
    pulse: of its thread.
    """

    def __init__(self, stats: Stats) -> None:
        self.stats = stats
        self.queue: Queue | None = None
        self.failure: BaseException | None = None
        self.pulse = Pulse()
        self._worker: Worker | None = None
        self._build: Callable[[Queue], Worker] | None = None
        self._again = threading.Event()

    def assemble(self, queue: Queue, build: Callable[[Queue], Worker]) -> None:
        """Take the queue, and build what works on it; paused, if it was when the daemon last ran."""
        self.queue, self._build = queue, build
        self._worker = build(queue)
        if queue.get(paused_fact(self.stats.name)) is not None:
            self._worker.pause()

    def run(self, stop: threading.Event, failed: Callable[[], object] = lambda: None) -> None:
        """Work in the calling thread until `stop`; returns at once if it could not be assembled. Never raises.

        failed: called when it has, before it waits for `try_again`.
        """
        while self._worker is not None and not stop.is_set():
            with contained(self.stats), self.pulse.felt():
                try:
                    if self._again.is_set():
                        self._build_anew()
                    self._worker.run(stop)
                except BaseException as exc:
                    self.failure = exc
                    raise
                self.stats.state = State.STOPPED
                return
            if not self._again.is_set():
                failed()
            while not (self._again.is_set() or stop.is_set()):
                self._again.wait(_POLL_SECONDS)
            if self._again.is_set():
                self.failure = self.stats.error = None
                self.stats.hint, self.stats.state = "", State.STARTING

    def _build_anew(self) -> None:
        """With the passwords that are configured by now."""
        self._again.clear()
        if self.queue is not None and self._build is not None:
            self.assemble(self.queue, self._build)

    def try_again(self) -> None:
        """Let it begin once more, built anew, if it has failed; or as soon as it does."""
        self._assembled()
        self._again.set()

    def pause(self) -> None:
        """Pause durably."""
        self._assembled()[0].set(paused_fact(self.stats.name), "1")
        self._assembled()[1].pause()  # another one, if it was built before that was written

    def resume(self) -> None:
        """Undo `pause`, durably; and try again, if it has failed."""
        self._assembled()[0].set(paused_fact(self.stats.name), None)
        self._assembled()[1].resume()
        self._again.set()

    def _assembled(self) -> tuple[Queue, Worker]:
        if self.queue is None or self._worker is None:
            raise CdcError(f"{self.stats.name} has failed: {self.stats.error}", hint=self.stats.hint)
        return self.queue, self._worker


AnyPipeline = Pipeline[CaptureStats] | Pipeline[DeliveryStats]


class FillThenDeliver:
    """A sink's thread: first what it needs before the stream can come (a mirror: the copy), then the stream.

    And again, where the stream brings something that has to be copied, or somebody else wants that.
    """

    def __init__(
        self, fill: Callable[[threading.Event], None], delivery: Delivery, queue: Queue, stats: DeliveryStats
    ) -> None:
        self._fill = fill
        self._delivery = delivery
        self._queue = queue
        self._stats = stats
        self._running = threading.Event()
        self._running.set()

    def run(self, stop: threading.Event) -> None:
        """Fill, and deliver. Paused before that began, it does not begin; later the pause waits for its end."""
        fill_wanted = True
        while fill_wanted and self._may_begin(stop):
            with elsewhere():  # servers and programs copy, for hours if need be
                self._fill(stop)
            fill_wanted = self._delivery.run(stop)

    def _may_begin(self, stop: threading.Event) -> bool:
        """Wait until the capture has begun, or what changes between the copy and it would be lost. False: stopped."""
        while not (self._running.is_set() and self._queue.position is not None):
            self._stats.state = State.STARTING if self._running.is_set() else State.PAUSED
            beat()
            if stop.wait(_POLL_SECONDS):
                return False
        return True

    def pause(self) -> None:
        """Stand still after the batch at hand."""
        self._running.clear()
        self._delivery.pause()

    def resume(self) -> None:
        """Go on."""
        self._running.set()
        self._delivery.resume()


def parker_of(config: SinkConfig, sink: Sink, queue: Queue, stats: DeliveryStats) -> Parker | None:
    """What parks changes, where that is wanted. Raises `FatalError` where this sink's cannot be."""
    if not config.parks:
        return None
    if not can_park(sink):
        raise FatalError(f"sink {sink.name} cannot park changes", hint='set on_error = "stop"')
    return Parker(sink, queue, stats, ParkingBounds.of(config), retry=config.retry)


@contextmanager
def contained(stats: CaptureStats | DeliveryStats) -> Iterator[None]:
    """Whatever is raised inside fails this pipeline, and no other."""
    try:
        yield
    except CdcError as exc:
        _fail(stats, str(exc), exc.hint)
        log.error("failed", name=stats.name, error=str(exc), hint=exc.hint)
    except Exception as exc:  # the task's outer edge
        _fail(stats, redact(f"{type(exc).__name__}: {exc}"), "this is a bug; the log has a traceback")
        log.error("failed unexpectedly", name=stats.name, exc_info=exc)


def _fail(stats: CaptureStats | DeliveryStats, error: str, hint: str) -> None:
    stats.error, stats.hint = error, hint
    stats.state = State.FAILED
