"""Where a soak takes place: a daemon that mirrors PostgreSQL and MongoDB, with a feed, and all that it speaks to."""

from __future__ import annotations

import json
import random
import signal
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, Self
from urllib.error import HTTPError

import pymongo

from tests import shop
from tests.benchmarks.stream_clients import Client
from tests.faults.daemon import Daemon
from tests.faults.proxy import MONGODB, POSTGRES, Proxy
from tests.mongo_random import Workload as Documents
from tests.mongod.process import StandIn
from tests.processes import wait_until
from tests.servers import PostgresServer
from tests.soak.clients import Api
from tests.soak.counts import Counts, files, process_counts, resident_bytes, sizes_of

PATIENCE_SECONDS: Final = 90.0
"""For anything that a healthy daemon does; a WebSocket that does not answer is given up after 40 seconds."""

PATHS: Final = ("shop", "shop_backup", "ordersDB", "ordersDB_backup")
"""Databases, each reached through a network that can be cut; the first two are of PostgreSQL."""

_KEPT: Final = {".queue", ".sqlite"}

_NAMES: Final = Path(__file__).with_name("names")
"""Lets the kernel, and so us, know the names of threads."""

_CONFIG: Final = """
[sinks.changes]
kind = "data_changes"
from = "shop"
retention = "{retention}s"
{feed}

[sources.orders]
url = {orders}

[sinks.orders_backup]
from = "orders"
url = {backup}
batch = {{max_changes = {max_changes}}}

[[http.tokens]]
name = "operator"
token = "{token}"
scopes = ["admin"]
"""

_POSTGRES: Final = "postgresql://postgres@127.0.0.1:{}/{}?sslmode=disable&gssencmode=disable"
_MONGODB: Final = "mongodb://127.0.0.1:{}/{}?directConnection=true&heartbeatFrequencyMS=500"


