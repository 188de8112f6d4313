"""The mirror's side of the initial copy: schema, bookkeeping, loading, and what is built afterwards.

All that must survive a crash is in the target, in schema `cdc`: where the sink stands, which tables are complete and as
of which position, and the SQL that has to run once they are.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, NamedTuple, cast

import psycopg
import structlog
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from cdc.change import TableName
from cdc.config import SinkConfig
from cdc.errors import FatalError
from cdc.position import Lsn, Position, SourcePosition, as_lsn, format_lsn, parse_lsn
from cdc.postgres.connection import Connection, connect, to_cdc_error, translated_errors
from cdc.postgres.dump import KEY_KINDS, PostDataEntry, SchemaDump
from cdc.postgres.preparation import (
    ANALYZE,
    Preparation,
    mirrored_columns,
    rename_relations,
    renames,
    while_doing,
)
from cdc.postgres.schema import SchemaTable, read_tables
from cdc.postgres.sequences import SequenceValue, set_sequences

log = structlog.get_logger()


class _Pending(NamedTuple):
    ordinal: int
    kind: str
    name: str
    source_schema: str | None
    source_table: str | None
    sql: str


class CopyTarget:
    """What a PostgreSQL mirror does for the copy: a part of `cdc.sink.Mirror`. Every method has its own connection."""

    def __init__(self, config: SinkConfig) -> None:
        assert config.url is not None, "cdc.config derives one"
        self.name = config.name
        self.config = config
        self.url = config.url.reveal()
        self._columns: dict[TableName, dict[str, str]] = {}
        self._warned = False

    def stored_position(self) -> Position | None:
        """The position in the target; `None` if it was never written to."""
        query = "SELECT queue_id, seq, position::text FROM cdc.positions WHERE sink = %s"
        rows = self._bookkeeping(query)
        return Position(rows[0][0], rows[0][1], parse_lsn(rows[0][2])) if rows else None

    def copied(self) -> Mapping[TableName, Lsn]:
        """Tables whose copy is complete, and the snapshot position of each. Nothing where there is no database yet."""
        query = """SELECT source_schema, source_table, position::text FROM cdc.tables
                    WHERE sink = %s AND position IS NOT NULL"""
        return {TableName(schema, name): parse_lsn(position) for schema, name, position in self._bookkeeping(query)}

    def prepare_copy(self, tables: Sequence[TableName], start: Position, schema: object) -> None:
        """Create database, bookkeeping and tables, or take tables that the user made; empty what is not `copied`.

        All or nothing (but for the database). Raises `FatalError` where the target holds something else.
        """
        assert isinstance(schema, SchemaDump)
        self._create_database(schema.database)
        wanted = [table for table in schema.tables if table.name in tables]
        with self._session() as connection:
            ensure_bookkeeping(connection)
            self.silence_triggers(connection)
            with translated_errors(), connection.transaction():
                connection.execute("SELECT pg_advisory_xact_lock(hashtextextended('cdc.prepare', 0))")
                entries = Preparation(connection, self.config, self._marked(connection)).run(schema, wanted)
                self._record_post_data(connection, entries)
                self._record_start(connection, wanted, start)
            present = read_tables(connection)
        self._columns = {table.name: self._column_types(table, present) for table in wanted}

    def column_types(self, table: TableName) -> dict[str, str]:
        """Column name -> type name on the target, in the order the loader writes them. After `prepare_copy`."""
        return self._columns[table]

    def loader(self) -> PostgresLoader:
        """Open a connection for a copy worker; from any thread."""
        connection = connect(self.url, application_name="cdc-copy")
        self.silence_triggers(connection)
        return PostgresLoader(connection, self.config, self._columns)

    def table_copied(self, table: TableName, position: SourcePosition, rows: int) -> None:
        """Record durably that a table is complete as of `position`."""
        with self._session() as connection, translated_errors():
            connection.execute(
                """UPDATE cdc.tables SET position = %s, rows = %s, copied_at = now()
                    WHERE sink = %s AND source_schema = %s AND source_table = %s""",
                [format_lsn(as_lsn(position)), rows, self.name, *table],
            )

    def build_keys(self) -> None:
        """Build primary keys and identity indexes. Killed in the middle, it goes on where it was."""
        with self._session() as connection:
            self._build(connection, KEY_KINDS)

    def finish_copy(self, position: SourcePosition) -> bool:
        """Build all that has waited, in order; `False` while a table is incomplete or ahead of `position`."""
        with self._session() as connection:
            self._build(connection, KEY_KINDS)
            with translated_errors():
                ((waiting,),) = connection.execute(
                    "SELECT count(*) FROM cdc.tables WHERE sink = %s AND (position IS NULL OR position > %s)",
                    [self.name, format_lsn(as_lsn(position))],
                ).fetchall()
            if waiting:
                return False
            self._build(connection)
        return True

    def set_sequences(self, sequences: object) -> None:
        """Set every sequence that the target has to where the source's stands; log those that cannot be."""
        values = cast("Iterable[SequenceValue]", sequences)
        with self._session() as connection:
            result = set_sequences(connection, values, self.config.target_name)
        if result.missing or result.refused:
            log.warning("sequences not set", sink=self.name, missing=result.missing, refused=result.refused)

    def silence_triggers(self, connection: Connection) -> None:
        """Keep the target's triggers, rules and foreign keys still, where this role may; warn once where not."""
        try:
            with connection.transaction():
                connection.execute("SET session_replication_role = replica")
        except psycopg.errors.InsufficientPrivilege:
            if not self._warned:
                log.warning(
                    "triggers and foreign keys fire on the mirror: no right to set session_replication_role",
                    sink=self.name,
                    hint="GRANT SET ON PARAMETER session_replication_role TO the sink's role (PostgreSQL 15+)",
                )
            self._warned = True

    @contextmanager
    def _session(self) -> Iterator[Connection]:
        connection = connect(self.url, application_name=f"cdc-copy {self.name}", synchronous_commit="on")
        try:
            yield connection
        finally:
            connection.close()

    def _bookkeeping(self, query: str) -> list[tuple[Any, ...]]:
        """Rows of this sink in a table of ours; none if it does not exist yet."""
        try:
            with self._session() as connection:
                return connection.execute(query, [self.name]).fetchall()
        except psycopg.errors.UndefinedTable:
            return []
        except psycopg.Error as exc:
            raise to_cdc_error(exc) from exc
        except FatalError:
            if self._database_exists():
                raise
            return []

    def _create_database(self, options: str) -> None:
        try:
            connect(self.url).close()
        except FatalError:
            if self._database_exists():
                raise
        else:
            return
        name = _database_name(self.url)
        create = sql.SQL("CREATE DATABASE {} WITH ").format(sql.Identifier(name)) + sql.SQL(options)
        with while_doing(f"creating database {name}"), self._maintenance() as connection:
            connection.execute(create)
        log.info("database created", sink=self.name, database=name)

    def _database_exists(self) -> bool:
        with self._maintenance() as connection, translated_errors():
            query = "SELECT EXISTS (SELECT FROM pg_database WHERE datname = %s)"
            ((exists,),) = connection.execute(query, [_database_name(self.url)]).fetchall()
        return bool(exists)

    def _maintenance(self) -> Connection:
        """A connection to a database of the server that is always there."""
        try:
            return connect(make_conninfo(self.url, dbname="postgres"))
        except FatalError:
            return connect(make_conninfo(self.url, dbname="template1"))

    def _marked(self, connection: Connection) -> dict[TableName, bool]:
        """The tables that this sink has begun to copy, and whether each is complete."""
        query = "SELECT source_schema, source_table, position IS NOT NULL FROM cdc.tables WHERE sink = %s"
        return {TableName(schema, name): complete for schema, name, complete in connection.execute(query, [self.name])}

    def _column_types(self, table: SchemaTable, present: Mapping[TableName, SchemaTable]) -> dict[str, str]:
        types = {column.name: column.base_type_name for column in present[self.config.target_name(table.name)].columns}
        return {column.name: types[column.name] for column in mirrored_columns(self.config, table)}

    def _record_start(self, connection: Connection, tables: Sequence[SchemaTable], start: Position) -> None:
        with connection.cursor() as cursor:
            cursor.executemany(
                "INSERT INTO cdc.tables (sink, source_schema, source_table) VALUES (%s, %s, %s) ON CONFLICT DO NOTHING",
                [(self.name, *table.name) for table in tables],
            )
            cursor.execute(
                """INSERT INTO cdc.positions (sink, queue_id, seq, position) VALUES (%s, %s, %s, %s)
                   ON CONFLICT DO NOTHING""",
                [self.name, start.queue_id, start.seq, format_lsn(as_lsn(start.source))],
            )

    def _record_post_data(self, connection: Connection, entries: Sequence[PostDataEntry]) -> None:
        rows = [
            (self.name, ordinal, entry.kind, entry.name, *(entry.table or (None, None)), entry.sql)
            for ordinal, entry in enumerate(entries)
        ]
        with connection.cursor() as cursor:
            cursor.executemany(
                """INSERT INTO cdc.post_data (sink, ordinal, kind, name, source_schema, source_table, sql)
                   VALUES (%s, %s, %s, %s, %s, %s, %s)""",
                rows,
            )

    def _build(self, connection: Connection, kinds: Sequence[str] | None = None) -> None:
        """Run pending entries in order, each in a transaction that also records that it is done."""
        with translated_errors():
            rows = connection.execute(_PENDING, [self.name]).fetchall()
        pending = [entry for entry in map(_Pending._make, rows) if kinds is None or entry.kind in kinds]
        for number, entry in enumerate(pending, 1):
            started = time.monotonic()
            with while_doing(f"building {entry.kind} {entry.name} on the target"), connection.transaction():
                self._run_entry(connection, entry)
                connection.execute(
                    "UPDATE cdc.post_data SET done = true WHERE sink = %s AND ordinal = %s", [self.name, entry.ordinal]
                )
            seconds = round(time.monotonic() - started, 3)
            log.info(
                "built", sink=self.name, kind=entry.kind, name=entry.name, seconds=seconds, of=len(pending), n=number
            )

    def _run_entry(self, connection: Connection, entry: _Pending) -> None:
        """Run SQL that has the source's names: renamed tables get those back until the end of the transaction."""
        if entry.kind == ANALYZE:
            connection.execute(entry.sql.encode())
            return
        tables = [TableName(*row) for row in connection.execute(_POST_DATA_TABLES, [self.name]).fetchall()]
        pairs = [pair for pair in renames(self.config, tables) if _concerns(entry, pair[0])]
        rename_relations(connection, [(target, source) for source, target in pairs])
        connection.execute(entry.sql.encode())
        rename_relations(connection, pairs)


