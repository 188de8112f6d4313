"""Decoder of pgoutput, the logical decoding plugin of PostgreSQL: bytes in, messages out.

Pure: no I/O, no state between messages. Whatever the bytes are, either a message or a `DecodeError` comes out. Rows
stay as they are (see `cdc.postgres.row`); the last one of a message is not looked into.
Source: PostgreSQL manual, "Logical Replication Message Formats" (protocol versions 1 to 4; streamed and
prepared transactions are refused, since the stream is never asked for them).
"""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct, error
from typing import Final

import msgspec

from cdc.change import Column, Image, Table
from cdc.errors import DecodeError
from cdc.postgres.row import decode_row_at

POSTGRES_EPOCH_MICROSECONDS: Final = 946_684_800_000_000
"""2000-01-01 UTC, from which PostgreSQL counts, in microseconds since 1970."""


class Begin(msgspec.Struct, frozen=True, gc=False):
    """Start of a transaction. commit_lsn: start of its commit record. commit_time: microseconds since 1970, UTC."""

    commit_lsn: int
    commit_time: int
    xid: int


class Commit(msgspec.Struct, frozen=True, gc=False):
    """End of a transaction. end_lsn: end of its commit record, from which the stream can go on."""

    commit_lsn: int
    end_lsn: int
    commit_time: int


class Origin(msgspec.Struct, frozen=True):
    """The replication origin of the transaction that has just begun: it was not written here first."""

    lsn: int
    name: str


class Relation(msgspec.Struct, frozen=True):
    """The shape of a table, sent before its first change and after each change of its shape."""

    oid: int
    table: Table


class TypeName(msgspec.Struct, frozen=True):
    """The name of a type that is not built in."""

    oid: int
    schema: str
    name: str


class Insert(msgspec.Struct, frozen=True, gc=False):
    """A new row."""

    relation: int
    after: Image


class Update(msgspec.Struct, frozen=True, gc=False):
    """A changed row. key: only where it changed; before: only with identity FULL."""

    relation: int
    key: Image | None
    before: Image | None
    after: Image


class Delete(msgspec.Struct, frozen=True, gc=False):
    """A removed row: its key, or with identity FULL all of it."""

    relation: int
    key: Image | None
    before: Image | None


class Truncate(msgspec.Struct, frozen=True):
    """Tables emptied by one statement."""

    relations: tuple[int, ...]
    cascade: bool
    restart_identity: bool


class LogicalMessage(msgspec.Struct, frozen=True):
    """Written by `pg_logical_emit_message`. A non-transactional one may be from a rolled back transaction."""

    transactional: bool
    lsn: int
    prefix: str
    content: bytes


PgMessage = Begin | Commit | Origin | Relation | TypeName | Insert | Update | Delete | Truncate | LogicalMessage

_INT16: Final = Struct(">H").unpack_from
_INT32: Final = Struct(">I").unpack_from
_INT64: Final = Struct(">Q").unpack_from
_BEGIN: Final = Struct(">QqI").unpack_from
_COMMIT: Final = Struct(">BQQq").unpack_from

BEGIN_BYTES: Final = 1 + 20
COMMIT_BYTES: Final = 1 + 25
"""Size of these messages."""

_KEY, _OLD, _NEW = b"KON"


def decode(data: bytes, at: int = 0) -> PgMessage:
    """Decode the message that starts at byte `at` and ends with `data`. Raises only `DecodeError`."""
    try:
        message, end = _DECODERS[data[at]](data, at + 1)
    except KeyError:
        raise DecodeError(_unknown(data[at], at)) from None
    except (IndexError, error):
        raise DecodeError(f"pgoutput message truncated at byte {len(data)}") from None
    except UnicodeDecodeError as exc:
        raise DecodeError(f"pgoutput message has a name that is not UTF-8: {exc.reason}") from None
    if end != len(data):
        raise DecodeError(f"pgoutput message should end at byte {end}, but has {len(data)}")
    return message


def _unknown(kind: int, at: int) -> str:
    if kind in b"SEcAbPKrp":
        return f"streamed or prepared transaction (message {chr(kind)!r} at byte {at}) was not asked for"
    return f"unknown pgoutput message {kind:#04x} at byte {at}"


def _insert(data: bytes, at: int) -> tuple[Insert, int]:
    relation = _INT32(data, at)[0]
    _expect(data, at + 4, _NEW)
    return Insert(relation, data[at + 5 :]), len(data)


