"""How long a contender takes for a backlog."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import psutil

from tests.benchmarks.contenders import Contender, Usage
from tests.benchmarks.table import has_all, require_equal
from tests.processes import wait_until
from tests.servers import Database, PostgresServer

TIMEOUT_SECONDS: Final = 600


@dataclass(frozen=True)
class Drain:
    """One drain. usage: during it, where the contender is a process. target_cpu_seconds: of the target's server."""

    seconds: float
    usage: Usage | None
    target_cpu_seconds: float


def drain(contender: Contender, check: Callable[[Database, Database], None] = require_equal) -> Drain:
    """Let it drain what was committed since it was prepared, and check what it has made of it (source, target).

    The clock runs from its taking the slot until the target shows the last transaction.
    """
    for server in (contender.source.server, contender.target.server):
        with server.connect() as connection:
            connection.execute("CHECKPOINT")  # or a run would pay for what the one before has written
    with contender.target.connect() as connection:
        contender.start()
        contender.wait_until_reading()
        started, before = time.monotonic(), contender.usage()
        target_before = _server_cpu_seconds(contender.target.server)
        wait_until(
            lambda: has_all(connection),
            timeout_seconds=TIMEOUT_SECONDS,
            what=lambda: f"{contender.name} to drain the backlog; it says:\n{contender.log_tail()}",
        )
        seconds, after = time.monotonic() - started, contender.usage()
        target_cpu_seconds = _server_cpu_seconds(contender.target.server) - target_before
    check(contender.source, contender.target)
    return Drain(seconds, _difference(before, after), target_cpu_seconds)


def _server_cpu_seconds(server: PostgresServer) -> float:
    """Of all its processes, those included that have ended."""
    postmaster = psutil.Process(server.pid)
    ended = postmaster.cpu_times()
    running = []
    for process in postmaster.children():
        with suppress(psutil.NoSuchProcess):
            running.append(process.cpu_times())
    return ended.children_user + ended.children_system + sum(times.user + times.system for times in running)


def _difference(before: Usage | None, after: Usage | None) -> Usage | None:
    if before is None or after is None:
        return None
    return Usage(after.cpu_seconds - before.cpu_seconds, after.peak_rss_mb)