class PostgresLoader:
    """`cdc.sink.Loader`: one worker's connection."""

    def __init__(
        self, connection: Connection, config: SinkConfig, columns: Mapping[TableName, Mapping[str, str]]
    ) -> None:
        self._connection = connection
        self._config = config
        self._columns = columns

    def load(self, table: TableName, blocks: Iterable[bytes], *, binary: bool) -> int:
        """Write one chunk in a transaction of its own and return its number of rows."""
        columns = sql.SQL(", ").join(map(sql.Identifier, self._columns[table]))
        query = sql.SQL("COPY {}{} FROM STDIN (FORMAT {})").format(
            sql.Identifier(*self._config.target_name(table)),
            sql.SQL(" ({})").format(columns) if self._columns[table] else sql.SQL(""),
            sql.SQL("binary" if binary else "text"),
        )
        with while_doing(f"copying {table}"), self._connection.transaction(), self._connection.cursor() as cursor:
            with cursor.copy(query) as copy:
                for block in blocks:
                    copy.write(block)
            return cursor.rowcount

    def close(self) -> None:
        """Disconnect. Safe to call twice."""
        self._connection.close()


def ensure_bookkeeping(connection: Connection) -> None:
    """Create schema `cdc` and its tables, where they are not there."""
    with while_doing("creating the bookkeeping on the target"), connection.transaction():
        connection.execute("SELECT pg_advisory_xact_lock(hashtextextended('cdc.bookkeeping', 0))")
        ((exists,),) = connection.execute("SELECT to_regclass('cdc.post_data') IS NOT NULL").fetchall()
        if not exists:  # even IF NOT EXISTS wants the right to create a schema
            connection.execute(_BOOKKEEPING)


