"""Parked changes in a queue's file: how they are stored. What becomes of them is decided in `cdc.parking`."""

from __future__ import annotations

import sqlite3
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, Final, Literal

import msgspec

from cdc.change import Batch, TableName
from cdc.position import SourcePosition

ParkedState = Literal["retrying", "dead"]

ParkedId = tuple[int, int]
"""Seq and ordinal: the order of the source."""

_COLUMNS: Final = (
    "seq", "ordinal", "position", "tables", "key", "size", "created_at", "crc", "state", "attempts", "next_attempt_at",
    "error",
)  # fmt: skip
_FACTS: Final = ", ".join(_COLUMNS)
_LIST: Final = f"SELECT {_FACTS} FROM parked WHERE sink = ? ORDER BY seq, ordinal"  # noqa: S608 - no values
_PAYLOAD: Final = f"SELECT {_FACTS}, payload FROM parked WHERE sink = ? AND seq = ? AND ordinal = ?"  # noqa: S608
_INSERT: Final = "INSERT OR IGNORE INTO parked VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
_UPDATE: Final = """
    UPDATE parked SET state = ?, attempts = ?, next_attempt_at = ?, error = ? WHERE sink = ? AND seq = ? AND ordinal = ?
"""
_DELETE: Final = "DELETE FROM parked WHERE sink = ? AND seq = ? AND ordinal = ?"
_COUNT: Final = "SELECT sink, count(*), sum(state = 'dead'), min(created_at) FROM parked GROUP BY sink"

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Batch).decode


class ParkedChange(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What is known of a parked change, without the change itself.

    seq, ordinal: the batch that it came in, and its place there.
    position: its transaction's.
    tables, key: what it is about (see `cdc.sink.Subject`).
    size: bytes that the change takes.
    attempts: how often it was tried by itself; 0: it waits behind another one.
    next_attempt_at: unix seconds, for people and for a restart; without meaning where `attempts` is 0.
    error: why the last attempt failed, without values.
    """

    seq: int
    ordinal: int
    position: SourcePosition
    tables: tuple[TableName, ...]
    key: bytes | None
    size: int
    created_at: float
    state: ParkedState = "retrying"
    attempts: int = 0
    next_attempt_at: float = 0.0
    error: str = ""

    @property
    def id(self) -> ParkedId:
        """Its place in the order of the source."""
        return (self.seq, self.ordinal)


class Park(msgspec.Struct, frozen=True):
    """Write order: park changes. Those that are parked already stay as they are."""

    sink: str
    changes: Sequence[tuple[ParkedChange, bytes]]


class Retried(msgspec.Struct, frozen=True):
    """Write order: what became of the attempts to apply a change."""

    sink: str
    change: ParkedChange


class Unpark(msgspec.Struct, frozen=True):
    """Write order: these are applied (or discarded)."""

    sink: str
    ids: Sequence[ParkedId]


class UnparkAfter(msgspec.Struct, frozen=True):
    """Write order: forget those of later batches than `seq`: they come again."""

    sink: str
    seq: int


ParkedOrder = Park | Retried | Unpark | UnparkAfter


class ParkedCount(msgspec.Struct, frozen=True):
    """How many changes of a sink are parked, dead ones included, and since when the oldest (unix seconds)."""

    parked: int = 0
    dead: int = 0
    oldest_at: float | None = None


def payload_of(batch: Batch) -> bytes:
    """A batch with a single change, to be stored."""
    return _encode(batch)


def write(connection: sqlite3.Connection, order: ParkedOrder) -> None:
    """Carry out an order, inside the writer's transaction."""
    match order:
        case Park(sink, changes):
            connection.executemany(_INSERT, (_row(sink, change, payload) for change, payload in changes))
        case Retried(sink, change):
            values = (change.state, change.attempts, change.next_attempt_at, change.error, sink, *change.id)
            connection.execute(_UPDATE, values)
        case Unpark(sink, ids):
            connection.executemany(_DELETE, ((sink, *each) for each in ids))
        case UnparkAfter(sink, seq):
            connection.execute("DELETE FROM parked WHERE sink = ? AND seq > ?", (sink, seq))


def forget_sink(connection: sqlite3.Connection, sink: str) -> None:
    """Nothing is kept for this sink any more."""
    connection.execute("DELETE FROM parked WHERE sink = ?", (sink,))


def listed(connection: sqlite3.Connection, sink: str) -> list[ParkedChange]:
    """A sink's parked changes, in the order of the source."""
    return [_parked(row) for row in connection.execute(_LIST, (sink,))]


def batches(connection: sqlite3.Connection, sink: str, ids: Sequence[ParkedId]) -> Iterator[Batch]:
    """Each change as a batch by itself. Raises `msgspec.DecodeError` for what is damaged, or not there."""
    for each in ids:
        row = connection.execute(_PAYLOAD, (sink, *each)).fetchone()
        if row is None:
            raise msgspec.DecodeError(f"parked change {each} is missing")
        if row[7] != _crc(sink, row[:7], row[-1]):
            raise msgspec.DecodeError(f"parked change {each} fails its checksum")
        yield _decode(row[-1])


def counts(connection: sqlite3.Connection) -> dict[str, ParkedCount]:
    """By sink; those without parked changes are left out."""
    return {sink: ParkedCount(*row) for sink, *row in connection.execute(_COUNT)}


def _row(sink: str, change: ParkedChange, payload: bytes) -> tuple[object, ...]:
    tables = msgspec.json.encode(change.tables).decode()
    facts = (*change.id, change.position, tables, change.key, change.size, change.created_at)
    retries = (change.state, change.attempts, change.next_attempt_at, change.error)
    return (sink, *facts, _crc(sink, facts, payload), *retries, payload)


def _parked(row: Sequence[Any]) -> ParkedChange:
    found = dict(zip(_COLUMNS, row, strict=True))
    del found["crc"]
    found["tables"] = msgspec.json.decode(found["tables"], type=tuple[TableName, ...])
    return ParkedChange(**found)


def _crc(sink: str, facts: Sequence[object], payload: bytes) -> int:
    return zlib.crc32(payload, zlib.crc32(_encode((sink, *facts))))
