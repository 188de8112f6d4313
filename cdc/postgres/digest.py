"""Digests of PostgreSQL tables, computed inside the server, equal wherever the rows are equal as text.

No order, index, collation or locale of either server takes part: rows are hashed as the text of `ROW(...)`, which the
fixed session settings make the same everywhere (record_out quotes without ambiguity and tells NULL from an empty
string), and ranges are cut by the bytes of the key's text. `hashtextextended` has been stable from version 11 on;
it depends on the byte order of the machine, which must be the same on both sides.

TRUNCATE and table rewrites are not MVCC-safe: a view locks its tables against them while it is open, as pg_dump does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, LiteralString

import msgspec
import psycopg
from psycopg import sql
from psycopg.sql import SQL, Identifier, Literal

from cdc.change import TableName
from cdc.config import SinkConfig
from cdc.errors import CdcError
from cdc.postgres.connection import Connection, connect, translated_errors
from cdc.postgres.schema import SchemaTable, read_estimates, read_tables
from cdc.postgres.snapshot import PostgresSnapshot, open_snapshot
from cdc.verify import KeyRange, NotComparable, RangeDigest, RowDigest

SAMPLED_PAGES: Final = 1000
"""Pages that the first bounds are taken from: 8 MB, some ten thousand rows."""

_LABEL_CHARACTERS: Final = 120
_LOCK_TIMEOUT: Final = "60s"
_READER_LOCK_TIMEOUT: Final = "2s"
"""Who waits for an ALTER or TRUNCATE that itself waits for our snapshot would wait for ever."""
_CANCEL_SECONDS: Final = 5.0

_SESSION: Final[dict[str, Any]] = {
    # the planner takes the ranges for as many as the rows, and would sort whole rows instead of hashing 64 groups
    "enable_sort": "off",
    "jit": "off",
}


class ComparedTable(msgspec.Struct, frozen=True):
    """What of a table is compared, on one server.

    columns: in the source's order, on both sides. key: a part of them that names a row; empty where there is none.
    where: SQL that the rows must meet.
    """

    name: TableName
    columns: tuple[str, ...]
    key: tuple[str, ...]
    partitioned: bool
    where: str | None = None


class Comparison(msgspec.Struct, frozen=True):
    """What is compared with what. The largest tables come first.

    problems: tables that cannot be compared, and why. portable: not both databases are in UTF8, so text is brought to
    one form before it is hashed and ordered.
    """

    tables: tuple[TableName, ...]
    schema: dict[TableName, SchemaTable]
    source: dict[TableName, ComparedTable]
    target: dict[TableName, ComparedTable]
    problems: dict[TableName, str]
    portable: bool

    def source_view(self, url: str) -> SourceDigestView:
        """View the source as a temporary slot shows it. May wait long: for transactions that are older."""
        return SourceDigestView(url, self, open_snapshot(url, self.schema))

    def target_view(self, url: str) -> DigestView:
        """View the mirror as it is now."""
        return DigestView(url, self, self.target, OwnSnapshot(url, [table.name for table in self.target.values()]))


def plan_comparison(
    source: Connection, target: Connection, sink: SinkConfig, tables: Iterable[TableName]
) -> Comparison:
    """Find out from both catalogs what can be compared."""
    left, right = read_tables(source), read_tables(target)
    comparison = Comparison((), {}, {}, {}, {}, _encodings(source, target) != {"UTF8"})
    for table in tables:
        try:
            one = _source_side(table, left, sink)
            comparison.target[table] = _target_side(sink.target_name(table), right, one)
            comparison.source[table] = one
            comparison.schema[table] = left[table]
        except NotComparable as exc:
            comparison.problems[table] = str(exc)
    sizes = {name: estimate.size for name, estimate in read_estimates(source).items()}
    names = sorted({*comparison.source, *comparison.problems}, key=lambda name: (-sizes.get(name, 0), name))
    return msgspec.structs.replace(comparison, tables=tuple(names))


class OwnSnapshot:
    """The state of a database now, held by a connection of its own, with locks against TRUNCATE of `tables`."""

    def __init__(self, url: str, tables: Sequence[TableName]) -> None:
        self._connection = _open_transaction(url, _LOCK_TIMEOUT)
        if tables:  # before the snapshot is taken, which the first query does
            self._execute(_lock(tables))
        self.snapshot_id: str = self._execute(SQL("SELECT pg_export_snapshot()")).fetchall()[0][0]

    def close(self) -> None:
        """Forget it; who has imported it keeps it. Safe to call twice."""
        self._connection.close()

    def _execute(self, query: SQL | sql.Composed) -> psycopg.Cursor[Any]:
        try:
            with translated_errors():
                return self._connection.execute(query)
        except CdcError:
            self.close()
            raise


class DigestView:
    """A `View` of a PostgreSQL database."""

    def __init__(
        self,
        url: str,
        comparison: Comparison,
        tables: Mapping[TableName, ComparedTable],
        snapshot: OwnSnapshot | PostgresSnapshot,
    ) -> None:
        self._url = url
        self._comparison = comparison
        self._tables = tables
        self._snapshot = snapshot

    def reader(self) -> TableDigest:
        """Open one more connection into the view."""
        return TableDigest(self._url, self._comparison, self._tables, self._snapshot.snapshot_id)

    def close(self) -> None:
        """Let no more readers in, and tables be truncated again. Safe to call twice."""
        self._snapshot.close()


class SourceDigestView(DigestView):
    """A `SourceView` of a PostgreSQL database."""

    def __init__(self, url: str, comparison: Comparison, snapshot: PostgresSnapshot) -> None:
        super().__init__(url, comparison, comparison.source, snapshot)
        self.position = snapshot.position

    def nudge(self) -> None:
        """Commit a logical message behind the position."""
        with connect(self._url) as connection:
            nudge(connection)


class TableDigest:
    """A `Comparable`: one connection inside a snapshot. Only `cancel` may be called from another thread."""

    def __init__(
        self, url: str, comparison: Comparison, tables: Mapping[TableName, ComparedTable], snapshot_id: str
    ) -> None:
        """Take all locks at once: later they would queue behind a TRUNCATE that waits for the snapshot's own."""
        self._problems = comparison.problems
        self._portable = comparison.portable
        self._tables = tables
        self._connection = _open_transaction(url, _READER_LOCK_TIMEOUT)
        try:
            self._execute(SQL("SET TRANSACTION SNAPSHOT {}").format(Literal(snapshot_id)))
            if tables:
                self._execute(_lock([table.name for table in tables.values()]))
        except CdcError:
            self.close()
            raise

    def bounds(self, table: TableName, parts: int) -> list[str]:
        """Up to `parts - 1` bounds that split the table about evenly, from a sample of its pages."""
        ((pages,),) = self._execute(SQL(_PAGES).format(Literal(_quoted(self._find(table).name))))
        percent = min(100.0, 100.0 * SAMPLED_PAGES / max(pages, 1))
        rows = self._execute(self._query(table, _BOUNDS, percent=Literal(percent), fractions=_fractions(parts)))
        return list(dict.fromkeys(rows[0][0] or ()))

    def digest(self, table: TableName, ranges: Sequence[KeyRange]) -> list[RangeDigest]:
        """One digest for each of `ranges`, in one scan of the table."""
        parts = _Parts(ranges)
        found = {
            parts.range_of(part): RangeDigest(rows, int(total))
            for part, rows, total in self._execute(self._query(table, _DIGEST, parts))
        }
        return [found.get(one, RangeDigest(0, 0)) for one in ranges]

    def split(self, table: TableName, ranges: Sequence[KeyRange], pieces: int) -> list[list[str]]:
        """For each of `ranges` up to `pieces - 1` bounds that split its rows evenly, exactly."""
        parts = _Parts(ranges)
        query = self._query(table, _SPLIT, parts, fractions=_fractions(pieces))
        found = {parts.range_of(part): bounds for part, bounds in self._execute(query)}
        return [list(dict.fromkeys(found.get(one, ()))) for one in ranges]

    def rows(self, table: TableName, ranges: Sequence[KeyRange]) -> Iterator[RowDigest]:
        """Every row of `ranges`, equal ones together; read one by one, so that memory stays bounded."""
        query = self._query(table, _ROWS, _Parts(ranges))
        with translated_errors(), self._connection.cursor() as cursor:
            for row in cursor.stream(query):
                yield RowDigest(*row)

    def cancel(self) -> None:
        """Make the call that runs in another thread fail soon."""
        with suppress(psycopg.Error):
            self._connection.cancel_safe(timeout=_CANCEL_SECONDS)

    def close(self) -> None:
        """Disconnect. Safe to call twice."""
        self._connection.close()

    def _find(self, table: TableName) -> ComparedTable:
        found = self._tables.get(table)
        if found is None:
            raise NotComparable(self._problems.get(table, f"{table} is not compared"))
        return found

    def _query(
        self, table: TableName, template: LiteralString, parts: _Parts | None = None, **more: sql.Composable
    ) -> sql.Composed:
        """Fill in a template. Without parameters, so that a `%` in a name or in a filter is only a `%`."""
        found = self._find(table)
        row = _row(found.columns)
        row_hash = SQL("hashtextextended({} COLLATE {}, 0)").format(self._text(row), _C)
        key = self._text(_row(found.key)) if found.key else SQL("{}::text").format(row_hash)
        label = _row(found.key) if found.key else SQL(_KEYLESS_LABEL).format(row, Literal(_LABEL_CHARACTERS), row_hash)
        where: list[sql.Composable] = [SQL("({})").format(SQL(found.where))] if found.where else []
        part = SQL("width_bucket({} COLLATE {}, {}::text[])").format(key, _C, Literal(parts.edges if parts else []))
        if parts and not parts.everything:
            where.append(SQL("{} = ANY ({}::int[])").format(part, Literal(parts.numbers)))
        return SQL(template).format(
            part=part,
            key=SQL("{} COLLATE {}").format(key, _C),
            label=label,
            hash=row_hash,
            table=SQL("{} {}").format(SQL("" if found.partitioned else "ONLY"), Identifier(*found.name)),
            where=SQL(" AND ").join(where or [SQL("true")]),
            **more,
        )

    def _text(self, value: sql.Composable) -> sql.Composable:
        return SQL("encode(convert_to({}, 'UTF8'), 'escape')").format(value) if self._portable else value

    def _execute(self, query: sql.Composed) -> list[tuple[Any, ...]]:
        with translated_errors():
            cursor = self._connection.execute(query)
            return cursor.fetchall() if cursor.description else []


