"""Whether a pipeline's thread is alive, as a watchdog wants to know it.

The thread says so itself: with each round of its loop (`beat`), and by naming the waits in which somebody else works
(`elsewhere`): a server that builds an index for an hour, a program that reads a schema, a pause between two attempts.
What is silent without such a reason hangs.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from math import inf
from types import TracebackType

_thread = threading.local()


class Pulse:
    """Of one thread at a time; read from any."""

    __slots__ = ("_at", "_owner")

    def __init__(self) -> None:
        self._at = inf  # when it was last felt, monotonic; inf: nobody has to be
        self._owner = 0

    @property
    def silent_seconds(self) -> float:
        """For how long the thread has shown no sign of life; 0 while it need not."""
        return max(time.monotonic() - self._at, 0.0)

    @contextmanager
    def felt(self) -> Iterator[None]:
        """Within the block it is that of the calling thread."""
        self._owner, self._at = threading.get_ident(), time.monotonic()
        _thread.pulse = self
        try:
            yield
        finally:
            _thread.pulse = None
            self._at = inf

    def stack(self) -> str:
        """Where the thread is right now: code, and no values."""
        frame = sys._current_frames().get(self._owner)  # noqa: SLF001 - what the manual has for finding deadlocks
        return "".join(traceback.format_stack(frame)) if frame is not None else ""


def beat() -> None:
    """The calling thread is alive. Without effect (and within 0.1 us) in a thread that nobody watches."""
    pulse: Pulse | None = getattr(_thread, "pulse", None)
    if pulse is not None and pulse._at != inf:  # noqa: SLF001 - one class with its functions
        pulse._at = time.monotonic()  # noqa: SLF001


class elsewhere:  # noqa: N801 - used like a function; a generator would cost each query three times as much
    """Within the block the calling thread only waits for others, however long that takes: `with elsewhere():`."""

    __slots__ = ("_pulse", "_was")

    def __enter__(self) -> None:
        self._pulse: Pulse | None = getattr(_thread, "pulse", None)
        if self._pulse is not None:
            self._was, self._pulse._at = self._pulse._at, inf  # noqa: SLF001

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        if self._pulse is not None and self._was != inf:
            self._pulse._at = time.monotonic()  # noqa: SLF001
