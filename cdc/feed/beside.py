"""Work that goes on beside the thread that asks for it, one piece after the other."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import Self

from cdc.pulse import elsewhere


class Beside:
    """While one piece waits for a server, the next is prepared: a context, at whose end nothing is under way.

    Where a piece fails no other is begun, and its error is raised by what is called next. Used by one thread.
    """

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(1, name)  # which has no thread until there is a piece
        self._running: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        with self._pool, suppress(*() if kind is None else (Exception,)):
            self.wait()

    def begin(self, piece: Callable[[], None]) -> None:
        """Begin a piece once the one before is done."""
        self.wait()
        self._running = self._pool.submit(piece)

    def wait(self) -> None:
        """Return when nothing is under way."""
        running, self._running = self._running, None
        if running is not None:
            with elsewhere():
                running.result()
