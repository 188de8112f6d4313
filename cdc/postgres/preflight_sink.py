"""Whether a PostgreSQL server is ready to be mirrored into."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final

import msgspec
import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from cdc.change import TableName
from cdc.config import Config, SinkConfig, SourceConfig
from cdc.errors import CdcError, FatalError
from cdc.postgres.bookkeeping import Bookkeeping
from cdc.postgres.connection import Connection, connect
from cdc.postgres.preflight_server import (
    check_fsync,
    check_pooler,
    check_version,
    reveal,
    role_of,
    rows,
    setting,
    shortened,
    value,
)
from cdc.postgres.preparation import mirrored_columns
from cdc.postgres.publication import captured_tables, quoted
from cdc.postgres.schema import (
    SchemaColumn,
    SchemaTable,
    database_identity,
    read_tables,
    type_holds,
    unsupported_relations,
)
from cdc.postgres.url import parsed
from cdc.preflight import Finding, guard

_TARGET_PRIVILEGES: Final = ("SELECT", "INSERT", "UPDATE", "DELETE", "TRUNCATE")


class _SinkView(msgspec.Struct, frozen=True):
    """What the checks of a mirror look at.

    pairs: each captured table, with the target's table of its name where there is one.
    silenced: whether this role may keep triggers, rules and foreign keys from firing.
    """

    sink: SinkConfig
    origin: Connection
    target: Connection
    role: str
    pairs: Sequence[tuple[SchemaTable, SchemaTable | None]]
    silenced: bool


def check_sink(config: Config, sink: SinkConfig) -> Iterator[Finding]:
    """Yield what is in order and what is not. Raises `CdcError` where one of the servers cannot be asked at all."""
    source = config.sources[sink.source]
    with connect(reveal(source.url), application_name="cdc check") as origin:
        try:
            target = connect(reveal(sink.url), application_name="cdc check")
        except FatalError as exc:
            yield from _check_missing_database(reveal(sink.url), exc)
            return
        with target:
            basics = [*check_version(target), *check_pooler(target, "warning")]
            yield from basics
            if all(finding.level != "error" for finding in basics):
                view = _sink_view(source, sink, origin, target)
                for subject, check in _SINK_CHECKS.items():
                    yield from guard(subject, check(view))


def _sink_view(source: SourceConfig, sink: SinkConfig, origin: Connection, target: Connection) -> _SinkView:
    present = read_tables(target)
    tables = captured_tables(source, read_tables(origin))
    return _SinkView(
        sink,
        origin,
        target,
        role=role_of(target),
        pairs=[(table, present.get(sink.target_name(table.name))) for table in tables],
        silenced=_may_silence(target),
    )


def _check_missing_database(url: str, error: FatalError) -> Iterator[Finding]:
    """The copy creates the database, if it may. Raises `error` where that was not the reason."""
    name = parsed(url).get("dbname")
    try:
        server = connect(make_conninfo(url, dbname="postgres"), application_name="cdc check")
    except CdcError:
        raise error from None
    with server:
        if value(server, "SELECT EXISTS (SELECT FROM pg_database WHERE datname = %s)", name):
            raise error
        if value(server, "SELECT rolcreatedb OR rolsuper FROM pg_roles WHERE rolname = current_user"):
            yield Finding("ok", "database", f"{name} does not exist yet: the copy creates it")
        else:
            statement = sql.SQL("CREATE DATABASE {} OWNER {}")
            fix = statement.format(sql.Identifier(str(name)), sql.Identifier(role_of(server))).as_string()
            yield Finding("error", "database", f"{name} does not exist", f"as a superuser: {fix}")


def _check_distinct(view: _SinkView) -> Iterator[Finding]:
    """F117: a mirror in the captured database itself would feed itself for ever."""
    one, other = database_identity(view.origin), database_identity(view.target)
    if one == other:
        message = f"is the source's own database ({view.target.info.dbname})"
        yield Finding("error", "database", message, f"let sinks.{view.sink.name}.url name another database")


def _check_writable(view: _SinkView) -> Iterator[Finding]:
    if value(view.target, "SELECT pg_is_in_recovery()"):
        yield Finding("error", "server", "is a standby: nothing can be written", "let the url lead to the primary")
    elif setting(view.target, "default_transaction_read_only") == "on":
        database = sql.Identifier(view.target.info.dbname).as_string()
        fix = f"ALTER DATABASE {database} SET default_transaction_read_only = off"
        yield Finding("error", "server", "transactions are read-only here", fix)
    yield from check_fsync("server", view.target)
    if setting(view.target, "synchronous_standby_names") and not value(view.target, _SYNCHRONOUS):
        message = "no synchronous standby is connected: every commit waits for one"
        yield Finding("warning", "synchronous_standby_names", message, "start the standby, or empty the setting")
    if view.target.info.server_version // 10000 < view.origin.info.server_version // 10000:
        message = "is older than the source: it may not know everything that the source's schema uses"
        yield Finding("warning", "server", message, "upgrade the target first")


def _check_encoding(view: _SinkView) -> Iterator[Finding]:
    """F39: a character that the target does not have is an error when it comes; better now than then."""
    source, target = (value(connection, "SHOW server_encoding") for connection in (view.origin, view.target))
    if source == target or (target == "UTF8" and source != "SQL_ASCII"):
        yield Finding("ok", "encoding", target)
        return
    unchecked = "SQL_ASCII" in (source, target)
    message = f"is {target}, the source's {source}: " + (
        "what is no valid text in one of them stops the mirror" if unchecked else "some characters cannot be stored"
    )
    fix = f"create the target database with ENCODING '{source}' TEMPLATE template0"
    yield Finding("warning" if unchecked else "error", "encoding", message, fix)


def _check_target_privileges(view: _SinkView) -> Iterator[Finding]:
    """CREATE where schemas or tables are missing, and all that replication does to the tables that exist."""
    role, database = sql.Identifier(view.role).as_string(), sql.Identifier(view.target.info.dbname).as_string()
    wanted = {"cdc"} | {view.sink.target_name(table.name).schema for table, found in view.pairs if found is None}
    schemas = dict(rows(view.target, _SCHEMAS, sorted(wanted)))
    if wanted - set(schemas) and not value(view.target, _MAY_CREATE):
        message = f"{view.role} may not create schema {', '.join(sorted(wanted - set(schemas)))}"
        yield Finding("error", "privileges", message, f"GRANT CREATE ON DATABASE {database} TO {role}")
    for name in (name for name, allowed in schemas.items() if not allowed):
        fix = f"GRANT CREATE, USAGE ON SCHEMA {sql.Identifier(name).as_string()} TO {role}"
        yield Finding("error", "privileges", f"{view.role} may not create tables in schema {name}", fix)
    existing = [found for _, found in view.pairs if found is not None]
    lacking = rows(view.target, _LACKING, [found.oid for found in existing], list(_TARGET_PRIVILEGES))
    if tables := [TableName(*row) for row in lacking]:
        fix = f"GRANT {', '.join(_TARGET_PRIVILEGES)} ON {', '.join(map(quoted, tables))} TO {role}"
        yield Finding("error", "privileges", f"{view.role} may not write to {shortened(tables)}", fix)
    for found in existing:
        if found.row_security:
            message = f"row-level security on the target applies to {view.role}"
            yield Finding("error", str(found.name), message, f"ALTER ROLE {role} BYPASSRLS")


def _check_triggers(view: _SinkView) -> Iterator[Finding]:
    """F99: triggers and foreign keys of the target; F119: rules that could swallow changes."""
    if view.silenced:
        yield Finding("ok", "session_replication_role", "triggers, rules and foreign keys of the target keep still")
    else:
        role = sql.Identifier(view.role).as_string()
        grant = f"GRANT SET ON PARAMETER session_replication_role TO {role}"
        fix = grant if view.target.info.server_version >= 150000 else "let the url name a superuser"
        message = f"{view.role} may not set it: triggers, rules and foreign keys of the target fire"
        yield Finding("warning", "session_replication_role", message, fix)
    oids = [found.oid for _, found in view.pairs if found is not None]
    for schema, table, kind, name, enabled in rows(view.target, _FIRING, oids):
        if enabled in "AR" or not view.silenced:
            statement = sql.SQL("ALTER TABLE {} DISABLE {} {}").format(
                sql.Identifier(schema, table), sql.SQL(kind), sql.Identifier(name)
            )
            message = f"{kind.lower()} {name} on the target fires for replicated changes: it may change or swallow them"
            yield Finding("warning", f"{schema}.{table}", message, statement.as_string())


def _check_tables(view: _SinkView) -> Iterator[Finding]:
    """F102: tables that exist on the target and cannot hold what the source has."""
    occupied = dict(unsupported_relations(view.target))
    missing = [view.sink.target_name(table.name) for table, found in view.pairs if found is None]
    for name in missing:
        if (kind := occupied.get(name)) is not None:
            yield Finding(
                "error", str(name), f"is a {kind} on the target", "rename it there, or map the table elsewhere"
            )
    if missing and len(missing) < len(view.pairs) and not _made_by_us(view):
        message = f"on the target, while other tables exist: {shortened(missing)}"
        yield Finding("error", "missing tables", message, "create them there, or drop the tables that exist")
    required: dict[int, set[str]] = {}
    oids = [found.oid for _, found in view.pairs if found is not None]
    for oid, column in rows(view.target, _REQUIRED, oids):
        required.setdefault(oid, set()).add(column)
    for table, found in view.pairs:
        if found is not None:
            yield from _check_columns(view.sink, table, found, required.get(found.oid, set()))


def _made_by_us(view: _SinkView) -> bool:
    """Whether the copy made this mirror's tables: then it makes those that are new as well."""
    bookkeeping = Bookkeeping(view.target, view.sink.name)
    return bookkeeping.exists and any(mark.made for mark in bookkeeping.marks().values())


