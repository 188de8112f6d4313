"""One snapshot of everything, for `cdc status`, `GET /status`, `/metrics` and the web page alike.

`snapshot` reads the stats of all threads into frozen structs. What is shown anywhere is computed here and nowhere else.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from typing import Final

import msgspec

from cdc.position import SourcePosition, format_position
from cdc.queue import QueueStats
from cdc.stats import CaptureStats, CopyStatus, DeliveryStats, OplogStatus, ResyncStatus, SlotStats, State


class SlotStatus(msgspec.Struct, frozen=True):
    """`SlotStats`, with positions as text."""

    name: str
    active: bool
    wal_status: str | None
    retained_bytes: int
    safe_bytes: int | None
    restart_lsn: str | None
    confirmed_flush_lsn: str | None


class SourceStatus(msgspec.Struct, frozen=True):
    """A source and its queue. Positions as text; times in unix seconds.

    lag_seconds, lag_bytes: how far `confirmed` is behind the server; `None` while that is not known.
    """

    state: State
    error: str | None
    hint: str
    received: str | None
    server_end: str | None
    confirmed: str | None
    lag_seconds: float | None
    lag_bytes: int | None
    last_commit_time: float | None
    connected_at: float | None
    transactions: int
    changes: dict[str, int]
    bytes: int
    retries: int
    slot: SlotStatus | None
    insert_only: tuple[str, ...]
    queue: QueueStats | None
    oplog: OplogStatus | None = None


class SinkStatus(msgspec.Struct, frozen=True):
    """A sink. Positions as text; times in unix seconds.

    lag_seconds, lag_bytes: how far the target is behind the source's server, capture included.
    parked: changes that wait because the target refused one; `dead`: those of them that are not tried again; `waiting`:
        those that were never tried, since they are behind another one.
    parked_attempts: how often parked changes were tried again. discarded: how many were given up by a person.
    torn: whether transactions are on the target in part only: as long as something is parked.
    """

    source: str
    state: State
    error: str | None
    hint: str
    position: str | None
    seq: int
    lag_seconds: float | None
    lag_bytes: int | None
    last_commit_time: float | None
    transactions: int
    changes: dict[str, int]
    missing_rows: int
    healed_rows: int
    fallbacks: int
    retries: int
    parked: int
    dead: int
    copy: CopyStatus | None
    parked_oldest_seconds: float | None = None
    torn: bool = False
    parked_attempts: int = 0
    discarded: int = 0
    resync: ResyncStatus | None = None
    waiting: int = 0


class DaemonStatus(msgspec.Struct, frozen=True):
    """The whole daemon.

    started_at: unix seconds; `None` where no daemon runs, and this was read from its data directory.
    healthy: no pipeline is in trouble; `problems` names the trouble, one line each, and what else wants a person.
    reload_error: why the configuration that was to be read last is not in force; empty where it is.
    ready: all sources are connected (a paused one counts: a person wanted it so).
    """

    version: str
    started_at: float | None
    healthy: bool
    ready: bool
    problems: tuple[str, ...]
    sources: dict[str, SourceStatus]
    sinks: dict[str, SinkStatus]
    reload_error: str = ""


def snapshot(
    *,
    version: str,
    started_at: float | None,
    sources: Sequence[tuple[CaptureStats, QueueStats | None]],
    sinks: Sequence[DeliveryStats],
    resyncs_ordered: Collection[str] = (),
    reload_error: str = "",
    now: float | None = None,
) -> DaemonStatus:
    """Read everything once. Never waits for a pipeline.

    sources: each beside what its queue holds, `None` where that could not be opened.
    resyncs_ordered: sinks whose resync has not begun.
    """
    now = time.time() if now is None else now
    captures = {stats.name: stats for stats, _ in sources}
    source_status = {stats.name: _source(stats, queue, now) for stats, queue in sources}
    sink_status = {
        stats.name: _sink(
            stats, captures[stats.source], source_status[stats.source], now, ordered=stats.name in resyncs_ordered
        )
        for stats in sinks
    }
    stopped = ("daemon is not running",) if started_at is None else ()
    problems = (*stopped, *_source_problems(source_status), *_sink_problems(sink_status))
    refused = (f"configuration not reloaded: {reload_error}",) if reload_error else ()
    return DaemonStatus(
        version=version,
        started_at=started_at,
        healthy=not problems,
        ready=all(source.state in _CONNECTED for source in source_status.values()),
        problems=(*problems, *refused),
        sources=source_status,
        sinks=sink_status,
        reload_error=reload_error,
    )


def to_json(status: DaemonStatus) -> bytes:
    """What `GET /status` and `cdc status --json` print."""
    return msgspec.json.encode(status)


def from_json(data: bytes) -> DaemonStatus:
    """Read `to_json`'s form; raises `msgspec.DecodeError` (or its `ValidationError`) on anything else."""
    return msgspec.json.decode(data, type=DaemonStatus)


_CONNECTED: Final = frozenset({State.RUNNING, State.PAUSED})

_TROUBLE: Final = frozenset({State.FAILED, State.STOPPED, State.WAITING})


