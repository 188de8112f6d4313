"""Whether a target can be served: what it needs next is in the queue, and the queue is the one that fed it."""

from __future__ import annotations

from pathlib import Path

from cdc.errors import HistoryLost, ResyncRequired
from cdc.position import Position, SourcePosition, format_position
from cdc.queue.orders import Contents


def check_kept(after_seq: int, contents: Contents, path: Path) -> None:
    """Raise `HistoryLost` where what follows a batch is no longer kept."""
    if after_seq < (pruned_seq := contents.state.pruned_seq):
        raise HistoryLost(f"the sink stands at batch {after_seq}, {path} begins after {pruned_seq}")


def check_position(position: Position, contents: Contents, path: Path) -> None:
    """Raise `ResyncRequired` unless the queue at `path` holds what follows; `HistoryLost` where it did once."""
    if isinstance(position.source, bytes):
        _check_seq(position, contents, path)
    else:
        _check_lsn(position.source, contents, path)


def _check_lsn(source: SourcePosition, contents: Contents, path: Path) -> None:
    end, pruned = contents.state.position, contents.state.pruned_position
    if not (isinstance(source, int) and isinstance(end, int) and isinstance(pruned, int)):
        raise ResyncRequired(f"the target stands at {format_position(source)}, but {path} holds nothing of that kind")
    if source < pruned:
        raise HistoryLost(
            f"the target stands at {format_position(source)}, the queue begins at {format_position(pruned)}"
        )
    if source > end:
        raise ResyncRequired(
            f"the target stands at {format_position(source)}, the queue ends at {format_position(end)}"
        )


def _check_seq(position: Position, contents: Contents, path: Path) -> None:
    queue_id, pruned_seq = contents.state.queue_id, contents.state.pruned_seq
    if position.queue_id != queue_id:
        raise ResyncRequired(f"the target was fed by queue {position.queue_id}, {path} is queue {queue_id}")
    if position.seq < pruned_seq:
        raise HistoryLost(f"the target stands at batch {position.seq}, the queue begins after {pruned_seq}")
    if position.seq > contents.last_seq:
        raise ResyncRequired(f"the target stands at batch {position.seq}, the queue ends at {contents.last_seq}")
