"""Where other threads ask for what only the owner of something may do: it does so when it comes by."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from cdc.errors import TransientError

T = TypeVar("T")


class Desk:
    """While somebody owns what is asked about, requests wait for `serve`; otherwise they are carried out at once.

    So each is carried out alone, by the owner between two steps of its own, or by who asks while there is no owner.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owned = False
        self._waiting: deque[tuple[Future[Any], Callable[[], Any]]] = deque()

    @property
    def owned(self) -> bool:
        """Whether somebody owns it. For the owner, and for what is carried out."""
        return self._owned

    @property
    def asked(self) -> bool:
        """Whether something waits for `serve`."""
        return bool(self._waiting)

    def own(self, begin: Callable[[], None]) -> None:
        """Own it from now on, beginning with `begin`; where that raises, nobody does."""
        with self._lock:
            begin()
            self._owned = True

    def leave(self) -> None:
        """Own it no more. What still waits is done first. Safe to call twice."""
        with self._lock:
            self._owned = False
            self._serve()

    def serve(self) -> None:
        """Carry out what waits. For the owner."""
        if self._waiting:
            self._serve()

    def ask(self, action: Callable[[], T], *, seconds: float, wake: Callable[[], None]) -> T:
        """Return what `action` does, or raise what it raises. wake: lets the owner come by.

        Raises `TransientError` where the owner does not come within that time; then `action` never runs.
        """
        with self._lock:
            if not self._owned:
                return action()
            future: Future[T] = Future()
            self._waiting.append((future, action))
        wake()
        try:
            return future.result(seconds)
        except TimeoutError:
            if future.cancel():
                raise TransientError(
                    "the sink is busy with its target, and did not come to it", hint="try again; see `cdc status`"
                ) from None
            return future.result()

    def _serve(self) -> None:
        while self._waiting:
            future, action = self._waiting.popleft()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(action())
                except Exception as exc:  # noqa: BLE001 - it is the asker's, who raises it
                    future.set_exception(exc)
