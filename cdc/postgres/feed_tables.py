"""The tables of a feed in PostgreSQL: created once, and how their rows are written and read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, LiteralString

import psycopg
from psycopg import pq, sql
from psycopg.abc import Buffer
from psycopg.adapt import Loader

from cdc.errors import FatalError
from cdc.feed.tables import COLUMNS, Codec, Tables, check_format, not_ours
from cdc.postgres.connection import Connection, while_doing
from cdc.postgres.copy_fields import SINCE_1970

_SPAN: Final = """span (low, high) AS (
        SELECT min(id), max(id) + 1 FROM {main} UNION ALL
        SELECT CASE WHEN is_earlier THEN id + 1 ELSE low END, CASE WHEN is_earlier THEN high ELSE (low + high) / 2 END
        FROM span CROSS JOIN LATERAL (SELECT id, recorded_at < %(at)s AS is_earlier FROM {main}
            WHERE id >= (low + high) / 2 ORDER BY id LIMIT 1) AS middle WHERE low < high)"""
"""Of a recursive query, as {span}: its largest `low` is above all ids recorded before `at`, and not above any later.
Ids and times rise together: halves are looked at."""

DEFAULT_SCHEMA: Final = "public"

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


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
    """Queries with the names of the tables, the columns of the main one, and `_SPAN`."""
    names = {**_names(tables), "columns": sql.SQL(", ").join(map(sql.Identifier, COLUMNS))}
    names["span"] = sql.SQL(_SPAN).format(**names)
    return {name: sql.SQL(query).format(**names).as_bytes() for name, query in queries.items()}


def adapt(connection: Connection) -> None:
    """Let times be integers, and JSON bytes, where they come from this connection in binary form."""
    connection.adapters.register_loader("json", _JsonLoader)
    connection.adapters.register_loader("timestamptz", _TimeLoader)


def moment(microseconds: int) -> datetime:
    """A time as a parameter."""
    return _EPOCH + timedelta(microseconds=microseconds)


def copy_query(tables: Tables, table: str, columns: Iterable[str]) -> sql.Composed:
    """What takes `copy_data`, for `main` or `entities`; the columns that are not named are NULL."""
    names = sql.SQL(", ").join(map(sql.Identifier, columns))
    return sql.SQL("COPY {} ({}) FROM STDIN (FORMAT binary)").format(_names(tables)[table], names)


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
        return int.from_bytes(data, "big", signed=True) + SINCE_1970