class Setting:
    """Ends what it has started. The seed decides what is written, and if the feed is SQLite or (odd) in PostgreSQL.

    silent: clients that are there, and say and read nothing.
    """

    def __init__(self, folder: Path, *, seed: int) -> None:
        self.folder = folder
        self.rng = random.Random(seed)
        self.silent: list[Client] = []
        self._seed = seed
        self._edition = 0
        self._stack = ExitStack()
        (folder / "tmp").mkdir()

    def __enter__(self) -> Self:
        with ExitStack() as on_error:
            on_error.push(self._stack)
            self._begin()
            on_error.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _begin(self) -> None:
        self.postgres = self._stack.enter_context(PostgresServer(settings={"wal_sender_timeout": "10s"}))
        self.mongodb = self._stack.enter_context(StandIn())
        self.source, self.target = (self.postgres.create_database(name) for name in PATHS[:2])
        client = pymongo.MongoClient[dict[str, Any]](self.mongodb.url)
        self.client = self._stack.enter_context(client)
        self.lines = {
            name: self._stack.enter_context(
                Proxy(*((self.postgres.port, POSTGRES) if name in PATHS[:2] else (self.mongodb.port, MONGODB)))
            )
            for name in PATHS
        }
        with self.source.connect() as connection:
            shop.create(connection)
            shop.fill(connection)
            connection.execute("CREATE TABLE marks (id text PRIMARY KEY)")
        self._documents = Documents(self.client, PATHS[2], self._seed, ddl=False, moves=False)
        self._documents.run(100)
        self.client[PATHS[2]].marks.insert_one({"_id": "the first"})
        self.daemon = Daemon(
            self.folder,
            source=self._url("shop"),
            target=self._url("shop_backup"),
            pg_dump=self.postgres.bin_dir / "pg_dump",
            sink_options="retry = {max = 2.0}",
            environment={"TMPDIR": str(self.folder / "tmp"), "PYTHONPATH": str(_NAMES)},
        )
        self._stack.push(self.daemon)
        self._plain_config = self.daemon.config_file.read_text()
        self.reconfigure()

    def _url(self, name: str) -> str:
        return (_POSTGRES if name in PATHS[:2] else _MONGODB).format(self.lines[name].port, name)

    # the daemon

    def reconfigure(self) -> None:
        """Write another configuration, which a reload can take."""
        self._edition += 1
        feed = f"url = {json.dumps(self._url('shop_backup'))}" if self._seed % 2 else ""
        changing = {
            "retention": 20 + self._edition % 10,
            "max_changes": 1_000 + self._edition % 10,
            "token": f"{self._seed}-{self._edition}",
        }
        urls = {"orders": json.dumps(self._url("ordersDB")), "backup": json.dumps(self._url("ordersDB_backup"))}
        self.daemon.config_file.write_text(self._plain_config + _CONFIG.format(**urls, **changing, feed=feed))

    @property
    def api(self) -> Api:
        """The daemon's, with the token of the configuration that was written last."""
        url = (self.daemon.data_dir / "http").read_text()
        return Api(url, f"{self._seed}-{self._edition}")

    def start(self) -> None:
        """Start the daemon, and wait until all is there."""
        self.daemon.start()
        self.wait((self.daemon.data_dir / "http").exists, "the daemon to listen")
        self.arrive()

    def signal_reload(self, answer: str) -> None:
        """SIGHUP; wait until the log has that answer."""
        before = self.daemon.log_file.stat().st_size
        self.daemon.signal(signal.SIGHUP)

        def told() -> bool:
            with self.daemon.log_file.open("rb") as log:
                log.seek(before)
                return f'"{answer}'.encode() in log.read()

        self.wait(told, f"the log to say: {answer}")

    def left_behind(self) -> list[str]:
        """What there is although the daemon has ended, and should not be."""
        wait_until(lambda: not self._connections(), what=lambda: f"connections to end: {self._connections()}")
        kept = {path for path in files(self.daemon.data_dir) if path.name == "lock" or path.suffix in _KEPT}
        left = {*files(self.folder / "tmp"), *files(self.daemon.data_dir)} - kept
        return [f"{path} is left" for path in sorted(left)]

    # the databases

    def burst(self, transactions: int) -> None:
        """Write so much to PostgreSQL, as fast as it goes, and as much to MongoDB."""
        with shop.Workload(self.source.url, seed=self.rng.getrandbits(32)) as customers:
            self._documents.run(2 * transactions)
            self.wait(lambda: customers.transactions >= transactions, "customers to buy")

    def arrive(self) -> None:
        """Wait until all that was written is in the mirrors, and nothing is at work."""
        text = f"mark {uuid.uuid4()}"
        self.source.execute("INSERT INTO marks VALUES (%s)", [text])
        self.client[PATHS[2]].marks.insert_one({"_id": text})
        self.wait(lambda: self._has_arrived(text), "the mirrors to catch up")
        self.wait(self._is_quiet, "nothing to be at work")
        self.wait(self._is_feed_there, "the feed to be read again")

    def _is_feed_there(self) -> bool:
        """It is found again a little later than the mirror beside it."""
        try:
            return bool(self.api.get("/api/changes/poll?limit=1"))
        except HTTPError:
            return False

    def _has_arrived(self, mark: str) -> bool:
        if self.client[PATHS[3]].marks.find_one({"_id": mark}) is None:
            return False
        with self.target.connect() as connection:
            there = connection.execute("SELECT to_regclass('marks')").fetchone()
            if there is None or there[0] is None:
                return False
            return connection.execute("SELECT FROM marks WHERE id = %s", [mark]).fetchone() is not None

    def _is_quiet(self) -> bool:
        status = self.api.get("/status")
        parts = [*status["sources"].values(), *status["sinks"].values()]
        queues = [source["queue"]["batches"] for source in status["sources"].values()]
        running = all(part["state"] == "running" and not part.get("resync") for part in parts)
        return running and not any(queues)

    def await_quiet(self) -> None:
        """Nothing is at work; the daemon has lost patience with the silent clients, who now go; its pools are full."""
        self.arrive()
        self.wait(lambda: not self.api.get("/stats")["connections"], "silent clients to be given up")
        for client in self.silent:
            client.socket.close()
        self.silent.clear()
        self.api.crowd()

    # waiting

    def rest(self, seconds: float) -> None:
        """Let time pass: an idle daemon is the subject."""
        threading.Event().wait(seconds)

    def wait(self, condition: Callable[[], object], what: str) -> None:
        """Wait for something that a healthy daemon does."""

        def done() -> bool:
            if not self.daemon.running:
                raise TimeoutError(f"the daemon ended by itself:\n{self.daemon.log_tail()}")
            return bool(condition())

        wait_until(
            done,
            timeout_seconds=PATIENCE_SECONDS,
            what=lambda: f"{what}\n{self.daemon.ask('status').stdout}\n{self.daemon.log_tail()}",
        )

    # what is counted

    def count(self, highest: Counts, *, patience_seconds: float) -> Counts:
        """All that is countable, now that nothing is at work.

        What is beyond the highest known has so long to come down again; where nothing is known, so has all.
        """
        lowest = self._count()
        deadline = time.monotonic() + patience_seconds
        while time.monotonic() < deadline and any(lowest[name] > highest.get(name, 0) for name in lowest):
            self.rest(0.25)
            found = self._count()
            lowest = Counter({name: min(lowest[name], found[name]) for name in lowest})
        return lowest

    def sizes(self) -> Counts:
        """In bytes."""
        queues = self.daemon.data_dir.glob("*.queue*")
        return {"memory": resident_bytes(self.daemon.pid), "queues": sizes_of(queues)}

    def _count(self) -> Counter[str]:
        found = process_counts(self.daemon.pid)
        found.update(self._connections())
        found["files in the data directory"] = len(files(self.daemon.data_dir))
        found["temporary files"] = len(files(self.folder / "tmp"))
        statistics = self.mongodb.command("cdcTestStatistics")
        found.update({f"MongoDB {name}": statistics[name] for name in ("openCursors", "openTransactions")})
        (slots,) = self.source.execute("SELECT count(*) FROM pg_replication_slots")
        found["replication slots"] = slots[0]
        return found

    def _connections(self) -> Counter[str]:
        """The daemon's."""
        query = """SELECT datname, application_name, count(*) FROM pg_stat_activity
                    WHERE application_name LIKE 'cdc%' AND backend_type IN ('client backend', 'walsender')
                    GROUP BY 1, 2"""
        lines = {f"MongoDB {name}": self.lines[name].connections for name in PATHS[2:]}
        sessions = {f"PostgreSQL {name}: {whose}": number for name, whose, number in self.source.execute(query)}
        return +Counter(lines | sessions)
