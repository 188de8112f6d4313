"""What PostgreSQL's catalog says about tables: columns, keys, identity, types."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from cdc.change import TableName
from cdc.postgres.connection import Connection, translated_errors
from cdc.source import Estimate

FIRST_USER_OID: Final = 16384
"""FirstNormalObjectId: types below have the same OID on every server."""

_TEXT_ONLY: Final = frozenset({142}) | frozenset({24, 2202, 2203, 2204, 2205, 2206, 3734, 3769, 4089, 4096, 4191})
"""xml (its binary form carries an encoding declaration) and the reg* types (their binary form is a bare OID)."""


class SchemaColumn(msgspec.Struct, frozen=True):
    """A column.

    type_name: as `format_type` writes it, with schema unless in pg_catalog; base_type_name: without modifier (`bpchar`,
    since `character` alone means a single one).
    generated: `s` stored, `v` virtual, empty otherwise. identity: `a` always, `d` by default, empty otherwise.
    binary_exact: whether COPY's binary format carries it exactly to another server.
    """

    name: str
    type_oid: int
    type_name: str
    base_type_name: str
    not_null: bool
    generated: str
    identity: str
    binary_exact: bool


class SchemaTable(msgspec.Struct, frozen=True):
    """A table that can be published: plain or partitioned, permanent, no partition itself.

    primary_key: column names in key order; empty without one. key_deferrable: PostgreSQL does not accept a deferrable
    key as replica identity. identity: `d`, `i`, `f` or `n`. identity_columns: what UPDATE and DELETE send as the
    row's identity; empty where they send none.
    """

    oid: int
    name: TableName
    partitioned: bool
    columns: tuple[SchemaColumn, ...]
    primary_key: tuple[str, ...]
    key_deferrable: bool
    identity: str
    identity_columns: tuple[str, ...]
    row_security: bool

    @property
    def replicated_columns(self) -> tuple[SchemaColumn, ...]:
        """The columns that travel: a generated one is computed by each server itself."""
        return tuple(column for column in self.columns if not column.generated)


def read_tables(connection: Connection) -> dict[TableName, SchemaTable]:
    """All tables of the database that can be published, system schemas and cdc's own left out. Waits for no lock."""
    with translated_errors():
        columns: dict[int, list[dict[str, Any]]] = {}
        for row in connection.execute(_COLUMNS).fetchall():
            columns.setdefault(row[0], []).append(dict(zip(_COLUMN_FIELDS, row[1:], strict=True)))
        types = {
            row[0]: _Type(*row)
            for row in connection.execute(
                _TYPES, [list({column["type_oid"] for table in columns.values() for column in table})]
            ).fetchall()
        }
        tables = [_table(row, columns.get(row[0], []), types) for row in connection.execute(_TABLES).fetchall()]
    return {table.name: table for table in tables}


def read_estimates(connection: Connection) -> dict[TableName, Estimate]:
    """How large the same tables are: rows by the planner's statistics, bytes with TOAST; with all partitions.

    Waits for whoever holds one of them exclusively.
    """
    with translated_errors():
        found = connection.execute(_ESTIMATES).fetchall()
    return {TableName(schema, name): Estimate(rows, size) for schema, name, rows, size in found}


def database_identity(connection: Connection) -> tuple[str, str]:
    """What no other database has: the cluster's system identifier, and the name within it."""
    with translated_errors():
        row = connection.execute(
            "SELECT system_identifier::text, current_database() FROM pg_control_system()"
        ).fetchone()
    assert row is not None
    return row[0], row[1]


def unsupported_relations(connection: Connection) -> list[tuple[TableName, str]]:
    """Relations that logical replication does not carry, and what each is (`view`, `foreign table`...)."""
    with translated_errors():
        rows = connection.execute(_UNSUPPORTED).fetchall()
    return [(TableName(schema, name), kind) for schema, name, kind in rows]


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


class _Type(msgspec.Struct, frozen=True):
    oid: int
    kind: str
    is_array: bool
    has_receive: bool
    related: int | None  # base type of a domain, element of an array, subtype of a range, range of a multirange


def _binary_exact(oid: int, types: Mapping[int, _Type]) -> bool:
    found = types.get(oid)
    if found is None or oid in _TEXT_ONLY or not found.has_receive:
        return False
    if found.kind == "e":
        return True  # travels as its label
    if found.kind in "drm":
        return found.related is not None and _binary_exact(found.related, types)
    if found.is_array:  # carries the OID of its element type
        return found.related is not None and found.related < FIRST_USER_OID and _binary_exact(found.related, types)
    return found.kind == "b" and oid < FIRST_USER_OID


def _table(row: tuple[Any, ...], columns: list[dict[str, Any]], types: Mapping[int, _Type]) -> SchemaTable:
    oid, schema, name, partitioned, identity, primary_key, key_deferrable, index_columns, security = row
    if identity == "f":
        identity_columns = tuple(column["name"] for column in columns if not column["generated"])
    elif identity == "i":
        identity_columns = tuple(index_columns or ())
    elif identity == "d" and not key_deferrable:
        identity_columns = tuple(primary_key or ())
    else:
        identity_columns = ()
    return SchemaTable(
        oid=oid,
        name=TableName(schema, name),
        partitioned=partitioned,
        columns=tuple(
            SchemaColumn(**column, binary_exact=_binary_exact(column["type_oid"], types)) for column in columns
        ),
        primary_key=tuple(primary_key or ()),
        key_deferrable=bool(key_deferrable),
        identity=identity,
        identity_columns=identity_columns,
        row_security=security,
    )


