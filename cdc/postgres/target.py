"""The mirror's side of the initial copy: schema, bookkeeping, loading, and what is built afterwards.

All that must survive a crash is in the target, in schema `cdc`: where the sink stands, which tables are complete and as
of which position, and the SQL that has to run once they are.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import psycopg
import structlog
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from cdc.change import TableName
from cdc.config import SinkConfig
from cdc.errors import CdcError, FatalError
from cdc.position import Lsn, Position, SourcePosition, as_lsn, format_lsn, parse_lsn
from cdc.postgres.connection import Connection, connect, to_cdc_error, translated_errors
from cdc.postgres.dump import KEY_KINDS, PostDataEntry, SchemaDump, SequenceState
from cdc.postgres.schema import SchemaColumn, SchemaTable, read_tables

log = structlog.get_logger()

ANALYZE: Final = "ANALYZE"
IDENTITY: Final = "IDENTITY"
"""Kinds of post-data besides those of the dump: planner statistics, and identity columns that become GENERATED ALWAYS
again at cut-over. Their SQL has the target's names, all other has the source's."""

_Rename = tuple[TableName, TableName]


class _Pending(NamedTuple):
    ordinal: int
    kind: str
    name: str
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
                self._prepare_tables(connection, wanted, schema)
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
            self._build(connection, "kind = ANY (%s)", list(KEY_KINDS))

    def finish_copy(self, position: SourcePosition) -> bool:
        """Build all that has waited, in order; `False` while a table is incomplete or ahead of `position`."""
        with self._session() as connection:
            self._build(connection, "kind = ANY (%s)", list(KEY_KINDS))
            with translated_errors():
                ((waiting,),) = connection.execute(
                    "SELECT count(*) FROM cdc.tables WHERE sink = %s AND (position IS NULL OR position > %s)",
                    [self.name, format_lsn(as_lsn(position))],
                ).fetchall()
            if waiting:
                return False
            self._build(connection, "kind <> %s", IDENTITY)
        return True

    def restore_identity(self) -> None:
        """Make identity columns GENERATED ALWAYS again: for the cut-over, when the stream has ended."""
        with self._session() as connection:
            self._build(connection, "kind = %s", IDENTITY)

    def set_sequences(self, sequences: object) -> None:
        """Set every sequence that the target has to where the source's stands."""
        assert isinstance(sequences, tuple)
        with self._session() as connection, translated_errors(), connection.transaction():
            for state in sequences:
                assert isinstance(state, SequenceState)
                self._set_sequence(connection, state)

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

    def _bookkeeping(self, query: sql.SQL | str) -> list[tuple[Any, ...]]:
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
        with _while(f"creating database {name}"), self._maintenance() as connection:
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

    def _prepare_tables(self, connection: Connection, tables: Sequence[SchemaTable], schema: SchemaDump) -> None:
        present = read_tables(connection)
        marked = self._marked(connection)
        missing = [table.name for table in tables if self.config.target_name(table.name) not in present]
        if missing and len(missing) == len(tables) and not marked:
            self._create_tables(connection, tables, schema)
        elif missing:
            raise FatalError(
                f"missing on the target: {', '.join(str(self.config.target_name(name)) for name in missing)}",
                hint="create them there, or drop the sink's tables and its rows in schema cdc to begin anew",
            )
        else:
            unfinished = [table for table in tables if marked.get(table.name) is None]
            self._adopt(connection, unfinished, present, marked)

    def _create_tables(self, connection: Connection, tables: Sequence[SchemaTable], schema: SchemaDump) -> None:
        with _while("creating the tables on the target"):
            connection.execute("SET LOCAL check_function_bodies = off")
            connection.execute("SET LOCAL client_min_messages = warning")
            connection.execute(schema.pre_data.encode())
            _rename(connection, self._renames(_with_partitions(connection, tables)))
            own = [entry for table in tables for entry in self._adapt(connection, table)]
            self._record_post_data(connection, [*schema.post_data, *own])
        log.info("tables created", sink=self.name, tables=len(tables))

    def _adapt(self, connection: Connection, table: SchemaTable) -> Iterator[PostDataEntry]:
        """Loosen what replicated rows would break, and yield what is to be done about it later."""
        target = sql.Identifier(*self.config.target_name(table.name))
        alter = sql.SQL("ALTER TABLE {} ALTER COLUMN {} {}")
        mirrored = set(self._mirrored(table))
        for column in table.replicated_columns:
            name = sql.Identifier(column.name)
            if column.identity == "a":
                # UPDATE may not write an ALWAYS column
                connection.execute(alter.format(target, name, sql.SQL("SET GENERATED BY DEFAULT")))
                back = alter.format(target, name, sql.SQL("SET GENERATED ALWAYS")).as_string()
                yield PostDataEntry(IDENTITY, column.name, table.name, back)
            elif column.not_null and column not in mirrored:
                connection.execute(alter.format(target, name, sql.SQL("DROP NOT NULL")))
        yield PostDataEntry(ANALYZE, table.name.name, table.name, sql.SQL("ANALYZE {}").format(target).as_string())

    def _adopt(
        self,
        connection: Connection,
        tables: Sequence[SchemaTable],
        present: Mapping[TableName, SchemaTable],
        marked: Mapping[TableName, Lsn | None],
    ) -> None:
        """Take tables that are there: those of the user only if they are empty and fit, our own in any case."""
        targets = [present[self.config.target_name(table.name)] for table in tables]
        problems = [
            text for table, target in zip(tables, targets, strict=True) for text in self._misfits(table, target)
        ]
        if problems:
            raise FatalError(
                f"the target's tables do not fit: {'; '.join(problems)}", hint="alter them to what the source has"
            )
        for table, target in zip(tables, targets, strict=True):
            if table.name not in marked and not _is_empty(connection, target.name):
                raise FatalError(
                    f"{target.name} on the target has rows that this sink did not copy",
                    hint="empty it if they may go, or mirror into another database",
                )
        _empty(connection, [target for table, target in zip(tables, targets, strict=True) if table.name in marked])
        if not marked:
            analyze = sql.SQL("ANALYZE {}")
            self._record_post_data(
                connection,
                [
                    PostDataEntry(
                        ANALYZE, target.name.name, table.name, analyze.format(sql.Identifier(*target.name)).as_string()
                    )
                    for table, target in zip(tables, targets, strict=True)
                ],
            )

    def _misfits(self, table: SchemaTable, target: SchemaTable) -> Iterator[str]:
        """What about a target table would not hold the source's rows."""
        columns = {column.name: column for column in target.columns}
        for column in self._mirrored(table):
            found = columns.get(column.name)
            if found is None:
                yield f"{target.name}: column {column.name} ({column.type_name}) is missing"
            elif found.generated:
                yield f"{target.name}: column {column.name} is generated"
            elif not type_holds(column.type_name, found.type_name):
                yield f"{target.name}: column {column.name} is {found.type_name}, at the source {column.type_name}"

    def _mirrored(self, table: SchemaTable) -> list[SchemaColumn]:
        """The columns that travel to this sink, in the source's order."""
        wanted = self.config.options(table.name).columns
        if wanted is None:
            return list(table.replicated_columns)
        known = {column.name for column in table.replicated_columns}
        for column in wanted:
            if column not in known:
                raise FatalError(f"{table.name} has no column {column} that could be mirrored", hint="see `columns`")
        if left_out := set(table.primary_key) - set(wanted):
            raise FatalError(
                f"{table.name}: the key column {', '.join(sorted(left_out))} is left out", hint="add it to `columns`"
            )
        return [column for column in table.replicated_columns if column.name in wanted]

    def _column_types(self, table: SchemaTable, present: Mapping[TableName, SchemaTable]) -> dict[str, str]:
        types = {column.name: column.base_type_name for column in present[self.config.target_name(table.name)].columns}
        return {column.name: types[column.name] for column in self._mirrored(table)}

    def _renames(self, names: Iterable[TableName]) -> list[_Rename]:
        return [(name, renamed) for name in names if (renamed := self.config.target_name(name)) != name]

    def _marked(self, connection: Connection) -> dict[TableName, Lsn | None]:
        """The tables that this sink has begun to copy, and the position of those that are complete."""
        rows = connection.execute(
            "SELECT source_schema, source_table, position::text FROM cdc.tables WHERE sink = %s", [self.name]
        )
        return {TableName(schema, name): parse_lsn(at) if at else None for schema, name, at in rows}

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

    def _build(self, connection: Connection, condition: str, value: object) -> None:
        """Run pending entries in order, each in a transaction that also records that it is done."""
        query = f"SELECT ordinal, kind, name, sql FROM cdc.post_data WHERE sink = %s AND NOT done AND {condition}"  # noqa: S608 - constants
        with translated_errors():
            pending = [_Pending(*row) for row in connection.execute(f"{query} ORDER BY ordinal", [self.name, value])]
        for number, entry in enumerate(pending, 1):
            started = time.monotonic()
            with _while(f"building {entry.kind} {entry.name} on the target"), connection.transaction():
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
        if entry.kind in (ANALYZE, IDENTITY):
            connection.execute(entry.sql.encode())
            return
        tables = connection.execute(
            """SELECT DISTINCT source_schema, source_table FROM cdc.post_data
                WHERE sink = %s AND source_table IS NOT NULL""",
            [self.name],
        ).fetchall()
        renames = [pair for pair in self._renames(TableName(*row) for row in tables) if _mentions(entry.sql, pair[0])]
        _rename(connection, [(target, source) for source, target in renames])
        connection.execute(entry.sql.encode())
        _rename(connection, renames)

    def _set_sequence(self, connection: Connection, state: SequenceState) -> None:
        found: str | None = None
        if state.owner is not None:
            target = sql.Identifier(*self.config.target_name(state.owner)).as_string()
            rows = connection.execute(_SERIAL_SEQUENCE, {"table": target, "column": state.column}).fetchall()
            found = rows[0][0] if rows else None
        name = sql.Identifier(*state.name).as_string()
        done = connection.execute(
            "SELECT setval(found, %s, %s) FROM to_regclass(%s) AS found WHERE found IS NOT NULL",
            [state.last_value, state.is_called, found or name],
        )
        if not done.rowcount:
            log.warning("the mirror does not have a sequence of the source", sink=self.name, sequence=str(state.name))


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
        with _while(f"copying {table}"), self._connection.transaction(), self._connection.cursor() as cursor:
            with cursor.copy(query) as copy:
                for block in blocks:
                    copy.write(block)
            return cursor.rowcount

    def close(self) -> None:
        """Disconnect. Safe to call twice."""
        self._connection.close()


