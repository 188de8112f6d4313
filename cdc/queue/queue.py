"""The durable queue between one source and its sinks.

Only one thread writes. What is handed to it while it waits for an fsync goes into its next commit, so a single fsync
serves as many batches as have come; nothing can be read before it is fsynced.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from math import inf
from pathlib import Path
from typing import Final

from cdc.change import Batch
from cdc.errors import CdcError, FatalError
from cdc.failpoints import failpoint
from cdc.position import Position, SourcePosition
from cdc.pulse import Pulse
from cdc.queue.file import QueueFile
from cdc.queue.handover import Handover
from cdc.queue.orders import Begin, Contents, Cursor, Fact, Item, Restart, Stored, Upkeep
from cdc.queue.parked import Park, ParkedChange, ParkedId, Retried, Revive, Unpark
from cdc.queue.reach import check_kept, check_position
from cdc.queue.stats import QueueStats, measure_free_disk, stats_of
from cdc.queue.tail import Tail

_HANDED_OVER_BYTES: Final = 8 * 1024**2
"""Above this the writer is behind, and the source must wait."""

_LARGEST_BATCH_BYTES: Final = 900_000_000
"""SQLite refuses a row of a billion bytes."""

_UPKEEP_SECONDS: Final = 0.1
"""Cursors are stored, and batches pruned, at most this often: mostly within a commit that is due anyway."""

_AGING_SECONDS: Final = 1.0
"""How often to look for batches that only `keep_seconds` holds back."""


class Queue:
    """One source's batches in order, durable, until every sink has passed them. Any thread may call any method.

    max_bytes, min_free_bytes, keep_seconds: may be set at any time.
    """

    def __init__(
        self,
        path: Path,
        *,
        max_bytes: int,
        min_free_bytes: int,
        keep_seconds: float = 0.0,
        tail_bytes: int = 4 * 1024**2,
    ) -> None:
        """Open or create the file and start its writer. Raises `QueueCorrupt` on damage.

        max_bytes, min_free_bytes: of stored batches, and of free disk: beyond them `has_room` says no.
        keep_seconds: batches stay this long even when every sink has passed them.
        tail_bytes: of `Batch.size`: how much of the newest stays decoded in memory.
        """
        self._file = QueueFile(path)
        self.queue_id = self._file.contents.state.queue_id
        self._path = path
        self.max_bytes, self.min_free_bytes = max_bytes, min_free_bytes
        self.keep_seconds = keep_seconds

        self._lock = threading.Lock()
        self._handover = Handover(path, self._lock)

        self._contents = self._file.contents
        self._facts = self._file.facts()
        self._cursors = self._file.cursors()
        self._tail_bytes = tail_bytes
        self._tail = Tail(tail_bytes)

        self._in_transaction = False
        self._upkeep_at = time.monotonic()
        self._wakes = 0
        self.pulse = Pulse()
        self._writer = threading.Thread(target=self._run, name=f"queue:{path.stem}", daemon=True)
        self._writer.start()

    @property
    def position(self) -> SourcePosition | None:
        """The source goes on from here after a restart: all before it is durable. `None` before `begin`."""
        return self._contents.state.position

    @property
    def pruned_position(self) -> SourcePosition | None:
        """A target that stands before this can no longer be served."""
        return self._contents.state.pruned_position

    @property
    def beginning(self) -> Position:
        """The earliest position that a target can be served from. Not before `begin`."""
        state = self._contents.state
        assert state.pruned_position is not None
        return Position(self.queue_id, state.pruned_seq, state.pruned_position)

    def begin(self, position: SourcePosition) -> None:
        """Start a fresh queue at the source's `position`. Durable on return."""
        if self.position is not None:
            raise RuntimeError("this queue has already begun")
        self._write_now(Begin(position))

    def restart(self, position: SourcePosition, facts: Mapping[str, str | None], *, keep: bool) -> None:
        """Let the source go on from another position, behind a gap; durable on return, together with `facts`.

        For the thread that appends. keep: what is here can still be delivered; otherwise every target is behind.
        """
        with self._lock:
            self._handover.wait_written(None)
            self._in_transaction = False
            self._tail = Tail(self._tail_bytes)
            self._handover.put(Restart(position, dict(facts), keep))
            self._handover.wait_written(None)
            self._schedule(_UPKEEP_SECONDS)

    def rewind(self, sink: str, seq: int) -> Position:
        """Keep for a sink what comes after a batch, or after a transaction that ends before it; returns where that is.

        Durable. Raises `FatalError` where it is no longer kept.
        """
        with self._lock:
            before = self._cursors.get(sink)
            self._cursors[sink] = (min(seq, before[0]) if before else seq, None)
        self._write_now(Cursor(sink, seq, None))  # and so past a commit that might be pruning
        state = self._contents.state
        if seq < state.pruned_seq:
            if before is not None:
                self.advance(sink, *before)  # type: ignore[arg-type]
            raise FatalError(f"batch {seq} is no longer kept: the oldest is {state.pruned_seq + 1}")
        seq, position = self._file.boundary(seq, state)
        return Position(self.queue_id, seq, position)

    def append(self, batch: Batch) -> None:
        """Hand over a batch; it can be read as soon as it is durable, in the order of the calls.

        A batch without transactions only moves the position. Raises what the writer failed with, if it has:
        nothing appended since its last commit is durable, and the queue must be opened again.
        """
        if batch.size > _LARGEST_BATCH_BYTES:
            raise FatalError(
                f"a batch of {batch.size} bytes is too large for the queue",
                hint=f"a single row may have {_LARGEST_BATCH_BYTES} bytes; exclude the table, or shorten the value",
            )
        if self.position is None:
            raise RuntimeError("begin() comes before append()")
        with self._lock:
            if batch.transactions:
                self._in_transaction = not batch.complete
            elif self._in_transaction:
                return  # the position must not pass the batches that a restart drops with their transaction
            self._handover.put(batch)

    def flush(self, timeout_seconds: float) -> bool:
        """Wait until all that was appended before is durable; whether it is. Raises what the writer failed with."""
        with self._lock:
            return self._handover.wait_written(timeout_seconds)

    @property
    def has_room(self) -> bool:
        """Whether to read more from the source. An unfinished transaction may pass `max_bytes`, or it could never end.

        True after a failure: `append` raises it.
        """
        free_bytes = measure_free_disk(self._path, self._contents)
        with self._lock:
            if self._handover.failure is not None:
                return True
            if self._handover.bytes > _HANDED_OVER_BYTES or free_bytes < self.min_free_bytes:
                return False
            return self._in_transaction or self._contents.bytes + self._handover.bytes < self.max_bytes

    def read(self, after_seq: int, *, max_bytes: int, timeout_seconds: float) -> list[Stored]:
        """Durable batches after `after_seq`, in order: at least one if there is any, else up to `max_bytes` of them.

        Waits for the first one; empty when the time is over, or after `wake`. Raises `ResyncRequired` if the next
        one is no longer kept, and `QueueCorrupt` if it is damaged or missing.
        """
        with self._lock:
            contents = self._wait_beyond(after_seq, timeout_seconds)
            if contents.last_seq <= after_seq:
                return []
            check_kept(after_seq, self._contents, self._path)
            if stored := self._tail.after(after_seq, max_bytes):
                return stored
        try:
            return self._file.read(after_seq, last_seq=contents.last_seq, max_bytes=max_bytes)
        except CdcError:
            check_kept(after_seq, self._contents, self._path)  # pruned meanwhile: no damage
            raise

    def wake(self) -> None:
        """Make all calls of `read` that wait return now."""
        with self._lock:
            self._wakes += 1
            self._handover.wake()

    def seek(self, position: Position) -> int:
        """The seq to read after, for a sink whose target stores `position`.

        LSNs decide by themselves: the batch that follows may begin with transactions which the target has. Tokens
        have no order, so there the seq decides, and only in the queue that gave it.

        Raises `ResyncRequired` where what the target needs next is not here.
        """
        contents = self._contents
        check_position(position, contents, self._path)
        if isinstance(position.source, bytes):
            return position.seq
        return self._file.seek(position.source, contents)

    def register(self, sink: str) -> None:
        """From now on, durably, keep what this sink has not passed. Without effect if it is registered."""
        with self._lock:
            if sink in self._cursors:
                return
            seq = self._contents.state.pruned_seq
            self._cursors[sink] = (seq, None)
        self._write_now(Cursor(sink, seq, None))  # and so past a commit that might be pruning

    def retain(self, sinks: Iterable[str]) -> None:
        """Forget all other sinks: nothing is kept for them any more."""
        kept = frozenset(sinks)
        with self._lock:
            self._cursors = {sink: cursor for sink, cursor in self._cursors.items() if sink in kept}
            self._schedule(_UPKEEP_SECONDS)

    def advance(self, sink: str, seq: int, position: SourcePosition) -> None:
        """A sink's target stands here. Stored a little later: after a crash the target itself is asked."""
        with self._lock:
            self._cursors[sink] = (seq, position)
            self._schedule(_UPKEEP_SECONDS)

    @property
    def sinks(self) -> list[str]:
        """Those that are registered."""
        with self._lock:
            return sorted(self._cursors)

    def replayable(self, seq: int) -> int:
        """How many changes are kept after a batch."""
        return self._file.count_after(seq)

    def stored_at(self, seconds: float) -> int:
        """The seq before the first batch that was stored at a time (unix seconds) or later."""
        return self._file.stored_at(seconds)

    @property
    def oldest(self) -> tuple[int, float] | None:
        """The oldest batch that is kept: its seq, and when it was stored, in unix seconds."""
        return self._file.oldest(self._contents.state)

    def cursor(self, sink: str) -> tuple[int, SourcePosition | None] | None:
        """Where a sink stands, the position `None` until it first advanced; `None` if it is not registered."""
        with self._lock:
            return self._cursors.get(sink)

    def get(self, key: str) -> str | None:
        """A fact that `set` stored."""
        with self._lock:
            return self._facts.get(key)

    def set(self, key: str, value: str | None) -> None:
        """Store a small fact, or forget it (`None`). Durable on return."""
        self._write_now(Fact(key, value))

    def park(self, sink: str, changes: Sequence[tuple[ParkedChange, bytes]]) -> None:
        """Keep changes (each beside `payload_of` a batch with it alone) that a sink could not apply. Durable on return.

        They are kept when their batches are pruned, and when they are parked a second time.
        """
        failpoint("queue.park.before")
        self._write_now(Park(sink, changes))
        failpoint("queue.park.after")

    def unpark(self, sink: str, ids: Sequence[ParkedId]) -> None:
        """Forget parked changes, which are applied or given up, or come again. Durable on return."""
        self._write_now(Unpark(sink, ids))

    def retried(self, sink: str, change: ParkedChange) -> None:
        """Store a parked change's state, attempts and error. Durable on return."""
        self._write_now(Retried(sink, change))

    def revive(self, sink: str, ids: Sequence[ParkedId]) -> None:
        """Make parked changes due now, as if they had never been tried. Durable on return."""
        self._write_now(Revive(sink, ids))

    def parked(self, sink: str) -> list[ParkedChange]:
        """A sink's parked changes, in the order of the source."""
        return self._file.parked(sink)

    def parked_batches(self, sink: str, ids: Sequence[ParkedId]) -> list[Batch]:
        """The changes themselves, each as a batch by itself. Raises `QueueCorrupt` if one is damaged."""
        return self._file.parked_batches(sink, ids)

    def parked_batch(self, sink: str, parked: ParkedId) -> Batch | None:
        """One of them, `None` if it is gone. Raises `QueueCorrupt` if it is damaged."""
        return self._file.parked_batch(sink, parked)

    def stats(self) -> QueueStats:
        """Cheap, and never waits for the disk's writes."""
        return stats_of(self._path, self._contents, self.max_bytes, self.min_free_bytes)

    def close(self) -> None:
        """Write what was handed over, store the cursors, stop. Safe to call twice, and after a failure."""
        with self._lock:
            if self._handover.closing:
                return
            self._handover.close()
        self._writer.join()
        self._file.close(checkpoint=self._handover.failure is None)

    def _write_now(self, item: Item) -> None:
        with self._lock:
            self._handover.put(item)
            self._handover.wait_written(None)

    def _wait_beyond(self, after_seq: int, timeout_seconds: float) -> Contents:
        wakes = self._wakes
        self._handover.wait_for(lambda: self._contents.last_seq > after_seq or self._wakes != wakes, timeout_seconds)
        if self._contents.last_seq <= after_seq:
            self._handover.raise_failure()
        return self._contents

    # the writer's thread

    def _run(self) -> None:
        try:
            with self.pulse.felt():
                while self._write_round():
                    pass
        except Exception as exc:  # noqa: BLE001 - the thread's outer edge: whoever appends next gets it, with its cause
            self._fail(exc)

    def _fail(self, exc: Exception) -> None:
        failure = exc
        if not isinstance(failure, CdcError):
            failure = FatalError(f"{self._path}: {type(exc).__name__} while writing", hint="this is a bug in cdc")
            failure.__cause__ = exc
        with self._lock:
            self._handover.fail(failure)

    def _write_round(self) -> bool:
        """Wait for work, commit it, publish it. False when closing."""
        with self._lock:
            items = self._handover.take(lambda: self._upkeep_at - time.monotonic())
            closing = self._handover.closing
            upkeep = self._take_upkeep()
        stored = self._file.write(items, upkeep)
        with self._lock:
            self._publish(items, stored)
            if upkeep is not None:
                self._schedule_rest(upkeep)
        return not closing

    def _take_upkeep(self) -> Upkeep | None:
        if not self._handover.closing and time.monotonic() < self._upkeep_at:
            return None
        self._upkeep_at = inf
        cursors = [Cursor(sink, seq, position) for sink, (seq, position) in self._cursors.items()]
        prune_to = min((cursor.seq for cursor in cursors), default=self._contents.last_seq)
        # without `keep_seconds` the clock, which may jump, has no say
        created_before = time.time() - self.keep_seconds if self.keep_seconds else inf
        return Upkeep(cursors, min(prune_to, self._contents.last_seq), created_before)

    def _publish(self, items: Sequence[Item], stored: Sequence[Stored]) -> None:
        self._contents = self._file.contents
        for item in items:
            if isinstance(item, Fact):
                self._learn(item)
            elif isinstance(item, Restart):
                for key, value in item.facts.items():
                    self._learn(Fact(key, value))
        for each in stored:
            self._tail.add(each)
        if stored and not self._cursors:
            self._schedule(_UPKEEP_SECONDS)
        self._handover.wrote(items)

    def _learn(self, fact: Fact) -> None:
        self._facts.pop(fact.key, None)
        if fact.value is not None:
            self._facts[fact.key] = fact.value

    def _schedule(self, delay_seconds: float) -> None:
        at = time.monotonic() + delay_seconds
        if at < self._upkeep_at:
            self._upkeep_at = at
            self._handover.nudge()

    def _schedule_rest(self, upkeep: Upkeep) -> None:
        if self._file.has_more_upkeep:
            self._schedule(0.0)
        elif self.keep_seconds and upkeep.prune_to > self._contents.state.pruned_seq:
            self._schedule(_AGING_SECONDS)