def _update(data: bytes, at: int) -> tuple[Update, int]:
    relation = _INT32(data, at)[0]
    at += 4
    key = before = None
    if data[at] == _KEY:
        key, at = _old_row(data, at + 1)
    elif data[at] == _OLD:
        before, at = _old_row(data, at + 1)
    _expect(data, at, _NEW)
    return Update(relation, key, before, data[at + 1 :]), len(data)


def _delete(data: bytes, at: int) -> tuple[Delete, int]:
    relation = _INT32(data, at)[0]
    image = data[at + 5 :]
    if data[at + 4] == _KEY:
        return Delete(relation, image, None), len(data)
    _expect(data, at + 4, _OLD)
    return Delete(relation, None, image), len(data)


def _old_row(data: bytes, at: int) -> tuple[Image, int]:
    """The image of a row that another one follows."""
    _, end = decode_row_at(data, at)
    return data[at:end], end


def begin_body(data: bytes, at: int) -> tuple[Begin, int]:
    """Decode what follows the first byte of a Begin, and tell where it ends."""
    lsn, timestamp, xid = _BEGIN(data, at)
    return Begin(lsn, timestamp + POSTGRES_EPOCH_MICROSECONDS, xid), at + 20


def commit_body(data: bytes, at: int) -> tuple[Commit, int]:
    """Decode what follows the first byte of a Commit, and tell where it ends."""
    _flags, lsn, end_lsn, timestamp = _COMMIT(data, at)
    return Commit(lsn, end_lsn, timestamp + POSTGRES_EPOCH_MICROSECONDS), at + 25


def _origin(data: bytes, at: int) -> tuple[Origin, int]:
    lsn = _INT64(data, at)[0]
    name, at = _string(data, at + 8)
    return Origin(lsn, name), at


def _relation(data: bytes, at: int) -> tuple[Relation, int]:
    oid = _INT32(data, at)[0]
    schema, at = _string(data, at + 4)
    name, at = _string(data, at)
    identity, count = chr(data[at]), _INT16(data, at + 1)[0]
    at += 3
    columns = []
    for _ in range(count):
        is_key = bool(data[at] & 1)
        column, at = _string(data, at + 1)
        columns.append(Column(column, _INT32(data, at)[0], is_key))
        at += 8  # type OID and type modifier
    if at > len(data):
        raise IndexError
    # the manual: an empty namespace stands for pg_catalog
    return Relation(oid, Table(schema or "pg_catalog", name, tuple(columns), identity, oid)), at


def _type(data: bytes, at: int) -> tuple[TypeName, int]:
    oid = _INT32(data, at)[0]
    schema, at = _string(data, at + 4)
    name, at = _string(data, at)
    return TypeName(oid, schema or "pg_catalog", name), at


def _truncate(data: bytes, at: int) -> tuple[Truncate, int]:
    count, options = _INT32(data, at)[0], data[at + 4]
    at += 5
    end = at + 4 * count
    if end > len(data):
        raise IndexError
    relations = tuple(_INT32(data, offset)[0] for offset in range(at, end, 4))
    return Truncate(relations, bool(options & 1), bool(options & 2)), end


def _logical_message(data: bytes, at: int) -> tuple[LogicalMessage, int]:
    flags, lsn = data[at], _INT64(data, at + 1)[0]
    prefix, at = _string(data, at + 9)
    start = at + 4
    end = start + _INT32(data, at)[0]
    if end > len(data):
        raise IndexError
    return LogicalMessage(bool(flags & 1), lsn, prefix, data[start:end]), end


def _string(data: bytes, at: int) -> tuple[str, int]:
    end = data.find(b"\0", at)
    if end < 0:
        raise IndexError
    return data[at:end].decode(), end + 1


def _expect(data: bytes, at: int, kind: int) -> None:
    if data[at] != kind:
        raise DecodeError(f"expected {chr(kind)!r} at byte {at}, found {data[at]:#04x}")


_Decoder = Callable[[bytes, int], tuple[PgMessage, int]]

_DECODERS: Final[dict[int, _Decoder]] = {
    ord("B"): begin_body,
    ord("C"): commit_body,
    ord("D"): _delete,
    ord("I"): _insert,
    ord("M"): _logical_message,
    ord("O"): _origin,
    ord("R"): _relation,
    ord("T"): _truncate,
    ord("U"): _update,
    ord("Y"): _type,
}
