"""What a refresh reads: tables in ranges of their keys, out of a snapshot of the source.

A range is cut by the source's order of the keys. The mirror's may be another one (collations differ from server to
server), so what the mirror has between two keys by *its* order is not deleted for not being in the range, but only if
the snapshot says that it does not exist. Whatever the orders are: ranges between any keys that follow each other, from
the beginning to the end, leave out none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any, Final

import msgspec
import psycopg
from psycopg import sql
from psycopg.sql import SQL, Identifier, Literal

from cdc.change import TableName
from cdc.config import SinkConfig
from cdc.postgres.connection import Connection, connect, translated_errors, while_doing
from cdc.postgres.copy_text import copy_text
from cdc.postgres.preparation import mirrored_columns
from cdc.postgres.row import Row
from cdc.postgres.schema import SchemaTable
from cdc.postgres.snapshot import PostgresSnapshot

PART_ROWS: Final = 5_000
PART_BYTES: Final = 4 * 1024**2
"""So much is written in one transaction, beside which the stream waits."""

_FIRST_ROWS: Final = 10
_KEYS_AT_ONCE: Final = 1_000
_MOST_ABSENT: Final = 20_000


Key = tuple[str, ...]
"""A row's key, as texts."""


class KeyedTable(msgspec.Struct, frozen=True):
    """A table that can be refreshed by ranges of its key.

    columns: those that are mirrored, the key first. key_types: of the key's columns. target: its name on the mirror.
    type_schemas: where the key's types are, whose operators are found there.
    """

    name: TableName
    target: TableName
    key: tuple[str, ...]
    key_types: tuple[str, ...]
    columns: tuple[str, ...]
    partitioned: bool
    target_partitioned: bool
    type_schemas: tuple[str, ...]
    where: str | None

    @property
    def key_names(self) -> sql.Composed:
        """The key's columns, for a list."""
        return names(self.key)

    @property
    def at_source(self) -> sql.Composed:
        """The table at the source, without those that inherit from it."""
        return SQL("{}{}").format(SQL("" if self.partitioned else "ONLY "), Identifier(*self.name))

    @property
    def on_target(self) -> sql.Composed:
        """The table of the mirror, without those that inherit from it."""
        return SQL("{}{}").format(SQL("" if self.target_partitioned else "ONLY "), Identifier(*self.target))

    def between(self, after: Key | None, upto: Key | None) -> sql.Composed:
        """The condition for a range of keys: above `after`, not above `upto`."""
        bounds = [
            SQL("({}) {} ({})").format(self.key_names, SQL(sign), SQL(", ").join(map(Literal, key)))
            for sign, key in ((">", after), ("<=", upto))
            if key is not None
        ]
        return SQL(" AND ").join([SQL("true"), *bounds])


class Part(msgspec.Struct, frozen=True):
    """A range of a table, as it is in the snapshot.

    done: the key up to which the mirror is right once this is written; `None`: all of it. keys: those of the rows in
    `text`, which are in COPY's text format, with the table's `columns`. absent: keys of rows that the mirror has in the
    range, and the snapshot nowhere, in the same format.
    """

    table: KeyedTable
    done: Key | None
    keys: Sequence[Key]
    text: bytes
    absent: bytes

    def halves(self) -> tuple[Part, Part] | None:
        """Two parts that follow each other and are the same together; `None` for a single row."""
        middle = len(self.keys) // 2
        if middle == 0:
            return None
        first = b"".join(line + b"\n" for line in self.text.split(b"\n", middle)[:middle])
        return (
            Part(self.table, self.keys[middle - 1], self.keys[:middle], first, b""),
            Part(self.table, self.done, self.keys[middle:], self.text[len(first) :], self.absent),
        )


def usable_key(source: SchemaTable, target: SchemaTable | None) -> tuple[str, ...]:
    """The columns that name a row wherever it is told of: at the source, in every change, and on the mirror."""
    if target is None or not target.primary_key or target.key_deferrable:
        return ()
    if source.identity == "i":
        return source.identity_columns
    if source.identity == "n" or source.key_deferrable or set(source.primary_key) != set(target.primary_key):
        return ()
    return source.primary_key


def keyed(
    connection: Connection, sink: SinkConfig, source: SchemaTable, target: SchemaTable | None
) -> KeyedTable | None:
    """The table as it is refreshed; `None` if it has no key for that. connection: to the source."""
    key = usable_key(source, target)
    if not key:
        return None
    assert target is not None
    columns = {column.name: column for column in mirrored_columns(sink, source)}
    with translated_errors():
        schemas = connection.execute(_TYPE_SCHEMAS, [source.oid, list(key)]).fetchall()
    return KeyedTable(
        name=source.name,
        target=target.name,
        key=key,
        key_types=tuple(columns[name].base_type_name for name in key),
        columns=(*key, *(name for name in columns if name not in key)),
        partitioned=source.partitioned,
        target_partitioned=target.partitioned,
        type_schemas=tuple(schema for (schema,) in schemas),
        where=sink.table(source.name).where,
    )


