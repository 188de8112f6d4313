"""How long a contender takes for a backlog."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, NamedTuple

import psutil

from tests.benchmarks.contenders import Contender, Usage
from tests.benchmarks.table import LAST_ID, MARK_ID, has_row, require_equal
from tests.processes import wait_until
from tests.servers import Database, PostgresServer

TIMEOUT_SECONDS: Final = 600


@dataclass(frozen=True)
class Leg:
    """A part of a drain. usage: of the contender, where it is a process. target_cpu_seconds: of the target's server."""

    seconds: float
    usage: Usage | None
    target_cpu_seconds: float


@dataclass(frozen=True)
class Drain(Leg):
    """One drain. steady: from the backlog's mark on, if it has one."""

    steady: Leg | None = None


def drain(
    contender: Contender,
    check: Callable[[Database, Database], None] = require_equal,
    *,
    marked: bool = False,
) -> Drain:
    """Let it drain what was committed since it was prepared, and check what it has made of it (source, target).

    The clock runs from its taking the slot until the target shows the last transaction. marked: the backlog has a mark.
    """
    for server in (contender.source.server, contender.target.server):
        with server.connect() as connection:
            connection.execute("CHECKPOINT")  # or a run would pay for what the one before has written
    with contender.target.connect() as connection:

        def reading_at(row_id: int) -> _Reading:
            wait_until(
                lambda: has_row(connection, row_id),
                timeout_seconds=TIMEOUT_SECONDS,
                what=lambda: f"{contender.name} to drain the backlog; it says:\n{contender.log_tail()}",
            )
            return _read(contender)

        contender.start()
        contender.wait_until_reading()
        start = _read(contender)
        mark = reading_at(MARK_ID) if marked else None
        end = reading_at(LAST_ID)
    check(contender.source, contender.target)
    whole, steady = _leg(start, end), None if mark is None else _leg(mark, end)
    return Drain(whole.seconds, whole.usage, whole.target_cpu_seconds, steady)


class _Reading(NamedTuple):
    """What clocks show."""

    seconds: float
    usage: Usage | None
    target_cpu_seconds: float


def _read(contender: Contender) -> _Reading:
    return _Reading(time.monotonic(), contender.usage(), _server_cpu_seconds(contender.target.server))


def _leg(start: _Reading, end: _Reading) -> Leg:
    return Leg(
        end.seconds - start.seconds,
        _difference(start.usage, end.usage),
        end.target_cpu_seconds - start.target_cpu_seconds,
    )


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
