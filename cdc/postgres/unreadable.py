"""Tables that the source's role may not read: pg_dump is told to leave them alone, as it would fail to lock them.

It then no longer lists them, nor that anything depends on them: so that is asked of the catalog.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final, NamedTuple

from psycopg import sql

from cdc.change import TableName
from cdc.postgres.connection import Connection, translated_errors
from cdc.postgres.schema import read_tables


class Unreadable(NamedTuple):
    """Tables, and all that cannot be without them (views, foreign keys, functions), as (catalog, OID)."""

    tables: Sequence[TableName]
    dependent: Collection[tuple[int, int]]

    @property
    def pg_dump_options(self) -> list[str]:
        """Patterns in double quotes stand for just one name."""
        return [f"--exclude-table={sql.Identifier(*name).as_string(None)}" for name in self.tables]


def read_unreadable(connection: Connection, captured: Collection[TableName]) -> Unreadable:
    """What is neither captured nor readable for this role; pg_dump itself complains of what is captured and is not."""
    oids = [table.oid for name, table in read_tables(connection).items() if name in captured]
    with translated_errors():
        found = connection.execute(_UNREADABLE, {"captured": oids}).fetchall()
        tables = [oid for oid, _, _ in found]
        dependent = connection.execute(_DEPENDENT, {"tables": tables}).fetchall() if tables else []
    return Unreadable([TableName(schema, name) for _, schema, name in found], {(at, oid) for at, oid in dependent})


_UNREADABLE: Final = """
SELECT c.oid, n.nspname::text, c.relname::text
  FROM pg_class c
  JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relkind IN ('r', 'p') AND c.relpersistence <> 't' AND c.oid >= 16384
   AND NOT (has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'SELECT'))
   AND c.oid <> ALL (%(captured)s::oid[])
   AND c.oid NOT IN (SELECT relid FROM unnest(%(captured)s::oid[]) AS t, pg_partition_tree(t))
 ORDER BY 2, 3
"""

# a view's rule depends on what it reads, and not the view itself
_DEPENDENT: Final = """
WITH RECURSIVE gone (catalog, oid) AS (
    SELECT 'pg_class'::regclass::oid, t FROM unnest(%(tables)s::oid[]) AS t
    UNION
    SELECT without.catalog, without.oid
      FROM gone,
           LATERAL (SELECT d.classid, d.objid FROM pg_depend d
                     WHERE d.refclassid = gone.catalog AND d.refobjid = gone.oid
                     UNION ALL
                    SELECT 'pg_class'::regclass, r.ev_class FROM pg_rewrite r
                     WHERE gone.catalog = 'pg_rewrite'::regclass AND r.oid = gone.oid) AS without (catalog, oid)
)
SELECT catalog::bigint, oid::bigint FROM gone
"""
