"""Rows of a stale mirror that stand in the way of right ones: they have a unique value that has another owner by now.

While a mirror is not consistent, a row that the source has changed long ago may still hold a value which another row
has since got. Rows that are right never collide, as they do not at the source: of two that collide, the one which is
not being written is stale, so it may be deleted. It comes back, as it should be, when its turn comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec
from psycopg import sql
from psycopg.sql import SQL, Identifier

from cdc.change import TableName
from cdc.postgres.connection import Connection


class UniqueIndex(msgspec.Struct, frozen=True):
    """A unique index. expressions: what is unique, as SQL; where: of which rows.

    nulls_equal: whether NULL is a value that only one row may have (NULLS NOT DISTINCT, of PostgreSQL 15 and later).
    """

    expressions: tuple[str, ...]
    where: str | None
    nulls_equal: bool


def unique_indexes(connection: Connection, table: TableName, key: Sequence[str]) -> list[UniqueIndex]:
    """Those of a table that are checked at once, but for that of the key by which rows are known."""
    rows = connection.execute(_UNIQUE, [*table, sorted(key)]).fetchall()
    return [UniqueIndex(tuple(expressions), where, nulls_equal) for expressions, where, nulls_equal in rows]


def checked_late(connection: Connection, table: TableName) -> bool:
    """Whether a table has what collides in other ways: deferrable or exclusion constraints."""
    ((found,),) = connection.execute(_LATE, [*table]).fetchall()
    return bool(found)


def remove_conflicts(
    connection: Connection,
    table: TableName,
    key: Sequence[str],
    indexes: Sequence[UniqueIndex],
    stage: sql.Composable,
    *,
    nulls_known: bool = True,
) -> int:
    """Delete the rows that collide with those in `stage`, but for those with the same key; returns how many.

    nulls_known: whether a NULL in `stage` is one, and not a value that nobody knows.
    """
    removed = 0
    same = SQL(" AND ").join(SQL("s.{0} = t.{0}").format(Identifier(name)) for name in key)
    for index in indexes:
        parts = {
            "table": Identifier(*table),
            "expressions": SQL(", ").join(map(SQL, index.expressions)),
            "with_null": SQL(" OR ").join(SQL("({}) IS NULL").format(SQL(each)) for each in index.expressions),
            "where": SQL(index.where or "true"),
            "stage": stage,
            "same": same,
        }
        for query in (_COLLIDING, _COLLIDING_WITH_NULL) if index.nulls_equal and nulls_known else (_COLLIDING,):
            removed += connection.execute(SQL(query).format(**parts)).rowcount
    return removed


_COLLIDING: Final = """
DELETE FROM {table} AS t WHERE ({expressions}) IN (SELECT {expressions} FROM {stage} AS s WHERE {where})
   AND ({where}) AND NOT EXISTS (SELECT FROM {stage} AS s WHERE {same})
"""
_COLLIDING_WITH_NULL: Final = """
DELETE FROM {table} AS t WHERE ({with_null}) AND ({where})
   AND EXISTS (SELECT {expressions} INTERSECT SELECT {expressions} FROM {stage} AS s WHERE ({with_null}) AND ({where}))
   AND NOT EXISTS (SELECT FROM {stage} AS s WHERE {same})
"""
"""The same for what `IN` never finds. Few rows have NULL there, since no two may have it beside the same values."""

_UNIQUE: Final = """
SELECT (SELECT array_agg(pg_get_indexdef(i.indexrelid, n, true) ORDER BY n) FROM generate_series(1, i.indnkeyatts) n),
       pg_get_expr(i.indpred, i.indrelid, true), coalesce((to_jsonb(i) ->> 'indnullsnotdistinct')::bool, false)
  FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE n.nspname = %s AND c.relname = %s AND i.indisunique AND i.indimmediate AND i.indislive
   AND (i.indexprs IS NOT NULL OR i.indpred IS NOT NULL OR %s::text[] <>
        (SELECT array_agg(a.attname::text ORDER BY a.attname::text COLLATE "C") FROM pg_attribute a
          WHERE a.attrelid = c.oid AND a.attnum = ANY (i.indkey[0:i.indnkeyatts - 1])))
"""

_LATE: Final = """
SELECT EXISTS (SELECT FROM pg_constraint o
                 JOIN pg_class c ON c.oid = o.conrelid JOIN pg_namespace n ON n.oid = c.relnamespace
                WHERE n.nspname = %s AND c.relname = %s
                  AND (o.contype = 'x' OR o.contype IN ('p', 'u') AND o.condeferrable))
"""
