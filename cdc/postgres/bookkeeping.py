"""What must survive a crash, in schema `cdc` of the target: where a sink stands, its tables, what is left to build."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final, NamedTuple

import msgspec
from psycopg import sql
from psycopg.types.json import Jsonb

from cdc.change import TableName
from cdc.errors import FatalError
from cdc.position import Lsn, Position, as_lsn, format_lsn, parse_lsn
from cdc.postgres.connection import Connection, table_exists, while_doing
from cdc.postgres.dump import SchemaEntry
from cdc.postgres.shape import Followed, TableShape, decode

ANALYZE: Final = "ANALYZE"
FOREIGN_KEY: Final = "FOREIGN KEY"
"""Kinds of post-data besides those of the dump. A foreign key's SQL has the target's names, all other the source's."""

FORMAT: Final = 1
"""Of all tables of the schema. What later versions added so far is added where it is missing, and does not harm earlier
ones; what would, makes a table `cdc.format` whose only row holds a higher number."""

FORGOTTEN: Final = Lsn(2**64 - 1)
"""The copy position of a table that is no longer captured: every change comes before it, and is left out."""


class Mark(NamedTuple):
    """A table that a sink has begun to mirror.

    copied_at: `None` until its copy is complete. made: whether the sink made the table, and builds its indexes.
    """

    copied_at: Lsn | None
    made: bool


class PendingEntry(NamedTuple):
    """Something that is to be built. `relations` are the tables that it is about, by their names at the source.

    outdated: a table has changed since: it has to be looked up at the source again (`cdc.postgres.renewal`).
    object_id: see `SchemaEntry`; zeros also where an earlier version has recorded it.
    """

    ordinal: int
    kind: str
    name: str
    relations: tuple[TableName, ...]
    sql: str
    table: TableName | None = None
    outdated: bool = False
    object_id: tuple[int, int] = (0, 0)


EntryKey = tuple[str, str, TableName | None]
"""What makes an entry the same in two dumps: its kind, name and table."""


def key_of(entry: SchemaEntry) -> EntryKey:
    """The entry's key."""
    return entry.kind, entry.name, entry.table


