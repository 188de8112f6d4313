"""Whether a PostgreSQL server is ready to be captured from: every obstacle, each with its fix.

Nothing is changed on the server: what can only be found out by trying is rolled back. The mirror's side is in
`cdc.postgres.preflight_sink`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

import msgspec
from psycopg import sql

from cdc.change import TableName
from cdc.config import Config, SourceConfig
from cdc.errors import FatalError
from cdc.position import Lsn
from cdc.postgres.connection import Connection, connect
from cdc.postgres.ddl_capture import grants, is_installed, trigger_key
from cdc.postgres.dump import pg_dump_version
from cdc.postgres.preflight_feed import check_feeds
from cdc.postgres.preflight_server import (
    check_fsync,
    check_pooler,
    check_version,
    reveal,
    role_of,
    rows,
    shortened,
    value,
)
from cdc.postgres.preflight_sink import check_sink
from cdc.postgres.publication import Publication, captured_tables, creation, desired_publications, quoted
from cdc.postgres.publication_check import check_publications, publication_problems
from cdc.postgres.publication_setup import missing_publications
from cdc.postgres.schema import SchemaTable, read_tables, unsupported_relations
from cdc.postgres.slot import Slot, check_slot, identify_system, read_slot, slot_warning
from cdc.preflight import Finding, check_globs, guard

__all__ = ["check_sink", "check_source"]

OLD_TRANSACTION_SECONDS: Final = 10.0
"""From this age on, a transaction that delays the creation of a slot is named."""

SMALL_RETENTION_MB: Final = 1024
SMALL_DECODING_KB: Final = 64 * 1024
"""PostgreSQL's own default of `logical_decoding_work_mem`."""


class _SourceView(msgspec.Struct, frozen=True):
    """What the checks of a source look at. tables: the captured ones."""

    config: Config
    source: SourceConfig
    connection: Connection
    role: str
    settings: Mapping[str, str]
    all_tables: Mapping[TableName, SchemaTable]
    tables: Sequence[SchemaTable]
    publications: Sequence[Publication]
    slot: Slot | None


def check_source(config: Config, source: SourceConfig) -> Iterator[Finding]:
    """Yield what is in order and what is not. Raises `CdcError` where the server cannot be asked at all."""
    with connect(reveal(source.url), application_name="cdc check") as connection:
        basics = [*check_version(connection), *check_pooler(connection, "error")]
        yield from basics
        if all(finding.level != "error" for finding in basics):
            view = _source_view(config, source, connection)
            for subject, check in _SOURCE_CHECKS.items():
                yield from guard(subject, check(view))


def _source_view(config: Config, source: SourceConfig, connection: Connection) -> _SourceView:
    all_tables = read_tables(connection)
    return _SourceView(
        config,
        source,
        connection,
        role=role_of(connection),
        settings=dict(rows(connection, "SELECT name, setting FROM pg_settings WHERE name = ANY (%s)", _SETTINGS)),
        all_tables=all_tables,
        tables=captured_tables(source, all_tables),
        publications=desired_publications(config, source, all_tables),
        slot=read_slot(connection, source.slot),
    )


def _check_standing(view: _SourceView) -> Iterator[Finding]:
    if value(view.connection, "SELECT pg_is_in_recovery()"):
        yield Finding("error", "server", "is a standby", "let the source's url lead to the primary")
    yield from check_fsync("server", view.connection)
    if value(view.connection, "SHOW server_encoding") == "SQL_ASCII":
        message = "the database's encoding is SQL_ASCII: text that is not valid UTF-8 stops the stream"
        yield Finding("warning", "encoding", message, "convert the database to UTF8")


