"""What people have given up of parked changes. The daemon's log tells it, also of what was done while none ran."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec
import structlog

from cdc.queue import Queue

_UNTOLD: Final = "discarded"
"""The queue's fact of what no daemon's log tells yet."""

log = structlog.get_logger()


class Discard(msgspec.Struct, frozen=True, kw_only=True):
    """Who gave up which parked change, when (UTC) and why. state, error: as it was."""

    id: str
    sink: str
    tables: str
    state: str
    error: str
    reason: str
    by: str
    at: str

    def tell(self) -> None:
        """In the log."""
        log.warning("discarded a parked change", **msgspec.structs.asdict(self))


def keep(queue: Queue, discards: Sequence[Discard]) -> None:
    """Let the next daemon tell them: there is none now."""
    queue.set(_UNTOLD, msgspec.json.encode([*_untold(queue), *discards]).decode())


def tell_kept(queue: Queue) -> None:
    """Tell what was given up while no daemon ran, once."""
    if untold := _untold(queue):
        for discard in untold:
            discard.tell()
        queue.set(_UNTOLD, None)


def _untold(queue: Queue) -> Sequence[Discard]:
    return msgspec.json.decode(queue.get(_UNTOLD) or "[]", type=list[Discard])
