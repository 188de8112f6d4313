"""How a sink that is no mirror begins: with what the queue still has, and never a second time by itself."""

from __future__ import annotations

import threading
from functools import partial
from typing import Final

import structlog

from cdc.errors import ResyncRequired
from cdc.queue import Queue
from cdc.retry import keep_trying
from cdc.sink import StreamSink
from cdc.stats import DeliveryStats, note_waiting
from cdc.wishes import Wish, explained, resync_fact

log = structlog.get_logger()

_BEGUN: Final = "yes"


def begun_fact(sink: str) -> str:
    """The queue's fact that a sink has begun once."""
    return f"begun:{sink}"


def begin(sink: StreamSink, queue: Queue, *, stats: DeliveryStats, stop: threading.Event) -> None:
    """Let the sink begin, if it has not; return when it has, or `stop` is set. The queue must have begun.

    Retries for ever what is transient. Raises `ResyncRequired` where it had begun, and its target has lost that.
    """
    keep_trying(lambda: _begin(sink, queue), stop, partial(_waiting, stats))


def _begin(sink: StreamSink, queue: Queue) -> None:
    if (wish := Wish.read(queue, sink.name)) is not None:
        _grant(sink, queue, wish)
    fact = begun_fact(sink.name)
    has_begun = queue.get(fact) is not None
    if sink.stored_position() is None:
        if has_begun:
            gap = ResyncRequired(
                f"sink {sink.name}: its target has no position: it was emptied, or restored from before it began",
                hint="the feed begins anew with what the queue still has; let its readers read everything again",
            )
            raise explained(sink.name, gap)
        sink.begin(queue.beginning)
    if not has_begun:
        queue.set(fact, _BEGUN)


def _grant(sink: StreamSink, queue: Queue, wish: Wish) -> None:
    """A feed cannot be made right: it goes on where the queue begins, or behind the gap, and says so."""
    stored = sink.stored_position()
    try:
        reaches = stored is not None and not wish.anew and queue.seek(stored) >= 0
    except ResyncRequired:
        reaches = False
    if not reaches:
        sink.begin(queue.beginning)
    log.warning("changes are missing in this feed: its source or target had a gap", sink=sink.name)
    queue.set(resync_fact(sink.name), None)


def _waiting(stats: DeliveryStats, error: BaseException, seconds: float) -> None:
    note_waiting(stats, error)
    log.warning("target unavailable", sink=stats.name, error=str(error), retry_in_seconds=round(seconds, 1))
