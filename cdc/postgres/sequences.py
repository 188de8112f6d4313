"""Sequences: read at the source and set on the mirror, where the stream of changes does not carry them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any, Final

import msgspec
import psycopg
from psycopg import sql
from psycopg.sql import SQL, Identifier

from cdc.change import TableName
from cdc.errors import PermanentError
from cdc.postgres.connection import Connection, to_cdc_error, translated_errors


class SequenceValue(msgspec.Struct, frozen=True):
    """Where a sequence stands.

    owner, column: the column that it belongs to (serial, identity), where it belongs to one.
    last_value: `None` where our role may not read it.
    is_called: False if `last_value` itself is given out next.
    """

    name: TableName
    owner: TableName | None
    column: str | None
    last_value: int | None
    is_called: bool


class SequencesSet(msgspec.Struct, frozen=True):
    """What became of sequences on a mirror, by their names at the source.

    missing: not on the mirror. refused: name and reason, for those that could not be read or set.
    """

    done: tuple[str, ...]
    missing: tuple[str, ...]
    refused: tuple[tuple[str, str], ...]


def read_sequences(connection: Connection, tables: Collection[TableName]) -> list[SequenceValue]:
    """The sequences that `tables` own or use in defaults, and the free ones in their schemas."""
    with translated_errors():
        found = connection.execute(
            _SEQUENCES, [[table.schema for table in tables], [table.name for table in tables]]
        ).fetchall()
        readable = [TableName(*row[:2]) for row in found if row[-1]]
        values = _read_values(connection, readable)
    return [
        SequenceValue(name, TableName(*owner) if owner[0] else None, column, *values.get(name, (None, False)))
        for name, owner, column in ((TableName(*row[:2]), row[2:4], row[4]) for row in found)
    ]


def set_sequences(
    connection: Connection, values: Iterable[SequenceValue], rename: Callable[[TableName], TableName]
) -> SequencesSet:
    """Set each to where the source's stands; one that cannot be set is told and holds nothing else up.

    rename: where a table, or a sequence that belongs to none, lives on the mirror.
    """
    done: list[str] = []
    missing: list[str] = []
    refused: list[tuple[str, str]] = []
    for value in values:
        if value.last_value is None:
            refused.append((str(value.name), "our role may not read it at the source: grant SELECT"))
            continue
        try:
            found = _set(connection, value, rename)
        except PermanentError as exc:
            refused.append((str(value.name), str(exc)))
        else:
            (done if found else missing).append(str(value.name))
    return SequencesSet(tuple(done), tuple(missing), tuple(refused))


def _read_values(connection: Connection, names: Collection[TableName]) -> dict[TableName, tuple[int, bool]]:
    """From the sequences themselves: the view pg_sequences does not tell where one stands that was never called."""
    if not names:
        return {}
    query = SQL(" UNION ALL ").join(
        SQL("SELECT {}, {}, last_value, is_called FROM {}").format(
            sql.Literal(name.schema), sql.Literal(name.name), Identifier(*name)
        )
        for name in names
    )
    rows: list[tuple[Any, ...]] = connection.execute(query).fetchall()
    return {TableName(schema, name): (last_value, is_called) for schema, name, last_value, is_called in rows}


def _set(connection: Connection, value: SequenceValue, rename: Callable[[TableName], TableName]) -> bool:
    """Whether the mirror has it. Found by its column first: the mirror may have made it under another name."""
    owner = Identifier(*rename(value.owner)).as_string() if value.owner else None
    name = Identifier(*rename(value.name)).as_string()
    try:
        row = connection.execute(
            _SET,
            {
                "owner": owner,
                "column": value.column,
                "name": name,
                "value": value.last_value,
                "is_called": value.is_called,
            },
        ).fetchone()
    except psycopg.Error as exc:
        error = to_cdc_error(exc)
        if exc.sqlstate == _NO_PRIVILEGE:
            raise PermanentError(str(error)) from exc
        raise error from exc
    return row is not None


_NO_PRIVILEGE: Final = "42501"

_SEQUENCES: Final = """
WITH captured AS (
    SELECT c.oid, c.relnamespace
      FROM unnest(%s::text[], %s::text[]) AS t (schema, name)
      JOIN pg_namespace n ON n.nspname = t.schema
      JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = t.name
), used AS (
    SELECT d.refobjid AS oid
      FROM pg_attrdef a
      JOIN pg_depend d ON d.classid = 'pg_attrdef'::regclass AND d.objid = a.oid AND d.refclassid = 'pg_class'::regclass
     WHERE a.adrelid IN (SELECT oid FROM captured)
)
SELECT n.nspname, c.relname, owner_schema.nspname, owner.relname, a.attname, has_sequence_privilege(c.oid, 'SELECT')
  FROM pg_class c
  JOIN pg_namespace n ON n.oid = c.relnamespace
  LEFT JOIN pg_depend d ON d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.objsubid = 0
                       AND d.refclassid = 'pg_class'::regclass AND d.refobjsubid > 0 AND d.deptype IN ('a', 'i')
  LEFT JOIN pg_class owner ON owner.oid = d.refobjid
  LEFT JOIN pg_namespace owner_schema ON owner_schema.oid = owner.relnamespace
  LEFT JOIN pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
 WHERE c.relkind = 'S' AND c.relpersistence <> 't'
   AND (owner.oid IN (SELECT oid FROM captured)
        OR c.oid IN (SELECT oid FROM used)
        OR owner.oid IS NULL AND c.relnamespace IN (SELECT relnamespace FROM captured))
 ORDER BY 1, 2
"""

_SET: Final = """
WITH found AS (
    SELECT coalesce(CASE WHEN to_regclass(%(owner)s) IS NOT NULL
                          AND EXISTS (SELECT FROM pg_attribute
                                       WHERE attrelid = to_regclass(%(owner)s) AND attname = %(column)s)
                         THEN pg_get_serial_sequence(%(owner)s, %(column)s)::regclass END,
                    to_regclass(%(name)s)) AS sequence
)
SELECT setval(sequence, %(value)s, %(is_called)s) FROM found WHERE sequence IS NOT NULL
"""
