"""Publications: which tables a source publishes and how, made where missing, checked where they exist.

A careless publication breaks the *user's own* application: the server refuses UPDATE and DELETE on a published table
whose rows it cannot identify, or whose row filter or column list does not fit the replica identity. All of that is
found out before a publication is created.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Final

import msgspec
import psycopg
from psycopg import sql

from cdc.change import TableName
from cdc.config import Config, SourceConfig
from cdc.errors import CdcError, FatalError
from cdc.postgres.connection import Connection, to_cdc_error, translated_errors
from cdc.postgres.schema import SchemaTable
from cdc.preflight import Finding, require

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


class RowFilter(msgspec.Struct, frozen=True):
    """A row filter as the server understands it."""

    expression: str
    columns: frozenset[str]


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


def existing_publications(connection: Connection, source: SourceConfig) -> tuple[str, ...]:
    """Those of the source's publications that exist: the names to stream with."""
    existing = _read_publications(connection, publication_names(source))
    return tuple(name for name in publication_names(source) if name in existing)


def missing_publications(connection: Connection, publications: Sequence[Publication]) -> list[Publication]:
    """The publications that do not exist yet."""
    existing = _read_publications(connection, [publication.name for publication in publications])
    return [publication for publication in publications if publication.name not in existing]


def create_publications(connection: Connection, publications: Sequence[Publication]) -> list[str]:
    """Create those that are missing, all or none, and return their names.

    Raises `FatalError` where one would make the user's own UPDATE or DELETE fail.
    """
    missing = missing_publications(connection, publications)
    require(publication_problems(connection, missing))
    version = connection.info.server_version
    try:
        with connection.transaction():
            for publication in missing:
                connection.execute(creation(publication, version))
    except psycopg.errors.InsufficientPrivilege as exc:
        statements = "; ".join(creation(publication, version).as_string(connection) for publication in missing)
        reason = f"publication {publication.name} cannot be created: {exc.diag.message_primary}"
        raise FatalError(reason, hint=f"as a superuser: {statements}") from exc
    except psycopg.Error as exc:
        raise to_cdc_error(exc) from exc
    return [publication.name for publication in missing]


def extend_publications(connection: Connection, publications: Sequence[Publication]) -> list[TableName]:
    """Add the tables that none of these publications covers yet, all or none, and return them.

    Changes of a table are sent from then on: a copy must read a later snapshot. For publications of our own only.
    Raises `FatalError` where it would make the user's own UPDATE or DELETE fail.
    """
    with translated_errors(), connection.transaction():
        connection.execute("SELECT pg_advisory_xact_lock(hashtextextended('cdc.publication', 0))")
        coverage = _read_coverage(connection, [publication.name for publication in publications])
        new = [
            msgspec.structs.replace(publication, tables=tables)
            for publication in publications
            if (tables := tuple(published for published in publication.tables if published.name not in coverage))
        ]
        require(publication_problems(connection, new))
        for publication in new:
            for published in publication.tables:
                clause = _table_clause(published, connection.info.server_version)
                name = sql.Identifier(publication.name)
                connection.execute(sql.SQL("ALTER PUBLICATION {} ADD TABLE {}").format(name, clause))
    return [published.name for publication in new for published in publication.tables]


def drop_publications(connection: Connection, source: SourceConfig) -> None:
    """Drop the source's publications; without effect where they do not exist."""
    with translated_errors():
        for name in publication_names(source):
            connection.execute(sql.SQL("DROP PUBLICATION IF EXISTS {}").format(sql.Identifier(name)))


def creation(publication: Publication, server_version: int) -> sql.Composed:
    """The statement that creates a publication."""
    tables = [_table_clause(published, server_version) for published in publication.tables]
    return sql.SQL("CREATE PUBLICATION {} FOR TABLE {} WITH (publish = {}, publish_via_partition_root = true)").format(
        sql.Identifier(publication.name), sql.SQL(", ").join(tables), ", ".join(publication.operations)
    )


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
    existing, coverage = _read_publications(connection, names), _read_coverage(connection, names)
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


def quoted(name: TableName) -> str:
    """A table's name as it stands in a statement."""
    return sql.Identifier(*name).as_string(None)