class RangeReader:
    """Reads one table, in the order of its key: the source's rows in a snapshot, the mirror's keys as they are."""

    def __init__(self, snapshot: PostgresSnapshot, target_url: str, table: KeyedTable) -> None:
        self._table = table
        with ExitStack() as on_error:
            self._source = on_error.enter_context(snapshot.connect())
            self._target = on_error.enter_context(connect(target_url, application_name="cdc-refresh"))
            with translated_errors():
                for connection in (self._source, self._target):
                    find_operators(connection, table)
            self._connections = on_error.pop_all()

    def parts(self, after: Key | None) -> Iterator[Part]:
        """All that follows a key (`None`: all), in parts that are to be written one after the other."""
        table = self._table
        query = SQL("DECLARE cdc_rows NO SCROLL CURSOR FOR SELECT {} FROM {} WHERE {} AND ({}) ORDER BY {}").format(
            names(table.columns), table.at_source, table.between(after, None), SQL(table.where or "true"),
            table.key_names,
        )  # fmt: skip
        with while_doing(f"reading {table.name}"):
            self._source.execute(query)
            complete = False
            while not complete:
                rows, complete = self._rows()
                keys = list(map(self._key, rows))
                upto = None if complete else keys[-1]
                absent: list[Row] = []
                for block in self._strangers(after, upto, set(keys)):
                    absent += self._gone(block)
                    if len(absent) > _MOST_ABSENT and after is not None:
                        yield Part(table, after, (), b"", copy_text(absent))
                        absent = []
                yield Part(table, upto, keys, copy_text(rows), copy_text(absent))
                after = upto
            self._source.execute("CLOSE cdc_rows")

    def close(self) -> None:
        """Disconnect. Safe to call twice."""
        self._connections.close()

    def _rows(self) -> tuple[list[Row], bool]:
        """The next rows; True if there are no more."""
        rows: list[Row] = []
        size, wanted = 0, _FIRST_ROWS
        while len(rows) < PART_ROWS and size < PART_BYTES:
            cursor = self._source.execute(SQL("FETCH {} FROM cdc_rows").format(Literal(wanted)))
            fetched = _raw(cursor)
            rows += fetched
            if len(fetched) < wanted:
                return rows, True
            size += sum(len(value) for row in fetched for value in row if value)
            average = max(1, size // len(rows))
            wanted = max(1, min(PART_ROWS - len(rows), (PART_BYTES - size) // average, 10 * wanted))
        return rows, False

    def _strangers(self, after: Key | None, upto: Key | None, present: set[Key]) -> Iterator[list[Key]]:
        """Keys that the mirror has between the bounds, by its order, and that are not `present`."""
        table = self._table
        query = SQL("DECLARE cdc_keys NO SCROLL CURSOR FOR SELECT {} FROM {} WHERE {}").format(
            table.key_names, table.on_target, table.between(after, upto)
        )
        with self._target.transaction():
            self._target.execute(query)
            complete = False
            while not complete:
                keys = _raw(self._target.execute(SQL("FETCH {} FROM cdc_keys").format(Literal(PART_ROWS))))
                complete = len(keys) < PART_ROWS
                strange = [key for each in keys if (key := self._key(each)) not in present]
                yield from (strange[n : n + _KEYS_AT_ONCE] for n in range(0, len(strange), _KEYS_AT_ONCE))

    def _gone(self, keys: Sequence[Key]) -> list[Row]:
        """Those of the keys that are nowhere in the snapshot."""
        table = self._table
        given = SQL(", ").join(
            SQL("({}, {})").format(Literal(number), SQL(", ").join(map(Literal, key)))
            for number, key in enumerate(keys)
        )
        names_of = [Identifier(f"k{number}") for number in range(len(table.key))]
        same = SQL(" AND ").join(
            SQL("t.{} = v.{}::{}").format(Identifier(name), given_name, SQL(kind))
            for name, given_name, kind in zip(table.key, names_of, table.key_types, strict=True)
        )
        query = SQL(
            "SELECT n FROM (VALUES {}) AS v (n, {}) WHERE NOT EXISTS (SELECT FROM {} AS t WHERE {} AND ({}))"
        ).format(given, SQL(", ").join(names_of), table.at_source, same, SQL(table.where or "true"))
        gone = self._source.execute(query).fetchall()
        return [tuple(value.encode() for value in keys[number]) for (number,) in gone]

    def _key(self, row: Row) -> Key:
        return tuple([str(value, "utf-8") for value in row[: len(self._table.key)]])  # type: ignore[arg-type]


def names(columns: Sequence[str], of: str = "") -> sql.Composed:
    """Columns for a list, perhaps with the name of their table."""
    return SQL(", ").join(Identifier(of, name) if of else Identifier(name) for name in columns)


def find_operators(connection: Connection, table: KeyedTable) -> None:
    """Let comparisons of keys find the operators of their own types, in the open transaction or from now on."""
    if table.type_schemas:
        connection.execute(SQL("SET search_path = {}").format(names(table.type_schemas)))


def _raw(cursor: psycopg.Cursor[Any]) -> list[Row]:
    """The rows, each value as the server has written it."""
    result = cursor.pgresult
    assert result is not None
    columns = range(result.nfields)
    return [tuple([result.get_value(row, column) for column in columns]) for row in range(result.ntuples)]


_TYPE_SCHEMAS: Final = """
SELECT DISTINCT n.nspname FROM pg_attribute a
  JOIN pg_type t ON t.oid = a.atttypid JOIN pg_namespace n ON n.oid = t.typnamespace
 WHERE a.attrelid = %s AND a.attname = ANY (%s) AND n.nspname <> 'pg_catalog'
"""
