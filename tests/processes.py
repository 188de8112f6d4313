"""Processes, ports and waiting: what the test servers and the tests of the daemon need from the system."""

from __future__ import annotations

import itertools
import os
import pwd
import random
import socket
import time
from collections.abc import Callable
from typing import Any, Final, TypeVar

import psutil

T = TypeVar("T")

UNPRIVILEGED_USER: Final = "nobody"
"""Who runs the servers when root runs the tests."""


def wait_until(
    condition: Callable[[], T | None],
    *,
    timeout_seconds: float = 60,
    what: str | Callable[[], str] = "the condition",
) -> T:
    """Return the condition's value once it is true; `TimeoutError` naming `what` if that takes too long."""
    deadline = time.monotonic() + timeout_seconds
    for attempt in itertools.count():
        if value := condition():
            return value
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_seconds} s for {what if isinstance(what, str) else what()}")
        time.sleep(min(0.001 * 2 ** min(attempt, 5), 0.02))
    raise AssertionError("unreachable")


def kill_tree(pid: int) -> None:
    """SIGKILL a process and its children; return when none of them runs any more."""
    try:
        parent = psutil.Process(pid)
        parent.suspend()  # or it would start new children meanwhile
        doomed = [*parent.children(recursive=True), parent]
    except psutil.NoSuchProcess:
        return
    for process in doomed:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    wait_until(lambda: all(map(ended, doomed)), what="killed processes to end")


def ended(process: psutil.Process) -> bool:
    """Whether a process does nothing any more, even if nobody has asked for its exit code yet."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def free_port() -> int:
    """A port that nobody listens on, below those that systems give to outgoing connections.

    Otherwise a connection could take the port of a server while it is down, or even connect to itself.
    """
    for port in random.SystemRandom().sample(range(20000, 32000), 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError("no free port between 20000 and 32000")


def run_as() -> dict[str, Any]:
    """Arguments for `subprocess` that turn root into an unprivileged user."""
    if os.geteuid() != 0:
        return {"cwd": "/"}
    try:
        account = pwd.getpwnam(UNPRIVILEGED_USER)
    except KeyError:
        raise RuntimeError(f"PostgreSQL refuses to run as root, and there is no user {UNPRIVILEGED_USER}") from None
    return {"cwd": "/", "user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}


def is_cut_off(connection: socket.socket) -> bool:
    """Whether the other end has ended a connection that it has nothing to say on."""
    connection.setblocking(False)
    try:
        return connection.recv(100) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True
