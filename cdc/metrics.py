"""Every metric's name, in one place.

Gauges and counters are read from the status snapshot when they are asked for, so `/metrics` and `/status` cannot
disagree. Histograms are observed by delivery. Labels are names from the configuration and closed sets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final

from prometheus_client import CollectorRegistry, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from cdc.stats import State
from cdc.status import DaemonStatus, SinkStatus, SourceStatus, StreamsStatus

APPLY_SECONDS: Final = Histogram(
    "cdc_apply_seconds",
    "Time that one target transaction took, commit included.",
    ["sink"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
    registry=None,
)
LATENCY_SECONDS: Final = Histogram(
    "cdc_latency_seconds",
    "From a transaction's commit at the source to its commit in the target, by both clocks.",
    ["sink"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 7200),
    registry=None,
)


def registry(
    status: Callable[[], DaemonStatus] | None, streams: Callable[[], StreamsStatus] | None = None
) -> CollectorRegistry:
    """A registry of all metrics: the snapshots', the histograms, and the process's own (memory, CPU, files).

    status: of a daemon; streams: of a feed's gateway.
    """
    result = CollectorRegistry()
    if status is not None:
        result.register(StatusCollector(status))
        result.register(APPLY_SECONDS)
        result.register(LATENCY_SECONDS)
    if streams is not None:
        result.register(StreamsCollector(streams))
    ProcessCollector(registry=result)
    PlatformCollector(registry=result)
    return result


class StatusCollector(Collector):
    """Turns one status snapshot into metric families, each time it is asked."""

    def __init__(self, status: Callable[[], DaemonStatus]) -> None:
        self._status = status

    def collect(self) -> Iterable[Metric]:
        """Take one snapshot; all families come from it."""
        status = self._status()
        yield from _daemon(status)
        yield from _sources(status.sources)
        yield from _queues(status.sources)
        yield from _slots(status.sources)
        yield from _sinks(status.sinks)
        yield from _copies(status.sinks)
        yield from _resyncs(status.sinks)


class StreamsCollector(Collector):
    """The same for the live streams. (Channels are no label: there may be any number of them.)."""

    def __init__(self, status: Callable[[], StreamsStatus]) -> None:
        self._status = status

    def collect(self) -> Iterable[Metric]:
        """Take one snapshot; all families come from it."""
        status = self._status()
        yield _gauge("cdc_stream_clients", "WebSockets and event streams.", (), [((), status.connections)])
        yield _counter("cdc_stream_events", "Events sent, times clients.", (), [((), status.sent)])
        yield _counter("cdc_stream_frames", "Frames sent.", (), [((), status.frames)])
        yield _counter("cdc_stream_dropped", "Clients cut off as they did not read.", (), [((), status.dropped)])
        yield _gauge("cdc_feed_cursor", "The newest change seen.", (), [((), int(status.cursor))])
        yield _gauge("cdc_feed_connected", "1 while the feed's store answers.", (), [((), status.connected)])


Samples = Iterable[tuple[tuple[str, ...], float | None]]
"""Label values beside a value; `None` is not exposed (unknown is not 0)."""


def _gauge(name: str, text: str, labels: tuple[str, ...], samples: Samples) -> Metric:
    return _filled(GaugeMetricFamily(name, text, labels=labels), samples)


def _counter(name: str, text: str, labels: tuple[str, ...], samples: Samples) -> Metric:
    return _filled(CounterMetricFamily(name, text, labels=labels), samples)


def _filled(family: GaugeMetricFamily | CounterMetricFamily, samples: Samples) -> Metric:
    for labels, value in samples:
        if value is not None:
            family.add_metric(labels, value)
    return family


def _daemon(status: DaemonStatus) -> Iterator[Metric]:
    yield _gauge("cdc_info", "The daemon's version.", ("version",), [((status.version,), 1)])
    yield _gauge("cdc_start_time_seconds", "When the daemon started, unix time.", (), [((), status.started_at)])
    yield _gauge("cdc_healthy", "1 while no pipeline is in trouble.", (), [((), status.healthy)])
    yield _gauge("cdc_ready", "1 while all sources are connected.", (), [((), status.ready)])


def _states(pipelines: Mapping[str, SourceStatus] | Mapping[str, SinkStatus]) -> Samples:
    """One-hot: 1 for the state that each pipeline is in, 0 for the others."""
    for name, pipeline in pipelines.items():
        for state in State:
            yield (name, state), float(pipeline.state == state)


def _changes(pipelines: Mapping[str, SourceStatus] | Mapping[str, SinkStatus]) -> Samples:
    for name, pipeline in pipelines.items():
        for operation, count in pipeline.changes.items():
            yield (name, operation), count


def _sources(sources: Mapping[str, SourceStatus]) -> Iterator[Metric]:
    def each(value: Callable[[SourceStatus], float | None]) -> Samples:
        return (((name,), value(source)) for name, source in sources.items())

    label = ("source",)
    yield _gauge("cdc_source_state", "What a source does: 1 for its state.", ("source", "state"), _states(sources))
    yield _gauge("cdc_source_lag_seconds", "Age of what is not durable yet.", label, each(lambda s: s.lag_seconds))
    yield _gauge("cdc_source_lag_bytes", "Log of the server not durable yet.", label, each(lambda s: s.lag_bytes))
    yield _counter("cdc_captured_changes", "Changes captured.", ("source", "operation"), _changes(sources))
    yield _counter("cdc_captured_transactions", "Transactions captured.", label, each(lambda s: s.transactions))
    yield _counter("cdc_captured_bytes", "Bytes captured, as on the wire.", label, each(lambda s: s.bytes))
    for field, text in (("window", "How far the oplog reaches."), ("remaining", "How long a stop it would bear.")):
        samples = each(lambda s, f=f"{field}_seconds": getattr(s.oplog, f, None))  # type: ignore[misc]
        yield _gauge(f"cdc_source_oplog_{field}_seconds", text, label, samples)
    yield _counter("cdc_source_retries", "Attempts after a transient error.", label, each(lambda s: s.retries))


def _queues(sources: Mapping[str, SourceStatus]) -> Iterator[Metric]:
    queues = {(name,): source.queue for name, source in sources.items() if source.queue is not None}
    label = ("source",)
    yield _gauge("cdc_queue_batches", "Batches kept.", label, [(name, q.batches) for name, q in queues.items()])
    yield _gauge("cdc_queue_bytes", "Bytes kept.", label, [(name, q.bytes) for name, q in queues.items()])
    yield _gauge("cdc_queue_max_bytes", "Bytes that may be kept.", label, [(n, q.max_bytes) for n, q in queues.items()])
    yield _gauge("cdc_queue_full", "1 while its source must wait.", label, [(n, q.full) for n, q in queues.items()])
    yield _gauge(
        "cdc_queue_oldest_age_seconds",
        "Age of the oldest batch kept.",
        label,
        [(name, q.oldest_seconds or 0) for name, q in queues.items()],
    )


def _slots(sources: Mapping[str, SourceStatus]) -> Iterator[Metric]:
    slots = {(name, source.slot.name): source.slot for name, source in sources.items() if source.slot is not None}
    label = ("source", "slot")
    yield _gauge("cdc_slot_active", "1 while in use.", label, [(name, s.active) for name, s in slots.items()])
    yield _gauge(
        "cdc_slot_retained_bytes", "WAL kept for it.", label, [(name, s.retained_bytes) for name, s in slots.items()]
    )
    yield _gauge(
        "cdc_slot_safe_bytes",
        "WAL that may be written before it is lost.",
        label,
        [(name, s.safe_bytes) for name, s in slots.items()],
    )


def _sinks(sinks: Mapping[str, SinkStatus]) -> Iterator[Metric]:
    def each(value: Callable[[SinkStatus], float | None]) -> Samples:
        return (((name,), value(sink)) for name, sink in sinks.items())

    label = ("sink",)
    yield _gauge("cdc_sink_state", "What a sink does: 1 for its state.", ("sink", "state"), _states(sinks))
    yield _gauge("cdc_sink_lag_seconds", "Age of what is not in the target yet.", label, each(lambda s: s.lag_seconds))
    yield _gauge("cdc_sink_lag_bytes", "Log of the server not in the target.", label, each(lambda s: s.lag_bytes))
    yield _counter("cdc_applied_changes", "Changes applied.", ("sink", "operation"), _changes(sinks))
    yield _counter("cdc_applied_transactions", "Transactions applied.", label, each(lambda s: s.transactions))
    yield _counter("cdc_sink_retries", "Attempts after a transient error.", label, each(lambda s: s.retries))
    yield _counter("cdc_sink_fallbacks", "Batches applied one by one.", label, each(lambda s: s.fallbacks))
    yield _counter(
        "cdc_sink_missing_rows", "Rows to change that were not there.", label, each(lambda s: s.missing_rows)
    )
    yield _counter("cdc_sink_healed_rows", "Rows put right.", label, each(lambda s: s.healed_rows))
    parked = (
        sample
        for name, sink in sinks.items()
        for sample in (
            ((name, "retrying"), sink.parked - sink.dead - sink.waiting),
            ((name, "waiting"), sink.waiting),
            ((name, "dead"), sink.dead),
        )
    )
    yield _gauge("cdc_parked_changes", "Changes that wait, as the target refused one.", ("sink", "state"), parked)
    yield _counter("cdc_parked_attempts", "Parked changes tried again.", label, each(lambda s: s.parked_attempts))
    yield _counter("cdc_discarded_changes", "Parked changes given up by a person.", label, each(lambda s: s.discarded))
    yield _gauge(
        "cdc_parked_oldest_age_seconds",
        "Age of the oldest parked change.",
        label,
        each(lambda s: s.parked_oldest_seconds or 0),
    )


def _resyncs(sinks: Mapping[str, SinkStatus]) -> Iterator[Metric]:
    resyncs = {(name,): sink.resync for name, sink in sinks.items() if sink.resync is not None}
    for field, text in (
        ("tables_done", "Tables put right."),
        ("tables_expected", "Tables to be put right."),
        ("rows_done", "Rows compared, of the tables that are not done."),
        ("rows_expected", "Rows of those tables, estimated."),
        ("rows_written", "Rows that were not right, of the tables that are not done."),
    ):
        samples: Samples = [(name, getattr(resync, field)) for name, resync in resyncs.items()]
        yield _gauge(f"cdc_resync_{field}", text, ("sink",), samples)


def _copies(sinks: Mapping[str, SinkStatus]) -> Iterator[Metric]:
    copies = {(name,): sink.copy for name, sink in sinks.items() if sink.copy is not None}
    label = ("sink",)
    for unit in ("tables", "rows", "bytes"):
        for what, text in (("done", "copied"), ("expected", "to copy in all, estimated")):
            field = f"{unit}_{what}"
            samples: Samples = [(name, getattr(copy, field)) for name, copy in copies.items()]
            yield _gauge(f"cdc_copy_{field}", f"{unit.capitalize()} {text}.", label, samples)