class _Parts:
    """Ranges as the numbers that `width_bucket` gives them."""

    def __init__(self, ranges: Sequence[KeyRange]) -> None:
        self.edges = sorted({edge for one in ranges for edge in one if edge is not None})
        numbers = {edge: number for number, edge in enumerate(self.edges, 1)}
        self._ranges = {numbers[one.low] if one.low is not None else 0: one for one in ranges}
        self.numbers = sorted(self._ranges)
        self.everything = len(self.numbers) == len(self.edges) + 1

    def range_of(self, number: int) -> KeyRange:
        return self._ranges[number]


def nudge(connection: Connection) -> None:
    """Commit a logical message: the stream then passes every position before it. Needs no privilege."""
    with translated_errors():
        connection.execute("SELECT pg_logical_emit_message(true, 'cdc.heartbeat', '')")


def _lock(tables: Iterable[TableName]) -> sql.Composed:
    names = SQL(", ").join(Identifier(*table) for table in tables)
    return SQL("LOCK TABLE {} IN ACCESS SHARE MODE").format(names)


def _open_transaction(url: str, lock_timeout: str) -> Connection:
    """A transaction whose first query decides what it sees."""
    connection = connect(url, application_name="cdc-verify", lock_timeout=lock_timeout, **_SESSION)
    with translated_errors():
        if connection.info.server_version >= 170000:
            connection.execute("SET transaction_timeout = 0")
        connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
    return connection


