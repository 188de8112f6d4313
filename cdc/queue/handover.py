"""From those who hand something over to the one who writes it: what comes during an fsync goes with the next."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from math import inf
from pathlib import Path

from cdc.change import Batch
from cdc.errors import CdcError, FatalError
from cdc.pulse import beat, elsewhere
from cdc.queue.orders import Item
from cdc.queue.tail import weight


class Handover:
    """Of one queue. Whatever is called here is called with its lock held, which waiting gives up meanwhile.

    bytes: about what the batches take that are not written yet. closing: nothing more is taken.
    failure: what the writer has failed with.
    """

    def __init__(self, path: Path, lock: threading.Lock) -> None:
        self.bytes = 0
        self.closing = False
        self.failure: CdcError | None = None
        self._path = path
        self._items: list[Item] = []
        self._handed = self._written = 0
        self._come = threading.Condition(lock)
        self._done = threading.Condition(lock)

    def put(self, item: Item) -> None:
        """Hand it over. Raises what the writer has failed with."""
        self.raise_failure()
        if self.closing:
            raise FatalError(f"{self._path} is closed")
        self._items.append(item)
        if isinstance(item, Batch):
            self.bytes += weight(item)
        self._handed += 1
        self._come.notify_all()

    def wait_written(self, timeout_seconds: float | None) -> bool:
        """Wait until all that was put before is durable; whether it is. Raises what the writer has failed with."""
        handed = self._handed
        done = self._done.wait_for(lambda: self._written >= handed or self.failure is not None, timeout_seconds)
        if self._written < handed:
            self.raise_failure()
        return done

    def wait_for(self, condition: Callable[[], bool], timeout_seconds: float) -> None:
        """Wait until it holds, by what is written or by `wake`; or until nothing more will come."""
        self._done.wait_for(lambda: condition() or self.closing or self.failure is not None, timeout_seconds)

    def wake(self) -> None:
        """Let those who wait look once more."""
        self._done.notify_all()

    def close(self) -> None:
        """Take nothing more."""
        self.closing = True
        self._come.notify_all()
        self._done.notify_all()

    def raise_failure(self) -> None:
        """Raise what the writer has failed with, if it has."""
        if self.failure is not None:
            raise type(self.failure)(str(self.failure), hint=self.failure.hint) from self.failure

    # for the writer

    def take(self, seconds_left: Callable[[], float]) -> Sequence[Item]:
        """Wait for something, or until no seconds are left, or it is closing; returns all that has come."""
        while not (self._items or self.closing or (seconds := seconds_left()) <= 0):
            with elsewhere():
                self._come.wait(None if seconds == inf else seconds)
        beat()
        items, self._items = self._items, []
        return items

    def nudge(self) -> None:
        """The seconds that are left are others now."""
        self._come.notify_all()

    def wrote(self, items: Sequence[Item]) -> None:
        """They are durable, and can be read."""
        self._written += len(items)
        self.bytes -= sum(weight(item) for item in items if isinstance(item, Batch))
        self._done.notify_all()

    def fail(self, failure: CdcError) -> None:
        """Nothing more will be written."""
        self.failure = failure
        self._done.notify_all()