class Bookkeeping:
    """One sink's rows, within transactions of the caller's."""

    def __init__(self, connection: Connection, sink: str) -> None:
        self._connection = connection
        self._sink = sink

    @property
    def exists(self) -> bool:
        """Whether there is any on this target."""
        return table_exists(self._connection, "cdc.post_data")

    def create(self) -> None:
        """Create schema and tables where they are not there."""
        with while_doing("creating the bookkeeping on the target"), self._connection.transaction():
            self._connection.execute("SELECT pg_advisory_xact_lock(hashtextextended('cdc.bookkeeping', 0))")
            if not self.exists:  # even IF NOT EXISTS wants the right to create a schema
                self._connection.execute(_TABLES)
                return
            for table, column, kind in _LATER_COLUMNS:  # here, too: only where it is missing
                if (
                    table_exists(self._connection, table)
                    and not self._connection.execute(_HAS, [table, column]).rowcount
                ):
                    alter = sql.SQL("ALTER TABLE {} ADD COLUMN {} {}")
                    self._connection.execute(alter.format(sql.SQL(table), sql.Identifier(column), sql.SQL(kind)))

    def position(self) -> Position | None:
        """Where the sink stands; `None` if it never wrote anything. Raises `FatalError` for a later format."""
        self._check_format()
        query = "SELECT queue_id, seq, position::text FROM cdc.positions WHERE sink = %s"
        rows = self._connection.execute(query, [self._sink]).fetchall()
        return Position(rows[0][0], rows[0][1], parse_lsn(rows[0][2])) if rows else None

    def _check_format(self) -> None:
        if not table_exists(self._connection, "cdc.format"):
            return
        (found,) = self._connection.execute("SELECT max(format) FROM cdc.format").fetchone() or (None,)
        if found != FORMAT:
            raise FatalError(
                f"the schema cdc of the target has format {found}, this version of cdc knows format {FORMAT}",
                hint="run the version of cdc that wrote it",
            )

    def begin(self, start: Position) -> None:
        """Store `start`, unless a position is stored."""
        self._connection.execute(
            "INSERT INTO cdc.positions (sink, queue_id, seq, position) VALUES (%s, %s, %s, %s) ON CONFLICT DO NOTHING",
            [self._sink, start.queue_id, start.seq, format_lsn(as_lsn(start.source))],
        )

    # tables

    def marks(self) -> dict[TableName, Mark]:
        """The tables of this sink."""
        query = "SELECT source_schema, source_table, position::text, made FROM cdc.tables WHERE sink = %s"
        return {
            TableName(schema, name): Mark(None if position is None else parse_lsn(position), made)
            for schema, name, position, made in self._connection.execute(query, [self._sink]).fetchall()
        }

    def mark(self, tables: Iterable[TableName], made: Collection[TableName]) -> None:
        """Note that tables are going to be copied, and which of them the sink has made just now."""
        with self._connection.cursor() as cursor:
            cursor.executemany(_MARK, [(self._sink, *table, table in made) for table in tables])

    def copied(self, table: TableName, position: Lsn, rows: int) -> None:
        """Note that a table is complete as of `position`."""
        self._connection.execute(
            """UPDATE cdc.tables SET position = %s, rows = %s, copied_at = now()
                WHERE sink = %s AND source_schema = %s AND source_table = %s""",
            [format_lsn(position), rows, self._sink, *table],
        )

    def forget(self, tables: Collection[TableName]) -> None:
        """Leave tables as they are from now on, and build nothing any more that is about them."""
        self._move(tables, FORGOTTEN)
        self._connection.execute(_NOTHING_LEFT_OUT, [self._sink, Jsonb(list(tables))])

    def copy_again(self, tables: Collection[TableName]) -> None:
        """Note that what is in these tables is of no use."""
        self._move(tables, None)

    def retry_from(self, tables: Collection[TableName], position: Lsn) -> None:
        """Note that parked changes of tables which commit below `position` are not to be applied any more."""
        with self._connection.cursor() as cursor:
            cursor.executemany(_RETRY_FROM, [(format_lsn(position), self._sink, *table) for table in tables])

    def retried_from(self) -> dict[TableName, Lsn]:
        """The positions that were given to `retry_from`. After `create`."""
        rows = self._connection.execute(_RETRIED_FROM, [self._sink]).fetchall()
        return {TableName(schema, name): parse_lsn(position) for schema, name, position in rows}

    def followed(self) -> dict[TableName, Followed]:
        """The shape that each table has followed, where one was kept. After `create`."""
        query = "SELECT source_schema, source_table, shape::text FROM cdc.tables WHERE sink = %s AND shape IS NOT NULL"
        rows = self._connection.execute(query, [self._sink]).fetchall()
        return {TableName(schema, name): decode(shape, Followed) for schema, name, shape in rows}

    def follow(self, table: TableName, followed: Followed) -> None:
        """Note the shape that a table has now."""
        self._connection.execute(
            "UPDATE cdc.tables SET shape = %s WHERE sink = %s AND source_schema = %s AND source_table = %s",
            [msgspec.json.encode(followed).decode(), self._sink, *table],
        )

    def follow_copies(self, shapes: Iterable[TableShape]) -> None:
        """Note the shapes of the tables that are going to be copied."""
        with self._connection.cursor() as cursor:
            cursor.executemany(
                """UPDATE cdc.tables SET shape = %s
                    WHERE sink = %s AND source_schema = %s AND source_table = %s AND position IS NULL""",
                [(msgspec.json.encode(Followed(shape)).decode(), self._sink, *shape.qualified) for shape in shapes],
            )

    def rename(self, old: TableName, new: TableName) -> None:
        """A table has another name at the source. What was kept under that name, of a table that is gone, goes."""
        forget = "DELETE FROM cdc.{} WHERE sink = %s AND source_schema = %s AND source_table = %s"
        move = """UPDATE cdc.{} SET source_schema = %s, source_table = %s
                   WHERE sink = %s AND source_schema = %s AND source_table = %s"""
        for table in ("tables", "post_data"):
            name = sql.Identifier(table)
            self._connection.execute(sql.SQL(forget).format(name), [self._sink, *new])
            self._connection.execute(sql.SQL(move).format(name), [*new, self._sink, *old])
        self.outdate([new, old])
        self._connection.execute(_RENAME_RELATION, [Jsonb(old), Jsonb(new), self._sink])

    def waiting(self, position: Lsn) -> bool:
        """Whether a table is incomplete, or the stream has not reached its copy at `position`."""
        copies = [mark.copied_at for mark in self.marks().values()]
        return any(at is None or position < at < FORGOTTEN for at in copies)

    def _move(self, tables: Collection[TableName], position: Lsn | None) -> None:
        with self._connection.cursor() as cursor:
            cursor.executemany(
                """UPDATE cdc.tables SET position = %s, rows = NULL, copied_at = NULL
                    WHERE sink = %s AND source_schema = %s AND source_table = %s""",
                [(None if position is None else format_lsn(position), self._sink, *table) for table in tables],
            )

    # what is left to build

    def recorded(self) -> set[EntryKey]:
        """All that is built, or to be built."""
        query = "SELECT kind, name, source_schema, source_table FROM cdc.post_data WHERE sink = %s"
        rows = self._connection.execute(query, [self._sink]).fetchall()
        return {(kind, name, TableName(*table) if table[0] is not None else None) for kind, name, *table in rows}

    def record(self, entries: Sequence[SchemaEntry]) -> None:
        """Note what is to be built, after all that was noted before; once more, if it is noted already."""
        keys = [(self._sink, kind, name, *(table or (None, None))) for kind, name, table in map(key_of, entries)]
        rows = [
            (*key, Jsonb(entry.relations), entry.sql, Jsonb(entry.object_id), self._sink)
            for key, entry in zip(keys, entries, strict=True)
        ]
        with self._connection.cursor() as cursor:
            cursor.executemany(_DELETE_ENTRY, keys)
            cursor.executemany(_INSERT_ENTRY, rows)

    def pending(self) -> list[PendingEntry]:
        """What is left to build, in order."""
        return [
            PendingEntry(
                ordinal,
                kind,
                name,
                relations=tuple(TableName(*relation) for relation in relations),
                sql=text,
                table=None if table is None else TableName(*table),
                outdated=outdated,
                object_id=tuple(object_id),
            )
            for ordinal, kind, name, relations, text, table, outdated, object_id in self._connection.execute(
                _PENDING, [self._sink]
            ).fetchall()
        ]

    def outdate(self, tables: Collection[TableName] | None = None) -> None:
        """What is left to build, and may be about these tables (`None`: any), was said of what they were before."""
        self._connection.execute(_OUTDATE, [self._sink, None if tables is None else Jsonb(list(tables))])

    def renew(self, entry: PendingEntry, found: SchemaEntry) -> None:
        """Build it, in its turn, as it is found at the source now."""
        self._connection.execute(
            """UPDATE cdc.post_data
                  SET kind = %s, name = %s, source_schema = %s, source_table = %s, relations = %s, sql = %s,
                      object_id = %s, outdated = false
                WHERE sink = %s AND ordinal = %s""",
            [
                *(found.kind, found.name, *(found.table or (None, None)), Jsonb(found.relations), found.sql),
                *(Jsonb(found.object_id), self._sink, entry.ordinal),
            ],
        )

    def leave_out(self, entry: PendingEntry) -> None:
        """Build it never."""
        self._connection.execute(
            "DELETE FROM cdc.post_data WHERE sink = %s AND ordinal = %s", [self._sink, entry.ordinal]
        )

    def built(self, entry: PendingEntry) -> None:
        """Note that it is built."""
        self._connection.execute(
            "UPDATE cdc.post_data SET done = true WHERE sink = %s AND ordinal = %s", [self._sink, entry.ordinal]
        )


