"""All tables as they were at one LSN, read by several connections at once.

The snapshot is the one that a temporary logical slot exports: a transaction is visible in it if and only if its commit
record starts below the slot's consistent point. (Commit order in the log is not the order of becoming visible, so no
LSN that is merely asked for, as `pg_current_wal_lsn()`, can be matched with a snapshot.)
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Final

import msgspec
import structlog
from psycopg import sql

from cdc.change import TableName
from cdc.errors import CdcError, TransientError
from cdc.position import Lsn, parse_lsn
from cdc.postgres.connection import Connection, connect, translated_errors, while_doing
from cdc.postgres.copy_out import copy_out
from cdc.postgres.dump import SchemaDump
from cdc.postgres.schema import SchemaTable
from cdc.postgres.shape import read_shapes
from cdc.postgres.slot import blockers_logged
from cdc.source import Chunk

log = structlog.get_logger()

_LOCK_TIMEOUT: Final = "60s"
_READ_LOCK_TIMEOUT: Final = "1s"
"""A reader waits for a lock only behind somebody who waits for ours (a TRUNCATE, an ALTER TABLE): for ever, if we let
it, since the server sees no deadlock there. Giving up, and the snapshot with it, lets him go first."""

_LOST_HINT: Final = "finished tables stay; the others are copied again from a new snapshot"


class Leaf(msgspec.Struct, frozen=True):
    """A table that has rows of its own: a plain one, or a partition without partitions."""

    name: TableName
    rows: int
    blocks: int
    size: int


class PostgresSnapshot:
    """`cdc.source.Snapshot` of a PostgreSQL database. Made by `open_snapshot`.

    position: the slot's consistent point. snapshot_id: for SET TRANSACTION SNAPSHOT, as long as this object is open.
    """

    def __init__(
        self,
        url: str,
        coordinator: Connection,
        position: Lsn,
        tables: Mapping[TableName, SchemaTable],
        filters: Mapping[TableName, str],
    ) -> None:
        self._url = url
        self._coordinator = coordinator
        self._tables = tables
        self._filters = filters
        self.position = position
        with translated_errors():
            ((self.snapshot_id,),) = coordinator.execute("SELECT pg_export_snapshot()").fetchall()
        self._leaves = self._lock_tables()

    def chunks(self, table: TableName, chunk_bytes: int) -> Sequence[Chunk]:
        """Split by partition, and large ones by ranges of blocks. Raises `TransientError` if the table has gone.

        The ranges hold as long as the lock does: no VACUUM FULL can move rows from one to another meanwhile.
        """
        if table not in self._leaves:
            raise TransientError(f"{table} is no longer at the source")
        return [chunk for leaf in self._leaves[table] for chunk in split_leaf(table, leaf, chunk_bytes)]

    def binary_columns(self, table: TableName) -> dict[str, str]:
        """Column name -> type name, of the columns that COPY's binary format carries exactly."""
        return {c.name: c.base_type_name for c in self._tables[table].replicated_columns if c.binary_exact}

    def end(self, table: TableName) -> Lsn:  # noqa: ARG002 - the protocol's
        """The position: all tables are read as they were there."""
        return self.position

    def reader(self) -> PostgresReader:
        """Open a connection into the snapshot; from any thread."""
        return PostgresReader(self.connect(), self._filters)

    def connect(self) -> Connection:
        """A connection of the caller's that sees the snapshot, in a transaction that can only read."""
        connection = connect(self._url, application_name="cdc-copy", lock_timeout=_READ_LOCK_TIMEOUT)
        try:
            _enter(connection, self.snapshot_id)
        except CdcError as exc:
            connection.close()
            raise TransientError(f"the snapshot is lost: {exc}", hint=_LOST_HINT) from exc
        return connection

    def check(self) -> None:
        """Raise `TransientError` if the snapshot and its locks are lost."""
        try:
            with translated_errors():
                self._coordinator.execute("SELECT 1")
        except CdcError as exc:
            raise TransientError(f"the snapshot is lost: {exc}", hint=_LOST_HINT) from exc

    def check_schema(self, schema: object, tables: Collection[TableName]) -> None:
        """Raise `TransientError` if tables have another shape than `dump_schema` has said; the locks keep it now."""
        assert isinstance(schema, SchemaDump)
        shapes = [shape for shape in schema.shapes if shape.qualified in tables]
        # the coordinator may see the catalog as it was
        with connect(self._url, application_name="cdc-copy", lock_timeout=_READ_LOCK_TIMEOUT) as connection:
            now = read_shapes(connection, [shape.oid for shape in shapes])
        for shape in shapes:
            if shape not in now:
                raise TransientError(f"{shape.qualified} was altered while its copy began", hint=_LOST_HINT)

    def close(self) -> None:
        """Release snapshot and locks. Safe to call twice."""
        self._coordinator.close()

    def _lock_tables(self) -> dict[TableName, list[Leaf]]:
        leaves: dict[TableName, list[Leaf]] = {name: [] for name in self._tables}
        names = {table.oid: name for name, table in self._tables.items()}
        with translated_errors():
            if self._tables:
                identifiers = sql.SQL(", ").join(sql.Identifier(*name) for name in self._tables)
                self._coordinator.execute(sql.SQL("LOCK TABLE {} IN ACCESS SHARE MODE").format(identifiers))
            for oid, schema, name, rows, blocks, size, rewritten in self._coordinator.execute(_LEAVES, [list(names)]):
                leaf = Leaf(TableName(schema, name), rows, blocks, size)
                if rewritten:
                    raise TransientError(f"{leaf.name} was rewritten while the snapshot was taken: take a new one")
                leaves[names[oid]].append(leaf)
        return leaves


