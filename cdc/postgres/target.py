"""The mirror's side of the initial copy: schema, loading, and what is built afterwards.

All that must survive a crash is in the target: see `cdc.postgres.bookkeeping`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar, cast

import psycopg
import structlog
from psycopg import sql
from psycopg.conninfo import make_conninfo

from cdc.change import TableName
from cdc.config import SinkConfig
from cdc.errors import FatalError, TransientError
from cdc.position import Lsn, Position, SourcePosition, as_lsn
from cdc.postgres.bookkeeping import FORGOTTEN, Bookkeeping, Mark, changed_tables
from cdc.postgres.building import Builder
from cdc.postgres.connection import Connection, connect, translated_errors, while_doing
from cdc.postgres.dump import KEY_KINDS, SchemaDump
from cdc.postgres.loader import PostgresLoader
from cdc.postgres.preparation import Preparation, mirrored_columns
from cdc.postgres.refresh_marks import RefreshMarks
from cdc.postgres.renaming import Renaming
from cdc.postgres.renewal import LookAgain, renew
from cdc.postgres.schema import SchemaTable, database_identity, read_tables
from cdc.postgres.sequences import SequenceValue, set_sequences
from cdc.postgres.shape import TableShape
from cdc.postgres.url import parsed
from cdc.source import Chunk

log = structlog.get_logger()


T = TypeVar("T")


class CopyTarget:
    """What a PostgreSQL mirror does for the copy: a part of `cdc.sink.Mirror`. Every method has its own connection.

    consistent: each table is, from the first change on, as it was when the transaction at hand committed.
    """

    consistent = True
    keeps_parts = False

    def __init__(
        self,
        config: SinkConfig,
        shapes: Callable[[Collection[int]], Sequence[object]] | None = None,
        dump_schema: Callable[[], object] | None = None,
    ) -> None:
        """shapes, dump_schema: ask the source for its tables as they are now (`cdc.sink.SinkContext`)."""
        assert config.url is not None, "cdc.config derives one"
        self.name = config.name
        self.config = config
        self.url = config.url.reveal()
        self.read_shapes = cast("Callable[[Collection[int]], Sequence[TableShape]] | None", shapes)
        self._columns: dict[TableName, dict[str, str]] = {}
        self._made: Collection[TableName] = ()
        self._warned = False
        look_again = None
        if self.read_shapes is not None and dump_schema is not None:
            look_again = LookAgain(config, self.read_shapes, cast("Callable[[], SchemaDump]", dump_schema))
        self._builder = Builder(config, self._session, jobs=config.copy.workers, look_again=look_again)

    def stored_position(self) -> Position | None:
        """The position in the target; `None` if it was never written to."""
        return self._remembered(Bookkeeping.position)

    def copied(self) -> Mapping[TableName, Lsn]:
        """Tables whose copy is complete, and the snapshot position of each. Nothing where there is no database yet."""
        return {table: at for table, at in self.applied_from().items() if at != FORGOTTEN}

    def applied_from(self) -> Mapping[TableName, Lsn]:
        """From which position on changes of each table are to be applied: `FORGOTTEN` where none ever are."""
        marks = self._remembered(Bookkeeping.marks) or {}
        return {table: mark.copied_at for table, mark in marks.items() if mark.copied_at is not None}

    def mirror_only(self, tables: Collection[TableName]) -> None:
        """Leave tables that are not among these as they are from now on; one that comes back is copied again.

        Raises `FatalError` where none would stay: that is a mistake, and would cost a copy of everything.
        """
        if self.config.schema_changes == "apply":
            self._follow_renames(tables)
        marks = self._remembered(Bookkeeping.marks) or {}
        left, back = changed_tables(marks, tables)
        if not left and not back:
            return
        if not marks.keys() & set(tables):
            raise FatalError(
                f"sink {self.name}: none of the tables that it mirrors is captured any more",
                hint="correct `tables` or the url of the source; to mirror others instead, `cdc drop` the sink first",
            )
        with self._session() as connection, translated_errors(), connection.transaction():
            Bookkeeping(connection, self.name).forget(left)
            RefreshMarks(connection, self.name).done(left)
            Bookkeeping(connection, self.name).copy_again(back)
        for table in left:
            log.info("table no longer mirrored", sink=self.name, table=str(table))
        for table in back:
            log.info("table is mirrored again, and copied anew", sink=self.name, table=str(table))

    def _follow_renames(self, tables: Collection[TableName]) -> None:
        """Tables that only have another name now need no copy. What has yet to come by the old name knows their OID."""
        marks = self._remembered(Bookkeeping.marks) or {}
        left, _ = changed_tables(marks, tables)
        if not left or self.read_shapes is None:
            return
        with self._session() as connection, translated_errors(), connection.transaction():
            bookkeeping = Bookkeeping(connection, self.name)
            bookkeeping.create()
            names = {each.shape.oid: name for name, each in bookkeeping.followed().items() if name in left}
            for shape in self.read_shapes(list(names)):
                if shape.qualified in tables and shape.qualified not in marks:
                    renaming = Renaming(connection, self.config, names[shape.oid], shape.qualified)
                    if renaming.possible:
                        renaming.carry_out()

    def prepare_copy(self, tables: Sequence[TableName], start: Position, schema: object) -> None:
        """Create database, bookkeeping and missing tables, or take tables that the user made; empty what is not copied.

        All or nothing (but for the database). Raises `FatalError` where the target holds something else.
        """
        assert isinstance(schema, SchemaDump)
        if gone := set(tables) - {table.name for table in schema.tables}:
            raise TransientError(f"no longer at the source: {', '.join(map(str, sorted(gone)))}")
        self._create_database(schema.database)
        with self._session() as connection:
            if database_identity(connection) == schema.origin:
                raise FatalError(
                    f"sink {self.name} leads to the source's own database: it would mirror itself for ever",
                    hint=f"let sinks.{self.name}.url name another database",
                )
            bookkeeping = Bookkeeping(connection, self.name)
            bookkeeping.create()
            self.silence_triggers(connection)
            with translated_errors(), connection.transaction():
                connection.execute("SELECT pg_advisory_xact_lock(hashtextextended('cdc.prepare', 0))")
                marks, followed = bookkeeping.marks(), bookkeeping.followed()
                self._renew(bookkeeping, schema, marks)
                preparation = Preparation(connection, self.config, marks, bookkeeping.recorded(), followed)
                prepared = preparation.run(schema)
                bookkeeping.record(prepared.later)
                bookkeeping.mark([table.name for table in schema.tables], prepared.made)
                bookkeeping.follow_copies(schema.shapes)
                bookkeeping.begin(start)
            present = read_tables(connection)
            marks = bookkeeping.marks()
            copied = {name for name, mark in marks.items() if mark.copied_at is not None}
            self._made = {name for name, mark in marks.items() if mark.made}
        # those that are copied may have yet to follow the source's columns
        incomplete = [table for table in schema.tables if table.name not in copied]
        self._columns = {table.name: self._column_types(table, present) for table in incomplete}

    def _renew(self, bookkeeping: Bookkeeping, schema: SchemaDump, marks: Mapping[TableName, Mark]) -> None:
        """What is left to build of tables that were begun earlier: they are given the shape that they have now."""
        bookkeeping.outdate([table for table, mark in marks.items() if mark.copied_at is None])
        bookkeeping.follow_copies(schema.shapes)
        renew(bookkeeping, schema, sink=self.name)

    def column_types(self, table: TableName) -> dict[str, str]:
        """Column name -> type name on the target, in the order the loader writes them. After `prepare_copy`."""
        return self._columns[table]

    def loader(self) -> PostgresLoader:
        """Open a connection for a copy worker; from any thread."""
        # what `table_copied` commits later waits for the disk, and for all that was written before
        connection = connect(self.url, application_name="cdc-copy", synchronous_commit="off")
        self.silence_triggers(connection)
        return PostgresLoader(connection, self.config, self._columns, self._made)

    def pending(self, table: TableName, position: SourcePosition, chunks: Callable[[], Sequence[Chunk]]) -> list[Chunk]:  # noqa: ARG002
        """All of it: parts of different snapshots would not be one table."""
        return list(chunks())

    def chunk_copied(self, chunk: Chunk, rows: int) -> None:
        """Parts are not kept: see `pending`."""

    def table_copied(self, table: TableName, position: SourcePosition, rows: int) -> None:
        """Record durably that a table is complete as of `position`."""
        with self._session() as connection, translated_errors():
            Bookkeeping(connection, self.name).copied(table, as_lsn(position), rows)

    def build_keys(self) -> None:
        """Build primary keys and identity indexes. Killed in the middle, it goes on where it was."""
        self._builder.build(KEY_KINDS)

    def finish_copy(self, position: SourcePosition) -> bool:
        """Build all that has waited, in order; `False` while a table is incomplete or ahead of `position`."""
        with self._session() as connection, translated_errors():
            waiting = Bookkeeping(connection, self.name).waiting(as_lsn(position))
        built = self._builder.build(KEY_KINDS if waiting else None)
        return built and not waiting

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

    def _remembered(self, read: Callable[[Bookkeeping], T]) -> T | None:
        """What the bookkeeping says; `None` where there is none yet, or no database."""
        try:
            with self._session() as connection, translated_errors():
                bookkeeping = Bookkeeping(connection, self.name)
                return read(bookkeeping) if bookkeeping.exists else None
        except FatalError:
            if self._database_exists():
                raise
            return None

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
        given = parsed(self.url)
        try:
            return connect(make_conninfo(**given | {"dbname": "postgres"}))
        except FatalError:
            return connect(make_conninfo(**given | {"dbname": "template1"}))

    def _column_types(self, table: SchemaTable, present: Mapping[TableName, SchemaTable]) -> dict[str, str]:
        types = {column.name: column.base_type_name for column in present[self.config.target_name(table.name)].columns}
        return {column.name: types[column.name] for column in mirrored_columns(self.config, table)}


def _database_name(url: str) -> str:
    given = parsed(url)
    return str(given.get("dbname") or given.get("user") or "")
