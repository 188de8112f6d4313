"""Who starts services and listens to what they say, as systemd does."""

from __future__ import annotations

import socket
from contextlib import suppress
from pathlib import Path
from typing import Self

from tests.processes import wait_until


class ServiceManager:
    """Listens on a notify socket; what was said is kept until it is looked at."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "notify"
        self._said: list[str] = []

    def __enter__(self) -> Self:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.bind(str(self._path))
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def environment(self, watchdog_seconds: float | None = None) -> dict[str, str]:
        """What it gives to a service."""
        watchdog = {} if watchdog_seconds is None else {"WATCHDOG_USEC": str(int(watchdog_seconds * 1e6))}
        return {"NOTIFY_SOCKET": str(self._path), **watchdog}

    def said(self) -> list[str]:
        """What was said since the last look."""
        self._listen()
        said, self._said = self._said, []
        return said

    def hear(self, beginning: str, times: int = 1) -> list[str]:
        """Wait until a message has begun so, so many times; returns what was said up to then, and keeps the rest."""
        wait_until(
            lambda: len(self._places(beginning)) >= times, what=lambda: f"{times} times {beginning}: {self._said}"
        )
        end = self._places(beginning)[times - 1] + 1
        heard, self._said = self._said[:end], self._said[end:]
        return heard

    def _places(self, beginning: str) -> list[int]:
        self._listen()
        return [at for at, message in enumerate(self._said) if message.startswith(beginning)]

    def _listen(self) -> None:
        with suppress(BlockingIOError):
            while True:
                self._said.append(self._socket.recv(4096).decode())
