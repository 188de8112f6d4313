"""The newest batches of a queue, kept in memory: a sink that keeps up never decodes."""

from __future__ import annotations

from typing import Final

from cdc.change import Batch
from cdc.queue.orders import Stored

_BATCH_BYTES: Final = 512
"""What a batch weighs in memory besides its `size`: the many that carry a single change must count too."""


class Tail:
    """The newest batches, decoded, bounded in bytes. Seqs within one run have no gaps."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._oldest_seq = 0
        self._stored: dict[int, Stored] = {}

    def add(self, stored: Stored) -> None:
        """Add the newest one and forget the oldest ones."""
        if not self._stored:
            self._oldest_seq = stored.seq
        self._stored[stored.seq] = stored
        self._bytes += weight(stored.batch)
        while self._bytes > self._max_bytes:
            self._bytes -= weight(self._stored.pop(self._oldest_seq).batch)
            self._oldest_seq += 1

    def after(self, seq: int, max_bytes: int) -> list[Stored]:
        """What follows `seq`, as `Queue.read` bounds it; empty if that is not here."""
        found: list[Stored] = []
        while (stored := self._stored.get(seq := seq + 1)) is not None:
            max_bytes -= stored.batch.size
            if found and max_bytes < 0:
                break
            found.append(stored)
        return found


def weight(batch: Batch) -> int:
    """About what a batch takes in memory, in bytes."""
    return batch.size + _BATCH_BYTES
