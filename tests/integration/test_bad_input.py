"""What is wrong with a configuration or a server is said in one line, with what to do; nothing is left half-done."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.command import NOWHERE, Cdc, assert_complaint
from tests.servers import Database, PostgresServer

TABLE = "CREATE TABLE items (id int PRIMARY KEY, name text)"
BOTH = pytest.mark.parametrize("command", ["copy", "run"])


def traces(database: Database) -> tuple[int, int]:
    """Slots and publications that were left behind."""
    slots = database.value("SELECT count(*) FROM pg_replication_slots WHERE database = current_database()")
    return slots, database.value("SELECT count(*) FROM pg_publication")


@pytest.fixture
def source(source_db: Database) -> Database:
    source_db.execute(TABLE)
    return source_db


@pytest.fixture(scope="module")
def cramped() -> Iterator[PostgresServer]:
    """A server without a free slot."""
    with PostgresServer(18, settings={"max_replication_slots": "1"}) as server:
        server.create_database("shop").execute(TABLE)
        server.create_database("other").execute("SELECT pg_create_logical_replication_slot('taken', 'pgoutput')")
        yield server


@pytest.fixture(scope="module")
def replica_level() -> Iterator[PostgresServer]:
    """A server with the default wal_level."""
    with PostgresServer(18, settings={"wal_level": "replica"}) as server:
        server.create_database("shop").execute(TABLE)
        yield server


@BOTH
def test_wrong_password(cdc: Cdc, source: Database, target_db: Database, command: str) -> None:
    source.execute("CREATE ROLE clerk LOGIN REPLICATION PASSWORD 'right' IN ROLE needs_password")
    try:
        cdc.configure(source.server.url(source.name, user="clerk", password="geheim"), target_db.url)
        result = cdc(command)
        assert result.returncode == 1
        error, hint = last_lines(result.stderr)
        assert 'password authentication failed for user "clerk"' in error
        assert "check user, password" in hint
        assert "geheim" not in result.stderr
        assert traces(source) == (0, 0)
    finally:
        source.execute("DROP ROLE clerk")


def test_unreachable_server(cdc: Cdc) -> None:
    cdc.configure(NOWHERE)
    assert_complaint(cdc("copy"), 1, "connection", "is the server running")


def last_lines(stderr: str) -> tuple[str, str]:
    error, hint = stderr.splitlines()[-2:]
    assert "Traceback" not in stderr
    return error, hint


@BOTH
def test_wal_level(cdc: Cdc, replica_level: PostgresServer, target_db: Database, command: str) -> None:
    cdc.configure(replica_level.url("shop"), target_db.url)
    result = cdc(command)
    assert result.returncode == 1
    error, hint = last_lines(result.stderr)
    assert "wal_level" in error + hint
    assert "restart the server" in hint


@BOTH
def test_no_free_slot(cdc: Cdc, cramped: PostgresServer, target_db: Database, command: str) -> None:
    cdc.configure(cramped.url("shop"), target_db.url)
    result = cdc(command)
    assert result.returncode == 1
    error, hint = last_lines(result.stderr)
    assert error.startswith("error: ")
    assert "max_replication_slots" in hint
    assert target_db.value("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") == 0


@BOTH
def test_missing_privilege(cdc: Cdc, source: Database, target_db: Database, command: str) -> None:
    source.execute("CREATE ROLE guest LOGIN")
    try:
        cdc.configure(source.server.url(source.name, user="guest"), target_db.url)
        result = cdc(command)
        assert result.returncode == 1
        _, hint = last_lines(result.stderr)
        assert "ALTER ROLE guest REPLICATION" in hint or "REPLICATION" in hint
        assert traces(source) == (0, 0)
    finally:
        source.execute("DROP ROLE guest")


def test_target_table_with_other_columns(cdc: Cdc, source: Database, target_db: Database, pg_dump: object) -> None:
    target_db.execute("CREATE TABLE items (id int PRIMARY KEY)")
    cdc.configure(source.url, target_db.url, source=f'pg_dump = "{pg_dump}"')
    result = cdc("copy")
    assert result.returncode == 1
    error, hint = last_lines(result.stderr)
    assert "public.items: column name (text) is missing" in error
    assert "alter" in hint


@pytest.mark.parametrize("program", ["/nowhere/pg_dump", "/bin/true"])
def test_pg_dump_that_is_missing_or_another_program(
    cdc: Cdc, source: Database, target_db: Database, program: str
) -> None:
    cdc.configure(source.url, target_db.url, source=f'pg_dump = "{program}"')
    result = cdc("copy")
    assert result.returncode == 1
    error, hint = last_lines(result.stderr)
    assert program in error
    assert "pg_dump" in hint
    assert target_db.value("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") == 0


def test_table_without_identity(cdc: Cdc, source: Database, target_db: Database) -> None:
    source.execute("CREATE TABLE keyless (n int)")
    cdc.configure(source.url, target_db.url)
    result = cdc("copy")
    assert result.returncode == 1
    error, hint = last_lines(result.stderr)
    assert "public.keyless" in error
    assert "REPLICA IDENTITY FULL" in hint
    assert traces(source) == (0, 0)


def test_no_table_matches(cdc: Cdc, source_db: Database, target_db: Database) -> None:
    cdc.configure(source_db.url, target_db.url)
    result = cdc("copy")
    assert result.returncode == 1
    error, _ = last_lines(result.stderr)
    assert "no table matches public.*" in error
    assert traces(source_db) == (0, 0)


def test_f117_a_mirror_of_itself(cdc: Cdc, source: Database, pg_dump: object) -> None:
    cdc.configure(source.url, source.url, source=f'pg_dump = "{pg_dump}"')
    result = cdc("copy")
    assert result.returncode == 1
    error, _ = last_lines(result.stderr)
    assert "same database" in error or "itself" in error
    assert source.execute("SELECT FROM pg_namespace WHERE nspname = 'cdc'") == []