def ensure_bookkeeping(connection: Connection) -> None:
    """Create schema `cdc` and its tables, where they are not there."""
    with _while("creating the bookkeeping on the target"), connection.transaction():
        connection.execute("SELECT pg_advisory_xact_lock(hashtextextended('cdc.bookkeeping', 0))")
        ((exists,),) = connection.execute("SELECT to_regclass('cdc.post_data') IS NOT NULL").fetchall()
        if not exists:  # even IF NOT EXISTS wants the right to create a schema
            connection.execute(_BOOKKEEPING)


def type_holds(source: str, target: str) -> bool:
    """Whether a column of type `target` holds all values of type `source`, and shows them with the same text."""
    if source == target or target in _WIDER.get(source, ()):
        return True
    if source.startswith("numeric(") and target == "numeric":
        return True
    limited = re.fullmatch(r"character varying(?:\((\d+)\))?", source)
    if limited is None:
        return False
    if target in ("text", "character varying"):
        return True
    wider = re.fullmatch(r"character varying\((\d+)\)", target)
    return bool(limited[1] and wider and int(wider[1]) >= int(limited[1]))


@contextmanager
def _while(doing: str) -> Iterator[None]:
    """Say in an error what was being done."""
    try:
        with translated_errors():
            yield
    except CdcError as exc:
        raise type(exc)(f"{doing}: {exc}", hint=exc.hint) from exc