def changed_tables(
    marks: Mapping[TableName, Mark], wanted: Collection[TableName]
) -> tuple[list[TableName], list[TableName]]:
    """Tables that are to be forgotten, and those that were and have come back."""
    forgotten = {table for table, mark in marks.items() if mark.copied_at == FORGOTTEN}
    return sorted(marks.keys() - forgotten - set(wanted)), sorted(forgotten & set(wanted))


_MARK: Final = """
INSERT INTO cdc.tables (sink, source_schema, source_table, made) VALUES (%s, %s, %s, %s)
    ON CONFLICT (sink, source_schema, source_table) DO UPDATE SET made = cdc.tables.made OR excluded.made
"""

_NOTHING_LEFT_OUT: Final = """
DELETE FROM cdc.post_data
 WHERE sink = %s AND NOT done
   AND EXISTS (SELECT FROM jsonb_array_elements(relations) AS relation
                WHERE relation IN (SELECT jsonb_array_elements(%s)))
"""

_DELETE_ENTRY: Final = """
DELETE FROM cdc.post_data
 WHERE sink = %s AND kind = %s AND name = %s
   AND source_schema IS NOT DISTINCT FROM %s AND source_table IS NOT DISTINCT FROM %s
"""

_INSERT_ENTRY: Final = """
INSERT INTO cdc.post_data (sink, kind, name, source_schema, source_table, relations, sql, object_id, ordinal)
SELECT %s, %s, %s, %s, %s, %s, %s, %s, coalesce(max(ordinal) + 1, 0) FROM cdc.post_data WHERE sink = %s
"""