def _source_side(name: TableName, tables: Mapping[TableName, SchemaTable], sink: SinkConfig) -> ComparedTable:
    table = tables.get(name)
    if table is None:
        raise NotComparable(f"the source has no table {name}")
    options = sink.table(name)
    columns = tuple(
        column.name for column in table.replicated_columns if options.columns is None or column.name in options.columns
    )
    key = table.primary_key or (table.identity_columns if table.identity == "i" else ())
    return ComparedTable(name, columns, key if set(key) <= set(columns) else (), table.partitioned, options.where)


def _target_side(name: TableName, tables: Mapping[TableName, SchemaTable], source: ComparedTable) -> ComparedTable:
    """The same columns under the mirror's name, and all rows: one that the filter keeps away must not be there."""
    table = tables.get(name)
    if table is None:
        raise NotComparable(f"the mirror has no table {name}")
    absent = set(source.columns) - {column.name for column in table.columns}
    if absent:
        raise NotComparable(f"the mirror's table {name} has no column {', '.join(sorted(absent))}")
    return ComparedTable(name, source.columns, source.key, table.partitioned)


def _encodings(*connections: Connection) -> set[str]:
    return {connection.info.parameter_status("server_encoding") or "" for connection in connections}


def _row(columns: Sequence[str]) -> sql.Composed:
    return SQL("(ROW({})::text)").format(SQL(", ").join(map(Identifier, columns)))


def _fractions(parts: int) -> sql.Composable:
    return Literal([number / parts for number in range(1, parts)])


def _quoted(name: TableName) -> str:
    return Identifier(*name).as_string()


_C: Final = Identifier("C")

_PAGES: Final = """
SELECT coalesce((SELECT sum(pg_relation_size(relid)) FROM pg_partition_tree(name)), pg_relation_size(name))::bigint
       / current_setting('block_size')::int
  FROM CAST({} AS regclass) AS name
"""

_BOUNDS: Final = """
SELECT percentile_disc({fractions}::float8[]) WITHIN GROUP (ORDER BY {key})
  FROM {table} TABLESAMPLE SYSTEM ({percent}) REPEATABLE (0) WHERE {where}
"""

_DIGEST: Final = """
SELECT {part}, count(*), sum({hash})::text FROM {table} WHERE {where} GROUP BY 1
"""

_SPLIT: Final = """
SELECT {part}, percentile_disc({fractions}::float8[]) WITHIN GROUP (ORDER BY {key})
  FROM {table} WHERE {where} GROUP BY 1
"""

_ROWS: Final = """
SELECT {label}, {hash}, count(*) FROM {table} WHERE {where} GROUP BY 1, 2
"""

_KEYLESS_LABEL: Final = "left({}, {}) || ' #' || {}"
"""The row's beginning for people, its hash to tell rows with the same beginning apart."""
