"""The tables of a feed in PostgreSQL: created once, and how their rows are written and read."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import lru_cache, partial
from itertools import chain, repeat
from pathlib import Path
from typing import Any, Final, LiteralString

import psycopg
from psycopg import postgres, pq, sql
from psycopg.abc import Buffer
from psycopg.adapt import Loader

from cdc.errors import FatalError
from cdc.feed.tables import COLUMNS, Codec, Tables, check_format, not_ours
from cdc.postgres.connection import Connection, while_doing

DEFAULT_SCHEMA: Final = "public"

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_SINCE_1970: Final = 946_684_800_000_000
"""PostgreSQL counts microseconds from 2000-01-01 on."""

_EMPTY: Final = struct.pack("!iiI", 0, 0, postgres.types["text"].oid)

Fields = Mapping[str, Sequence[bytes]]
"""Values by column, in COPY's binary format."""

_TYPES: Final = {
    "id": "int8", "version": "int8", "changed_at": "timestamptz", "recorded_at": "timestamptz", "changed": "text[]",
    "lookup": "bool", "truncated": "bool", "before": "json", "after": "json", "delta": "json", "scope_before": "json",
    "scope_after": "json", "key": "bytea", "known": "bytea",
}  # fmt: skip
"""Of the columns whose values are no texts."""


def create_tables(connection: Connection, tables: Tables) -> None:
    """Create what is missing. Raises `FatalError` for tables that no feed has made, or one of another version."""
    with while_doing(f"creating the feed {tables.main}"), connection.transaction():
        if _is_there(connection, tables):  # even IF NOT EXISTS wants rights that are not needed later
            return
        connection.execute("SELECT pg_advisory_xact_lock(hashtextextended('cdc.feed', 0))")
        if _is_there(connection, tables):
            return
        schema = schema_of(tables)
        if not connection.execute("SELECT FROM pg_namespace WHERE nspname = %s", [schema]).fetchall():
            connection.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(schema)))
        schema_text = Path(__file__).with_name("feed.sql").read_text(encoding="utf-8")
        connection.execute(sql.SQL(schema_text).format(**_names(tables)))


def check_tables(connection: Connection, tables: Tables) -> bool:
    """Whether the feed is there. Raises `FatalError` as `create_tables` does."""
    return _is_there(connection, tables)


def schema_of(tables: Tables) -> str:
    """The schema that the tables are in."""
    return tables.schema or DEFAULT_SCHEMA


def composed(tables: Tables, queries: Mapping[str, LiteralString]) -> dict[str, bytes]:
    """Queries with the names of the tables, and the columns of the main one."""
    names = {**_names(tables), "columns": sql.SQL(", ").join(map(sql.Identifier, COLUMNS))}
    return {name: sql.SQL(query).format(**names).as_bytes() for name, query in queries.items()}


def adapt(connection: Connection) -> None:
    """Let times be integers, and JSON bytes, where they come from this connection in binary form."""
    connection.adapters.register_loader("json", _JsonLoader)
    connection.adapters.register_loader("timestamptz", _TimeLoader)


def moment(microseconds: int) -> datetime:
    """A time as a parameter."""
    return _EPOCH + timedelta(microseconds=microseconds)


def text(value: str) -> str:
    """A text that PostgreSQL can hold: NUL is shown by its symbol."""
    return value.replace("\0", "\N{SYMBOL FOR NULL}") if "\0" in value else value


@lru_cache(1024)  # the same fields change again and again
def _array(names: tuple[str, ...]) -> bytes:
    """As `array_recv` in PostgreSQL's `arrayfuncs.c` reads it: dimensions, no NULLs, element type; length, bound."""
    items = [text(name).encode() for name in names]
    head = struct.pack("!iiIii", 1, 0, postgres.types["text"].oid, len(items), 1) if items else _EMPTY
    return head + b"".join(len(item).to_bytes(4, "big") + item for item in items)


