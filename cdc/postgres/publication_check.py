"""What is wrong with publications, wanted or existing.

A careless publication breaks the *user's own* application: the server refuses UPDATE and DELETE on a published table
whose rows it cannot identify, or whose row filter or column list does not fit the replica identity. All of that is
found out before a publication is created.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import msgspec
import psycopg
from psycopg import sql

from cdc.change import TableName
from cdc.errors import CdcError
from cdc.postgres.connection import Connection, to_cdc_error, translated_errors
from cdc.postgres.publication import (
    ALL_OPERATIONS,
    Coverage,
    ExistingPublication,
    Publication,
    PublishedTable,
    addition,
    creation,
    expression_of,
    quoted,
    read_coverage,
    read_publications,
    table_clause,
)
from cdc.postgres.schema import SchemaTable
from cdc.preflight import Finding


class RowFilter(msgspec.Struct, frozen=True):
    """A row filter as the server understands it."""

    expression: str
    columns: frozenset[str]


def publication_problems(connection: Connection, publications: Iterable[Publication]) -> Iterator[Finding]:
    """What keeps the publications from being created, or would break the user's UPDATE and DELETE (F17)."""
    version = connection.info.server_version
    for publication in publications:
        partitions = _odd_partitions(connection, publication)
        for published in publication.tables:
            if "update" in publication.operations:
                yield from _identity_problems(published.table, version)
                yield from _column_problems(published)
                yield from partitions.get(published.table.oid, ())
            if published.where is not None:
                yield from _filter_problems(connection, publication, published)


def check_publications(connection: Connection, publications: Sequence[Publication]) -> Iterator[Finding]:
    """Whether what exists publishes what is wanted (F14), with the statement that puts it right.

    Publications FOR ALL TABLES or TABLES IN SCHEMA are as good as a list of tables.
    """
    names = [publication.name for publication in publications]
    existing, coverage = read_publications(connection, names), read_coverage(connection, names)
    for publication in publications:
        uncovered = [published for published in publication.tables if published.name not in coverage]
        if uncovered and publication.name not in existing:
            statement = creation(publication, connection.info.server_version).as_string(connection)
            yield Finding("error", f"publication {publication.name}", "does not exist", statement)
        elif uncovered:
            yield from _uncovered(connection, publication, existing[publication.name], uncovered)
        for published in publication.tables:
            if (covering := coverage.get(published.name)) is not None:
                yield from _operation_problems(
                    connection, publication, published, [existing[name] for name in covering]
                )
                yield from _content_problems(connection, published, covering)


def identity_fault(table: SchemaTable, server_version: int) -> str | None:
    """Why the server refuses UPDATE and DELETE of the table once they are published; `None` if it does not.

    The last two faults are those of 18; servers before it would send an identity without the generated column.
    """
    generated = {column.name for column in table.columns if column.generated}
    if table.identity == "n":
        return "its replica identity is NOTHING"
    if table.identity == "i" and not table.identity_columns:
        return "the index that was its replica identity is gone"
    if table.identity == "d" and table.primary_key and table.key_deferrable:
        return "its primary key is deferrable, which PostgreSQL does not accept as replica identity"
    if table.identity == "d" and not table.primary_key:
        return "it has neither a primary key nor another replica identity"
    if table.identity == "f":
        return (
            "its replica identity FULL includes a generated column" if generated and server_version >= 180000 else None
        )
    if generated & set(table.identity_columns):
        return "its replica identity includes a generated column"
    return None


def identity_fix(table: SchemaTable, server_version: int) -> str:
    """The statement that gives the table an identity that can be published."""
    generated = {column.name for column in table.columns if column.generated}
    if table.primary_key and not table.key_deferrable and not generated & set(table.primary_key):
        identity = "DEFAULT"
    elif generated and server_version >= 180000:
        identity = "USING INDEX ..."
    else:
        identity = "FULL"
    return f"ALTER TABLE {quoted(table.name)} REPLICA IDENTITY {identity}"


