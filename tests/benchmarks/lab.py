"""Where benchmarks run: a folder, servers of their own, and a terminal to tell how far they are."""

from __future__ import annotations

import os
import platform
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from rich.console import Console

from cdc.postgres.copy_text import COMPILED
from tests.servers import PostgresServer

SETTINGS: Final = {"shared_buffers": "128MB", "track_commit_timestamp": "on"}
"""Of all servers, besides fsync: what is confirmed must survive, and that has its price."""

console: Final = Console(highlight=False, width=None if sys.stdout.isatty() else 120)


class Lab:
    """Servers are started when somebody wants them, and end with the `with` block.

    folder: for configurations, logs and queues; whoever makes it removes it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._started: list[PostgresServer] = []
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def source(self) -> PostgresServer:
        """A server to replicate from."""
        return self._server(0)

    @property
    def target(self) -> PostgresServer:
        """Another one, to replicate to."""
        return self._server(1)

    def new_folder(self, name: str) -> Path:
        """An empty one."""
        folder = self.folder / name
        folder.mkdir()
        return folder

    def _server(self, number: int) -> PostgresServer:
        while len(self._started) <= number:
            server = PostgresServer(fsync=True, settings=SETTINGS)
            self._started.append(self._stack.enter_context(server))
        return self._started[number]


def surroundings() -> dict[str, Any]:
    """What the numbers depend on, besides what is measured."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "python": platform.python_version(),
        "compiled": COMPILED,
        "cpu": _cpu(),
        "cpus": os.cpu_count(),
        "kernel": platform.release(),
        "load": [round(load, 1) for load in os.getloadavg()],
    }


def version_of(server: PostgresServer) -> str:
    """As it tells itself: "18.1"."""
    with server.connect() as connection:
        return connection.info.parameter_status("server_version") or "of an unknown version"


def _cpu() -> str:
    """The processor's name, where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
