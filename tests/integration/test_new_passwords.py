"""A database's password is changed while the daemon runs."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.command import Cdc
from tests.processes import wait_until
from tests.servers import Database

ROLE = "clerk_of_both"


@pytest.fixture
def clerk(
    cdc: Cdc, source_db: Database, target_db: Database, pg_dump: Path
) -> Iterator[Callable[[Database, str], Path]]:
    """Sets a password at a server; returns the `url_file` that does not have it yet."""
    files = {database.name: cdc.folder / f"{database.name}_url" for database in (source_db, target_db)}

    def password(database: Database, word: str) -> Path:
        database.execute(f"ALTER ROLE {ROLE} PASSWORD '{word}'")
        return files[database.name]

    try:
        source_db.execute("CREATE TABLE items (id int PRIMARY KEY)")
        for database in (source_db, target_db):
            database.execute(f"CREATE ROLE {ROLE} SUPERUSER LOGIN IN ROLE needs_password")
            password(database, "first").write_text(url(database, "first"))
        cdc.configure(
            "",
            source=f'url_file = "{files[source_db.name]}"\npg_dump = "{pg_dump}"',
            sink=f'url_file = "{files[target_db.name]}"',
        )
        cdc.file.write_text(cdc.file.read_text().replace('url = ""\n', ""))
        yield password
    finally:
        for database in (source_db, target_db):
            database.execute(f"DROP OWNED BY {ROLE} CASCADE; DROP ROLE {ROLE}")


def url(database: Database, word: str) -> str:
    return database.server.url(database.name, user=ROLE, password=word)


def cut(database: Database) -> None:
    database.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{ROLE}'")


def arrives(cdc: Cdc, source: Database, target: Database, number: int) -> None:
    source.execute(f"INSERT INTO items VALUES ({number})")
    wait_until(
        lambda: target.execute(f"SELECT count(*) FROM items WHERE id = {number}") == [(1,)], what=lambda: cdc.log
    )


@pytest.mark.parametrize("name", ["shop", "mirror"])
def test_f110_a_refused_password_is_read_again_by_resume(
    cdc: Cdc, clerk: Callable[[Database, str], Path], source_db: Database, target_db: Database, name: str
) -> None:
    changed = source_db if name == "shop" else target_db
    part = "sources" if name == "shop" else "sinks"
    with cdc.running():
        cdc.wait_for_sink("running")
        arrives(cdc, source_db, target_db, 1)
        file = clerk(changed, "second")
        cut(changed)
        wait_until(lambda: cdc.status()[part][name]["state"] == "failed", what=lambda: cdc.log)
        assert "cdc resume NAME" in cdc.status()[part][name]["hint"]
        assert cdc("resume", name).returncode == 0
        wait_until(lambda: cdc.log.count("password authentication failed") >= 2, what=lambda: cdc.log)
        wait_until(lambda: cdc.status()[part][name]["state"] == "failed", what=lambda: cdc.log)
        file.write_text(url(changed, "second"))
        assert cdc("resume", name).returncode == 0
        arrives(cdc, source_db, target_db, 2)


def test_f110_a_reload_hands_out_passwords_before_they_are_needed(
    cdc: Cdc, clerk: Callable[[Database, str], Path], source_db: Database, target_db: Database
) -> None:
    with cdc.running() as process:
        cdc.wait_for_sink("running")
        arrives(cdc, source_db, target_db, 1)
        for database in (source_db, target_db):
            clerk(database, "second").write_text(url(database, "second"))
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: '"reloaded"' in cdc.log, what=lambda: cdc.log)
        for database in (source_db, target_db):
            cut(database)
        arrives(cdc, source_db, target_db, 2)