def _check_columns(sink: SinkConfig, table: SchemaTable, found: SchemaTable, required: set[str]) -> Iterator[Finding]:
    """Compare a table with the one on the target. required: its columns that take neither NULL nor a default."""
    columns = {column.name: column for column in found.columns}
    mirrored = mirrored_columns(sink, table)
    for column in mirrored:
        yield from _check_column(found.name, column, columns.get(column.name))
    for name in sorted(required - {column.name for column in mirrored}):
        alter = sql.SQL("ALTER TABLE {} ALTER COLUMN {} DROP NOT NULL")
        fix = alter.format(sql.Identifier(*found.name), sql.Identifier(name)).as_string()
        message = f"column {name} of the target is NOT NULL without a default, and nothing is mirrored into it"
        yield Finding("error", str(found.name), message, fix)


def _check_column(table: TableName, column: SchemaColumn, found: SchemaColumn | None) -> Iterator[Finding]:
    name, target = sql.Identifier(column.name).as_string(), quoted(table)
    if found is None:
        fix = f"ALTER TABLE {target} ADD COLUMN {name} {column.type_name}"
        yield Finding("error", str(table), f"column {column.name} is missing on the target", fix)
    elif found.generated:
        fix = f"ALTER TABLE {target} ALTER COLUMN {name} DROP EXPRESSION"
        yield Finding("error", str(table), f"column {column.name} is generated on the target only", fix)
    elif not type_holds(column.type_name, found.type_name):
        fix = f"ALTER TABLE {target} ALTER COLUMN {name} TYPE {column.type_name}"
        message = f"column {column.name} is {found.type_name} on the target, {column.type_name} at the source"
        yield Finding("error", str(table), message, fix)


