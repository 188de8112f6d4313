"""Every metric's name, in one place; docs/metrics.md is made of it.

Gauges and counters are read from the status snapshot when they are asked for, so `/metrics` and `/status` cannot
disagree. Histograms are observed by delivery. Labels are names from the configuration and closed sets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from prometheus_client import CollectorRegistry, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from cdc.queue import QueueStats
from cdc.stats import CopyStatus, ResyncStatus, State
from cdc.status import DaemonStatus, HttpStatus, SinkStatus, SlotStatus, SourceStatus, StreamsStatus

HISTOGRAM_LABELS: Final = ("sink",)

APPLY_SECONDS: Final = Histogram(
    "cdc_apply_seconds",
    "Time that one target transaction took, commit included.",
    HISTOGRAM_LABELS,
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
    registry=None,
)
LATENCY_SECONDS: Final = Histogram(
    "cdc_latency_seconds",
    "From a transaction's commit at the source to its commit in the target, by both clocks.",
    HISTOGRAM_LABELS,
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 7200),
    registry=None,
)
HISTOGRAMS: Final = (APPLY_SECONDS, LATENCY_SECONDS)

S = TypeVar("S")
P = TypeVar("P")

Samples = Iterable[tuple[tuple[str, ...], float | None]]
"""Label values beside a value; `None` is not exposed (unknown is not 0)."""


@dataclass(frozen=True, slots=True)
class Family(Generic[S]):
    """One metric: its name, what it means, its labels, and how its samples are read from a snapshot.

    counter: it only grows, from 0 at the daemon's start.
    """

    name: str
    text: str
    labels: tuple[str, ...]
    samples: Callable[[S], Samples]
    counter: bool

    @property
    def exposed_as(self) -> str:
        """Its name in `/metrics`."""
        return f"{self.name}_total" if self.counter else self.name

    def read(self, status: S) -> Metric:
        """What a snapshot says of it."""
        kind = CounterMetricFamily if self.counter else GaugeMetricFamily
        metric = kind(self.name, self.text, labels=self.labels)
        for labels, value in self.samples(status):
            if value is not None:
                metric.add_metric(labels, value)
        return metric


@dataclass(frozen=True, slots=True)
class _Part(Generic[S, P]):
    """What a snapshot has several of, each by the values of its labels: the metrics of such a part."""

    labels: tuple[str, ...]
    members: Callable[[S], Mapping[tuple[str, ...], P]]

    def gauge(self, name: str, text: str, value: Callable[[P], float | None]) -> Family[S]:
        return self._one(name, text, value, counter=False)

    def counter(self, name: str, text: str, value: Callable[[P], float | None]) -> Family[S]:
        return self._one(name, text, value, counter=True)

    def _one(self, name: str, text: str, value: Callable[[P], float | None], *, counter: bool) -> Family[S]:
        def samples(status: S) -> Samples:
            return ((labels, value(member)) for labels, member in self.members(status).items())

        return Family(name, text, self.labels, samples, counter)

    def each(
        self, label: str, name: str, text: str, values: Callable[[P], Mapping[str, float]], *, counter: bool = False
    ) -> Family[S]:
        """Several values a member, told apart by one label more."""

        def samples(status: S) -> Samples:
            return (
                ((*labels, key), value)
                for labels, member in self.members(status).items()
                for key, value in values(member).items()
            )

        return Family(name, text, (*self.labels, label), samples, counter)


def _one_hot(values: Iterable[str], current: str | None) -> dict[str, float]:
    """1 for the value that holds, 0 for the others."""
    return {str(value): float(value == current) for value in values}


def _sources(status: DaemonStatus) -> dict[tuple[str, ...], SourceStatus]:
    return {(name,): source for name, source in status.sources.items()}


def _queues(status: DaemonStatus) -> dict[tuple[str, ...], QueueStats]:
    return {(name,): source.queue for name, source in status.sources.items() if source.queue is not None}


def _slots(status: DaemonStatus) -> dict[tuple[str, ...], SlotStatus]:
    return {(name, source.slot.name): source.slot for name, source in status.sources.items() if source.slot is not None}


def _sinks(status: DaemonStatus) -> dict[tuple[str, ...], SinkStatus]:
    return {(name,): sink for name, sink in status.sinks.items()}


def _copies(status: DaemonStatus) -> dict[tuple[str, ...], CopyStatus]:
    return {(name,): sink.copy for name, sink in status.sinks.items() if sink.copy is not None}


def _resyncs(status: DaemonStatus) -> dict[tuple[str, ...], ResyncStatus]:
    return {(name,): sink.resync for name, sink in status.sinks.items() if sink.resync is not None}


def _parked(sink: SinkStatus) -> dict[str, float]:
    return {"retrying": sink.parked - sink.dead - sink.waiting, "waiting": sink.waiting, "dead": sink.dead}


_WAL_STATUSES: Final = ("reserved", "extended", "unreserved", "lost")

_DAEMON: Final[_Part[DaemonStatus, DaemonStatus]] = _Part((), lambda status: {(): status})
_SOURCE: Final = _Part(("source",), _sources)
_QUEUE: Final = _Part(("source",), _queues)
_SLOT: Final = _Part(("source", "slot"), _slots)
_SINK: Final = _Part(("sink",), _sinks)
_COPY: Final = _Part(("sink",), _copies)
_RESYNC: Final = _Part(("sink",), _resyncs)
_HTTP: Final[_Part[HttpStatus, HttpStatus]] = _Part((), lambda status: {(): status})
_STREAMS: Final[_Part[StreamsStatus, StreamsStatus]] = _Part((), lambda status: {(): status})

OF_DAEMON: Final[Mapping[str, tuple[Family[DaemonStatus], ...]]] = {
    "The daemon": (
        _DAEMON.each("version", "cdc_info", "Always 1, for the daemon's version.", lambda d: {d.version: 1}),
        _DAEMON.gauge("cdc_start_time_seconds", "When the daemon started, in unix time.", lambda d: d.started_at),
        _DAEMON.gauge("cdc_healthy", "1 while no pipeline is in trouble.", lambda d: d.healthy),
        _DAEMON.gauge("cdc_ready", "1 while all sources are connected.", lambda d: d.ready),
        _DAEMON.gauge(
            "cdc_config_last_reload_successful",
            "0 after a reload of the configuration was refused, until one succeeds; else 1.",
            lambda d: not d.reload_error,
        ),
    ),
    "Sources": (
        _SOURCE.each(
            "state", "cdc_source_state", "1 for the state that it is in, else 0.", lambda s: _one_hot(State, s.state)
        ),
        _SOURCE.gauge(
            "cdc_source_lag_seconds", "Age of the oldest change that is not in the queue.", lambda s: s.lag_seconds
        ),
        _SOURCE.gauge(
            "cdc_source_lag_bytes",
            "Of the server's log, what is not in the queue (PostgreSQL only).",
            lambda s: s.lag_bytes,
        ),
        _SOURCE.each(
            "operation", "cdc_captured_changes", "Changes put into the queue.", lambda s: s.changes, counter=True
        ),
        _SOURCE.counter("cdc_captured_transactions", "Transactions put into the queue.", lambda s: s.transactions),
        _SOURCE.counter("cdc_captured_bytes", "Bytes that were read, as on the wire.", lambda s: s.bytes),
        _SOURCE.counter("cdc_source_retries", "Attempts after an error that may pass.", lambda s: s.retries),
        _SOURCE.gauge(
            "cdc_source_oplog_window_seconds",
            "How far the oplog reaches back (MongoDB only).",
            lambda s: s.oplog.window_seconds if s.oplog else None,
        ),
        _SOURCE.gauge(
            "cdc_source_oplog_remaining_seconds",
            "How long a stop the oplog would bear; absent while it has room for more.",
            lambda s: s.oplog.remaining_seconds if s.oplog else None,
        ),
    ),
    "Replication slots (PostgreSQL)": (
        _SLOT.gauge("cdc_slot_active", "1 while somebody reads from it.", lambda s: s.active),
        _SLOT.each(
            "status",
            "cdc_slot_wal_status",
            "1 for the server's `wal_status` of it, else 0.",
            lambda s: _one_hot(_WAL_STATUSES, s.wal_status),
        ),
        _SLOT.gauge("cdc_slot_retained_bytes", "WAL that the server keeps for it.", lambda s: s.retained_bytes),
        _SLOT.gauge(
            "cdc_slot_safe_bytes",
            "WAL that may yet be written before it is lost; absent without `max_slot_wal_keep_size`.",
            lambda s: s.safe_bytes,
        ),
    ),
    "Queues": (
        _QUEUE.gauge("cdc_queue_batches", "Batches that are kept.", lambda q: q.batches),
        _QUEUE.gauge("cdc_queue_bytes", "Bytes that are kept.", lambda q: q.bytes),
        _QUEUE.gauge("cdc_queue_max_bytes", "Bytes that may be kept: `queue.max_bytes`.", lambda q: q.max_bytes),
        _QUEUE.gauge("cdc_queue_full", "1 while the source is not read, for want of room.", lambda q: q.full),
        _QUEUE.gauge("cdc_queue_oldest_age_seconds", "Age of the oldest batch.", lambda q: q.oldest_seconds or 0),
        _QUEUE.gauge(
            "cdc_queue_free_disk_bytes",
            "Bytes that its disk has left, with what its file keeps for reuse.",
            lambda q: q.free_disk_bytes,
        ),
        _QUEUE.gauge(
            "cdc_queue_min_free_bytes",
            "Bytes of disk that are left alone: `queue.min_free_bytes`.",
            lambda q: q.min_free_bytes,
        ),
    ),
    "Sinks": (
        _SINK.each(
            "state", "cdc_sink_state", "1 for the state that it is in, else 0.", lambda s: _one_hot(State, s.state)
        ),
        _SINK.gauge(
            "cdc_sink_lag_seconds",
            "Age of the oldest change that is not in the target, since its commit at the source.",
            lambda s: s.lag_seconds,
        ),
        _SINK.gauge(
            "cdc_sink_lag_bytes",
            "Of the source server's log, what is not in the target (PostgreSQL only).",
            lambda s: s.lag_bytes,
        ),
        _SINK.each("operation", "cdc_applied_changes", "Changes applied.", lambda s: s.changes, counter=True),
        _SINK.counter("cdc_applied_transactions", "Source transactions applied.", lambda s: s.transactions),
        _SINK.counter("cdc_sink_retries", "Attempts after an error that may pass.", lambda s: s.retries),
        _SINK.counter(
            "cdc_sink_fallbacks", "Batches applied one change at a time, as one was refused.", lambda s: s.fallbacks
        ),
        _SINK.counter(
            "cdc_sink_missing_rows", "Rows to update or delete that were not there.", lambda s: s.missing_rows
        ),
        _SINK.counter(
            "cdc_sink_healed_rows",
            "Rows put right, from the change itself or by reading the source again.",
            lambda s: s.healed_rows,
        ),
        _SINK.each(
            "state",
            "cdc_parked_changes",
            "Changes that wait: `retrying` what the target refused, `waiting` behind it, or `dead`: a person must act.",
            _parked,
        ),
        _SINK.gauge(
            "cdc_parked_oldest_age_seconds", "Age of the oldest of them.", lambda s: s.parked_oldest_seconds or 0
        ),
        _SINK.counter("cdc_parked_attempts", "Parked changes tried again.", lambda s: s.parked_attempts),
        _SINK.counter("cdc_discarded_changes", "Parked changes given up by a person.", lambda s: s.discarded),
    ),
    "The initial copy": (
        _COPY.gauge("cdc_copy_tables_done", "Tables copied.", lambda c: c.tables_done),
        _COPY.gauge("cdc_copy_tables_expected", "Tables to copy in all.", lambda c: c.tables_expected),
        _COPY.gauge("cdc_copy_rows_done", "Rows copied.", lambda c: c.rows_done),
        _COPY.gauge("cdc_copy_rows_expected", "Rows to copy in all, estimated.", lambda c: c.rows_expected),
        _COPY.gauge("cdc_copy_bytes_done", "Bytes copied.", lambda c: c.bytes_done),
        _COPY.gauge("cdc_copy_bytes_expected", "Bytes to copy in all, estimated.", lambda c: c.bytes_expected),
    ),
    "A resync, while there is one": (
        _RESYNC.gauge("cdc_resync_tables_done", "Tables put right.", lambda r: r.tables_done),
        _RESYNC.gauge("cdc_resync_tables_expected", "Tables to be put right.", lambda r: r.tables_expected),
        _RESYNC.gauge("cdc_resync_rows_done", "Rows compared, of the tables that are not done.", lambda r: r.rows_done),
        _RESYNC.gauge("cdc_resync_rows_expected", "Rows of those tables, estimated.", lambda r: r.rows_expected),
        _RESYNC.gauge(
            "cdc_resync_rows_written", "Of the rows compared, those that were wrong.", lambda r: r.rows_written
        ),
    ),
}
"""All metrics of a daemon but the histograms, by what they are about."""

OF_HTTP: Final = (
    _HTTP.gauge(
        "cdc_http_certificate_expiry_timestamp_seconds",
        "When the certificate that is shown expires, in unix time; absent without TLS.",
        lambda h: h.certificate_expires_at,
    ),
)
"""Of the HTTP interface, of a daemon or a gateway."""

OF_STREAMS: Final = (
    _STREAMS.gauge("cdc_stream_clients", "WebSockets and event streams.", lambda s: s.connections),
    _STREAMS.counter("cdc_stream_events", "Events sent, times clients.", lambda s: s.sent),
    _STREAMS.counter("cdc_stream_frames", "Frames sent.", lambda s: s.frames),
    _STREAMS.counter("cdc_stream_dropped", "Clients cut off as they did not read.", lambda s: s.dropped),
    _STREAMS.gauge("cdc_feed_cursor", "The newest change seen.", lambda s: int(s.cursor)),
    _STREAMS.gauge("cdc_feed_connected", "1 while the feed's store answers.", lambda s: s.connected),
)
"""Of the live streams, of a daemon or a gateway. (Channels are no label: there may be any number of them.)"""


def registry(
    status: Callable[[], DaemonStatus] | None,
    streams: Callable[[], StreamsStatus] | None = None,
    http: Callable[[], HttpStatus] = HttpStatus,
) -> CollectorRegistry:
    """A registry of all metrics: the snapshots', the histograms, and the process's own (memory, CPU, files).

    status: of a daemon; streams: of a feed's gateway; http: of either.
    """
    result = CollectorRegistry()
    if status is not None:
        result.register(SnapshotCollector(status, [family for group in OF_DAEMON.values() for family in group]))
        for histogram in HISTOGRAMS:
            result.register(histogram)
    if streams is not None:
        result.register(SnapshotCollector(streams, OF_STREAMS))
    result.register(SnapshotCollector(http, OF_HTTP))
    ProcessCollector(registry=result)
    PlatformCollector(registry=result)
    return result


class SnapshotCollector(Collector, Generic[S]):
    """Turns one snapshot into metric families, each time it is asked."""

    def __init__(self, status: Callable[[], S], families: Iterable[Family[S]]) -> None:
        self._status = status
        self._families = tuple(families)

    def collect(self) -> Iterable[Metric]:
        """Take one snapshot; all families come from it."""
        status = self._status()
        return [family.read(status) for family in self._families]
