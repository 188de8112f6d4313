"""What a person wants done about a gap, kept as facts of the queue until it is done.

So it outlasts a restart, and may be said while no daemon runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec

from cdc.errors import HistoryLost, ResyncRequired
from cdc.position import Position
from cdc.queue import Queue

GAP: Final = "gap"
ANYTHING: Final = "anything"
"""What a source may begin anew after: the loss of its history; or whatever made it stop, another cluster too."""


class Wish(msgspec.Struct, frozen=True):
    """That a sink be made right again. tables: their names at the source; `None`: all.

    anew: whatever its target says, it stands where the queue does now.
    """

    tables: tuple[str, ...] | None = None
    anew: bool = False

    @staticmethod
    def read(queue: Queue, sink: str) -> Wish | None:
        """The wish that stands."""
        text = queue.get(resync_fact(sink))
        return None if text is None else msgspec.json.decode(text, type=Wish)

    def beside(self, other: Wish) -> Wish:
        """Both."""
        if self.tables is None or other.tables is None:
            return Wish(None, self.anew or other.anew)
        return Wish((*other.tables, *(table for table in self.tables if table not in other.tables)))

    def encode(self) -> str:
        """As it is kept."""
        return msgspec.json.encode(self).decode()


def resync_fact(sink: str) -> str:
    """The queue's fact that a sink is to be made right."""
    return f"resync:{sink}"


def restart_fact(source: str) -> str:
    """The queue's fact that a source may begin anew, after a `GAP` or `ANYTHING`."""
    return f"restart:{source}"


def replay_fact(sink: str) -> str:
    """The queue's fact that a sink is to be taken back to a batch: its seq."""
    return f"replay:{sink}"


def wishes_of(sink: str) -> Iterable[str]:
    """All facts of a sink that are wishes."""
    return resync_fact(sink), replay_fact(sink)


def is_allowed(queue: Queue, source: str, gap: ResyncRequired) -> bool:
    """Whether a person has said that the source may begin anew after this."""
    wish = queue.get(restart_fact(source))
    return wish == ANYTHING or (wish == GAP and isinstance(gap, HistoryLost))


def way_out(name: str, gap: ResyncRequired) -> str:
    """The command that ends it."""
    if isinstance(gap, HistoryLost):
        return (
            f"`cdc resync {name}`: the stream begins anew, and mirrors are compared and put right beside it; "
            "feeds go on behind the gap"
        )
    return f"if this is the right database: `cdc resync {name} --yes`"


def explained(name: str, gap: ResyncRequired) -> ResyncRequired:
    """The same error, by the name under which the documentation has it, with the way out behind its hint."""
    return type(gap)(f"resync required: {gap}", hint="; ".join(filter(None, (gap.hint, way_out(name, gap)))))


def end_of(queue: Queue) -> Position:
    """Where the queue ends now: a mirror that stands there lacks nothing of what comes."""
    assert queue.position is not None
    return Position(queue.queue_id, queue.stats().last_seq, queue.position)
