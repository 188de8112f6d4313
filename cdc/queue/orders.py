"""What a queue's writer is told to write, and what is known of the file then."""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec

from cdc.change import Batch
from cdc.position import SourcePosition
from cdc.queue.parked import ParkedOrder


class Stored(msgspec.Struct, frozen=True, gc=False):
    """A durable batch and its place in the queue."""

    seq: int
    batch: Batch


class Begin(msgspec.Struct, frozen=True):
    """Write order: the position that a fresh queue starts at."""

    position: SourcePosition


class Restart(msgspec.Struct, frozen=True):
    """Write order: the source goes on from a new position, behind a gap; `facts` go with it.

    keep: what is here can still be delivered, up to the gap. Otherwise nothing of it counts any more.
    """

    position: SourcePosition
    facts: dict[str, str | None]
    keep: bool


class Cursor(msgspec.Struct, frozen=True):
    """Write order: where a sink stands."""

    sink: str
    seq: int
    position: SourcePosition | None


class Fact(msgspec.Struct, frozen=True):
    """Write order: a small fact; `None` forgets it."""

    key: str
    value: str | None


Item = Batch | Begin | Restart | Cursor | Fact | ParkedOrder


class Upkeep(msgspec.Struct, frozen=True):
    """What a commit does besides its items.

    cursors: all there are.
    prune_to: every sink has passed this seq.
    created_before: unix seconds; younger batches stay.
    """

    cursors: Sequence[Cursor]
    prune_to: int
    created_before: float


class State(msgspec.Struct, frozen=True):
    """The row of table `state`."""

    queue_id: str
    position: SourcePosition | None = None
    complete_seq: int = 0
    pruned_seq: int = 0
    pruned_position: SourcePosition | None = None


class Contents(msgspec.Struct, frozen=True):
    """What is durable in the file, counted.

    bytes: of the payloads.
    oldest_at: when the oldest batch was stored, unix seconds.
    free_bytes: pages inside the file that the next batches will use.
    """

    state: State
    last_seq: int
    batches: int
    bytes: int
    oldest_at: float | None
    free_bytes: int = 0

    @property
    def oldest_seconds(self) -> float | None:
        """Age of the oldest batch; never negative, whatever the clock does."""
        return None if self.oldest_at is None else max(0.0, time.time() - self.oldest_at)