class PostgresReader:
    """`cdc.source.SnapshotReader`: one worker's connection."""

    def __init__(self, connection: Connection, filters: Mapping[TableName, str]) -> None:
        self._connection = connection
        self._filters = filters

    def read(self, chunk: Chunk, *, columns: Sequence[str], binary: bool) -> Iterator[bytes]:
        """Yield the chunk's rows in large blocks, as one stream in COPY's binary or text format."""
        query = copy_query(chunk, columns, self._filters.get(chunk.table), binary=binary)
        with while_doing(f"reading {chunk.table}"):
            yield from copy_out(self._connection.pgconn, query.as_bytes(self._connection))

    def close(self) -> None:
        """Disconnect. Safe to call twice."""
        self._connection.close()


def open_snapshot(
    url: str, tables: Mapping[TableName, SchemaTable], *, filters: Mapping[TableName, str] | None = None
) -> PostgresSnapshot:
    """Take a snapshot of `tables`, with a row filter (SQL of the operator) for some of them.

    Waits for transactions that are older than the slot, and logs whom it waits for. The slot is gone on return: it
    keeps no WAL during the copy. Raises `TransientError` where trying again with new `tables` may help.
    """
    with ExitStack() as on_error:
        with connect(url, application_name="cdc-snapshot", replication=True) as walsender:
            position, exported = _create_slot(walsender)
            coordinator = connect(url, application_name="cdc-snapshot", lock_timeout=_LOCK_TIMEOUT)
            on_error.callback(coordinator.close)
            _enter(coordinator, exported)
        snapshot = PostgresSnapshot(url, coordinator, position, tables, filters or {})
        on_error.pop_all()
    return snapshot


def split_leaf(table: TableName, leaf: Leaf, chunk_bytes: int) -> Iterator[Chunk]:
    """Cut into ranges of blocks of about equal size; the last has no end."""
    wanted = max(1, min(-(-leaf.size // chunk_bytes), leaf.blocks))
    step = max(1, -(-leaf.blocks // wanted))
    starts = range(0, max(leaf.blocks, 1), step)
    for start in starts:
        end = start + step if start != starts[-1] else None
        yield Chunk(table, (*leaf.name, start, end), leaf.rows // len(starts), leaf.size // len(starts))


def copy_query(chunk: Chunk, columns: Sequence[str], row_filter: str | None, *, binary: bool) -> sql.Composed:
    """`COPY (SELECT ...) TO STDOUT` of one chunk."""
    schema, name, start, end = chunk.part
    conditions: list[sql.Composable] = []
    if start:
        conditions.append(sql.SQL("ctid >= {}::tid").format(f"({start},0)"))
    if end is not None:
        conditions.append(sql.SQL("ctid < {}::tid").format(f"({end},0)"))
    if row_filter is not None:
        conditions.append(sql.SQL(f"({row_filter})"))  # the operator's SQL, by design
    return sql.SQL("COPY (SELECT {} FROM ONLY {}{}) TO STDOUT (FORMAT {})").format(
        sql.SQL(", ").join(map(sql.Identifier, columns)),
        sql.Identifier(str(schema), str(name)),
        sql.SQL(" WHERE ") + sql.SQL(" AND ").join(conditions) if conditions else sql.SQL(""),
        sql.SQL("binary" if binary else "text"),
    )


def _create_slot(walsender: Connection) -> tuple[Lsn, str]:
    """Create a temporary slot; return its consistent point and the name of the snapshot that belongs to it.

    The snapshot is exported until the next command on this connection.
    """
    slot = f"cdc_copy_{secrets.token_hex(6)}"
    export = "(SNAPSHOT 'export')" if walsender.info.server_version >= 150000 else "EXPORT_SNAPSHOT"
    command = f'CREATE_REPLICATION_SLOT "{slot}" TEMPORARY LOGICAL pgoutput {export}'
    with blockers_logged(walsender, slot), translated_errors():
        ((_, consistent_point, exported, _),) = walsender.execute(command).fetchall()
    return parse_lsn(consistent_point), exported


def _enter(connection: Connection, snapshot: str) -> None:
    with translated_errors():
        connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
        connection.execute(sql.SQL("SET TRANSACTION SNAPSHOT {}").format(snapshot))


_LEAVES: Final = """
SELECT root.oid::bigint, n.nspname, c.relname, greatest(c.reltuples, 0)::bigint,
       pg_relation_size(c.oid) / current_setting('block_size')::bigint, pg_table_size(c.oid),
       c.relfilenode IS DISTINCT FROM pg_relation_filenode(c.oid)
  FROM unnest(%s::oid[]) AS root (oid)
  JOIN LATERAL (SELECT root.oid UNION SELECT relid FROM pg_partition_tree(root.oid)) AS part (oid) ON true
  JOIN pg_class c ON c.oid = part.oid AND c.relkind = 'r'
  JOIN pg_namespace n ON n.oid = c.relnamespace
 ORDER BY part.oid
"""
"""`c` is read in the snapshot, the sizes and `pg_relation_filenode` tell of now: a rewrite (ALTER TABLE, TRUNCATE)
between snapshot and lock is not MVCC-safe, and would make the table look empty."""