def parse_filter(connection: Connection, table: TableName, where: str) -> RowFilter:
    """Let the server parse a row filter, without changing anything but a temporary table that is rolled back.

    A CHECK constraint is the only place where the catalog lists the columns of an expression that can be had without
    owning the table. The temporary table bears the table's name, so that the expression may mention it.
    """
    temporary = sql.Identifier("pg_temp", table.name)
    statement = sql.SQL("CREATE TEMPORARY TABLE {} (LIKE {}, CHECK ({}))").format(
        temporary, sql.Identifier(*table), expression_of(where)
    )
    try:
        with connection.transaction(force_rollback=True):
            connection.execute(statement)
            row = connection.execute(_PARSED_FILTER, [temporary.as_string(connection)]).fetchone()
    except psycopg.Error as exc:
        raise to_cdc_error(exc) from exc
    assert row is not None
    return RowFilter(row[0], frozenset(row[1]))


_Covering = Mapping[str, Coverage]
"""How each publication that publishes a table does it, by the publication's name."""


def _identity_problems(table: SchemaTable, server_version: int) -> Iterator[Finding]:
    if (fault := identity_fault(table, server_version)) is not None:
        message = f"{fault}: once published, every UPDATE and DELETE of it would fail"
        fix = f"{identity_fix(table, server_version)}; or list the table in `insert_only`, or exclude it"
        yield Finding("error", str(table.name), message, fix)


def _column_problems(published: PublishedTable) -> Iterator[Finding]:
    columns = published.columns
    if columns is None:
        return
    option = f'sinks.*.tables."{published.name}".columns'
    if unknown := set(columns) - {column.name for column in published.table.replicated_columns}:
        message = f"has no column {_listed(unknown)} that could be published"
        yield Finding("error", str(published.name), message, f"correct {option}")
    if left_out := set(published.table.identity_columns) - set(columns):
        message = f"the configured columns leave out {_listed(left_out)}, part of its replica identity"
        yield Finding("error", str(published.name), message, f"add it to {option}")


def _filter_problems(connection: Connection, publication: Publication, published: PublishedTable) -> Iterator[Finding]:
    option = f'sinks.*.tables."{published.name}".where'
    if connection.info.server_version < 150000:
        yield Finding("error", str(published.name), "row filters need PostgreSQL 15", f"remove {option}")
        return
    assert published.where is not None
    try:
        columns = parse_filter(connection, published.name, published.where).columns
    except CdcError as exc:
        yield Finding("error", str(published.name), f"the row filter is not valid: {exc}", f"correct {option}")
        return
    if "update" in publication.operations and (outside := columns - set(published.table.identity_columns)):
        message = (
            f"the row filter uses {_listed(outside)}, not part of the replica identity: once published, every UPDATE"
            " and DELETE of it would fail"
        )
        full = f"ALTER TABLE {quoted(published.name)} REPLICA IDENTITY FULL"
        yield Finding("error", str(published.name), message, f"{full}; or list the table in `insert_only`")


def _odd_partitions(connection: Connection, publication: Publication) -> dict[int, list[Finding]]:
    """Partitions whose identity is not their root's, by the root's OID.

    The server asks the partition for its identity and describes the rows by the root's: only a FULL one fits all.
    """
    roots = [published.table.oid for published in publication.tables if published.table.partitioned]
    findings: dict[int, list[Finding]] = {}
    with translated_errors():
        rows = connection.execute(_ODD_PARTITIONS, [roots]).fetchall() if roots else []
    for root, schema, name, identity in rows:
        partition = TableName(schema, name)
        message = f"this partition does not have the replica identity of its root ({_IDENTITIES[identity]})"
        fix = f"ALTER TABLE {quoted(partition)} REPLICA IDENTITY {_IDENTITIES[identity]}"
        findings.setdefault(root, []).append(Finding("error", str(partition), message, fix))
    return findings


def _uncovered(
    connection: Connection, publication: Publication, existing: ExistingPublication, tables: Iterable[PublishedTable]
) -> Iterator[Finding]:
    for published in tables:
        if published.table.partitioned and not existing.via_partition_root:
            message = f"publication {publication.name} publishes its partitions, not the table itself"
            alter = sql.SQL("ALTER PUBLICATION {} SET (publish_via_partition_root = true)")
            statement = alter.format(sql.Identifier(publication.name))
        else:
            message = f"publication {publication.name} does not publish it"
            statement = addition(publication, published, connection.info.server_version)
        yield Finding("error", str(published.name), message, statement.as_string(connection))


