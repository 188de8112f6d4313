"""Two PostgreSQL servers, the load on one, and a watcher of the other."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Mapping
from typing import ClassVar, Final

import psycopg

from tests.faults.load_postgres import SCHEMA, TABLES, Load
from tests.faults.proxy import POSTGRES, Proxy
from tests.faults.watch_postgres import Watcher
from tests.faults.world import Violation, World
from tests.processes import wait_until
from tests.servers import Database, PostgresServer

_SETTINGS: Final = {"wal_sender_timeout": "10s"}


class PostgresWorld(World):
    """servers: the real ones, `source` and `target`, for whoever wants to stop them.

    An odd seed has event triggers tell of DDL; with an even one the catalog is looked at.
    """

    kind = "postgres"
    bulk_table = "public.bulk"
    counters: ClassVar = {
        "journal": lambda change: change["after"]["seq"],
        "counters": lambda change: change["after"]["n"],
    }
    servers: Mapping[str, PostgresServer]

    def begin(self) -> None:
        self.servers = {
            name: self.stack.enter_context(PostgresServer(settings=_SETTINGS)) for name in ("source", "target")
        }
        self.databases = {name: server.create_database("shop") for name, server in self.servers.items()}
        self.source, self.target = self.databases["source"], self.databases["target"]
        self.source.execute(SCHEMA)
        self.lines = {
            name: self.stack.enter_context(Proxy(server.port, POSTGRES)) for name, server in self.servers.items()
        }
        self.daemon = self.make_daemon(
            *(f"postgresql://postgres@127.0.0.1:{self.lines[name].port}/shop?sslmode=disable&gssencmode=disable"
              for name in ("source", "target")),
            pg_dump=self.servers["source"].bin_dir / "pg_dump",
            options='on_gap = "resync"',
        )  # fmt: skip
        if self.seed % 2 and (result := self.daemon.ask("init", "--ddl-capture")).returncode:
            raise Violation(f"event triggers could not be installed: {result.stderr}")
        self.load = self.stack.enter_context(Load(self.source.url, seed=self.seed, rate=self.rate))
        self.watcher = self.stack.enter_context(Watcher(self.target.url))

    def mark(self) -> str:
        text = f"mark {uuid.uuid4()}"
        wait_until(lambda: self._write(text), what="the source to take a mark", timeout_seconds=60)
        return text

    def _write(self, text: str) -> bool:
        try:
            self.source.execute("INSERT INTO marks VALUES (%s)", [text])
        except psycopg.OperationalError:
            return False
        return True

    def has_arrived(self, mark: str) -> bool:
        try:
            return bool(self.target.value("SELECT EXISTS (SELECT FROM marks WHERE id = %s)", [mark]))
        except (psycopg.OperationalError, psycopg.errors.UndefinedTable):
            return False

    def differences(self) -> list[str]:
        return [problem for table in TABLES for problem in compare(self.source, self.target, table)]

    def counted(self) -> Mapping[str, Mapping[str, int]]:
        queries = {"journal": "SELECT key::text, seq FROM journal", "counters": "SELECT id::text, n FROM counters"}
        return {kind: dict(self.source.execute(query)) for kind, query in queries.items()}

    def is_versioned(self, entity_type: str) -> bool:
        return entity_type != "bulk"  # which retention removes

    def seen(self) -> list[str]:
        return self.watcher.problems


def compare(source: Database, target: Database, table: str) -> list[str]:
    """Compare the exact text of all rows, equal ones counted."""
    query = f"SELECT row::text FROM {table} AS row"
    ours, theirs = (Counter(row for (row,) in database.execute(query)) for database in (source, target))
    missing, extra = ours - theirs, theirs - ours
    return [
        f"{table}: {rows.total()} rows {what}, as {next(iter(rows))[:100]}"
        for what, rows in (("are missing from the mirror", missing), ("are too many in the mirror", extra))
        if rows
    ]