def _database_name(url: str) -> str:
    given = conninfo_to_dict(url)
    return str(given.get("dbname") or given.get("user") or "")


def _rename(connection: Connection, renames: Sequence[_Rename]) -> None:
    """Rename tables, those that do not exist left out; by way of unique names, so that they may swap theirs."""
    present = [(old, new) for old, new in renames if _exists(connection, old)]
    for number, (old, new) in enumerate(present):
        if not connection.execute("SELECT FROM pg_namespace WHERE nspname = %s", [new.schema]).rowcount:
            connection.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(new.schema)))
        passing = TableName(old.schema, f"cdc_renaming_{number}")
        _alter(connection, old, "RENAME TO {}", passing.name)
        if old.schema != new.schema:
            _alter(connection, passing, "SET SCHEMA {}", new.schema)
    for number, (_, new) in enumerate(present):
        _alter(connection, TableName(new.schema, f"cdc_renaming_{number}"), "RENAME TO {}", new.name)


def _alter(connection: Connection, table: TableName, action: str, name: str) -> None:
    statement = sql.SQL("ALTER TABLE {} " + action)
    connection.execute(statement.format(sql.Identifier(*table), sql.Identifier(name)))


def _exists(connection: Connection, table: TableName) -> bool:
    query = "SELECT FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace WHERE nspname = %s AND relname = %s"
    return connection.execute(query, list(table)).rowcount > 0


