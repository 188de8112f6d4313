"""Writing a part of a refreshed table on the mirror, set-wise, within a target transaction of the caller's.

Only rows that really differ are written. What the stream has touched since the snapshot is left to it, but for columns
that no change carried.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import psycopg
from psycopg import sql
from psycopg.sql import SQL, Identifier, Literal

from cdc.postgres.conflicts import remove_conflicts, unique_indexes
from cdc.postgres.connection import Connection
from cdc.postgres.copy_text import copy_text
from cdc.postgres.refresh_read import KeyedTable, Part, find_operators, names
from cdc.postgres.touched import Key, Touch

_STAGE: Final = Identifier("pg_temp", "cdc_refreshed")
_TOUCHED: Final = Identifier("pg_temp", "cdc_touched")
_ABSENT: Final = Identifier("pg_temp", "cdc_absent")


class Written(NamedTuple):
    """How many rows of the mirror were not as they should be."""

    inserted: int
    updated: int
    deleted: int


def write_part(connection: Connection, part: Part, touched: Mapping[Key, Touch]) -> Written:
    """Put the part's rows right. The caller's transaction also decides about the savepoint `part`."""
    writer = _Writer(connection, part.table)
    find_operators(connection, part.table)
    writer.stage(part, touched)
    deleted = writer.delete_absent()
    updated = writer.fill_missing(touched)
    writer.leave_touched()
    connection.execute("SAVEPOINT part")
    try:
        written = Written(*writer.update_and_insert(), deleted)
    except psycopg.errors.UniqueViolation:
        connection.execute("ROLLBACK TO SAVEPOINT part")
        written = Written(*writer.replace(), deleted)
    if part.table.type_schemas:
        connection.execute("SET search_path = ''")
    return written._replace(updated=written.updated + updated)


class _Writer:
    """The statements, with the names of one table."""

    def __init__(self, connection: Connection, table: KeyedTable) -> None:
        self._connection = connection
        self._table = table
        self._same_key = _same("t", "s", table.key)
        # the images, byte by byte: json and point have no equality, and 1.0 is not 1.00
        self._differs = SQL("ROW({})::record *<> ROW({})::record").format(
            names(table.columns, "t"), names(table.columns, "s")
        )

    def stage(self, part: Part, touched: Mapping[Key, Touch]) -> None:
        """Bring rows, touched keys and absent keys into temporary tables."""
        table = self._table
        key = [SQL("{} AS {}").format(Identifier(name), Identifier(f"k{n}")) for n, name in enumerate(table.key)]
        origin = [SQL("{} AS {}").format(Identifier(name), Identifier(f"o{n}")) for n, name in enumerate(table.key)]
        self._create(_STAGE, names(table.columns))
        self._create(_TOUCHED, SQL(", ").join([*key, *origin, SQL("0 AS missing")]))
        self._create(_ABSENT, SQL(", ").join(key))
        numbers = _numbered(touched)
        rows = [(*key, *touch.origin, b"%d" % numbers[touch.missing]) for key, touch in touched.items()]
        for target, text in ((_STAGE, part.text), (_TOUCHED, copy_text(rows)), (_ABSENT, part.absent)):
            if text:
                query = SQL("COPY {} FROM STDIN").format(target)
                with self._connection.cursor() as cursor, cursor.copy(query) as copy:
                    copy.write(text)

    def delete_absent(self) -> int:
        """Delete what the snapshot has not, and nobody has inserted since."""
        query = SQL("DELETE FROM {} AS t USING {} AS a WHERE {} AND NOT EXISTS (SELECT FROM {} AS x WHERE {})")
        keys = self._numbered_key
        return self._run(query, self._table.on_target, _ABSENT, keys("t", "a", "k"), _TOUCHED, keys("t", "x", "k"))

    def fill_missing(self, touched: Mapping[Key, Touch]) -> int:
        """Write into touched rows what none of their changes carried."""
        updated = 0
        for missing, number in _numbered(touched).items():
            columns = [name for name in self._table.columns if name in missing]
            if not columns:
                continue
            query = SQL(
                "UPDATE {} AS t SET {} FROM {} AS s, {} AS x WHERE {} AND {} AND x.missing = {}"
                " AND ROW({})::record *<> ROW({})::record"
            )
            keys = self._numbered_key
            updated += self._run(
                query, self._table.on_target, _assigned(columns), _STAGE, _TOUCHED, keys("s", "x", "o"),
                keys("t", "x", "k"), Literal(number), names(columns, "t"), names(columns, "s"),
            )  # fmt: skip
        return updated

    def leave_touched(self) -> None:
        """Forget the rows that belong to the stream."""
        self._run(
            SQL("DELETE FROM {} AS s USING {} AS x WHERE {}"), _STAGE, _TOUCHED, self._numbered_key("s", "x", "k")
        )

    def update_and_insert(self) -> tuple[int, int]:
        """Write what differs, in place; returns the numbers of rows inserted and updated."""
        table = self._table
        update = SQL("UPDATE {} AS t SET {} FROM {} AS s WHERE {} AND {}")
        updated = self._run(update, table.on_target, _assigned(table.columns), _STAGE, self._same_key, self._differs)
        return self._insert(), updated

    def replace(self) -> tuple[int, int]:
        """The same where unique values have moved from row to row: those rows go first, and then come anew."""
        table = self._table
        indexes = unique_indexes(self._connection, table.target, table.key)
        remove_conflicts(self._connection, table.target, table.key, indexes, _STAGE)
        delete = SQL("DELETE FROM {} AS t USING {} AS s WHERE {} AND {}")
        updated = self._run(delete, table.on_target, _STAGE, self._same_key, self._differs)
        return self._insert() - updated, updated

    def _insert(self) -> int:
        table = self._table
        query = SQL(
            "INSERT INTO {} ({}) OVERRIDING SYSTEM VALUE SELECT {} FROM {} AS s"
            " WHERE NOT EXISTS (SELECT FROM {} AS t WHERE {})"
        )
        columns = names(table.columns)
        return self._run(query, Identifier(*table.target), columns, columns, _STAGE, table.on_target, self._same_key)

    def _create(self, name: sql.Identifier, columns: sql.Composable) -> None:
        query = SQL("CREATE TEMPORARY TABLE {} ON COMMIT DROP AS SELECT {} FROM {} WITH NO DATA")
        self._run(query, name, columns, Identifier(*self._table.target))

    def _numbered_key(self, one: str, other: str, prefix: str) -> sql.Composed:
        """The key of a row beside one in a temporary table."""
        return SQL(" AND ").join(
            SQL("{} = {}").format(Identifier(one, name), Identifier(other, f"{prefix}{n}"))
            for n, name in enumerate(self._table.key)
        )

    def _run(self, query: SQL, *parts: sql.Composable) -> int:
        return self._connection.execute(query.format(*parts)).rowcount


def _same(one: str, other: str, key: Sequence[str]) -> sql.Composed:
    return SQL(" AND ").join(SQL("{} = {}").format(Identifier(one, name), Identifier(other, name)) for name in key)


def _assigned(columns: Sequence[str]) -> sql.Composed:
    return SQL(", ").join(SQL("{} = {}").format(Identifier(name), Identifier("s", name)) for name in columns)


def _numbered(touched: Mapping[Key, Touch]) -> dict[frozenset[str], int]:
    """The different sets of missing columns, each with a number."""
    sets = dict.fromkeys(touch.missing for touch in touched.values())
    return {missing: number for number, missing in enumerate(sets)}