def _check_settings(view: _SourceView) -> Iterator[Finding]:
    if (level := view.settings["wal_level"]) == "logical":
        yield Finding("ok", "wal_level", "logical")
    else:
        fix = "ALTER SYSTEM SET wal_level = logical; then restart the server"
        yield Finding("error", "wal_level", f"is {level}, which has nothing to decode", fix)
    yield from _check_retention(int(view.settings["max_slot_wal_keep_size"]))
    if seconds := int(view.settings.get("idle_replication_slot_timeout", 0)):
        message = f"a slot that nobody reads for {seconds} seconds is lost, and the tables are copied again"
        fix = "ALTER SYSTEM SET idle_replication_slot_timeout = 0, or never stop the daemon for so long"
        yield Finding("warning", "idle_replication_slot_timeout", message, fix)
    if int(view.settings["logical_decoding_work_mem"]) < SMALL_DECODING_KB:
        message = "is less than the default of 64MB: the server writes large transactions to its disk while it decodes"
        fix = "ALTER SYSTEM SET logical_decoding_work_mem = '64MB'"
        yield Finding("warning", "logical_decoding_work_mem", message, fix)


def _check_retention(megabytes: int) -> Iterator[Finding]:
    subject, fix = "max_slot_wal_keep_size", "ALTER SYSTEM SET max_slot_wal_keep_size = '50GB', as the disk allows"
    if megabytes < 0:
        message = "has no limit: while the daemon is down, WAL can fill the server's disk"
        yield Finding("warning", subject, message, fix)
    elif megabytes < SMALL_RETENTION_MB:
        message = f"is only {megabytes} MB: the slot is lost when so much WAL is written while the daemon is down"
        yield Finding("warning", subject, message, fix)
    else:
        yield Finding("ok", subject, f"{megabytes} MB")


def _check_capacity(view: _SourceView) -> Iterator[Finding]:
    """Count what is free: copying and verifying need a temporary slot, and a walsender for it, beside the stream's."""
    slots, senders = rows(view.connection, _USED)[0]
    slots_needed = 1 if view.slot else 2
    senders_needed = 1 if view.slot and view.slot.active_pid else 2
    for setting, used, needed in (
        ("max_replication_slots", slots, slots_needed),
        ("max_wal_senders", senders, senders_needed),
    ):
        free = int(view.settings[setting]) - used
        if free < needed:
            fix = f"ALTER SYSTEM SET {setting} = {used + needed}; then restart the server"
            yield Finding("error", setting, f"{free} of {view.settings[setting]} free, {needed} needed", fix)
        else:
            yield Finding("ok", setting, f"{free} of {view.settings[setting]} free")


def _check_replication(view: _SourceView) -> Iterator[Finding]:
    """Open a replication connection: the only proof that role, pg_hba.conf and everything between allow it."""
    try:
        replication = connect(reveal(view.source.url), application_name="cdc check", replication=True)
    except FatalError as exc:
        role = sql.Identifier(view.role).as_string()
        fix = f"ALTER ROLE {role} REPLICATION" if "ALTER ROLE" in exc.hint else exc.hint
        yield Finding("error", "replication", str(exc), fix)
        return
    with replication:
        yield from check_pooler(replication, "error")
        identity = identify_system(replication)
        if identity.system_id != value(view.connection, _SYSTEM_ID):
            message = "replication connections lead to another cluster than ordinary ones"
            yield Finding("error", "replication", message, "connect to the server itself")
        else:
            yield Finding("ok", "replication", f"allowed for {view.role}")


def _check_configured_names(view: _SourceView) -> Iterator[Finding]:
    """Names in the configuration that fit nothing are mostly mistyped."""
    if not view.tables:
        globs = ", ".join(view.source.tables.include)
        yield Finding("error", "tables", f"no table matches {globs}", f"correct sources.{view.source.name}.tables")
        return
    yield from check_globs("tables", view.source, [table.name for table in view.tables])
    names = {str(table.name) for table in view.tables}
    for sink in view.config.sinks_of(view.source.name):
        for unknown in sorted(set(sink.tables) - names):
            message = f'sinks.{sink.name}.tables."{unknown}" names no captured table'
            yield Finding("warning", unknown, message, "correct it (schema.table), or include the table")
    yield from check_feeds(view.config, view.source, {table.name: table for table in view.tables})


