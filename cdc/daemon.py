"""The daemon: start up, run one task a pipeline, drain, end.

Each pipeline runs in a thread of its own, from an executor that has one for each. What goes wrong in one ends that one
only: it stays failed, with error and hint in its status, until a person lets it try again; when nothing is left that
could do anything, the daemon ends with that error. HTTP and signals stay with the event loop, which nothing blocks.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from cdc import __version__, logs
from cdc.alerts import Alerts
from cdc.api.backend import UnknownName
from cdc.capture import Capture
from cdc.config import Config, LogLevel
from cdc.dead_letters import Box, Office
from cdc.delivery import Delivery
from cdc.directory import lock_directory, tell_address, told_address
from cdc.discards import tell_kept
from cdc.errors import CdcError, FatalError
from cdc.letter import DeadLetters
from cdc.notify import Notifier
from cdc.parking import Parker
from cdc.pipeline import AnyPipeline, FillThenDeliver, Pipeline, Wiring, contained, parker_of
from cdc.position import SourcePosition
from cdc.process import finished, on_signals, run_in_loop
from cdc.pulse import Pulse
from cdc.queue import Queue
from cdc.reload import changes, reconnecting, with_passwords
from cdc.stats import CaptureStats, DeliveryStats, State
from cdc.status import DaemonStatus, snapshot
from cdc.steering import Ordered, Replayed, replay, resync
from cdc.supervision import Supervision
from cdc.wishes import Wish

if TYPE_CHECKING:
    from cdc.web import Web

log = structlog.get_logger()


def run(config: Config, wiring: Wiring) -> bool:
    """Run until SIGTERM or SIGINT, and drain; a second signal ends the process at once.

    Returns if all ended within `drain_seconds`; if not, only leaving the process ends its threads (nothing is lost).
    """
    return run_in_loop(Daemon(config, wiring, Notifier.from_environment()).run_until_signalled())


def queue_path(data_dir: Path, source: str) -> Path:
    """The queue file of a source."""
    return data_dir / f"{source}.queue"


def open_queue(config: Config, source: str) -> Queue:
    """Open a source's queue, which keeps changes for the configured sinks and no others."""
    queue = Queue(
        queue_path(Path(config.daemon.data_dir), source),
        max_bytes=config.queue.max_bytes,
        min_free_bytes=config.queue.min_free_bytes,
        keep_seconds=config.queue.keep_seconds,
    )
    sinks = [sink.name for sink in config.sinks_of(source)]
    queue.retain(sinks)
    for sink in sinks:
        queue.register(sink)
    return queue


