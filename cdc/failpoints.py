"""Failpoints: where tests let the process die, fail or stand still, to show that nothing gets lost there.

Only the environment variable CDC_FAILPOINTS arms them, once, when the process starts: `NAME=ACTION[@PASS]`, several
separated by commas. PASS is which time that the place is passed (1: the first). It happens once. The actions:

    kill         SIGKILL, as a crash or a power cut: nothing of Python's is run any more
    raise        a `TransientError`
    block:FILE   the thread stands still there as long as FILE exists; the name is written into it first

    CDC_FAILPOINTS=queue.fsync.before=kill@20 cdc run
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Final

from cdc.errors import ConfigError, TransientError

VARIABLE: Final = "CDC_FAILPOINTS"

FAILPOINTS: Final = tuple(
    f"{place}.{moment}"
    for place in (
        "capture.append",  # the queue is given a batch
        "capture.confirm",  # the source is told what is durable
        "queue.fsync",  # what was written becomes durable
        "queue.prune",  # what every sink has passed is deleted
        "queue.park",  # what a target refuses is written down
        "delivery.apply",  # a sink is given batches
        "target.commit",  # data and position become visible (MongoDB: the position alone, in most cases)
    )
    for moment in ("before", "after")
)
"""All there are."""

_POLL_SECONDS: Final = 0.01


class _Armed:
    """One failpoint that is to do something."""

    def __init__(self, action: Callable[[], None], passes: int) -> None:
        self._action = action
        self._passes_left = passes
        self._counting = threading.Lock()

    def __call__(self) -> None:
        with self._counting:
            self._passes_left -= 1
            is_due = self._passes_left == 0
        if is_due:
            self._action()


def arm(text: str) -> Mapping[str, Callable[[], None]]:
    """What CDC_FAILPOINTS says, by name. Raises `ConfigError` for what is no failpoint or no action."""
    return dict(_parse(part) for part in text.split(",") if part)


def _parse(text: str) -> tuple[str, _Armed]:
    name, _, rest = text.partition("=")
    what, at, passes = rest.rpartition("@")
    if not at:
        what, passes = rest, "1"
    kind, _, gate = what.partition(":")
    actions: dict[str, Callable[[], None]] = {
        "kill": _kill,
        "raise": partial(_raise, name),
        "block": partial(_block, name, Path(gate)),
    }
    if name not in FAILPOINTS or kind not in actions or bool(gate) is not (kind == "block") or not passes.isdecimal():
        raise ConfigError(f"{VARIABLE}: {text!r} is no failpoint with an action", hint="see cdc/failpoints.py")
    return name, _Armed(actions[kind], int(passes))


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _raise(name: str) -> None:
    raise TransientError(f"failpoint {name}")


def _block(name: str, gate: Path) -> None:
    gate.write_text(name)
    while gate.exists():
        time.sleep(_POLL_SECONDS)


_armed: Final = arm(os.environ.get(VARIABLE, ""))


def failpoint(name: str) -> None:
    """Pass a failpoint. Costs about 0.1 us while none is armed."""
    if _armed and (act := _armed.get(name)) is not None:
        act()
