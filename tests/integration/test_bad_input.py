"""What is wrong with a configuration or a server is said in one line, with what to do; nothing is left half-done."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.command import NOWHERE, Cdc, assert_complaint
from tests.processes import wait_until
from tests.servers import Database, PostgresServer
from tests.tls import Authority, TlsServer

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
    assert "Traceback" not in stderr, stderr.replace("\\n", "\n")
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


def test_publication_of_somebody_else_is_his_to_drop(cdc: Cdc, source: Database, target_db: Database) -> None:
    source.execute("CREATE PUBLICATION cdc_shop FOR TABLE items")
    source.execute("CREATE ROLE guest LOGIN REPLICATION")
    source.execute("SELECT pg_create_logical_replication_slot('cdc_shop', 'pgoutput')")
    try:
        cdc.configure(source.server.url(source.name, user="guest"), target_db.url)
        drop = ("drop", "shop", "--yes")
        assert_complaint(cdc(*drop), 1, "must be owner of publication cdc_shop", "as its owner: DROP PUBLICATION")
        assert traces(source) == (1, 1)  # or the next `cdc run` would find a gap
        source.execute("DROP PUBLICATION cdc_shop")
        assert cdc(*drop).returncode == 0
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


# --- what surrounds the daemon ----------------------------------------------------------------------------------------

WITHOUT_PRIVILEGES = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--"] if os.geteuid() == 0 else []
"""Even root is held to what files allow."""


def refused(cdc: Cdc, command: str = "run") -> subprocess.CompletedProcess[str]:
    """What a command says that is to end by itself."""
    arguments = [*WITHOUT_PRIVILEGES, *cdc.command(command)]
    return subprocess.run(arguments, check=False, timeout=60, **cdc.surroundings())


@contextmanager
def mode(path: Path, bits: int) -> Iterator[None]:
    """Files have other permissions meanwhile."""
    before = path.stat().st_mode
    path.chmod(bits)
    try:
        yield
    finally:
        path.chmod(before)


@pytest.mark.parametrize("command", ["run", "check", "status"])
def test_f112_configuration_that_cannot_be_read(cdc: Cdc, command: str) -> None:
    cdc.configure(NOWHERE)
    with mode(cdc.file, 0):
        assert_complaint(
            refused(cdc, command), 2, "cdc.toml: Permission denied", hint="let the user that runs cdc read"
        )


def test_data_directory_that_cannot_be_made(cdc: Cdc) -> None:
    cdc.configure(NOWHERE)
    with mode(cdc.folder, 0o555):
        assert_complaint(refused(cdc), 1, "data directory .*/data: Permission denied", hint="must belong to the user")


def test_data_directory_of_somebody_else(cdc: Cdc) -> None:
    cdc.configure(NOWHERE)
    cdc.data_dir.mkdir()
    with mode(cdc.data_dir, 0o555):
        assert_complaint(refused(cdc), 1, "data directory .*/lock: Permission denied", hint="must belong to the user")


@pytest.mark.parametrize("command", ["status", "verify"])
def test_commands_of_somebody_who_may_not_look_into_the_data_directory(cdc: Cdc, command: str) -> None:
    cdc.configure(NOWHERE)
    cdc.data_dir.mkdir()
    with mode(cdc.data_dir, 0):
        assert_complaint(
            refused(cdc, command), 1, "cannot look into the data directory .*: Permission denied", "daemon's user"
        )


def test_f86_data_directory_that_cannot_be_written_to(cdc: Cdc) -> None:
    cdc.configure(NOWHERE)
    no_room = ["prlimit", "--fsize=0"]  # as a disk that is full: files can be made, and hold nothing
    result = subprocess.run([*no_room, *cdc.command("run")], check=False, timeout=60, **cdc.surroundings())
    assert_complaint(result, 1, "cannot write to the data directory .*/data: File too large", hint="make room")


@pytest.mark.parametrize("name", ["lock", "shop.queue"])
def test_file_of_somebody_else_in_the_data_directory(cdc: Cdc, name: str) -> None:
    cdc.configure(NOWHERE)
    with cdc.running():
        pass
    with mode(cdc.data_dir / name, 0o444):
        result = refused(cdc)
    assert result.returncode == 1
    error, hint = last_lines(result.stderr)
    assert name in error
    assert "user" in hint


def test_port_that_is_in_use(cdc: Cdc) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        cdc.configure(NOWHERE)
        address = f"127.0.0.1:{other.getsockname()[1]}"
        cdc.file.write_text(cdc.file.read_text().replace("127.0.0.1:0", address))
        assert_complaint(refused(cdc), 1, f"cannot listen on {address}: Address already in use", hint="http.address")


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (None, "No such file"),
        (b"", "empty"),
        (b"geheim\n", "not an url"),
        (b"\xff\xfe", "not text"),
        (b"mysql://me:geheim@db/shop", "no database has the scheme 'mysql'"),
        (b"postgresql://me:ge%heim@db/shop", "the url cannot be read"),
        (b"mongodb://me:geheim@db:99999/shop", "the url of a MongoDB server cannot be read"),
        (b"postgresql://me:geheim@a\npostgresql://me:geheim@b\n", "more than one line"),
    ],
)
def test_f113_wrong_credential_file(cdc: Cdc, tmp_path: Path, content: bytes | None, error: str) -> None:
    cdc.configure(NOWHERE)
    secret = tmp_path / "shop_url"
    if content is not None:
        secret.write_bytes(content)
    cdc.file.write_text(cdc.file.read_text().replace(f'url = "{NOWHERE}"', f'url_file = "{secret}"'))
    result = refused(cdc)
    assert_complaint(result, 2, f"sources.shop.url.*{error}", hint=".")
    assert "geheim" not in result.stderr


def test_f110_f113_a_reload_refuses_a_password_that_is_not_escaped(cdc: Cdc, tmp_path: Path) -> None:
    secret = tmp_path / "shop_url"
    secret.write_text(NOWHERE)
    cdc.configure(NOWHERE)
    cdc.file.write_text(cdc.file.read_text().replace(f'url = "{NOWHERE}"', f'url_file = "{secret}"'))
    with cdc.running() as process:
        secret.write_text(NOWHERE.replace("geheim", "ge%heim"))
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: "not reloaded" in cdc.log, what=lambda: cdc.log)
        assert f"sources.shop.url_file: {secret}: the url cannot be read" in cdc.log
        secret.write_text(NOWHERE.replace("geheim", "anders"))
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: '"reloaded"' in cdc.log, what=lambda: cdc.log)
    assert "heim" not in cdc.log


def test_credential_of_systemd_that_is_absent(cdc: Cdc) -> None:
    cdc.configure(NOWHERE)
    absent = 'url_file = "${CREDENTIALS_DIRECTORY}/shop_url"'
    cdc.file.write_text(cdc.file.read_text().replace(f'url = "{NOWHERE}"', absent))
    assert_complaint(refused(cdc), 2, "CREDENTIALS_DIRECTORY", hint=".")
    given = cdc("run", CREDENTIALS_DIRECTORY=str(cdc.folder))
    assert_complaint(given, 2, "url_file: .*/shop_url: No such file", hint="readable by this user")


def test_credential_file_that_cannot_be_read(cdc: Cdc, tmp_path: Path) -> None:
    secret = tmp_path / "shop_url"
    secret.write_text(NOWHERE)
    cdc.configure(NOWHERE)
    cdc.file.write_text(cdc.file.read_text().replace(f'url = "{NOWHERE}"', f'url_file = "{secret}"'))
    with mode(secret, 0):
        assert_complaint(refused(cdc), 2, "url_file: .*/shop_url: Permission denied", hint="readable by this user")


# --- certificates -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shown", "trusted", "error"),
    [
        ("expired", "authority.pem", "certificate verify failed"),
        ("good", "other.pem", "certificate verify failed"),
        ("good", "missing.pem", r"missing\.pem"),
        ("good", "garbage.pem", r"garbage\.pem|no certificate"),
    ],
)
@pytest.mark.parametrize("kind", ["postgresql", "mongodb"])
def test_certificate_that_is_not_accepted(
    cdc: Cdc, tmp_path: Path, kind: str, shown: str, trusted: str, error: str
) -> None:
    Authority(tmp_path, "other")
    (tmp_path / "garbage.pem").write_text("garbage")
    certificate = Authority(tmp_path).issue(shown, expired=shown == "expired")
    options = {
        "postgresql": f"sslmode=verify-full&sslrootcert={tmp_path / trusted}",
        "mongodb": f"directConnection=true&tls=true&tlsCAFile={tmp_path / trusted}&serverSelectionTimeoutMS=2000",
    }
    with TlsServer(certificate, asked=kind == "postgresql") as server:
        url = f"{kind}://me:geheim@127.0.0.1:{server.port}/shop?{options[kind]}"
        cdc.configure(url, f"{kind}://127.0.0.1:1/other")
        result = refused(cdc)
    assert result.returncode == 1
    said, hint = last_lines(result.stderr)
    assert re.search(error, said), said
    assert "certificates are valid" in hint
    assert "geheim" not in result.stderr