def _operation_problems(
    connection: Connection, publication: Publication, published: PublishedTable, covering: Sequence[ExistingPublication]
) -> Iterator[Finding]:
    operations = frozenset[str]().union(*(existing.operations for existing in covering))
    if lacking := [operation for operation in publication.operations if operation not in operations]:
        first = covering[0]
        message = f"publication {first.name} does not publish {_listed(lacking)}"
        wanted = ", ".join(name for name in ALL_OPERATIONS if name in first.operations or name in lacking)
        statement = sql.SQL("ALTER PUBLICATION {} SET (publish = {})").format(sql.Identifier(first.name), wanted)
        yield Finding("error", str(published.name), message, statement.as_string(connection))
    fault = identity_fault(published.table, connection.info.server_version)
    if fault is not None and "update" in operations and "update" not in publication.operations:
        message = f"is insert-only here, but published with updates, and {fault}: every UPDATE and DELETE of it fails"
        fix = identity_fix(published.table, connection.info.server_version)
        yield Finding("error", str(published.name), message, f"{fix}; or take it out of the publication")


def _content_problems(connection: Connection, published: PublishedTable, covering: _Covering) -> Iterator[Finding]:
    """Find columns that are missing or should not be there, and another row filter than the configured one."""
    wanted = set(published.columns or (column.name for column in published.table.replicated_columns))
    generated = {column.name for column in published.table.columns if column.generated}
    expression = None
    if published.where is not None:
        expression = parse_filter(connection, published.name, published.where).expression
    for name, coverage in covering.items():
        problems = []
        if coverage.columns is not None and (lacking := wanted - coverage.columns):
            problems.append(f"does not publish the columns {_listed(lacking)}")
        if coverage.columns is not None and (extra := generated & coverage.columns):
            problems.append(f"publishes the generated columns {_listed(extra)}, which each server computes itself")
        if coverage.where != expression:
            problems.append(f"filters rows by {coverage.where or 'nothing'}, not by {expression or 'nothing'}")
        fix = _replacement(connection, name, published)
        yield from (Finding("error", str(published.name), f"publication {name} {text}", fix) for text in problems)


def _replacement(connection: Connection, publication: str, published: PublishedTable) -> str:
    name, table = sql.Identifier(publication), sql.Identifier(*published.name)
    clause = table_clause(published, connection.info.server_version)
    statement = sql.SQL("BEGIN; ALTER PUBLICATION {} DROP TABLE ONLY {}; ALTER PUBLICATION {} ADD TABLE {}; COMMIT")
    return f"{statement.format(name, table, name, clause).as_string(connection)}; then copy the table again"


def _listed(names: Iterable[Any]) -> str:
    return ", ".join(sorted(names))


_IDENTITIES: Final = {"d": "DEFAULT", "f": "FULL", "i": "USING INDEX ...", "n": "NOTHING"}

_PARSED_FILTER: Final = """
SELECT pg_get_expr(c.conbin, c.conrelid),
       ARRAY(SELECT a.attname::text FROM pg_attribute a WHERE a.attrelid = c.conrelid AND a.attnum = ANY (c.conkey))
  FROM pg_constraint c
 WHERE c.conrelid = %s::regclass AND c.contype = 'c'
"""

_ODD_PARTITIONS: Final = """
SELECT root.oid, n.nspname::text, leaf.relname::text, root.relreplident::text
  FROM pg_class root
 CROSS JOIN LATERAL pg_partition_tree(root.oid) AS tree
  JOIN pg_class leaf ON leaf.oid = tree.relid
  JOIN pg_namespace n ON n.oid = leaf.relnamespace
 WHERE root.oid = ANY (%s::oid[]) AND tree.isleaf AND leaf.relkind = 'r'
   AND leaf.relreplident NOT IN (root.relreplident, 'f')
 ORDER BY 2, 3
"""
