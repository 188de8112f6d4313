"""A daemon that is followed from outside, between databases that lose what it needs."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cdc.api.client import Client
from cdc.status import to_json
from tests.command import Cdc
from tests.processes import wait_until
from tests.servers import Database

SCHEMA = """
    CREATE TABLE items (id int PRIMARY KEY, name text UNIQUE);
    CREATE TABLE keyless (n int);
    ALTER TABLE keyless REPLICA IDENTITY FULL;
    INSERT INTO items SELECT n, 'item ' || n FROM generate_series(1, 100) n;
    INSERT INTO keyless SELECT generate_series(1, 10);
"""
MISSED = """
    DELETE FROM items WHERE id <= 50;
    UPDATE items SET name = NULL WHERE id = 51;
    UPDATE items SET name = 'item 51' WHERE id = 60;
    INSERT INTO items SELECT n, 'item ' || (n - 200) FROM generate_series(201, 220) n;
    DELETE FROM keyless WHERE n < 5;
"""
"""What happens while nobody captures: names pass from row to row."""
MISSED_AGAIN = """
    DELETE FROM items WHERE id > 90;
    UPDATE items SET name = 'item 60' WHERE id = 61;
    UPDATE keyless SET n = 50 WHERE n > 8;
"""
ANEW = "the stream begins anew: changes are missing"


class Daemon:
    """A daemon that is followed from outside."""

    def __init__(self, cdc: Cdc) -> None:
        self.cdc = cdc

    @property
    def client(self) -> Client:
        """As the command line has one, without a process for each command."""
        return Client((self.cdc.data_dir / "http").read_text())

    def status(self) -> dict[str, Any]:
        """As `cdc status --json` prints it."""
        return dict(json.loads(to_json(self.client.status())))

    def wait_for_state(self, sink: str, state: str) -> None:
        wait_until(lambda: self.status()["sinks"][sink]["state"] == state, what=lambda: f"{sink}: {self.cdc.log}")

    def failed(self, name: str) -> dict[str, Any]:
        """Wait until a source or a sink has stopped, and return its status."""

        def found() -> dict[str, Any] | None:
            status = self.status()
            part = (status["sources"] | status["sinks"])[name]
            return part if part["state"] == "failed" else None

        return wait_until(found, what=lambda: f"{name} to fail: {self.status()}\n{self.cdc.log}")

    def follow(self, hint: str, *expected: str) -> str:
        """Do what the hint says."""
        found = re.search(r"`cdc ([^`]+)`", hint)
        assert found is not None, hint
        assert found[1].split() == list(expected)
        done = self.cdc(*found[1].split())
        assert done.returncode == 0, done.stderr
        return done.stdout

    def wait_until_parked(self, count: int) -> None:
        def parked() -> bool:
            return bool(self.status()["sinks"]["mirror"]["parked"] == count)

        wait_until(parked, what=lambda: f"{count} to be parked: {self.status()}\n{self.cdc.log}")

    def wait_until_resynced(self) -> None:
        def done() -> bool:
            status = self.status()
            sink, source = status["sinks"]["mirror"], status["sources"]["shop"]
            return sink["state"] == source["state"] == "running" and sink["resync"] is None

        wait_until(done, timeout_seconds=60, what=lambda: f"the resync: {self.status()}\n{self.cdc.log}")

    def wait_until_ordered(self) -> None:
        """A resync that a pause holds up."""

        def shown() -> bool:
            sink = self.status()["sinks"]["mirror"]
            return bool(sink["state"] == "paused" and sink["resync"])

        wait_until(shown, what=lambda: f"what was ordered: {self.status()}\n{self.cdc.log}")

    def wait_until_anew(self, count: int) -> None:
        """Its source has had so many gaps."""
        wait_until(lambda: self.cdc.log.count(ANEW) == count, what=lambda: self.cdc.log)

    def wait_until_resyncing(self) -> None:
        def begun() -> bool:
            status = self.status()
            sink, source = status["sinks"]["mirror"], status["sources"]["shop"]
            return bool(sink["state"] == "resyncing" and sink["resync"] and source["state"] == "running")

        wait_until(begun, timeout_seconds=60, what=lambda: f"a resync: {self.status()}\n{self.cdc.log}")


class Run(Daemon):
    """Of two PostgreSQL databases."""

    def __init__(self, cdc: Cdc, source_db: Database, target_db: Database, pg_dump: Path) -> None:
        super().__init__(cdc)
        self.source_db, self.target_db, self.pg_dump = source_db, target_db, pg_dump
        self.configure(source_db)

    def configure(self, source_db: Database, **options: str) -> None:
        source = f'pg_dump = "{self.pg_dump}"\nslot = "{self.source_db.name}"\n{options.pop("source", "")}'
        self.cdc.configure(source_db.url, self.target_db.url, source=source, **options)

    @contextmanager
    def running(self) -> Iterator[subprocess.Popen[str]]:
        with self.cdc.running() as process:
            yield process

    def fill_and_stop(self) -> None:
        with self.cdc.running():
            self.wait_until_resynced()
            self.source_db.execute("UPDATE items SET name = 'first' WHERE id = 1")
            self.wait_for_row("first")

    def wait_for_row(self, name: str) -> None:
        query = f"SELECT count(*) FROM items WHERE name = '{name}'"
        wait_until(lambda: self.target_db.value(query), what=lambda: f"{name}: {self.status()}\n{self.cdc.log}")

    def assert_right(self, new: str = "1") -> None:
        """Right, and following the stream."""
        self.wait_until_resynced()
        self.source_db.execute(f"INSERT INTO items VALUES (1000 + {new}, 'new {new}')")
        self.wait_for_row(f"new {new}")
        verified = self.cdc("verify")
        assert verified.returncode == 0, verified.stdout


def drop_slot(database: Database) -> None:
    database.execute(f"SELECT pg_drop_replication_slot('{database.name}')")


def read_slot(database: Database) -> None:
    database.execute("INSERT INTO keyless VALUES (77)")
    database.execute(f"SELECT pg_replication_slot_advance('{database.name}', pg_current_wal_lsn())")


def lose_slot(database: Database) -> None:
    state = f"SELECT wal_status FROM pg_replication_slots WHERE slot_name = '{database.name}'"

    def lost() -> bool:
        database.execute("SELECT pg_logical_emit_message(true, 'fill', 'x'), pg_switch_wal()")
        database.execute("CHECKPOINT")
        return bool(database.value(state) == "lost")

    database.execute("ALTER SYSTEM SET max_slot_wal_keep_size = '1MB'")
    try:
        database.execute("SELECT pg_reload_conf()")
        wait_until(lost, what=lambda: str(database.value(state)))
    finally:
        database.execute("ALTER SYSTEM RESET max_slot_wal_keep_size")
        database.execute("SELECT pg_reload_conf()")