class Daemon:
    """All pipelines of a configuration, and how they are seen and steered (`cdc.api.backend.Backend`)."""

    def __init__(self, config: Config, wiring: Wiring, notifier: Notifier = Notifier()) -> None:  # noqa: B008
        self._config = config
        self._wiring = wiring
        self._supervision = Supervision(notifier, self.status, self._pulses)
        self._directory = Path(config.daemon.data_dir)
        self._started_at = time.time()
        self._sources = {name: Pipeline[CaptureStats](CaptureStats(name)) for name in config.sources}
        self._sinks = {
            name: Pipeline[DeliveryStats](DeliveryStats(name, sink.source)) for name, sink in config.sinks.items()
        }
        self._deliveries: dict[str, Delivery] = {}
        self._parkers: dict[str, Parker] = {}
        self.dead_letters: DeadLetters = Office(self._boxes)
        self._stopping = asyncio.Event()
        options = config.alerts
        self._alerts = Alerts(options.webhook, options, self.status) if options.webhook is not None else None
        self._web: Web | None = None

    async def run_until_signalled(self) -> bool:
        """Run until SIGTERM or SIGINT."""
        on_signals(self._stopping, self.reload)
        return await self.run()

    async def run(self) -> bool:
        """Run until `stop`, and drain; returns what `cdc.daemon.run` does.

        Raises `CdcError` where it cannot start at all (nothing has been touched then), or has nothing left to do.
        """
        from cdc.web import listening  # noqa: PLC0415 - a third of the start of every command, and most serve nothing

        with ExitStack() as stack:
            stack.enter_context(lock_directory(self._directory))
            web = self._web = stack.enter_context(listening(self._config, self))
            stack.enter_context(told_address(self._directory, web.address))
            self._assemble()
            log.info("started", version=__version__, data_dir=str(self._directory), http=web.address.url)
            drained = await self._main_loop(web)
            if drained:
                self._close_queues()
            log.info("stopped", drained=drained)
            self._raise_failure()
            return drained

    def stop(self) -> None:
        """Begin to drain. For the event loop's own thread."""
        self._stopping.set()

    def reload(self) -> None:
        """Go on with what is configured now; or as before, where that has a mistake or takes a restart."""
        with self._supervision.reloading():
            config = self._wiring.reload()
            changed = changes(self._config, config)
            if self._web is not None:
                tell_address(self._directory, self._web.address)  # where that is refused, the certificate stays, too
                if renewed := self._web.renew_certificate():
                    tell_address(self._directory, self._web.address)
                    changed += renewed
            self._adopt(config)
            log.info("reloaded", changed=changed)

    def _adopt(self, config: Config) -> None:
        self._take_passwords(config)
        self._config = config
        logs.configure(config.daemon.log_format, config.daemon.log_level)
        for source in self._sources.values():
            if (queue := source.queue) is not None:
                options = config.queue
                queue.max_bytes, queue.min_free_bytes = options.max_bytes, options.min_free_bytes
                queue.keep_seconds = options.keep_seconds
        for name, delivery in self._deliveries.items():
            delivery.adopt(config.sinks[name])
        if self._web is not None:
            self._web.adopt(config.http)

    def _take_passwords(self, config: Config) -> None:
        """Those of the urls. What runs goes on with its connections, and takes them once the old ones are refused."""
        before, self._config = self._config, with_passwords(self._config, config)
        for name in reconnecting(before, self._config):
            if (pipeline := self._pipeline(name)).queue is not None:
                pipeline.try_again()

    def status(self) -> DaemonStatus:
        """Take a snapshot. Never blocks."""
        return snapshot(
            version=__version__,
            started_at=self._started_at,
            sources=[
                (source.stats, source.queue.stats() if source.queue else None) for source in self._sources.values()
            ],
            sinks=[sink.stats for sink in self._sinks.values()],
            reload_error=self._supervision.reload_error,
            resyncs_ordered=[
                name for name, sink in self._sinks.items() if sink.queue is not None and Wish.read(sink.queue, name)
            ],
        )

    def set_log_level(self, level: LogLevel) -> None:
        """Log more or less, until the configuration is read again."""
        logs.configure(self._config.daemon.log_format, level)
        log.warning("log level changed", to=level)

    def pause(self, name: str) -> None:
        """Pause a source or a sink until `resume`, also over restarts."""
        self._pipeline(name).pause()
        log.info("paused", name=name)

    def resume(self, name: str) -> None:
        """Undo `pause`; let what has failed try again, with the password that its url has by now."""
        pipeline = self._pipeline(name)
        if pipeline.failure is not None:
            try:
                self._take_passwords(self._wiring.reload())
            except CdcError as exc:
                log.warning("the configuration cannot be read again", error=str(exc), hint=exc.hint)
        pipeline.resume()
        log.info("resumed", name=name)

    def resync(self, name: str, tables: Sequence[str], *, yes: bool) -> Ordered:
        """Let a sink, or all sinks of a source, be made right beside the stream; what has failed tries again."""
        self._pipeline(name)
        failures = {each.stats.name: each.failure for each in self._pipelines if each.failure is not None}
        queues = {source: pipeline.queue for source, pipeline in self._sources.items() if pipeline.queue is not None}
        ordered = resync(self._config, queues, name, tables, failures=failures, yes=yes)
        log.info("resync ordered", sinks=ordered.sinks, tables=list(tables) or "all")
        if ordered.begins_anew is not None:
            self._pipeline(ordered.begins_anew).try_again()
        for sink in ordered.sinks:
            self._fill(sink)
        return ordered

    def replay(self, name: str, since: str, *, dry_run: bool) -> Replayed:
        """Let a mirror get once more what the queue keeps from a point on."""
        self._check_sink(name)
        queue = self._sinks[name].queue
        if queue is None:
            raise CdcError(
                f"sink {name} has failed: {self._sinks[name].stats.error}", hint=self._sinks[name].stats.hint
            )
        replayed = replay(self._config, queue, name, since, dry_run=dry_run)
        if not dry_run:
            log.info("replay ordered", sink=name, after_seq=replayed.after_seq, changes=replayed.changes)
            self._fill(name)
        return replayed

    def _fill(self, sink: str, *, at_once: bool = False) -> None:
        """Let a sink look what it is to be filled with."""
        if (delivery := self._deliveries.get(sink)) is not None:
            delivery.want_filling(at_once=at_once)
            self._sinks[sink].try_again()

    def hold(self, name: str, until: SourcePosition | None, seconds: float) -> SourcePosition:
        """Block until a sink stands exactly at `until`; it stays there until `release`, or the time is over."""
        return self._delivery(name).hold(until, seconds)

    def release(self, name: str) -> None:
        """Let a held sink go on."""
        self._delivery(name).release()

    def _assemble(self) -> None:
        for name, source in self._sources.items():
            with contained(source.stats):
                queue = open_queue(self._config, name)
                tell_kept(queue)
                source.assemble(queue, partial(self._capture, name))
        for name, sink in self._sinks.items():
            with contained(sink.stats):
                sink.assemble(self._queue_for(name), partial(self._deliver, name))

    def _queue_for(self, sink: str) -> Queue:
        source = self._config.sinks[sink].source
        queue = self._sources[source].queue
        if queue is None:
            raise FatalError(f"the queue of source {source} cannot be used", hint=self._sources[source].stats.hint)
        return queue

    def _capture(self, name: str, queue: Queue) -> Capture:
        config = self._config.sources[name]

        def restarted() -> None:
            for sink in self._config.sinks_of(name):
                self._fill(sink.name, at_once=True)

        return Capture(
            self._wiring.source(self._config, config, queue),
            queue,
            self._sources[name].stats,
            applied=partial(self._slowest_sink, name),
            resyncs=config.on_gap == "resync",
            restarted=restarted,
        )

    def _deliver(self, name: str, queue: Queue) -> FillThenDeliver:
        config, stats = self._config.sinks[name], self._sinks[name].stats
        sink = self._wiring.sink(self._config, config)
        parker = parker_of(config, sink, queue, stats)
        if parker is not None:
            self._parkers[name] = parker
        delivery = self._deliveries[name] = Delivery(sink, queue, stats, config.batch, parker=parker)
        return FillThenDeliver(partial(self._wiring.fill, self._config, sink, queue, stats), delivery, queue, stats)

    def _boxes(self) -> dict[str, Box]:
        """What operators can look into: parked changes of sinks whose queue is open."""
        return {
            name: Box(name, self._config.sources[source].kind, queue, queue, self._parkers.get(name), sink.stats)
            for name, sink in self._sinks.items()
            if (queue := self._sources[source := sink.stats.source].queue) is not None
        }

    def _slowest_sink(self, source: str) -> SourcePosition | None:
        """What every sink of a source has applied; `None` where there is no such order, or one is not known yet."""
        positions = [sink.stats.position for sink in self._sinks.values() if sink.stats.source == source]
        known = [position for position in positions if isinstance(position, int)]
        return min(known) if known and len(known) == len(positions) else None

    async def _main_loop(self, web: Web) -> bool:
        stop = threading.Event()
        threads = ThreadPoolExecutor(max_workers=len(self._pipelines), thread_name_prefix="pipeline")
        loop = asyncio.get_running_loop()
        failed = asyncio.Event()

        async def work(pipeline: AnyPipeline) -> None:
            await loop.run_in_executor(threads, pipeline.run, stop, partial(loop.call_soon_threadsafe, failed.set))

        async with asyncio.TaskGroup() as group:
            group.create_task(web.serve(), name="http")
            alerting = group.create_task(self._alerts.run(), name="alerts") if self._alerts is not None else None
            supervising = group.create_task(self._supervision.run(), name="supervision")
            tasks = [group.create_task(work(pipeline), name=pipeline.stats.name) for pipeline in self._pipelines]
            await self._stopped_or_useless(tasks, failed)
            if alerting is not None:
                alerting.cancel()
            log.info("draining", at_most_seconds=self._config.daemon.drain_seconds)
            self._supervision.stop()
            stop.set()
            self._wake_all()
            drained = await finished(tasks, self._config.daemon.drain_seconds)
            if self._alerts is not None and not self._stopping.is_set():
                await self._alerts.look(last=True)
            supervising.cancel()
            web.stop()
        threads.shutdown(wait=drained)
        return drained

    async def _stopped_or_useless(self, tasks: Sequence[asyncio.Task[None]], failed: asyncio.Event) -> None:
        """Wait for `stop`, or until no pipeline is left that can do anything. failed: set when another one has."""
        stopping = asyncio.create_task(self._stopping.wait(), name="stopping")
        failing = asyncio.create_task(failed.wait(), name="failing")
        waiting: set[asyncio.Task[Any]] = {stopping, failing, *tasks}
        while not stopping.done() and not self._useless():
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if failing in done:
                failed.clear()
                failing = asyncio.create_task(failed.wait(), name="failing")
                waiting.add(failing)
        stopping.cancel()
        failing.cancel()

    def _useless(self) -> bool:
        """Whether every source has failed, and no sink has a queue that it could still deliver."""
        begun = [sink for sink in self._sinks.values() if sink.queue is not None and sink.queue.position is not None]
        pipelines: list[AnyPipeline] = [*self._sources.values(), *begun]
        return all(pipeline.stats.state in {State.FAILED, State.STOPPED} for pipeline in pipelines)

    def _raise_failure(self) -> None:
        """If it was not told to stop, say why it did."""
        failed = [pipeline.stats for pipeline in self._pipelines if pipeline.stats.state is State.FAILED]
        if not self._stopping.is_set() and failed:
            raise CdcError(f"{failed[0].name}: {failed[0].error}", hint=failed[0].hint)

    def _wake_all(self) -> None:
        for delivery in self._deliveries.values():
            delivery.release()
        for source in self._sources.values():
            if source.queue is not None:
                source.queue.wake()

    def _close_queues(self) -> None:
        for source in self._sources.values():
            if source.queue is not None:
                with contained(source.stats):
                    source.queue.close()

    def _pulses(self) -> dict[str, Pulse]:
        """Of all threads that changes pass through."""
        queues = {
            f"queue of {name}": each.queue.pulse for name, each in self._sources.items() if each.queue is not None
        }
        return {each.stats.name: each.pulse for each in self._pipelines} | queues

    @property
    def _pipelines(self) -> list[AnyPipeline]:
        return [*self._sources.values(), *self._sinks.values()]

    def _pipeline(self, name: str) -> AnyPipeline:
        found = self._sources.get(name) or self._sinks.get(name)
        if found is None:
            raise UnknownName(
                f"no source or sink is called {name!r}", hint=f"one of: {', '.join((*self._sources, *self._sinks))}"
            )
        return found

    def _check_sink(self, name: str) -> None:
        if name not in self._sinks:
            raise UnknownName(f"no sink is called {name!r}", hint=f"one of: {', '.join(self._sinks) or 'none'}")

    def _delivery(self, name: str) -> Delivery:
        self._check_sink(name)
        sink = self._sinks[name]
        if sink.stats.state in {State.FAILED, State.STOPPED, State.PAUSED, State.COPYING}:
            raise CdcError(f"sink {name} is {sink.stats.state}: it does not move", hint=sink.stats.hint)
        return self._deliveries[name]