def _check_reading(view: _SourceView) -> Iterator[Finding]:
    """SELECT on every captured table, and all of its rows (F118)."""
    role = sql.Identifier(view.role).as_string()
    readable = rows(view.connection, _READABLE, [table.oid for table in view.tables])
    schemas = sorted({schema for schema, _, usage, _ in readable if not usage})
    if schemas:
        fix = f"GRANT USAGE ON SCHEMA {', '.join(sql.Identifier(name).as_string() for name in schemas)} TO {role}"
        yield Finding("error", "privileges", f"no USAGE on schema {', '.join(schemas)}", fix)
    if tables := [TableName(schema, name) for schema, name, _, select in readable if not select]:
        fix = f"GRANT SELECT ON {', '.join(map(quoted, tables))} TO {role}"
        yield Finding("error", "privileges", f"no SELECT on {shortened(tables)}", fix)
    if view.tables and not schemas and not tables:
        yield Finding("ok", "privileges", "every captured table can be read")
    for table in view.tables:
        if table.row_security:
            message = f"row-level security shows {view.role} only a part of it"
            yield Finding("error", str(table.name), message, f"ALTER ROLE {role} BYPASSRLS")


def _check_publications(view: _SourceView) -> Iterator[Finding]:
    problems = list(publication_problems(view.connection, view.publications))
    missing = missing_publications(view.connection, view.publications)
    # once there is a slot, a missing publication means that changes are not captured: no longer created silently (F14)
    expected = [p for p in view.publications if view.slot is not None or p not in missing]
    problems += check_publications(view.connection, expected)
    yield from problems
    if view.slot is None and missing:
        yield from _check_creating(view, missing)
    for publication in expected if not problems else ():
        tables = f"{len(publication.tables)} table{'s' if len(publication.tables) > 1 else ''}"
        yield Finding("ok", f"publication {publication.name}", f"covers {tables}: {', '.join(publication.operations)}")


def _check_creating(view: _SourceView, missing: Sequence[Publication]) -> Iterator[Finding]:
    """CREATE on the database and ownership of the tables: what CREATE PUBLICATION wants."""
    oids = [published.table.oid for publication in missing for published in publication.tables]
    ((may_create, foreign),) = rows(view.connection, _MAY_PUBLISH, oids)
    statements = [creation(publication, view.connection.info.server_version) for publication in missing]
    by_hand = "; ".join(statement.as_string(view.connection) for statement in statements)
    if not may_create:
        yield Finding("error", "publication", f"{view.role} may not CREATE in the database", f"as its owner: {by_hand}")
    elif foreign:
        message = f"{view.role} does not own {shortened(foreign)}"
        yield Finding("error", "publication", message, f"as a superuser: {by_hand}")
    else:
        for publication in missing:
            yield Finding("ok", f"publication {publication.name}", "will be created")


def _check_slot(view: _SourceView) -> Iterator[Finding]:
    slot, subject = view.slot, f"slot {view.source.slot}"
    if slot is None:
        yield Finding("ok", subject, "will be created")
        yield from _check_old_transactions(view.connection)
        return
    idle = msgspec.structs.replace(slot, active_pid=None)  # by our own daemon, as a rule
    database = view.connection.info.dbname
    check_slot(idle, name=slot.name, database=database, position=None, wal_end=Lsn(0))
    if (warning := slot_warning(slot)) is not None:
        yield Finding("warning", subject, warning, "let the daemon catch up, or raise max_slot_wal_keep_size")
    else:
        reader = f"read by process {slot.active_pid} ({slot.active_application})" if slot.active_pid else "not read now"
        yield Finding("ok", subject, reader)


def _check_old_transactions(connection: Connection) -> Iterator[Finding]:
    for pid, gid, age_seconds, application in rows(connection, _OLD_TRANSACTIONS, OLD_TRANSACTION_SECONDS):
        who = f"prepared transaction {gid!r}" if pid is None else f"process {pid} ({application or 'no name'})"
        message = f"{who} has been writing for {age_seconds} s: the creation of a slot waits for its end"
        fix = f"ROLLBACK PREPARED '{gid}'" if pid is None else f"SELECT pg_terminate_backend({pid})"
        yield Finding("warning", "transactions", message, f"wait, or end it: {fix}")