def _mentions(script: str, table: TableName) -> bool:
    """Whether SQL may be about a table. Attaching an index names only indexes, which live in their tables' schema."""
    return " ATTACH PARTITION " in script or table.name.replace('"', '""') in script


def _with_partitions(connection: Connection, tables: Sequence[SchemaTable]) -> list[TableName]:
    names = [table.name for table in tables]
    for table in tables:
        if table.partitioned:
            root = sql.Identifier(*table.name).as_string()
            names += [TableName(*row) for row in connection.execute(_PARTITIONS, [root])]
    return names


def _is_empty(connection: Connection, table: TableName) -> bool:
    query = sql.SQL("SELECT FROM {} LIMIT 1").format(sql.Identifier(*table))
    return connection.execute(query).rowcount == 0


def _empty(connection: Connection, tables: Sequence[SchemaTable]) -> None:
    """Empty tables, but not those that inherit from them."""
    if not tables:
        return
    names = [sql.SQL("" if t.partitioned else "ONLY ") + sql.Identifier(*t.name) for t in tables]
    try:
        with connection.transaction():
            connection.execute(sql.SQL("TRUNCATE {}").format(sql.SQL(", ").join(names)))
    except psycopg.errors.FeatureNotSupported:  # a foreign key of a table that is complete
        for name in names:
            connection.execute(sql.SQL("DELETE FROM ") + name)


_WIDER: Final = {
    "smallint": ("integer", "bigint", "numeric"),
    "integer": ("bigint", "numeric"),
    "bigint": ("numeric",),
}

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

_PARTITIONS: Final = """
SELECT n.nspname, c.relname
  FROM pg_partition_tree(%s::regclass) p
  JOIN pg_class c ON c.oid = p.relid
  JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE p.level > 0
"""

_SERIAL_SEQUENCE: Final = """
SELECT pg_get_serial_sequence(%(table)s, attname)
  FROM pg_attribute WHERE attrelid = to_regclass(%(table)s) AND attname = %(column)s AND NOT attisdropped
"""