def parse_filter(connection: Connection, table: TableName, where: str) -> RowFilter:
    """Let the server parse a row filter, without changing anything but a temporary table that is rolled back.

    A CHECK constraint is the only place where the catalog lists the columns of an expression that can be had without
    owning the table. The temporary table bears the table's name, so that the expression may mention it.
    """
    temporary = sql.Identifier("pg_temp", table.name)
    statement = sql.SQL("CREATE TEMPORARY TABLE {} (LIKE {}, CHECK ({}))").format(
        temporary, sql.Identifier(*table), _expression(where)
    )
    try:
        with connection.transaction(force_rollback=True):
            connection.execute(statement)
            row = connection.execute(_PARSED_FILTER, [temporary.as_string(connection)]).fetchone()
    except psycopg.Error as exc:
        raise to_cdc_error(exc) from exc
    assert row is not None
    return RowFilter(row[0], frozenset(row[1]))


class _Existing(msgspec.Struct, frozen=True):
    """A publication as it is on the server."""

    name: str
    operations: frozenset[str]
    via_partition_root: bool


class _Coverage(msgspec.Struct, frozen=True):
    """A table as an existing publication publishes it. columns: `None` where the server has no column lists (14)."""

    columns: frozenset[str] | None
    where: str | None


_Covering = Mapping[str, _Coverage]
"""How each publication that publishes a table does it, by the publication's name."""


def _column_list(config: Config, source: SourceConfig, table: SchemaTable) -> tuple[str, ...] | None:
    """The columns that any sink wants, if every sink names its own."""
    lists = [sink.options(table.name).columns for sink in config.sinks_of(source.name)]
    wanted = {column for columns in lists for column in columns or ()}
    known = tuple(column.name for column in table.replicated_columns)
    if not lists or None in lists or wanted >= set(known):
        return None
    return (*(name for name in known if name in wanted), *sorted(wanted - set(known)))


def _table_clause(published: PublishedTable, server_version: int) -> sql.Composed:
    clause = sql.SQL("ONLY {}").format(sql.Identifier(*published.name))
    if published.columns is not None and server_version >= 150000:  # an older server sends all, the sink takes its own
        clause += sql.SQL(" ({})").format(sql.SQL(", ").join(map(sql.Identifier, published.columns)))
    if published.where is not None:
        clause += sql.SQL(" WHERE ({})").format(_expression(published.where))
    return clause


def _expression(where: str) -> sql.SQL:
    """The operator's own SQL, from the configuration."""
    return sql.SQL(where)


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
    connection: Connection, publication: Publication, existing: _Existing, tables: Iterable[PublishedTable]
) -> Iterator[Finding]:
    name = sql.Identifier(publication.name)
    for published in tables:
        if published.table.partitioned and not existing.via_partition_root:
            message = f"publication {publication.name} publishes its partitions, not the table itself"
            statement = sql.SQL("ALTER PUBLICATION {} SET (publish_via_partition_root = true)").format(name)
        else:
            message = f"publication {publication.name} does not publish it"
            clause = _table_clause(published, connection.info.server_version)
            statement = sql.SQL("ALTER PUBLICATION {} ADD TABLE {}").format(name, clause)
        yield Finding("error", str(published.name), message, statement.as_string(connection))


def _operation_problems(
    connection: Connection, publication: Publication, published: PublishedTable, covering: Sequence[_Existing]
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
    clause = _table_clause(published, connection.info.server_version)
    statement = sql.SQL("BEGIN; ALTER PUBLICATION {} DROP TABLE ONLY {}; ALTER PUBLICATION {} ADD TABLE {}; COMMIT")
    return f"{statement.format(name, table, name, clause).as_string(connection)}; then copy the table again"


def _read_publications(connection: Connection, names: Sequence[str]) -> dict[str, _Existing]:
    with translated_errors():
        rows = connection.execute(_PUBLICATIONS, [list(names)]).fetchall()
    return {
        name: _Existing(
            name, frozenset(operation for operation, flag in zip(ALL_OPERATIONS, flags, strict=True) if flag), via_root
        )
        for name, via_root, *flags in rows
    }


def _read_coverage(connection: Connection, names: Sequence[str]) -> dict[TableName, dict[str, _Coverage]]:
    coverage: dict[TableName, dict[str, _Coverage]] = {}
    with translated_errors():
        rows = connection.execute(_COVERAGE, [list(names)]).fetchall()
    for publication, schema, name, columns, where in rows:
        published = _Coverage(None if columns is None else frozenset(columns), where)
        coverage.setdefault(TableName(schema, name), {})[publication] = published
    return coverage


def _listed(names: Iterable[Any]) -> str:
    return ", ".join(sorted(names))


_IDENTITIES: Final = {"d": "DEFAULT", "f": "FULL", "i": "USING INDEX ...", "n": "NOTHING"}

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
