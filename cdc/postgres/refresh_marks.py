"""How far the refresh of a mirror's tables is: a row a table in schema `cdc` of the target, gone when it is done."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

import msgspec

from cdc.change import TableName
from cdc.position import Lsn, Position, as_lsn, format_lsn, format_position, parse_lsn
from cdc.postgres.bookkeeping import FORGOTTEN
from cdc.postgres.connection import Connection, table_exists


class RefreshMark(msgspec.Struct, frozen=True):
    """A table that is being refreshed. done_key: all rows up to this key are right; `None` before the first part.

    rows: read of the source so far; the others are what had to be written on the mirror. since: the position of the
    first snapshot it was read in: rows that are right are so with all that commits below.
    """

    table: TableName
    done_key: tuple[str, ...] | None = None
    rows: int = 0
    inserted: int = 0
    updated: int = 0
    deleted: int = 0
    since: Lsn | None = None


class RefreshMarks:
    """One sink's rows, within transactions of the caller's."""

    def __init__(self, connection: Connection, sink: str) -> None:
        self._connection = connection
        self._sink = sink

    def read(self) -> dict[TableName, RefreshMark]:
        """The tables that are not refreshed yet."""
        if not self._exists():
            return {}
        marks = {}
        for *table, key, rows, inserted, updated, deleted, since in self._connection.execute(_READ, [self._sink]):
            name, counts = TableName(*table), (rows, inserted, updated, deleted)
            marks[name] = RefreshMark(name, tuple(key) if key else None, *counts, parse_lsn(since) if since else None)
        return marks

    def want(self, tables: Collection[TableName]) -> None:
        """Let tables be refreshed, from their beginning."""
        if not self._exists():  # even IF NOT EXISTS wants the right to create something
            self._connection.execute(_TABLE)
        self.done(tables)
        with self._connection.cursor() as cursor:
            cursor.executemany(
                "INSERT INTO cdc.resyncs (sink, source_schema, source_table) VALUES (%s, %s, %s)",
                [(self._sink, *table) for table in tables],
            )

    def put(self, mark: RefreshMark) -> None:
        """Store how far a table is."""
        key = None if mark.done_key is None else list(mark.done_key)
        counts = [mark.rows, mark.inserted, mark.updated, mark.deleted]
        self._connection.execute(_PUT, [key, *counts, format_position(mark.since), self._sink, *mark.table])

    def finish(self, mark: RefreshMark) -> None:
        """Note that a table is refreshed: as after a copy, no earlier change of it is to be applied any more.

        It may have been parked, and would be done to rows that later ones have made what they are.
        """
        self.done([mark.table])
        position = [format_position(mark.since), self._sink, *mark.table, format_lsn(FORGOTTEN)]
        self._connection.execute(_HOLDS, position)

    def done(self, tables: Collection[TableName]) -> None:
        """Note that tables are refreshed, or need not be any more."""
        if tables and self._exists():
            with self._connection.cursor() as cursor:
                cursor.executemany(_DONE, [(self._sink, *table) for table in tables])

    def restart(self, table: TableName) -> None:
        """Let a table that is being refreshed begin once more: what was kept is no key of it any longer."""
        if self._exists():
            self._connection.execute(_RESTART_TABLE, [self._sink, *table])

    def rename(self, old: TableName, new: TableName) -> None:
        """A table has another name at the source. What was kept under that name is about none that is there."""
        if self._exists():
            self.done([new])
            self._connection.execute(_RENAME, [*new, self._sink, *old])

    def begin_anew(self, start: Position) -> None:
        """Let the mirror stand at `start`, whatever it holds: every table is as of before, and must be refreshed."""
        self.replayed()
        position = format_lsn(as_lsn(start.source))
        self._connection.execute(_RESTART, [self._sink, start.queue_id, start.seq, position])
        self._connection.execute(_TABLES_FROM, [position, self._sink, format_lsn(FORGOTTEN)])

    # a replay

    def replaying(self) -> Lsn | None:
        """Where the mirror stood before it was taken back: until it is there again its rows are of an earlier time."""
        if not table_exists(self._connection, "cdc.replays"):
            return None
        rows = self._connection.execute("SELECT until::text FROM cdc.replays WHERE sink = %s", [self._sink]).fetchall()
        return parse_lsn(rows[0][0]) if rows else None

    def rewind(self, position: Position) -> None:
        """Let the mirror stand at an earlier position, and remember where it stood."""
        if self.replaying() is None:
            self._connection.execute(_REPLAYS)
            self._connection.execute(_REPLAY, [self._sink])
        lsn = format_lsn(as_lsn(position.source))
        self._connection.execute(_REWIND, [position.queue_id, position.seq, lsn, self._sink])

    def replayed(self) -> None:
        """Note that it is there again."""
        if self.replaying() is not None:
            self._connection.execute("DELETE FROM cdc.replays WHERE sink = %s", [self._sink])

    def _exists(self) -> bool:
        return table_exists(self._connection, "cdc.resyncs")


_TABLE: Final = """
CREATE TABLE IF NOT EXISTS cdc.resyncs (
    sink text,
    source_schema text,
    source_table text,
    done_key text[],
    rows bigint NOT NULL DEFAULT 0,
    inserted bigint NOT NULL DEFAULT 0,
    updated bigint NOT NULL DEFAULT 0,
    deleted bigint NOT NULL DEFAULT 0,
    since pg_lsn,
    PRIMARY KEY (sink, source_schema, source_table)
)
"""
_READ: Final = """
SELECT source_schema, source_table, done_key, rows, inserted, updated, deleted, since::text
  FROM cdc.resyncs
 WHERE sink = %s ORDER BY source_schema, source_table
"""
_PUT: Final = """
UPDATE cdc.resyncs SET done_key = %s, rows = %s, inserted = %s, updated = %s, deleted = %s, since = %s
 WHERE sink = %s AND source_schema = %s AND source_table = %s
"""
_REPLAYS: Final = "CREATE TABLE IF NOT EXISTS cdc.replays (sink text PRIMARY KEY, until pg_lsn NOT NULL)"
_REPLAY: Final = "INSERT INTO cdc.replays SELECT sink, position FROM cdc.positions WHERE sink = %s"
_REWIND: Final = "UPDATE cdc.positions SET queue_id = %s, seq = %s, position = %s WHERE sink = %s"
_HOLDS: Final = """
UPDATE cdc.tables SET position = greatest(position, %s)
 WHERE sink = %s AND source_schema = %s AND source_table = %s AND position <> %s
"""
_DONE: Final = "DELETE FROM cdc.resyncs WHERE sink = %s AND source_schema = %s AND source_table = %s"

_RESTART_TABLE: Final = """
UPDATE cdc.resyncs SET done_key = NULL WHERE sink = %s AND source_schema = %s AND source_table = %s
"""
_RENAME: Final = """
UPDATE cdc.resyncs SET source_schema = %s, source_table = %s
 WHERE sink = %s AND source_schema = %s AND source_table = %s
"""

_RESTART: Final = """
INSERT INTO cdc.positions (sink, queue_id, seq, position) VALUES (%s, %s, %s, %s)
    ON CONFLICT (sink) DO UPDATE
   SET queue_id = excluded.queue_id, seq = excluded.seq, position = excluded.position, updated_at = now()
"""
_TABLES_FROM: Final = """
UPDATE cdc.tables SET position = %s WHERE sink = %s AND position IS NOT NULL AND position <> %s
"""
