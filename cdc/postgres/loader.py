"""Writing copied rows into a PostgreSQL mirror, by COPY."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Final

import psycopg
from psycopg import sql

from cdc.change import TableName
from cdc.config import SinkConfig
from cdc.postgres.connection import Connection, while_doing

_CANNOT_BEGIN_ANEW: Final = (
    psycopg.errors.LockNotAvailable,  # somebody is reading
    psycopg.errors.FeatureNotSupported,  # another table refers to it
    psycopg.errors.WrongObjectType,  # it has partitions
    psycopg.errors.InsufficientPrivilege,
)


class PostgresLoader:
    """A `cdc.sink.Loader`.

    Rows of tables that are written whole come as VACUUM FREEZE would leave them (PostgreSQL manual, COPY). Of others,
    whoever reads them first, mostly an index that is built, writes every page again to mark its rows as visible to all,
    and where there are checksums logs it as well: measured, half as long again for the copy, and 70 % more WAL.
    """

    def __init__(
        self,
        connection: Connection,
        config: SinkConfig,
        columns: Mapping[TableName, Mapping[str, str]],
        made: Collection[TableName],
    ) -> None:
        """made: the tables that are there only because we have made them; of others, readers are not kept waiting."""
        self._connection = connection
        self._config = config
        self._columns = columns
        self._made = made

    def load(self, table: TableName, blocks: Iterable[bytes], *, binary: bool, whole: bool) -> int:
        """Write one chunk in a transaction of its own and return its number of rows."""
        with while_doing(f"copying {table}"), self._connection.transaction(), self._connection.cursor() as cursor:
            frozen = whole and table in self._made and self._begin_anew(table)
            with cursor.copy(self._query(table, binary=binary, frozen=frozen)) as copy:
                for block in blocks:
                    copy.write(block)
            return cursor.rowcount

    def _query(self, table: TableName, *, binary: bool, frozen: bool) -> sql.Composed:
        columns = sql.SQL(", ").join(map(sql.Identifier, self._columns[table]))
        return sql.SQL("COPY {}{} FROM STDIN (FORMAT {}, FREEZE {})").format(
            sql.Identifier(*self._config.target_name(table)),
            sql.SQL(" ({})").format(columns) if self._columns[table] else sql.SQL(""),
            sql.SQL("binary" if binary else "text"),
            sql.SQL("true" if frozen else "false"),
        )

    def _begin_anew(self, table: TableName) -> bool:
        """Make an empty table anew within the transaction, as its rows must be for that; whether it could be done."""
        name = sql.Identifier(*self._config.target_name(table))
        try:
            with self._connection.transaction():
                self._connection.execute("SET LOCAL lock_timeout = '1s'")
                self._connection.execute(sql.SQL("LOCK TABLE ONLY {} IN ACCESS EXCLUSIVE MODE").format(name))
                ((filled,),) = self._connection.execute(
                    sql.SQL("SELECT EXISTS (SELECT FROM ONLY {})").format(name)
                ).fetchall()
                if not filled:
                    self._connection.execute(sql.SQL("TRUNCATE ONLY {}").format(name))
                return not filled
        except _CANNOT_BEGIN_ANEW:
            return False

    def close(self) -> None:
        """Disconnect. Safe to call twice."""
        self._connection.close()
