"""Passwords and tokens stay where they were written, whatever is done with a daemon, and whatever fails."""

from __future__ import annotations

import json
import signal
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from cdc.api.client import Client
from cdc.secret import Token
from cdc.status import SinkStatus
from tests.command import Cdc
from tests.processes import wait_until
from tests.servers import Database

WORD: Final = "kanari"
"""Part of every secret, and of nothing else."""

PASSWORD: Final = f"{WORD}'s p@ss:word/{WORD}"
"""With what has a meaning in URLs, in libpq's strings and for a careless pattern; it ends as it begins."""

TOKEN: Final = f"{WORD}-token"

PATHS: Final = (
    "/",
    "/health",
    "/ready",
    "/status",
    "/metrics",
    "/stats",
    "/openapi.json",
    "/api/changes/poll",
    "/api/dead-letters",
    "/api/dead-letters?full=true",
    "/nowhere",
)


class CommandLines:
    """Those of all processes of this machine, looked at again and again within the block."""

    def __init__(self) -> None:
        self.seen: set[bytes] = set()
        self._done = threading.Event()

    def __enter__(self) -> CommandLines:
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            for file in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    self.seen.add(file.read_bytes())
                except OSError:
                    continue  # it has ended


class Shop:
    """A mirror that parks and a feed, between databases that want passwords; and all that was said."""

    def __init__(self, cdc: Cdc, source: Database, target: Database, pg_dump: Path) -> None:
        self.cdc, self.source, self.target, self.pg_dump = cdc, source, target, pg_dump
        self.said: dict[str, bytes] = {}
        (cdc.folder / "target_url").write_text(self.url(target))
        (cdc.folder / "token").write_text(TOKEN)

    @staticmethod
    def url(database: Database, password: str = PASSWORD) -> str:
        return database.server.url(database.name, user="keeper", password=password)

    def configure(self, source_password: str = PASSWORD) -> None:
        self.cdc.configure(
            self.url(self.source, source_password),
            daemon='log_level = "debug"',
            source=f'pg_dump = "{self.pg_dump}"',
            sink=f"""
                url_file = "{self.cdc.folder}/target_url"
                on_error = "park"
                retry = {{ initial = 0.05, max = 0.1, attempts = 2 }}
                [sinks.feed]
                kind = "data_changes"
                from = "shop"
            """,
            http=f"""
                [[http.tokens]]
                name = "operator"
                token_file = "{self.cdc.folder}/token"
                scopes = ["admin"]
            """,
        )

    def status(self) -> SinkStatus:
        """Of the mirror."""
        return Client((self.cdc.data_dir / "http").read_text(), Token(TOKEN)).status().sinks["mirror"]

    def run(self, *arguments: str, code: int = 0) -> str:
        """A command, which ends with this exit code; what it prints."""
        result = self.cdc("--debug", *arguments)
        self.said[" ".join(arguments)] = (result.stdout + result.stderr).encode()
        assert result.returncode == code, result.stdout + result.stderr
        return result.stdout

    def ask(self, path: str, token: str = TOKEN) -> None:
        request = urllib.request.Request(
            (self.cdc.data_dir / "http").read_text() + path, headers={"Authorization": f"Bearer {token}"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                body, headers = answer.read(), str(answer.headers)
        except urllib.error.HTTPError as exc:
            body, headers = exc.read(), str(exc.headers)
        self.said[f"GET {path}"] = body + headers.encode()


@contextmanager
def keepers(*databases: Database) -> Iterator[None]:
    """Each server has a role that must show a password."""
    try:
        for database in databases:
            password = PASSWORD.replace("'", "''")
            database.execute(f"CREATE ROLE keeper SUPERUSER LOGIN PASSWORD '{password}' IN ROLE needs_password")
        yield
    finally:
        for database in databases:
            database.execute("DROP OWNED BY keeper CASCADE; DROP ROLE keeper")


@pytest.fixture
def shop(cdc: Cdc, source_db: Database, target_db: Database, pg_dump: Path) -> Iterator[Shop]:
    source_db.execute("CREATE TABLE items (id int PRIMARY KEY, name text); INSERT INTO items VALUES (1, 'one')")
    with keepers(source_db, target_db):
        yield Shop(cdc, source_db, target_db, pg_dump)


def test_f113_no_secret_is_shown_anywhere(shop: Shop, cdc: Cdc) -> None:
    with CommandLines() as lines:
        shop.configure(source_password=f"not the {PASSWORD}")
        shop.run("check", code=1)
        shop.run("run", code=1)
        shop.configure()
        shop.run("check")
        shop.run("copy", "mirror")
        with cdc.running() as process:
            work_and_fail(shop, cdc)
            for path in PATHS:
                shop.ask(path)
            shop.ask("/status", token=f"{WORD}-other-token")
            process.send_signal(signal.SIGHUP)
            wait_until(lambda: '"reloaded"' in cdc.log, what=lambda: cdc.log)
            in_use = contents(cdc.data_dir)
        shop.run("status", "--json", code=1)
    places = shop.said | in_use | contents(cdc.data_dir) | {"log": cdc.log.encode()}
    assert len(lines.seen) > 10
    assert [place for place, text in places.items() if WORD.encode() in text.lower()] == []
    assert [line for line in lines.seen if WORD.encode() in line.lower()] == []


def work_and_fail(shop: Shop, cdc: Cdc) -> None:
    """Deliver, lose connections, be refused, compare."""
    wait_until(lambda: shop.status().state == "running", what=lambda: cdc.log)
    for database in (shop.source, shop.target):
        database.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'keeper'")
    wait_until(lambda: "unavailable" in cdc.log, what=lambda: cdc.log)
    shop.target.execute("ALTER TABLE items ADD CONSTRAINT poison CHECK (name <> 'bad')")
    shop.source.execute("INSERT INTO items VALUES (2, 'bad'), (3, 'good')")
    wait_until(lambda: shop.status().dead == 1, what=lambda: f"{shop.status()}\n{cdc.log}")
    shop.run("status", code=1)  # dead changes are trouble
    shop.run("verify", code=1)
    (letter,) = json.loads(shop.run("dead-letters", "list", "--json"))
    shop.run("dead-letters", "show", letter["id"])


def contents(folder: Path) -> dict[str, bytes]:
    """Of all files in a folder."""
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
