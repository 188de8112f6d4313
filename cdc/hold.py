"""Lets another thread stop a delivery at one position, so that source and target can be compared there."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from cdc.errors import TransientError
from cdc.position import SourcePosition, format_position


@dataclass(frozen=True, eq=False, slots=True)
class Request:
    """A wish that the target stands still once all below `until` is applied; `None`: where it is.

    deadline: by the monotonic clock; afterwards the wish is void.
    """

    until: SourcePosition | None
    deadline: float


class Hold:
    """One request at a time; a new one replaces the old. All methods may be called from any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._request: Request | None = None
        self._reached: SourcePosition | None = None
        self._error: str | None = None

    def ask(self, until: SourcePosition | None, seconds: float) -> None:
        """Ask the delivery to stand still."""
        with self._changed:
            self._request = Request(until, time.monotonic() + seconds)
            self._reached = self._error = None
            self._changed.notify_all()

    def wait(self, seconds: float) -> SourcePosition:
        """Wait until the delivery stands still, and return where. Raises `TransientError` if it does not."""
        with self._changed:
            asked = self._request
            self._changed.wait_for(
                lambda: self._reached is not None or self._error is not None or self._request is not asked, seconds
            )
            if self._error is None and self._reached is not None:
                return self._reached
            if self._request is asked:
                self._request = None
            self._changed.notify_all()
            where = format_position(asked.until) if asked and asked.until else "rest"
            raise TransientError(
                self._error or f"the sink did not come to {where} within {seconds:.0f} seconds",
                hint="see `cdc status`: is it running, and how far behind is it?",
            )

    def release(self) -> None:
        """Let the delivery go on."""
        with self._changed:
            self._request = None
            self._changed.notify_all()

    # for the delivery

    @property
    def request(self) -> Request | None:
        """The wish that stands, if any."""
        with self._changed:
            if self._request is not None and time.monotonic() >= self._request.deadline:
                self._request = None
            return self._request

    def stand(self, request: Request, position: SourcePosition, alive: Callable[[], bool]) -> None:
        """Report the position, and block while the same request stands and `alive` says so."""
        with self._changed:
            if self._request is not request:
                return
            self._reached = position
            self._changed.notify_all()
        while alive() and self.request is request:
            with self._changed:
                if self._request is request:
                    self._changed.wait(0.05)

    def refuse(self, request: Request, reason: str) -> None:
        """Say why the position cannot be had."""
        with self._changed:
            if self._request is request:
                self._request, self._error = None, reason
                self._changed.notify_all()
