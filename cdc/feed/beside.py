"""Work that goes on beside the thread that asks for it, one piece after the other."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

from cdc.pulse import elsewhere


class Beside:
    """While one piece waits for a server, the next is prepared. Used by one thread.

    Where a piece fails no other is begun, and its error is raised by what is called next.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._pool: ThreadPoolExecutor | None = None
        self._running: Future[None] | None = None

    def begin(self, piece: Callable[[], None]) -> None:
        """Begin a piece once the one before is done."""
        self.wait()
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, self._name)
        self._running = self._pool.submit(piece)

    def wait(self) -> None:
        """Return when nothing is under way."""
        running, self._running = self._running, None
        if running is not None:
            with elsewhere():
                running.result()

    def end(self) -> None:
        """Wait, whatever becomes of it, and leave no thread behind. Another piece may begin later."""
        with suppress(Exception):
            self.wait()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
