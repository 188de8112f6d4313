"""What the threads of capture and delivery tell of themselves while they work.

Plain mutable stats, each with one writer and no lock: every field is replaced as a whole. `cdc.status` reads them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

import msgspec

from cdc.change import Operation, Summary
from cdc.position import SourcePosition
from cdc.queue.parked import ParkedCount

OPERATIONS: Final = tuple(operation.name.lower() for operation in Operation)
"""Keys of `changes`: a closed set, so that metrics stay bounded."""


class State(StrEnum):
    """What a pipeline does right now."""

    STARTING = "starting"
    RUNNING = "running"
    WAITING = "waiting"
    """Backing off: its server is away, or asked for patience."""
    PAUSED = "paused"
    COPYING = "copying"
    CATCHING_UP = "catching up"
    """Copied without a snapshot: rows of different moments are together until the stream has passed the copy."""
    HELD = "held"
    """Stands still at one position, so that source and target can be compared there."""
    RESYNCING = "resyncing"
    """Delivers, while tables of the mirror are read again: what was not read yet may be wrong."""
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(slots=True)
class SlotStats:
    """A replication slot, as its server describes it.

    wal_status: `reserved`, `extended`, `unreserved` or `lost`.
    retained_bytes: WAL that the slot keeps from being removed.
    safe_bytes: WAL that may still be written before the slot is lost; `None` without a limit.
    """

    name: str
    active: bool = False
    wal_status: str | None = None
    retained_bytes: int = 0
    safe_bytes: int | None = None
    restart_lsn: int | None = None
    confirmed_flush_lsn: int | None = None


class OplogStatus(msgspec.Struct, frozen=True):
    """How far a MongoDB server's oplog reaches back.

    window_seconds: from its oldest entry to its newest.
    remaining_seconds: how much of that lies before the captured position: while the window stays as it is, a stop of so
        long is survived. `None` while nothing is forgotten, as there is room for more.
    """

    window_seconds: float
    remaining_seconds: float | None

    @property
    def is_short(self) -> bool:
        """Whether the captured position is about to be forgotten."""
        return self.remaining_seconds is not None and self.remaining_seconds < self.window_seconds / 10


@dataclass(slots=True)
class CaptureStats:
    """Written by a source's capture thread. Counters count since the daemon started; times are unix seconds.

    received: everything up to here was read from the source.
    server_end: where the source's log ends, as the server last told.
    confirmed: everything up to here is durable in the queue, and the server was told so.
    last_commit_time: when the last captured transaction was committed, by the source's clock.
    caught_up_at: when `confirmed` last was at or past `server_end`.
    changes: by name of the operation.
    """

    name: str
    state: State = State.STARTING
    error: str | None = None
    hint: str = ""
    received: SourcePosition | None = None
    server_end: SourcePosition | None = None
    confirmed: SourcePosition | None = None
    last_commit_time: float | None = None
    caught_up_at: float | None = None
    connected_at: float | None = None
    transactions: int = 0
    changes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(OPERATIONS, 0))
    bytes: int = 0
    retries: int = 0
    slot: SlotStats | None = None
    oplog: OplogStatus | None = None
    insert_only: tuple[str, ...] = ()


class CopyStatus(msgspec.Struct, frozen=True):
    """How far an initial copy has come. What is expected is the planner's estimate."""

    tables_done: int
    tables_expected: int
    rows_done: int
    rows_expected: int
    bytes_done: int
    bytes_expected: int
    seconds_left: float | None = None


class ResyncStatus(msgspec.Struct, frozen=True):
    """How far a resync has come, of the tables that are not done. What is expected is the planner's estimate.

    rows_done: compared with the source; rows_written: of those, what was inserted, updated or deleted on the mirror.
    error: why it waits, if it does.
    """

    tables_done: int
    tables_expected: int
    rows_done: int
    rows_expected: int
    rows_written: int
    error: str | None = None

    @staticmethod
    def ordered() -> ResyncStatus:
        """Of one that has not begun."""
        return ResyncStatus(0, 0, 0, 0, 0)


@dataclass(slots=True)
class DeliveryStats:
    """Written by a sink's delivery thread. Counters count since the daemon started; times are unix seconds.

    position, seq: where the target stands, in the source's terms and in the queue's.
    last_commit_time: when the last applied transaction was committed, by the source's clock.
    caught_up_at: when everything that was captured was applied, last.
    parked: changes that wait because the target refused one; `dead`: those of them that are not tried again; `waiting`:
        those that were never tried, since they are behind another one.
    parked_oldest_at: since when the oldest of them waits.
    parked_attempts: how often parked changes were tried again. discarded: how many were given up by a person.
    copy: tells how far the initial copy is, once one has begun.
    resync: how far a resync is, while there is one.
    """

    name: str
    source: str
    state: State = State.STARTING
    error: str | None = None
    hint: str = ""
    position: SourcePosition | None = None
    seq: int = 0
    last_commit_time: float | None = None
    caught_up_at: float | None = None
    transactions: int = 0
    changes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(OPERATIONS, 0))
    missing_rows: int = 0
    healed_rows: int = 0
    fallbacks: int = 0
    retries: int = 0
    parked: int = 0
    dead: int = 0
    waiting: int = 0
    parked_oldest_at: float | None = None
    parked_attempts: int = 0
    discarded: int = 0
    copy: Callable[[], CopyStatus] | None = None
    resync: ResyncStatus | None = None


def note_waiting(stats: CaptureStats | DeliveryStats, error: BaseException) -> None:
    """Its server is away, or asked for patience: a pipeline backs off."""
    stats.state = State.WAITING
    stats.error, stats.hint = str(error), getattr(error, "hint", "")
    stats.retries += 1


def note_parked(stats: DeliveryStats, count: ParkedCount) -> None:
    """So much of a sink is parked."""
    stats.parked, stats.dead, stats.waiting = count.parked, count.dead, count.waiting
    stats.parked_oldest_at = count.oldest_at


def count_changes(stats: CaptureStats | DeliveryStats, summary: Summary) -> None:
    """Add a batch's changes, by name of the operation."""
    for name, count in zip(OPERATIONS, summary.counts, strict=True):
        stats.changes[name] += count