def _check_ddl_capture(view: _SourceView) -> Iterator[Finding]:
    if not is_installed(view.connection):
        message = (
            "by looking into the catalog: `cdc init --ddl-capture` lets event triggers tell, in mid-transaction too"
        )
        yield Finding("ok", "schema changes", message)
    elif trigger_key(view.connection) is None:
        message = f"event triggers tell of them, but {view.role} may not read cdc.ddl_capture"
        yield Finding("warning", "schema changes", message, f"as its owner: {grants(view.role)}")
    else:
        yield Finding("ok", "schema changes", "told by event triggers")


def _check_left_out(view: _SourceView) -> Iterator[Finding]:
    """What matches the globs and cannot be captured (F34), and what no table holds (F35)."""
    kinds: dict[str, list[TableName]] = {}
    for name, kind in unsupported_relations(view.connection):
        if view.source.tables.match(name):
            kinds.setdefault(kind, []).append(name)
    for kind, names in sorted(kinds.items()):
        message = f"logical replication does not carry the contents of a {kind}: {shortened(names)}"
        yield Finding("warning", f"{kind}s", message, "exclude them in `tables`, to say that this is known")
    if value(view.connection, "SELECT EXISTS (SELECT FROM pg_largeobject_metadata)"):
        message = "the database has large objects, which logical replication does not carry"
        yield Finding("warning", "large objects", message, "keep them in bytea columns, or copy them at the cut-over")


def _check_pg_dump(view: _SourceView) -> Iterator[Finding]:
    if not view.config.mirrors_of(view.source.name):
        return
    major, minor = pg_dump_version(view.source.pg_dump)
    server = view.connection.info.server_version // 10000
    if major < server:
        message = f"{view.source.pg_dump} is version {major}.{minor}, older than the server ({server})"
        fix = f'install postgresql-client-{server}, or set sources.{view.source.name}.pg_dump = "/path/to/pg_dump"'
        yield Finding("error", "pg_dump", message, fix)
    else:
        yield Finding("ok", "pg_dump", f"version {major}.{minor}")


_SOURCE_CHECKS: Final[dict[str, Callable[[_SourceView], Iterator[Finding]]]] = {
    "server": _check_standing,
    "settings": _check_settings,
    "capacity": _check_capacity,  # before a replication connection takes a walsender
    "replication": _check_replication,
    "tables": _check_configured_names,
    "privileges": _check_reading,
    "publication": _check_publications,
    "slot": _check_slot,
    "schema changes": _check_ddl_capture,
    "left out": _check_left_out,
    "pg_dump": _check_pg_dump,
}

_SETTINGS: Final = [
    "idle_replication_slot_timeout",
    "logical_decoding_work_mem",
    "max_replication_slots",
    "max_slot_wal_keep_size",
    "max_wal_senders",
    "wal_level",
]

_SYSTEM_ID: Final = "SELECT system_identifier::text FROM pg_control_system()"

_USED: Final = "SELECT (SELECT count(*) FROM pg_replication_slots), (SELECT count(*) FROM pg_stat_replication)"

_READABLE: Final = """
SELECT n.nspname::text, c.relname::text, has_schema_privilege(n.oid, 'USAGE'), has_table_privilege(c.oid, 'SELECT')
  FROM pg_class c
  JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE c.oid = ANY (%s::oid[])
 ORDER BY 1, 2
"""

_MAY_PUBLISH: Final = """
SELECT has_database_privilege(current_database(), 'CREATE'),
       array(SELECT n.nspname || '.' || c.relname
               FROM pg_class c
               JOIN pg_namespace n ON n.oid = c.relnamespace
              WHERE c.oid = ANY (%s::oid[]) AND NOT pg_has_role(c.relowner, 'USAGE')
              ORDER BY 1)
"""

_OLD_TRANSACTIONS: Final = """
SELECT pid, gid, extract(epoch FROM clock_timestamp() - since)::int, application
  FROM (SELECT pid, NULL AS gid, xact_start AS since, application_name AS application
          FROM pg_stat_activity
         WHERE backend_xid IS NOT NULL
         UNION ALL
        SELECT NULL, gid, prepared, NULL
          FROM pg_prepared_xacts) AS writing
 WHERE since <= clock_timestamp() - make_interval(secs => %s)
 ORDER BY since
"""
