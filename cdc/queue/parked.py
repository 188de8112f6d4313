"""Parked changes in a queue's file: how they are stored. What becomes of them is decided in `cdc.parking`."""

from __future__ import annotations

import sqlite3
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from cdc.change import Batch, TableName
from cdc.position import SourcePosition

ParkedState = Literal["retrying", "dead"]

ParkedId = tuple[int, int]
"""Place and ordinal: the order of the source.

Where positions are numbers: the position of the change's transaction, and its ordinal there. So it does not depend on
how transactions were cut into batches, and a target knows what it has passed. Else the seq of its batch, and its
ordinal there.
"""

_COLUMNS: Final = (
    "place", "ordinal", "position", "tables", "keys", "size", "created_at", "crc", "state", "attempts",
    "next_attempt_at", "error",
)  # fmt: skip
_FACTS: Final = ", ".join(_COLUMNS)
_LIST: Final = f"SELECT {_FACTS} FROM parked WHERE sink = ? ORDER BY place, ordinal"  # noqa: S608 - no values
_PAYLOAD: Final = f"SELECT {_FACTS}, payload FROM parked WHERE sink = ? AND place = ? AND ordinal = ?"  # noqa: S608
_INSERT: Final = "INSERT OR IGNORE INTO parked VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
_UPDATE: Final = """
    UPDATE parked SET state = ?, attempts = ?, next_attempt_at = ?, error = ?
     WHERE sink = ? AND place = ? AND ordinal = ?
"""
_REVIVE: Final = """
    UPDATE parked SET state = 'retrying', attempts = 0, next_attempt_at = 0
     WHERE sink = ? AND place = ? AND ordinal = ?
"""
_DELETE: Final = "DELETE FROM parked WHERE sink = ? AND place = ? AND ordinal = ?"
_COUNT: Final = """
    SELECT sink, count(*), sum(state = 'dead'), min(created_at), sum(state <> 'dead' AND attempts = 0)
      FROM parked GROUP BY sink
"""

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Batch).decode
_decode_keys = msgspec.msgpack.Decoder(tuple[bytes, ...]).decode


class ParkedChange(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What is known of a parked change, without the change itself.

    place, ordinal: see `ParkedId`.
    position: its transaction's.
    tables, keys: what it is about (see `cdc.sink.Subject`).
    size: bytes that the change takes.
    attempts: how often it was tried by itself; 0: it waits behind another one, or is due now.
    next_attempt_at: unix seconds, for people and for a restart; without meaning where `attempts` is 0.
    error: why the last attempt failed, without values.
    """

    place: int
    ordinal: int
    position: SourcePosition
    tables: tuple[TableName, ...]
    keys: tuple[bytes, ...] | None
    size: int
    created_at: float
    state: ParkedState = "retrying"
    attempts: int = 0
    next_attempt_at: float = 0.0
    error: str = ""

    @property
    def id(self) -> ParkedId:
        """Its place in the order of the source."""
        return (self.place, self.ordinal)


class Park(msgspec.Struct, frozen=True):
    """Write order: park changes. Those that are parked already stay as they are."""

    sink: str
    changes: Sequence[tuple[ParkedChange, bytes]]


class Retried(msgspec.Struct, frozen=True):
    """Write order: what became of the attempts to apply a change."""

    sink: str
    change: ParkedChange


class Unpark(msgspec.Struct, frozen=True):
    """Write order: forget these: they are applied (or discarded), or come again."""

    sink: str
    ids: Sequence[ParkedId]


class Revive(msgspec.Struct, frozen=True):
    """Write order: these are due now, as if they had never been tried."""

    sink: str
    ids: Sequence[ParkedId]


ParkedOrder = Park | Retried | Revive | Unpark


class ParkedCount(msgspec.Struct, frozen=True):
    """How many changes of a sink are parked, dead and waiting ones included, and since when the oldest (unix seconds).

    waiting: untried, behind another one (or due now).
    """

    parked: int = 0
    dead: int = 0
    oldest_at: float | None = None
    waiting: int = 0


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
        case Revive(sink, ids):
            connection.executemany(_REVIVE, ((sink, *each) for each in ids))
        case Unpark(sink, ids):
            connection.executemany(_DELETE, ((sink, *each) for each in ids))


def forget_sink(connection: sqlite3.Connection, sink: str) -> None:
    """Nothing is kept for this sink any more."""
    connection.execute("DELETE FROM parked WHERE sink = ?", (sink,))


def schema() -> str:
    """The statement that creates the table."""
    return Path(__file__).with_suffix(".sql").read_text(encoding="utf-8")


def upgrade(connection: sqlite3.Connection) -> None:
    """From format 1, inside a transaction: there a change had one key at most. What is damaged stays recognisable."""
    connection.execute("ALTER TABLE parked RENAME TO parked_before")
    connection.execute(schema())
    for sink, *row in connection.execute("SELECT * FROM parked_before").fetchall():
        facts, crc, payload = row[:7], row[7], row[-1]
        old = _crc(sink, facts, payload)
        if facts[4] is not None:
            facts[4] = _encode((facts[4],))
        row[:8] = (*facts, crc ^ old ^ _crc(sink, facts, payload))
        connection.execute(_INSERT, (sink, *row))
    connection.execute("DROP TABLE parked_before")


def listed(connection: sqlite3.Connection, sink: str) -> list[ParkedChange]:
    """A sink's parked changes, in the order of the source."""
    return [_parked(row) for row in connection.execute(_LIST, (sink,))]


def batches(connection: sqlite3.Connection, sink: str, ids: Sequence[ParkedId]) -> Iterator[Batch]:
    """Each change as a batch by itself. Raises `msgspec.DecodeError` for what is damaged, or not there."""
    for each in ids:
        found = batch(connection, sink, each)
        if found is None:
            raise msgspec.DecodeError(f"parked change {each} is missing")
        yield found


def batch(connection: sqlite3.Connection, sink: str, parked: ParkedId) -> Batch | None:
    """One change as a batch, `None` if it is not there. Raises `msgspec.DecodeError` for what is damaged."""
    row = connection.execute(_PAYLOAD, (sink, *parked)).fetchone()
    if row is None:
        return None
    if row[7] != _crc(sink, row[:7], row[-1]):
        raise msgspec.DecodeError(f"parked change {parked} fails its checksum")
    return _decode(row[-1])


def counts(connection: sqlite3.Connection) -> dict[str, ParkedCount]:
    """By sink; those without parked changes are left out."""
    return {sink: ParkedCount(*row) for sink, *row in connection.execute(_COUNT)}


def _row(sink: str, change: ParkedChange, payload: bytes) -> tuple[object, ...]:
    tables = msgspec.json.encode(change.tables).decode()
    keys = None if change.keys is None else _encode(change.keys)
    facts = (*change.id, change.position, tables, keys, change.size, change.created_at)
    retries = (change.state, change.attempts, change.next_attempt_at, change.error)
    return (sink, *facts, _crc(sink, facts, payload), *retries, payload)


def _parked(row: Sequence[Any]) -> ParkedChange:
    found = dict(zip(_COLUMNS, row, strict=True))
    del found["crc"]
    found["tables"] = msgspec.json.decode(found["tables"], type=tuple[TableName, ...])
    if found["keys"] is not None:
        found["keys"] = _decode_keys(found["keys"])
    return ParkedChange(**found)


def _crc(sink: str, facts: Sequence[object], payload: bytes) -> int:
    return zlib.crc32(payload, zlib.crc32(_encode((sink, *facts))))