def _may_silence(connection: Connection) -> bool:
    """Whether triggers can be kept still. Tried, since who may depends on version, grants and provider."""
    try:
        with connection.transaction(force_rollback=True):
            connection.execute("SET LOCAL session_replication_role = replica")
    except psycopg.errors.InsufficientPrivilege:
        return False
    return True


_SINK_CHECKS: Final[dict[str, Callable[[_SinkView], Iterator[Finding]]]] = {
    "database": _check_distinct,
    "server": _check_writable,
    "encoding": _check_encoding,
    "privileges": _check_target_privileges,
    "triggers": _check_triggers,
    "tables": _check_tables,
}

_MAY_CREATE: Final = "SELECT has_database_privilege(current_database(), 'CREATE')"

_SYNCHRONOUS: Final = "SELECT EXISTS (SELECT FROM pg_stat_replication WHERE sync_state IN ('sync', 'quorum'))"

_SCHEMAS: Final = """
SELECT nspname::text, has_schema_privilege(oid, 'CREATE') AND has_schema_privilege(oid, 'USAGE')
  FROM pg_namespace
 WHERE nspname = ANY (%s)
"""

_LACKING: Final = """
SELECT n.nspname::text, c.relname::text
  FROM pg_class c
  JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE c.oid = ANY (%s::oid[])
   AND NOT (SELECT bool_and(has_table_privilege(c.oid, wanted)) FROM unnest(%s::text[]) AS wanted)
 ORDER BY 1, 2
"""

_FIRING: Final = """
SELECT n.nspname::text, c.relname::text, kind, name, enabled
  FROM (SELECT ev_class AS oid, 'RULE' AS kind, rulename::text AS name, ev_enabled::text AS enabled
          FROM pg_rewrite
         WHERE ev_type <> '1'
         UNION ALL
        SELECT tgrelid, 'TRIGGER', tgname::text, tgenabled::text
          FROM pg_trigger
         WHERE NOT tgisinternal) AS firing
  JOIN pg_class c USING (oid)
  JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE c.oid = ANY (%s::oid[]) AND enabled <> 'D'
 ORDER BY 1, 2, 3, 4
"""

_REQUIRED: Final = """
SELECT attrelid, attname::text
  FROM pg_attribute
 WHERE attrelid = ANY (%s::oid[]) AND attnum > 0 AND NOT attisdropped
   AND attnotnull AND NOT atthasdef AND attidentity = ''
"""
