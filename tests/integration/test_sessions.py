"""Sessions of cdc behave the same, whatever a role or a database presets."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import psycopg
import pytest

from cdc.change import Column, Table
from cdc.config import CopyOptions
from cdc.errors import CdcError
from cdc.filling import fill
from cdc.postgres.connection import connect
from cdc.postgres.reread import reread
from cdc.postgres.row import UNCHANGED, encode_row
from cdc.sink import Mirror as MirrorSink
from tests import types
from tests.mirror import Mirror
from tests.servers import Database, PostgresServer

EXPECTED = {
    "DateStyle": "ISO, MDY",
    "IntervalStyle": "postgres",
    "extra_float_digits": "3",
    "TimeZone": "UTC",
    "client_encoding": "UTF8",
    "bytea_output": "hex",
    "lc_monetary": "C",
    "row_security": "off",
    "search_path": "",
    "statement_timeout": "0",
    "lock_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
}

HOSTILE = {
    "DateStyle": "German, DMY",
    "IntervalStyle": "iso_8601",
    "extra_float_digits": "-15",
    "TimeZone": "Asia/Kathmandu",
    "client_encoding": "LATIN1",
    "bytea_output": "escape",
    "lc_monetary": "POSIX",
    "row_security": "on",
    "search_path": "pg_temp, public",
    "statement_timeout": "500ms",
    "lock_timeout": "1ms",
    "idle_in_transaction_session_timeout": "50ms",
}


@pytest.fixture
def hostile(source_db: Database, target_db: Database) -> Iterator[str]:
    """A superuser on both servers, to whose sessions everything is preset otherwise."""
    role = f"{source_db.name}_hostile"
    servers = {database.server for database in (source_db, target_db)}
    for server in servers:
        with server.connect() as connection:
            connection.execute(f"CREATE ROLE {role} SUPERUSER LOGIN REPLICATION")
            for name, value in HOSTILE.items():
                connection.execute(f"ALTER ROLE {role} SET {name} = {value if name == 'search_path' else repr(value)}")
    yield role
    for database in (source_db, target_db):
        database.execute(f"REASSIGN OWNED BY {role} TO postgres; DROP OWNED BY {role}")
    for server in servers:
        with server.connect() as connection:
            connection.execute(f"DROP ROLE {role}")


@pytest.mark.parametrize("replication", [False, True], ids=["ordinary", "walsender"])
def test_f38_every_session_has_the_same_settings(
    postgres: PostgresServer, source_db: Database, hostile: str, replication: bool
) -> None:
    with psycopg.connect(postgres.url(source_db.name, user=hostile)) as connection:
        preset = {name: connection.execute(f"SHOW {name}").fetchone() for name in EXPECTED}
        assert not {name for name in EXPECTED if preset[name] == (EXPECTED[name],)}, "the test proves nothing"
    with connect(postgres.url(source_db.name, user=hostile), replication=replication) as session:
        assert {name: session.execute(f"SHOW {name}").fetchone() for name in EXPECTED} == {
            name: (value,) for name, value in EXPECTED.items()
        }


def test_f36_f37_f38_values_do_not_depend_on_presets(
    source_db: Database, target_db: Database, hostile: str, tmp_path: Path, pg_dump: Path
) -> None:
    """Copied, inserted and updated by the stream: by sessions of a role that presets everything otherwise."""
    with source_db.connect() as connection:
        types.create_types_schema(connection)
        connection.execute("ALTER TABLE every_type_full ADD PRIMARY KEY (id), REPLICA IDENTITY DEFAULT")
        types.fill(connection)
    mirror = Mirror(_As(source_db, hostile), _As(target_db, hostile), tmp_path, pg_dump)
    try:
        copy(mirror)
        assert_same_contents(source_db, target_db)
        mirror.start()
        with source_db.connect() as connection:
            connection.execute(f"TRUNCATE {', '.join(types.TABLES)}")
            types.fill(connection)
            types.rotate(connection)
        mirror.sync()
        assert_same_contents(source_db, target_db)
        assert mirror.capture_stats.retries == mirror.delivery_stats.retries == 0
    finally:
        mirror.close()


def copy(mirror: Mirror) -> None:
    """Make publication and slot, and copy."""
    mirror.queue.register("mirror")
    mirror.queue.begin(mirror.source.open(None))
    mirror.source.close()
    stats, options, sink = mirror.delivery_stats, CopyOptions(), cast("MirrorSink", mirror.sink)
    fill(mirror.source, sink, mirror.queue, stats=stats, options=options, stop=threading.Event())


class _As(Database):
    """The same database, with the url of another role."""

    def __init__(self, database: Database, role: str) -> None:
        super().__init__(database.server, database.name)
        self._role = role

    @property
    def url(self) -> str:
        return self.server.url(self.name, user=self._role)


def assert_same_contents(source: Database, target: Database) -> None:
    with source.connect() as one, target.connect() as other:
        assert types.contents(one) == types.contents(other)


def test_f118_a_row_that_may_not_be_seen_is_not_taken_for_one_that_is_gone(source_db: Database) -> None:
    """A mirror heals missing rows by reading the source: a policy must not turn that into a deletion."""
    role = f"{source_db.name}_reader"
    source_db.execute(
        f"""CREATE TABLE items (id int PRIMARY KEY, name text);
            INSERT INTO items VALUES (1, 'hidden');
            ALTER TABLE items ENABLE ROW LEVEL SECURITY;
            CREATE ROLE {role} LOGIN;
            GRANT SELECT ON items TO {role}"""
    )
    table = Table("public", "items", (Column("id", 23, is_key=True), Column("name", 25, is_key=False)))
    try:
        row = encode_row((b"1", UNCHANGED))
        assert reread(source_db.url, table, row) == encode_row((b"1", b"hidden"))
        with pytest.raises(CdcError, match="row-level security"):
            reread(source_db.server.url(source_db.name, user=role), table, row)
    finally:
        source_db.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")
