"""What a long-running process of ours does alike: its event loop, its signals, its memory."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any, Final, TypeVar

import structlog

SWITCH_SECONDS: Final = 0.0005
"""How long a thread that computes may keep one waiting that has got its answer. A change passes from thread to thread
and from server to server: with Python's 5 ms, a busy event loop made each of a dozen steps so much longer.
"""

_M_ARENA_MAX: Final = -8
"""Of glibc's mallopt(3)."""

_ARENAS: Final = 2

T = TypeVar("T")

log = structlog.get_logger()


def run_in_loop(main: Coroutine[Any, Any, T]) -> T:
    """Run in an event loop of the fastest kind there is."""
    _share_arenas()
    _collect_garbage_rarely()
    sys.setswitchinterval(SWITCH_SECONDS)
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(main)


def on_signals(stopping: asyncio.Event, reload: Callable[[], None] | None = None) -> None:
    """Set the event on SIGTERM and SIGINT; a second signal ends the process at once. Call it in the event loop.

    reload: called on SIGHUP, which else ends the process.
    """
    loop = asyncio.get_running_loop()
    if reload is not None:
        loop.add_signal_handler(signal.SIGHUP, reload)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _on_signal, stopping, number)


async def finished(tasks: Sequence[asyncio.Task[None]], seconds: float) -> bool:
    """Wait for tasks that wait for threads; those that do not end in time are left alone. Returns whether all did."""
    _, late = await asyncio.wait(tasks, timeout=seconds)
    for task in late:
        log.warning("did not end in time", name=task.get_name())
        task.cancel()
    return not late


def _on_signal(stopping: asyncio.Event, number: signal.Signals) -> None:
    if stopping.is_set():
        log.warning("second signal: ending at once", signal=number.name)
        os._exit(128 + number)
    stopping.set()


def _share_arenas() -> None:
    """Let threads allocate from the same pieces of memory: each would keep what it once had most of for itself.

    Measured: a tenth of the daemon's memory, and no time, since Python's threads take turns anyway.
    """
    with suppress(AttributeError, OSError):  # no such function but in glibc
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, _ARENAS)


def _collect_garbage_rarely() -> None:
    """What flows through has no reference cycles, but its lists make the collector look at everything again and again.

    Measured: a fifth of the CPU of a drain with Python's default of 700 new containers, next to nothing with this.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """What makes event loops of the fastest kind there is; `None`: asyncio itself."""
    try:
        import uvloop  # noqa: PLC0415 - not on every platform
    except ImportError:
        return None
    return uvloop.new_event_loop
