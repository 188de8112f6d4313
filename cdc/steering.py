"""What a person orders about gaps: resync and replay, of the running daemon or of its data directory."""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime

import msgspec

from cdc.config import Config
from cdc.errors import CdcError, HistoryLost, ResyncRequired
from cdc.queue import Queue
from cdc.wishes import ANYTHING, GAP, Wish, replay_fact, restart_fact, resync_fact


class Refused(CdcError):
    """The order would do something else than was meant, or cannot be carried out."""


class Ordered(msgspec.Struct, frozen=True):
    """What was ordered. sinks: that are made right. begins_anew: the source, if its stream does."""

    sinks: tuple[str, ...]
    begins_anew: str | None = None

    def lines(self) -> list[str]:
        """For people."""
        told = []
        if self.begins_anew is not None:
            told.append(f"source {self.begins_anew} begins anew; its sinks all have the gap: {', '.join(self.sinks)}")
        return [*told, *(f"{sink}: resync ordered; `cdc status` shows how far it is" for sink in self.sinks)]


class Replayed(msgspec.Struct, frozen=True):
    """What is delivered again: so many changes, those after a batch."""

    after_seq: int
    changes: int


def resync(
    config: Config,
    queues: Mapping[str, Queue],
    name: str,
    tables: Sequence[str],
    *,
    failures: Mapping[str, BaseException] | None,
    yes: bool,
) -> Ordered:
    """Write down that a sink, or all sinks of a source, are to be made right.

    failures: what pipelines have failed with, by name; `None` where no daemon runs, and nobody knows. Raises `Refused`
    where the source or the target may be another database than before, unless `yes`; and for a feed that has no gap.
    """
    source = name if name in config.sources else config.sinks[name].source
    if tables and (name == source or not config.sinks[name].is_mirror):
        raise Refused("tables go with a mirror", hint="cdc resync SINK TABLE...")
    queue = queues[source]
    chosen = [sink.name for sink in config.sinks_of(source)] if name == source else [name]
    _check_tables(tables)
    failed = failures or {}
    gap = failed.get(source)
    for failure in (gap, *(failed.get(sink) for sink in chosen)):
        if isinstance(failure, ResyncRequired) and not isinstance(failure, HistoryLost) and not yes:
            raise Refused(str(failure), hint=failure.hint or f"`cdc resync {name} --yes`, if that is right")
    if isinstance(gap, ResyncRequired):
        queue.set(restart_fact(source), ANYTHING if yes else GAP)
        # which makes all of its sinks right, each behind its part of what was captured before
        return Ordered(tuple(sink.name for sink in config.sinks_of(source)), source)
    concerned = tuple(
        sink
        for sink in chosen
        if config.sinks[sink].is_mirror or failures is None or isinstance(failed.get(sink), ResyncRequired)
    )
    if not concerned:
        raise Refused(
            f"{', '.join(chosen)}: nothing is known to be missing in that feed",
            hint="a feed cannot be filled again; a reader that wants changes again goes back with its cursor",
        )
    if name == source:
        queue.set(restart_fact(source), ANYTHING if yes else GAP)
    for sink in concerned:
        wish, before = Wish(tuple(tables) or None), Wish.read(queue, sink)
        queue.set(resync_fact(sink), (wish if before is None else wish.beside(before)).encode())
    return Ordered(concerned)


def replay(config: Config, queue: Queue, sink: str, since: str, *, dry_run: bool) -> Replayed:
    """Write down that a mirror gets once more what the queue keeps from a point on: see `parse_since`."""
    if not config.sinks[sink].is_mirror:
        raise Refused(
            f"{sink} has told these changes: told again, its readers would get them twice",
            hint="a reader that wants them again goes back with its cursor",
        )
    seq = parse_since(since, queue)
    oldest = queue.oldest
    if oldest is None or seq + 1 < oldest[0]:
        kept = "nothing is" if oldest is None else f"the oldest is batch {oldest[0]}, of {_time(oldest[1])}"
        raise Refused(f"what follows batch {seq} is not kept any more: {kept}", hint="queue.keep_seconds says how long")
    if seq > (last := queue.stats().last_seq):
        raise Refused(f"batch {seq + 1} is not there yet", hint=f"the last one is {last}")
    changes = queue.replayable(seq)
    if not dry_run:
        seq = queue.rewind(sink, seq).seq
        queue.set(replay_fact(sink), str(seq))
    return Replayed(seq, changes)


def parse_since(text: str, queue: Queue) -> int:
    """The seq to deliver after. text: a seq; a time as ISO 8601; or how long ago: `30s`, `15m`, `2h`, `1d`."""
    if text.isdecimal():
        return int(text) - 1
    if (ago := re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd])", text)) is not None:
        seconds = time.time() - float(ago[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[ago[2]]
    else:
        try:
            seconds = datetime.fromisoformat(text).timestamp()
        except ValueError:
            raise Refused(
                f"not a point to begin at: {text[:40]!r}", hint="a seq, a time (2025-01-31T12:00:00Z), or 2h for ago"
            ) from None
    oldest = queue.oldest
    if oldest is not None and seconds < oldest[1]:
        raise Refused(
            f"what was captured before {_time(oldest[1])} is not kept any more: the oldest is batch {oldest[0]}",
            hint=f"`--from {oldest[0]}` begins with the oldest; queue.keep_seconds says how long they are kept",
        )
    return queue.stored_at(seconds)


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds")


def _check_tables(tables: Collection[str]) -> None:
    if unclear := [table for table in tables if "." not in table]:
        raise Refused(f"not a table: {', '.join(unclear)}", hint="schema.table, or database.collection")