_PENDING: Final = """
SELECT ordinal, kind, name, relations, sql,
       CASE WHEN source_table IS NOT NULL THEN ARRAY[source_schema, source_table] END,
       outdated, coalesce(object_id, '[0, 0]')
  FROM cdc.post_data
 WHERE sink = %s AND NOT done
 ORDER BY ordinal
"""

_OUTDATE: Final = f"""
UPDATE cdc.post_data p SET outdated = true
 WHERE sink = %s AND NOT done AND kind NOT IN ('{ANALYZE}', '{FOREIGN_KEY}')
   AND EXISTS (SELECT FROM jsonb_array_elements(relations) AS relation
                WHERE relation IN (SELECT jsonb_array_elements(coalesce(%s, relations)))
                   OR NOT EXISTS (SELECT FROM cdc.tables t  -- a partition: of any of them
                                   WHERE t.sink = p.sink AND t.source_schema = relation->>0
                                     AND t.source_table = relation->>1))
"""  # noqa: S608 - constants

_RENAME_RELATION: Final = """
UPDATE cdc.post_data
   SET relations = (SELECT coalesce(jsonb_agg(CASE relation WHEN %s THEN %s ELSE relation END), '[]')
                      FROM jsonb_array_elements(relations) AS relation)
 WHERE sink = %s AND NOT done
"""

_RETRY_FROM: Final = (
    "UPDATE cdc.tables SET retried_from = %s WHERE sink = %s AND source_schema = %s AND source_table = %s"
)

_RETRIED_FROM: Final = """
SELECT source_schema, source_table, retried_from::text FROM cdc.tables WHERE sink = %s AND retried_from IS NOT NULL
"""

_LATER_COLUMNS: Final = (
    ("cdc.tables", "shape", "jsonb"),
    ("cdc.tables", "retried_from", "pg_lsn"),
    ("cdc.resyncs", "since", "pg_lsn"),
    ("cdc.post_data", "outdated", "boolean NOT NULL DEFAULT false"),
    ("cdc.post_data", "object_id", "jsonb"),
)
"""Those that earlier versions did not have."""

_HAS: Final = "SELECT FROM pg_attribute WHERE attrelid = to_regclass(%s) AND attname = %s"

_TABLES: Final = """
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
    made boolean NOT NULL,
    position pg_lsn,
    rows bigint,
    copied_at timestamptz,
    shape jsonb,
    retried_from pg_lsn,
    PRIMARY KEY (sink, source_schema, source_table)
);
CREATE TABLE IF NOT EXISTS cdc.post_data (
    sink text,
    ordinal int,
    kind text NOT NULL,
    name text NOT NULL,
    source_schema text,
    source_table text,
    relations jsonb NOT NULL,
    sql text NOT NULL,
    done boolean NOT NULL DEFAULT false,
    outdated boolean NOT NULL DEFAULT false,
    object_id jsonb,
    PRIMARY KEY (sink, ordinal)
);
"""
