"""How a writer wakes the readers of the same process, where the store itself wakes nobody."""

from __future__ import annotations

import threading
from typing import Final
from weakref import WeakValueDictionary

from cdc.feed.place import Place


class Bell:
    """Counts what was committed to one feed. Any thread may call any method."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._rung = 0

    @property
    def rung(self) -> int:
        """How often it was rung."""
        return self._rung

    def ring(self) -> None:
        """Wake everybody who waits."""
        with self._condition:
            self._rung += 1
            self._condition.notify_all()

    def wait(self, seen: int, timeout_seconds: float) -> int:
        """Return how often it was rung, once that is more than `seen`, at the latest after the time-out."""
        with self._condition:
            self._condition.wait_for(lambda: self._rung != seen, timeout_seconds)
            return self._rung


_bells: Final[WeakValueDictionary[Place, Bell]] = WeakValueDictionary()
_lock: Final = threading.Lock()


def bell_of(place: Place) -> Bell:
    """The one bell of a feed in this process."""
    with _lock:
        return _bells.setdefault(place, Bell())