def _database_name(url: str) -> str:
    given = conninfo_to_dict(url)
    return str(given.get("dbname") or given.get("user") or "")


def _concerns(entry: _Pending, table: TableName) -> bool:
    """Whether an entry's SQL may be about a table, or about its indexes, which live in its schema."""
    if table == (entry.source_schema, entry.source_table) or " ATTACH PARTITION " in entry.sql:
        return True
    return table.name.replace('"', '""') in entry.sql


_PENDING: Final = """
SELECT ordinal, kind, name, source_schema, source_table, sql
  FROM cdc.post_data WHERE sink = %s AND NOT done ORDER BY ordinal
"""

_POST_DATA_TABLES: Final = """
SELECT DISTINCT source_schema, source_table FROM cdc.post_data WHERE sink = %s AND source_table IS NOT NULL
"""

_BOOKKEEPING: Final = """
CREATE SCHEMA IF NOT EXISTS cdc;
CREATE TABLE IF NOT EXISTS cdc.positions (
    sink text PRIMARY KEY,
    source_system text NOT NULL DEFAULT '',
    queue_id text NOT NULL,
    seq bigint NOT NULL,
    position pg_lsn NOT NULL,
    updated_at timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE IF NOT EXISTS cdc.tables (
    sink text,
    source_schema text,
    source_table text,
    position pg_lsn,
    rows bigint,
    copied_at timestamptz,
    PRIMARY KEY (sink, source_schema, source_table)
);
CREATE TABLE IF NOT EXISTS cdc.post_data (
    sink text,
    ordinal int,
    kind text NOT NULL,
    name text NOT NULL,
    source_schema text,
    source_table text,
    sql text NOT NULL,
    done boolean NOT NULL DEFAULT false,
    PRIMARY KEY (sink, ordinal)
);
"""
