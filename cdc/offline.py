"""What the data directory tells when no daemon is there to ask: the status, and parked changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from cdc import __version__
from cdc.config import Config
from cdc.daemon import open_queue, queue_path
from cdc.dead_letters import Box, Office
from cdc.errors import CdcError
from cdc.pipeline import paused_fact
from cdc.queue import ParkedInFile, QueueOnDisk, read_status
from cdc.queue.parked import ParkedCount
from cdc.stats import CaptureStats, DeliveryStats, State, note_parked
from cdc.status import DaemonStatus, snapshot
from cdc.wishes import resync_fact


def offline_status(config: Config) -> DaemonStatus:
    """What the queues' files say: positions, sizes, pauses, orders. Lag is not known. Changes nothing on disk."""
    captures: list[tuple[CaptureStats, QueueOnDisk | None]] = []
    deliveries: list[DeliveryStats] = []
    ordered: list[str] = []
    for source in config.sources:
        capture = CaptureStats(source, State.STOPPED)
        queue = _read(config, capture)
        captures.append((capture, queue))
        deliveries += [_delivery(sink.name, source, queue) for sink in config.sinks_of(source)]
        if queue is not None:
            ordered += [sink.name for sink in config.sinks_of(source) if resync_fact(sink.name) in queue.facts]
    return snapshot(
        version=__version__,
        started_at=None,
        sources=[(stats, queue.stats if queue else None) for stats, queue in captures],
        sinks=deliveries,
        resyncs_ordered=ordered,
    )


def letters_on_disk(config: Config) -> Office:
    """Parked changes, to look at. Changes nothing on disk."""

    def boxes() -> dict[str, Box]:
        return {
            sink.name: Box(sink.name, config.sources[sink.source].kind, ParkedInFile(path))
            for sink in config.sinks.values()
            if (path := queue_path(Path(config.daemon.data_dir), sink.source)).exists()
        }

    return Office(boxes)


@contextmanager
def opened_letters(config: Config) -> Iterator[Office]:
    """Parked changes, to act on. For who has locked the directory."""
    data_dir = Path(config.daemon.data_dir)
    with ExitStack() as stack:
        queues = {
            source: stack.enter_context(closing(open_queue(config, source)))
            for source in config.sources
            if queue_path(data_dir, source).exists()
        }
        boxes = {
            sink.name: Box(sink.name, config.sources[sink.source].kind, queue, queue)
            for sink in config.sinks.values()
            if (queue := queues.get(sink.source)) is not None
        }
        yield Office(lambda: boxes)


def _read(config: Config, stats: CaptureStats) -> QueueOnDisk | None:
    path = queue_path(Path(config.daemon.data_dir), stats.name)
    if not path.exists():
        return None
    try:
        queue = read_status(path, max_bytes=config.queue.max_bytes, min_free_bytes=config.queue.min_free_bytes)
    except CdcError as exc:
        stats.state, stats.error, stats.hint = State.FAILED, str(exc), exc.hint
        return None
    stats.received = stats.confirmed = queue.position
    stats.state = _state(queue, stats.name)
    return queue


def _delivery(name: str, source: str, queue: QueueOnDisk | None) -> DeliveryStats:
    stats = DeliveryStats(name, source, State.STOPPED)
    if queue is not None:
        stats.seq, stats.position = queue.cursors.get(name, (0, None))
        stats.state = _state(queue, name)
        note_parked(stats, queue.parked.get(name, ParkedCount()))
    return stats


def _state(queue: QueueOnDisk, name: str) -> State:
    return State.PAUSED if paused_fact(name) in queue.facts else State.STOPPED
