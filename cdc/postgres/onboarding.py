"""For `cdc init`: what a database has, and the SQL of a role with just the privileges that the daemon needs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Final, LiteralString

from psycopg import sql
from psycopg.conninfo import make_conninfo

from cdc.change import TableName
from cdc.config import Config, SinkConfig, SourceConfig
from cdc.errors import FatalError
from cdc.first_config import Script
from cdc.postgres.connection import Connection, connect
from cdc.postgres.preflight_server import reveal, rows, value
from cdc.postgres.publication import captured_tables, creation, desired_publications
from cdc.postgres.publication_setup import missing_publications
from cdc.postgres.schema import SchemaTable, read_tables
from cdc.postgres.url import parsed
from cdc.urls import with_database

_MAINTENANCE: Final = "postgres"
"""The database that every server has, to connect to where there is no other yet."""


def contents(url: str) -> dict[str, int]:
    """Schemas, and how many tables of each can be captured. Raises `CdcError` where the database cannot be asked."""
    with connect(url, application_name="cdc init") as connection:
        return dict(sorted(Counter(name.schema for name in read_tables(connection)).items()))


def source_role(config: Config, source: SourceConfig, role: str) -> Script:
    """What to run in the source's database, as a superuser: the role, what it may read, and the publications.

    Only a superuser, or the owner of all tables, may publish them: so the daemon need not be either. Raises `CdcError`
    where the database cannot be asked.
    """
    url = reveal(source.url)
    with connect(url, application_name="cdc init") as connection:
        all_tables = read_tables(connection)
        publications = missing_publications(connection, desired_publications(config, source, all_tables))
        tables = captured_tables(source, all_tables)
        statements = [*_login(role, "LOGIN REPLICATION"), *_reading(connection, tables, role)]
        statements += [creation(each, connection.info.server_version) for each in publications]
        return Script(url, _text(connection, statements))


def mirror_role(sink: SinkConfig, role: str) -> Script:
    """What to run on the mirror's server, as a superuser: the role, and a database that it may fill.

    Where the database is not there yet, this makes it, with the role as its owner. Raises `CdcError` as above.
    """
    url = reveal(sink.url)
    name = parsed(url).get("dbname")
    with _server_of(url) as server:
        exists = value(server, "SELECT EXISTS (SELECT FROM pg_database WHERE datname = %s)", name)
        database = sql.Identifier(str(name))
        statements = list(_login(role, "LOGIN"))
        if server.info.server_version >= 150000:
            statements.append(_granted("SET ON PARAMETER session_replication_role", role))
        if not exists:
            url = with_database(url, _MAINTENANCE)  # a database is not made from within itself
            statements.append(sql.SQL("CREATE DATABASE {} OWNER {}").format(database, sql.Identifier(role)))
        else:
            statements.append(_granted("CONNECT, CREATE ON DATABASE {}", role, database))
            statements += _filling(url, role)
        return Script(url, _text(server, statements))


def _server_of(url: str) -> Connection:
    """The server of a database that need not exist."""
    try:
        return connect(url, application_name="cdc init")
    except FatalError:
        return connect(make_conninfo(url, dbname=_MAINTENANCE), application_name="cdc init")


def _login(role: str, attributes: LiteralString) -> Iterator[sql.Composed]:
    """Also where it is there already: source and mirror may be on one server."""
    name = sql.Identifier(role)
    yield sql.SQL("DO $$BEGIN CREATE ROLE {}; EXCEPTION WHEN duplicate_object THEN NULL; END$$").format(name)
    yield sql.SQL("ALTER ROLE {} {}").format(name, sql.SQL(attributes))


def _reading(connection: Connection, tables: Sequence[SchemaTable], role: str) -> Iterator[sql.Composed]:
    """SELECT on what is captured and on its sequences, which a cut-over sets; all rows of it."""
    yield _granted("CONNECT ON DATABASE {}", role, sql.Identifier(connection.info.dbname))
    for schema in sorted({table.name.schema for table in tables}):
        yield _granted("USAGE ON SCHEMA {}", role, sql.Identifier(schema))
    oids = [table.oid for table in tables]
    if names := [TableName(*row) for row in rows(connection, _READ, oids, oids, oids)]:
        listed = sql.SQL(", ").join(sql.Identifier(*name) for name in names)
        yield _granted("SELECT ON {}", role, listed)
    if value(connection, _ROW_SECURITY, oids):
        yield sql.SQL("ALTER ROLE {} BYPASSRLS").format(sql.Identifier(role))


def _filling(url: str, role: str) -> Iterator[sql.Composed]:
    """Of a database that is there: its schemas, for what the copy makes in them."""
    with connect(url, application_name="cdc init") as target:
        for (schema,) in rows(target, _SCHEMAS):
            yield _granted("USAGE, CREATE ON SCHEMA {}", role, sql.Identifier(schema))


def _granted(what: LiteralString, role: str, *names: sql.Composable) -> sql.Composed:
    return sql.SQL("GRANT {} TO {}").format(sql.SQL(what).format(*names), sql.Identifier(role))


def _text(connection: Connection, statements: Sequence[sql.Composed]) -> str:
    return "".join(f"{statement.as_string(connection)};\n" for statement in statements)


_READ: Final = """
SELECT n.nspname::text, c.relname::text
  FROM pg_class c
  JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE c.oid IN (SELECT relid FROM unnest(%s::oid[]) AS captured, pg_partition_tree(captured)
                  UNION SELECT unnest(%s::oid[]))
    OR c.relkind = 'S' AND EXISTS (
       SELECT FROM pg_depend d WHERE d.objid = c.oid AND d.refobjid = ANY (%s::oid[]) AND d.deptype IN ('a', 'i'))
 ORDER BY c.relkind = 'S', 1, 2
"""

_ROW_SECURITY: Final = "SELECT EXISTS (SELECT FROM pg_class WHERE oid = ANY (%s::oid[]) AND relrowsecurity)"

_SCHEMAS: Final = """
SELECT nspname::text FROM pg_namespace WHERE nspname <> 'information_schema' AND nspname !~ '^pg_' ORDER BY 1
"""
