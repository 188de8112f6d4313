"""Which part of what the queue holds goes into one transaction on a target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from cdc.change import Batch
from cdc.config import BatchBounds
from cdc.position import SourcePosition
from cdc.queue import Stored
from cdc.sink import Applied

MAX_FOLDING: Final = 3
"""So many times the bounds at most, whatever a target makes of it: all of it is in memory, and the next as well."""


class Portion:
    """How much is read for one transaction on the target.

    The bounds are meant for what is written there. Where changes of the same rows come again and again, and the target
    writes each row once, it is more changes for as many rows: what it wrote for the last ones tells how many.

    bounds: may be set at any time.
    """

    def __init__(self, bounds: BatchBounds) -> None:
        self.bounds = bounds
        self._folding = 1.0

    @property
    def max_changes(self) -> int:
        """Of all batches together, unless it is one alone."""
        return int(self.bounds.max_changes * self._folding)

    @property
    def max_bytes(self) -> int:
        """The same of `Batch.size`."""
        return int(self.bounds.max_bytes * self._folding)

    def applied(self, applied: Applied) -> None:
        """Learn from what was made of a portion."""
        rows = applied.changes if applied.rows is None else applied.rows
        self._folding = min(max(applied.changes / max(rows, 1), 1.0), MAX_FOLDING)


def bounded(stored: Sequence[Stored], max_changes: int) -> list[Stored]:
    """The first of them, at least one, until there are enough changes for one target transaction."""
    chosen: list[Stored] = []
    changes = 0
    for item in stored:
        changes += item.batch.change_count
        if chosen and changes > max_changes:
            break
        chosen.append(item)
    return chosen


def select(
    stored: Sequence[Stored], given_seq: int, after: SourcePosition, until: SourcePosition | None
) -> tuple[list[Stored], bool]:
    """Leave out what the target has already, and what commits at `until` or later; True if that was something.

    A batch that is cut counts as not given: its rest comes again.
    """
    if not isinstance(after, int):
        return list(stored), False
    pieces: list[Stored] = []
    for item in stored:
        summary = item.batch.summary if item.batch.transactions else None
        cut = summary is not None and until is not None and summary.last >= until  # type: ignore[operator]
        if cut or (summary is not None and summary.first < after):  # type: ignore[operator]
            batch = _between(item.batch, after, until)
            if batch.transactions or not cut:
                pieces.append(Stored(given_seq if cut else item.seq, batch))
        else:
            pieces.append(item)
        if cut:
            return pieces, True
        given_seq = item.seq
    return pieces, False


def _between(batch: Batch, after: int, until: SourcePosition | None) -> Batch:
    """The transactions that commit at `after` or later, and below `until`."""
    kept = [
        transaction
        for transaction in batch.transactions
        if transaction.position >= after and (until is None or transaction.position < until)  # type: ignore[operator]
    ]
    if not kept or kept[-1] is batch.transactions[-1]:
        return msgspec.structs.replace(batch, transactions=kept)
    return msgspec.structs.replace(batch, transactions=kept, position=kept[-1].end)