def _source(stats: CaptureStats, queue: QueueStats | None, now: float) -> SourceStatus:
    lag_bytes = _distance(stats.confirmed, _server_end(stats))
    return SourceStatus(
        state=stats.state,
        error=stats.error,
        hint=stats.hint,
        received=format_position(stats.received),
        server_end=format_position(stats.server_end),
        confirmed=format_position(stats.confirmed),
        lag_seconds=0.0 if lag_bytes == 0 else _age(stats.last_commit_time, stats.caught_up_at, now),
        lag_bytes=lag_bytes,
        last_commit_time=stats.last_commit_time,
        connected_at=stats.connected_at,
        transactions=stats.transactions,
        changes=dict(stats.changes),
        bytes=stats.bytes,
        retries=stats.retries,
        slot=_slot(stats.slot),
        insert_only=stats.insert_only,
        queue=queue,
        oplog=stats.oplog,
    )


def _slot(slot: SlotStats | None) -> SlotStatus | None:
    if slot is None:
        return None
    return SlotStatus(
        name=slot.name,
        active=slot.active,
        wal_status=slot.wal_status,
        retained_bytes=slot.retained_bytes,
        safe_bytes=slot.safe_bytes,
        restart_lsn=format_position(slot.restart_lsn),
        confirmed_flush_lsn=format_position(slot.confirmed_flush_lsn),
    )


def _sink(
    stats: DeliveryStats, capture: CaptureStats, source: SourceStatus, now: float, *, ordered: bool
) -> SinkStatus:
    """ordered: whether a resync is, that has not begun. One that is under way is told of first."""
    lag_seconds, lag_bytes = _sink_lag(stats, capture, source, now)
    return SinkStatus(
        source=stats.source,
        state=stats.state,
        error=stats.error,
        hint=stats.hint,
        position=format_position(stats.position),
        seq=stats.seq,
        lag_seconds=lag_seconds,
        lag_bytes=lag_bytes,
        last_commit_time=stats.last_commit_time,
        transactions=stats.transactions,
        changes=dict(stats.changes),
        missing_rows=stats.missing_rows,
        healed_rows=stats.healed_rows,
        fallbacks=stats.fallbacks,
        retries=stats.retries,
        parked=stats.parked,
        dead=stats.dead,
        copy=stats.copy() if stats.copy else None,
        parked_oldest_seconds=_age(stats.parked_oldest_at, None, now),
        torn=stats.parked > 0,
        parked_attempts=stats.parked_attempts,
        discarded=stats.discarded,
        resync=stats.resync or (ResyncStatus.ordered() if ordered else None),
        waiting=stats.waiting,
    )


def _sink_lag(
    stats: DeliveryStats, capture: CaptureStats, source: SourceStatus, now: float
) -> tuple[float | None, int | None]:
    """Seconds and bytes. A sink that applied all that was captured is as late as its source, and no later."""
    if source.queue is not None and stats.position is not None and stats.seq >= source.queue.last_seq:
        return source.lag_seconds, source.lag_bytes
    lag_bytes = _distance(stats.position, _server_end(capture))
    return _age(stats.last_commit_time, stats.caught_up_at, now), lag_bytes


def _server_end(stats: CaptureStats) -> SourcePosition | None:
    """What a server told before it went away, or is not asked any more, says nothing about now."""
    return stats.server_end if stats.state is State.RUNNING else None


def _distance(reached: SourcePosition | None, end: SourcePosition | None) -> int | None:
    """Bytes of log between two positions; `None` where they cannot be subtracted."""
    if isinstance(reached, int) and isinstance(end, int):
        return max(end - reached, 0)
    return 0 if reached is not None and reached == end else None


def _age(last_commit_time: float | None, caught_up_at: float | None, now: float) -> float | None:
    """Seconds since the newest moment of which all is known to be done.

    Both are such moments. After an idle hour the last commit is an hour old while nothing is late.
    """
    known = [moment for moment in (last_commit_time, caught_up_at) if moment is not None]
    return max(now - max(known), 0.0) if known else None


def _source_problems(sources: Mapping[str, SourceStatus]) -> list[str]:
    problems = [_problem(name, source.state, source.error) for name, source in sources.items()]
    for name, source in sources.items():
        if source.queue is not None and source.queue.removed:
            problems.append(f"{name}: the file {name}.queue was removed: what is only in there is lost at a restart")
        if source.slot is not None and source.slot.wal_status in {"unreserved", "lost"}:
            problems.append(f"{name}: slot {source.slot.name} is {source.slot.wal_status}: the server gives up its WAL")
        if source.oplog is not None and source.oplog.is_short:
            left = source.oplog.remaining_seconds or 0.0
            problems.append(f"{name}: the oplog will soon have forgotten the captured position ({left:.0f} s left)")
    return [problem for problem in problems if problem]


def _sink_problems(sinks: Mapping[str, SinkStatus]) -> list[str]:
    problems = [_problem(name, sink.state, sink.error) for name, sink in sinks.items()]
    problems += [f"{name}: {sink.dead} changes are dead" for name, sink in sinks.items() if sink.dead]
    return [problem for problem in problems if problem]


def _problem(name: str, state: State, error: str | None) -> str:
    if state not in _TROUBLE:
        return ""
    return f"{name}: {state}: {error}" if error else f"{name}: {state}"


class HttpStatus(msgspec.Struct, frozen=True):
    """The HTTP interface of this process. certificate_expires_at: unix seconds; `None` without TLS."""

    certificate_expires_at: float | None = None


class StreamsStatus(msgspec.Struct, frozen=True):
    """The live streams of this process, since it started.

    connections: open streams. channels: subscribers by name. sent: events, times the clients that got them; frames:
    what they travelled in. dropped: clients that were disconnected as they did not read. cursor: the newest change
    seen. connected: whether the feed's store answers.
    """

    connections: int
    channels: dict[str, int]
    sent: int
    frames: int
    dropped: int
    cursor: str
    connected: bool
