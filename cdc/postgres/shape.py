"""A table's shape at the source: what the mirror's table is made to follow.

The same JSON is written by the source's event triggers (see `cdc.postgres.ddl_capture`), by the source itself where
there are none, and kept in the target's bookkeeping.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final, TypeVar

import msgspec

from cdc.change import Column, Table, TableName
from cdc.errors import DecodeError
from cdc.postgres.connection import Connection, translated_errors
from cdc.postgres.schema import PUBLISHABLE

T = TypeVar("T")

REWRITE_OF_TYPES: Final = 4
"""AT_REWRITE_COLUMN_REWRITE in `pg_event_trigger_table_rewrite_reason()`: values were computed anew."""


class ColumnShape(msgspec.Struct, frozen=True):
    """A column. `attnum` stays what it is as long as the column exists, whatever it is called.

    type: as `format_type` writes it, with schema unless in pg_catalog. collation: qualified, if it is not the type's.
    default: SQL; of a generated column its expression.
    missing: the text of the value that rows have which are older than the column (PostgreSQL computed it once); `None`
        where that is NULL, or where the rows were rewritten since.
    generated: `s` stored, `v` virtual, empty otherwise. identity: `a` always, `d` by default, empty otherwise.
    """

    attnum: int
    name: str
    type: str
    type_oid: int
    not_null: bool = False
    default: str | None = None
    missing: str | None = None
    generated: str = ""
    identity: str = ""
    collation: str | None = None


class TableShape(msgspec.Struct, frozen=True):
    """A table, known by its `oid`.

    columns: by `attnum`. primary_key: column names in key order.
    filenode: another one after every rewrite of the rows (also TRUNCATE, VACUUM FULL); of partitions the sum.
    rewrite: reasons of the rewrite that led here, as the event trigger tells, 0 where there was none; `None`: unknown.
    dropped: the table is no more.
    """

    oid: int
    schema: str
    name: str
    filenode: int = 0
    columns: tuple[ColumnShape, ...] = ()
    primary_key: tuple[str, ...] = ()
    rewrite: int | None = None
    dropped: bool = False

    @property
    def qualified(self) -> TableName:
        """The table's name."""
        return TableName(self.schema, self.name)

    def described(self) -> Table:
        """As a Relation message tells it, if all columns are published and it has the identity DEFAULT."""
        columns = tuple(
            Column(column.name, column.type_oid, column.name in self.primary_key)
            for column in self.columns
            if not column.generated
        )
        return Table(self.schema, self.name, columns, oid=self.oid)


class Followed(msgspec.Struct, frozen=True):
    """The shape that a mirror's table has followed, and the position of the transaction that brought it."""

    shape: TableShape
    position: int = 0


def decode(text: str | bytes, kind: type[T]) -> T:
    """Read a shape, or what contains one, from its JSON. Raises `DecodeError`."""
    try:
        return msgspec.json.decode(text, type=kind)
    except msgspec.DecodeError as exc:
        raise DecodeError(f"not the shape of a table: {exc}") from exc


def read_shapes(connection: Connection, oids: Collection[int] | None = None) -> list[TableShape]:
    """The shapes of some tables, or of all that can be published; those that are gone are left out."""
    with translated_errors():
        rows = connection.execute(_SHAPES, [None if oids is None else list(oids)]).fetchall()
    return [decode(text, TableShape) for (text,) in rows]


def _shape(filenode: str, default: str, missing: str) -> str:
    return f"""
json_build_object(
    'oid', c.oid::bigint, 'schema', n.nspname, 'name', c.relname, 'filenode', {filenode},
    'primary_key', (SELECT coalesce(json_agg(a.attname ORDER BY k.ordinality), '[]')
        FROM pg_index i, unnest(i.indkey[0:i.indnkeyatts - 1]) WITH ORDINALITY AS k (attnum, ordinality)
        JOIN pg_attribute a ON a.attnum = k.attnum
       WHERE i.indrelid = c.oid AND i.indisprimary AND a.attrelid = c.oid),
    'columns', (SELECT coalesce(json_agg(json_build_object(
            'attnum', a.attnum, 'name', a.attname,
            'type', format_type(a.atttypid, a.atttypmod), 'type_oid', a.atttypid::bigint,
            'not_null', a.attnotnull, 'default', {default}, 'missing', {missing},
            'generated', a.attgenerated, 'identity', a.attidentity,
            'collation', (SELECT quote_ident(cn.nspname) || '.' || quote_ident(col.collname)
                            FROM pg_collation col JOIN pg_namespace cn ON cn.oid = col.collnamespace
                           WHERE col.oid = a.attcollation AND a.attcollation <> t.typcollation)
        ) ORDER BY a.attnum), '[]')
        FROM pg_attribute a
        JOIN pg_type t ON t.oid = a.atttypid
        LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
       WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped)
)
"""  # noqa: S608 - parts of this file


SHAPE: Final = _shape(
    """CASE WHEN c.relkind = 'p'
        THEN (SELECT coalesce(sum(pg_relation_filenode(part.relid)::bigint), 0)
                FROM pg_partition_tree(c.oid) AS part WHERE part.isleaf)
        ELSE pg_relation_filenode(c.oid)::bigint END""",
    "pg_get_expr(d.adbin, d.adrelid)",
    """CASE WHEN c.relkind = 'p'
                THEN (SELECT min((leaf.attmissingval::text::text[])[1])
                        FROM pg_partition_tree(c.oid) AS part
                        JOIN pg_attribute leaf ON leaf.attrelid = part.relid AND leaf.attname = a.attname
                       WHERE part.isleaf AND leaf.atthasmissing)
                ELSE (a.attmissingval::text::text[])[1] END""",
)
"""The shape of the row `c` of pg_class, in schema `n`. Wants the settings of `cdc.postgres.connection`.

Takes a lock of the table, to write a default as text (from version 17 on), and of its partitions.
"""

TRACE: Final = _shape("NULL", "d.adbin::text", "CASE WHEN c.relkind <> 'p' THEN a.attmissingval::text END")
"""The same, only to tell whether it has changed (but for the file, which each TRUNCATE does). Waits for no lock."""

_SHAPES: Final = f"""
SELECT {SHAPE}::text
  FROM pg_class c
  JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE {PUBLISHABLE} AND c.oid = ANY (coalesce(%s::oid[], ARRAY[c.oid]))
 ORDER BY c.oid
"""  # noqa: S608 - constants