_WIDER: Final = {
    "smallint": ("integer", "bigint", "numeric"),
    "integer": ("bigint", "numeric"),
    "bigint": ("numeric",),
}

PUBLISHABLE: Final = """
    c.relkind IN ('r', 'p') AND NOT c.relispartition AND c.relpersistence = 'p'
    AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'cdc') AND n.nspname !~ '^pg_'
"""
"""Which rows `c` of pg_class, with their schema `n`, are tables that can be published."""

_TABLES: Final = f"""
SELECT c.oid, n.nspname, c.relname, c.relkind = 'p', c.relreplident::text,
       key.columns, key.deferrable, replident.columns, row_security_active(c.oid)
  FROM pg_class c
  JOIN pg_namespace n ON n.oid = c.relnamespace
  LEFT JOIN LATERAL (
       SELECT array_agg(a.attname::text ORDER BY k.ordinality) AS columns, bool_or(NOT i.indimmediate) AS deferrable
         FROM pg_index i, unnest(i.indkey[0:i.indnkeyatts - 1]) WITH ORDINALITY AS k(attnum, ordinality)
         JOIN pg_attribute a ON a.attnum = k.attnum
        WHERE i.indrelid = c.oid AND i.indisprimary AND a.attrelid = c.oid
       ) AS key ON true
  LEFT JOIN LATERAL (
       SELECT array_agg(a.attname::text ORDER BY k.ordinality) AS columns
         FROM pg_index i, unnest(i.indkey[0:i.indnkeyatts - 1]) WITH ORDINALITY AS k(attnum, ordinality)
         JOIN pg_attribute a ON a.attnum = k.attnum
        WHERE i.indrelid = c.oid AND i.indisreplident AND a.attrelid = c.oid
       ) AS replident ON true
 WHERE {PUBLISHABLE}
 ORDER BY n.nspname, c.relname
"""  # noqa: S608 - a constant

_ESTIMATES: Final = f"""
SELECT n.nspname, c.relname,
       coalesce(sum(greatest(p.reltuples, 0)), 0)::bigint, coalesce(sum(pg_table_size(p.oid)), 0)::bigint
  FROM pg_class c
  JOIN pg_namespace n ON n.oid = c.relnamespace
  JOIN pg_class p ON p.oid = c.oid OR (c.relkind = 'p' AND p.oid IN (SELECT relid FROM pg_partition_tree(c.oid)))
 WHERE {PUBLISHABLE}
 GROUP BY c.oid, n.nspname, c.relname
"""  # noqa: S608 - a constant

_COLUMN_FIELDS: Final = ("name", "type_oid", "type_name", "base_type_name", "not_null", "generated", "identity")

_COLUMNS: Final = f"""
SELECT c.oid, a.attname, a.atttypid, format_type(a.atttypid, a.atttypmod), format_type(a.atttypid, -1),
       a.attnotnull,
       a.attgenerated::text, a.attidentity::text
  FROM pg_attribute a
  JOIN pg_class c ON c.oid = a.attrelid
  JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE {PUBLISHABLE} AND a.attnum > 0 AND NOT a.attisdropped
 ORDER BY c.oid, a.attnum
"""  # noqa: S608 - a constant

_TYPES: Final = """
WITH RECURSIVE one AS (
    SELECT t.oid, t.typtype::text AS kind, t.typcategory = 'A' AND t.typelem <> 0 AS is_array,
           t.typreceive <> 0 AS has_receive,
           CASE t.typtype WHEN 'd' THEN t.typbasetype
                          WHEN 'r' THEN (SELECT rngsubtype FROM pg_range WHERE rngtypid = t.oid)
                          WHEN 'm' THEN (SELECT rngtypid FROM pg_range WHERE rngmultitypid = t.oid)
                          ELSE nullif(t.typelem, 0) END AS related
      FROM pg_type t
), used AS (
    SELECT one.* FROM one WHERE oid = ANY (%s::oid[])
    UNION
    SELECT one.* FROM one JOIN used ON one.oid = used.related
)
SELECT oid, kind, is_array, has_receive, related FROM used
"""

_UNSUPPORTED: Final = """
SELECT n.nspname, c.relname,
       CASE WHEN c.relpersistence = 'u' THEN 'unlogged table' WHEN c.relpersistence = 't' THEN 'temporary table'
            WHEN c.relkind = 'v' THEN 'view' WHEN c.relkind = 'm' THEN 'materialized view' ELSE 'foreign table' END
  FROM pg_class c
  JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE n.nspname NOT IN ('pg_catalog', 'information_schema', 'cdc') AND n.nspname !~ '^pg_'
   AND (c.relkind IN ('v', 'm', 'f') OR (c.relkind IN ('r', 'p') AND c.relpersistence <> 'p' AND NOT c.relispartition))
 ORDER BY 1, 2
"""
