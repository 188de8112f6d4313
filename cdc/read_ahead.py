"""Reading ahead: while the target is busy with some batches, the next are read from the queue and prepared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import NamedTuple

from cdc.parking import Parker
from cdc.portion import Portion, bounded
from cdc.queue import Queue, Stored
from cdc.sink import Sink


class ReadAhead:
    """Reads a queue for one sink: ahead where that is worth it, in a thread of its own."""

    def __init__(self, sink: Sink, queue: Queue, portion: Portion, parker: Parker | None) -> None:
        self._sink = sink
        self._queue = queue
        self._portion = portion
        self._parker = parker
        self._thread: ThreadPoolExecutor | None = None
        self._ahead: _Ahead | None = None

    @contextmanager
    def in_thread(self) -> Iterator[None]:
        """Have the thread within the block, whose end waits for what it is doing."""
        with ThreadPoolExecutor(1, f"read-ahead:{self._sink.name}") as self._thread:
            yield

    def begin(self, pieces: Sequence[Stored]) -> None:
        """While behind, read and prepare what comes next in the time that the target is busy with `pieces`."""
        assert self._thread is not None
        if sum(piece.batch.size for piece in pieces) < self._portion.max_bytes // 2:
            return
        after_seq = pieces[-1].seq

        def read() -> list[Stored]:
            found = self._queue.read(after_seq, max_bytes=self._portion.max_bytes, timeout_seconds=0)
            stored = bounded(found, self._portion.max_changes)
            if stored:
                expected = stored if self._parker is None else self._parker.foresee(stored)
                self._sink.prepare([each.batch for each in expected])
            return stored

        self._ahead = _Ahead(after_seq, self._thread.submit(read))

    def read(self, after_seq: int, *, timeout_seconds: float) -> list[Stored]:
        """What comes after a batch, read ahead or now."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead.after_seq == after_seq and (stored := ahead.stored.result()):
            return stored
        return self._queue.read(after_seq, max_bytes=self._portion.max_bytes, timeout_seconds=timeout_seconds)

    def wait(self) -> None:
        """Wait until the sink has prepared: meanwhile nothing but `apply` may happen to it."""
        if self._ahead is not None:
            wait([self._ahead.stored])

    def forget(self) -> None:
        """Begin anew: the target may stand elsewhere."""
        self._ahead = None


class _Ahead(NamedTuple):
    """What is being read from behind a batch, and prepared."""

    after_seq: int
    stored: Future[list[Stored]]