def copy_query(tables: Tables, table: str, columns: Iterable[str]) -> sql.Composed:
    """What takes `copy_data`, for `main` or `entities`; the columns that are not named are NULL."""
    names = sql.SQL(", ").join(map(sql.Identifier, columns))
    return sql.SQL("COPY {} ({}) FROM STDIN (FORMAT binary)").format(_names(tables)[table], names)


def copy_fields(columns: Mapping[str, Sequence[Any]]) -> Fields:
    """The values of records or entities' states by column, each as COPY's binary format has it."""
    return {name: _fields(_ENCODERS[_TYPES.get(name, "text")], values) for name, values in columns.items()}


def copy_data(fields: Fields) -> bytes:
    """Rows in COPY's binary format."""
    head = len(fields).to_bytes(2, "big")
    return b"".join((_SIGNATURE, *chain.from_iterable(zip(repeat(head), *fields.values(), strict=False)), _END))


def _fields(encode: Callable[[Any], bytes], values: Sequence[Any]) -> list[bytes]:
    return [_NULL if value is None else encode(value) for value in values]


def _text(value: str) -> bytes:
    return _sized(text(value).encode())


def _sized(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data


_SIGNATURE: Final = b"PGCOPY\n\xff\r\n\0" + bytes(8)
_END: Final = b"\xff\xff"
_NULL: Final = b"\xff\xff\xff\xff"
_INT8: Final = struct.Struct("!Iq").pack

_ENCODERS: Final[dict[str, Callable[[Any], bytes]]] = {
    "text": _text,
    "json": _sized,
    "bytea": _sized,
    "int8": partial(_INT8, 8),
    "timestamptz": lambda microseconds: _INT8(8, microseconds - _SINCE_1970),
    "bool": (b"\0\0\0\1\0", b"\0\0\0\1\1").__getitem__,
    "text[]": lambda names: _sized(_array(names)),
}

CODEC: Final = Codec(kept={}, read={"changed": tuple})
"""The rest is done by `adapt`."""


def _is_there(connection: Connection, tables: Tables) -> bool:
    query = """SELECT relname FROM pg_class JOIN pg_namespace ON relnamespace = pg_namespace.oid
                WHERE nspname = %s AND relname = ANY (%s)"""
    schema = schema_of(tables)
    names = [tables.main, tables.entities, tables.positions, tables.pruned, tables.state]
    found = {name for (name,) in connection.execute(query, [schema, names]).fetchall()}
    if not found:
        return False
    if tables.state not in found:
        raise not_ours(f"table {schema}.{min(found)}")
    try:
        query = "SELECT format FROM {state}"
        row = connection.execute(composed(tables, {"format": query})["format"]).fetchone()
    except psycopg.errors.UndefinedColumn as exc:
        raise not_ours(f"table {schema}.{tables.state}") from exc
    check_format(row and row[0], f"{schema}.{tables.main}")
    if missing := sorted(set(names) - found):
        raise FatalError(
            f"the feed {schema}.{tables.main} has lost {', '.join(missing)}",
            hint="restore it, or drop the rest of the feed's tables: a new one begins",
        )
    return True


def _names(tables: Tables) -> dict[str, sql.Composable]:
    schema = schema_of(tables)
    names = ("main", "entities", "positions", "pruned", "state")
    found: dict[str, sql.Composable] = {name: sql.Identifier(schema, getattr(tables, name)) for name in names}
    indexes = ("source", "history", "types", "recorded")
    return found | {f"main_{name}": sql.Identifier(f"{tables.main}_{name}") for name in indexes}


class _JsonLoader(Loader):
    format = pq.Format.BINARY

    def load(self, data: Buffer) -> bytes:
        return bytes(data)


class _TimeLoader(Loader):
    format = pq.Format.BINARY

    def load(self, data: Buffer) -> int:
        return int.from_bytes(data, "big", signed=True) + _SINCE_1970
