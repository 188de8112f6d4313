"""Publications: which tables a source publishes and how, and what the server says of those that exist."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Final

import msgspec
from psycopg import sql

from cdc.change import TableName
from cdc.config import Config, SourceConfig
from cdc.postgres.connection import Connection, translated_errors
from cdc.postgres.schema import SchemaTable

ALL_OPERATIONS: Final = ("insert", "update", "delete", "truncate")
INSERT_ONLY_OPERATIONS: Final = ("insert", "truncate")


class PublishedTable(msgspec.Struct, frozen=True):
    """What of a table is published.

    columns: the column list; `None` publishes every column, also those that are added later.
    where: the row filter, as configured.
    """

    table: SchemaTable
    columns: tuple[str, ...] | None = None
    where: str | None = None

    @property
    def name(self) -> TableName:
        """The table's name."""
        return self.table.name


class Publication(msgspec.Struct, frozen=True):
    """A publication as the configuration wants it."""

    name: str
    operations: tuple[str, ...]
    tables: tuple[PublishedTable, ...]


def captured_tables(source: SourceConfig, tables: Mapping[TableName, SchemaTable]) -> list[SchemaTable]:
    """The tables that the source's globs match, of all that can be published."""
    return [table for name, table in tables.items() if source.tables.match(name)]


def is_insert_only(source: SourceConfig, table: TableName) -> bool:
    """Whether updates and deletes of a captured table are left out on purpose."""
    return any(fnmatchcase(str(table), glob) for glob in source.insert_only)


def publication_names(source: SourceConfig) -> tuple[str, str]:
    """The source's two publications: for most tables, and for those of which only inserts are published."""
    return source.publication, f"{source.publication}_insert_only"


def desired_publications(
    config: Config, source: SourceConfig, tables: Mapping[TableName, SchemaTable]
) -> tuple[Publication, ...]:
    """What the configuration wants published; a publication without tables is left out."""
    groups: dict[bool, list[PublishedTable]] = {False: [], True: []}
    for table in captured_tables(source, tables):
        columns, where = _column_list(config, source, table), config.row_filter(source.name, table.name)
        groups[is_insert_only(source, table.name)].append(PublishedTable(table, columns, where))
    main, insert_only = publication_names(source)
    publications = (
        Publication(main, ALL_OPERATIONS, tuple(groups[False])),
        Publication(insert_only, INSERT_ONLY_OPERATIONS, tuple(groups[True])),
    )
    return tuple(publication for publication in publications if publication.tables)


def creation(publication: Publication, server_version: int) -> sql.Composed:
    """The statement that creates a publication."""
    tables = [table_clause(published, server_version) for published in publication.tables]
    return sql.SQL("CREATE PUBLICATION {} FOR TABLE {} WITH (publish = {}, publish_via_partition_root = true)").format(
        sql.Identifier(publication.name), sql.SQL(", ").join(tables), ", ".join(publication.operations)
    )


def addition(publication: Publication, published: PublishedTable, server_version: int) -> sql.Composed:
    """The statement that adds a table to a publication that exists."""
    clause = table_clause(published, server_version)
    return sql.SQL("ALTER PUBLICATION {} ADD TABLE {}").format(sql.Identifier(publication.name), clause)


def quoted(name: TableName) -> str:
    """A table's name as it stands in a statement."""
    return sql.Identifier(*name).as_string(None)


class ExistingPublication(msgspec.Struct, frozen=True):
    """A publication as it is on the server."""

    name: str
    operations: frozenset[str]
    via_partition_root: bool


class Coverage(msgspec.Struct, frozen=True):
    """A table as an existing publication publishes it. columns: `None` where the server has no column lists (14)."""

    columns: frozenset[str] | None
    where: str | None


def _column_list(config: Config, source: SourceConfig, table: SchemaTable) -> tuple[str, ...] | None:
    """The columns that any sink wants, if every sink names its own."""
    lists = [sink.table(table.name).columns for sink in config.sinks_of(source.name)]
    wanted = {column for columns in lists for column in columns or ()}
    known = tuple(column.name for column in table.replicated_columns)
    if not lists or None in lists or wanted >= set(known):
        return None
    return (*(name for name in known if name in wanted), *sorted(wanted - set(known)))


def table_clause(published: PublishedTable, server_version: int) -> sql.Composed:
    """The table as it stands in CREATE or ALTER PUBLICATION."""
    clause = sql.SQL("ONLY {}").format(sql.Identifier(*published.name))
    if published.columns is not None and server_version >= 150000:  # an older server sends all, the sink takes its own
        clause += sql.SQL(" ({})").format(sql.SQL(", ").join(map(sql.Identifier, published.columns)))
    if published.where is not None:
        clause += sql.SQL(" WHERE ({})").format(expression_of(published.where))
    return clause


def expression_of(where: str) -> sql.SQL:
    """The operator's own SQL, from the configuration."""
    return sql.SQL(where)


def read_publications(connection: Connection, names: Sequence[str]) -> dict[str, ExistingPublication]:
    """Those of the named publications that exist."""
    with translated_errors():
        rows = connection.execute(_PUBLICATIONS, [list(names)]).fetchall()
    return {
        name: ExistingPublication(
            name, frozenset(operation for operation, flag in zip(ALL_OPERATIONS, flags, strict=True) if flag), via_root
        )
        for name, via_root, *flags in rows
    }


def read_coverage(connection: Connection, names: Sequence[str]) -> dict[TableName, dict[str, Coverage]]:
    """The tables that the named publications publish, and how each of these does it."""
    coverage: dict[TableName, dict[str, Coverage]] = {}
    with translated_errors():
        rows = connection.execute(_COVERAGE, [list(names)]).fetchall()
    for publication, schema, name, columns, where in rows:
        published = Coverage(None if columns is None else frozenset(columns), where)
        coverage.setdefault(TableName(schema, name), {})[publication] = published
    return coverage


_PUBLICATIONS: Final = """
SELECT pubname::text, pubviaroot, pubinsert, pubupdate, pubdelete, pubtruncate
  FROM pg_publication
 WHERE pubname = ANY (%s)
"""

# the last two columns came with 15: read through JSON, one query serves all versions
_COVERAGE: Final = """
SELECT t.pubname::text, t.schemaname::text, t.tablename::text, to_jsonb(t) -> 'attnames', to_jsonb(t) ->> 'rowfilter'
  FROM pg_publication_tables t
 WHERE t.pubname = ANY (%s)
"""
