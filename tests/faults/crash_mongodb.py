"""Kill the daemon of a MongoDB mirror with -9 again and again, while everything is written and the server fails too.

The daemon is a process, the server a `mongod` or, where there is none, the stand-in. Commands of the daemon, and only
of it, fail at random: connections are closed before and after a command was executed, the primary steps down, cursors
are gone. At the end all documents must be equal byte for byte, and `cdc verify` must say so too.
"""

from __future__ import annotations

import itertools
import random
import subprocess
import threading
from collections.abc import Callable
from typing import Any, Final

import msgspec
import pymongo

from tests.command import Cdc
from tests.mongo import at, raw_documents
from tests.mongod.fixture import MongoDatabase
from tests.processes import kill_tree

DOCUMENTS: Final = 10_000

CLIENTS: Final = ("cdc shop", "cdc sink mirror")
"""Names that the daemon's connections tell the server: of its source `shop`, and of its sink `mirror`."""

_RESUMABLE: Final = {"errorLabels": ["ResumableChangeStreamError"]}
_FAULTS: Final[tuple[tuple[tuple[str, ...], dict[str, Any]], ...]] = (
    (("getMore", "aggregate"), {"closeConnection": True}),
    (("getMore",), {"errorCode": 43, **_RESUMABLE}),  # CursorNotFound
    (("getMore", "aggregate"), {"errorCode": 10107, **_RESUMABLE}),  # NotWritablePrimary
    (("getMore",), {"errorCode": 262, **_RESUMABLE}),  # ExceededTimeLimit
    (("find", "aggregate"), {"closeConnection": True}),
    (("insert", "update", "delete", "commitTransaction"), {"closeConnection": True}),
    (("insert", "update", "delete"), {"errorCode": 10107}),
    (("insert", "update", "delete"), {"errorCode": 91}),  # ShutdownInProgress
    (("insert", "update"), {"errorCode": 112, "errorLabels": ["TransientTransactionError"]}),  # WriteConflict
)


class Result(msgspec.Struct):
    """What happened, and what is wrong; `problems` is empty where nothing is."""

    seed: int
    kills: int = 0
    faults: int = 0
    writes: int = 0
    documents: int = 0
    problems: list[str] = []


class Load(threading.Thread):
    """Everything that a source can do to its mirror, at random, as a context manager."""

    def __init__(self, database: MongoDatabase, seed: int) -> None:
        super().__init__()
        self.writes = 0
        self._database = database
        self._random = random.Random(seed)
        self._stop_it = threading.Event()
        self._error: Exception | None = None

    def __enter__(self) -> Load:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_it.set()
        self.join()
        if self._error is not None:
            raise self._error

    def run(self) -> None:
        try:
            for number in itertools.count(1):
                self._write(number)
                if number % 50 == 0:
                    self._pass_on_a_unique_value()
                if number % 70 == 0:
                    self._in_one_transaction(number)
                if number % 200 == 0:
                    self._replace_a_collection(number)
                self.writes = number
                if self._stop_it.wait(0.001):
                    return
        except Exception as exc:  # noqa: BLE001 - raised at the end
            self._error = exc

    def _write(self, number: int) -> None:
        orders, one = self._database.orders, self._any()
        orders.insert_one({"_id": f"new {number}", "unique": f"new {number}"})
        orders.update_one({"_id": one}, {"$set": {"b": number, "sub.x": number}, "$push": {"list": number}})
        orders.update_one({"_id": one}, {"$pop": {"list": -1}, "$unset": {"b": 1}})
        orders.replace_one({"_id": self._any()}, {"unique": f"replaced {number}"})
        orders.delete_one({"_id": f"new {number - 50}"})

    def _pass_on_a_unique_value(self) -> None:
        orders, one, other = self._database.orders, self._any(), self._any()
        found = orders.find_one({"_id": one})
        if found is not None and one != other:
            orders.delete_one({"_id": one})
            orders.update_one({"_id": other}, {"$set": {"unique": found["unique"]}}, upsert=True)

    def _in_one_transaction(self, number: int) -> None:
        with self._database.client.start_session() as session, session.start_transaction():
            for account, amount in (("from", -number), ("to", number)):
                self._database.accounts.update_one(
                    {"_id": account}, {"$inc": {"balance": amount}}, upsert=True, session=session
                )

    def _replace_a_collection(self, number: int) -> None:
        name = f"c{number % 600}"
        self._database[name].drop()
        self._database[name].insert_one({"_id": number})
        if number % 600 == 0:
            self._database[name].rename("renamed", dropTarget=True)

    def _any(self) -> int:
        return self._random.randrange(DOCUMENTS)


class CrashTest:
    """One run. faults: whether commands fail besides."""

    def __init__(
        self, cdc: Cdc, url: str, database: str, *, kills: int, seed: int, full_document: str, faults: bool
    ) -> None:
        self._client = pymongo.MongoClient[dict[str, Any]](url)
        self._source = self._client[database]
        self._mirror = self._client[f"{database}_backup"]
        self._cdc = cdc
        self._kills = kills
        self._random = random.Random(seed)
        self._faults = faults
        self.result = Result(seed)
        # a server that seems not to be the primary is looked at again soon
        cdc.configure(at(url, database, "heartbeatFrequencyMS=500"), source=f'full_document = "{full_document}"')
        cdc.file.write_text(f"{cdc.file.read_text()}\n[sinks.mirror.copy]\nchunk_bytes = 300_000\n")

    def run(self, say: Callable[[str], None] = lambda _: None) -> Result:
        """Fill the source, kill, let it catch up, compare, and drop both databases."""
        try:
            self._fill()
            with Load(self._source, self.result.seed) as load:
                for _ in range(self._kills):
                    self._run_and_kill()
                    self.result.kills += 1
                    if self.result.kills % 10 == 0:
                        say(f"{self.result.kills}/{self._kills} kills, {load.writes:,} rounds of writes")
            self.result.writes = load.writes
            self._stop_failing()
            with self._cdc.running():
                self._cdc.wait_for_sink("running")
                self._compare()
        finally:
            self._stop_failing()
            for database in (self._source, self._mirror):
                self._client.drop_database(database.name)
            self._client.close()
        return self.result

    def _fill(self) -> None:
        orders = self._source.orders
        orders.insert_many([{"_id": n, "unique": n, "text": "x" * 300} for n in range(DOCUMENTS)])
        orders.create_index("unique", unique=True)

    def _run_and_kill(self) -> None:
        """Run the daemon for a while, and end it as a power cut would. It must not have ended by itself."""
        if self._faults:
            self._fail()
        with (self._cdc.folder / "log").open("a") as log:
            surroundings = {**self._cdc.surroundings(), "stdout": log, "stderr": log}
            process = subprocess.Popen(self._cdc.command("run"), **surroundings)
        try:
            process.wait(self._random.uniform(0.6, 2.5))
        except subprocess.TimeoutExpired:
            kill_tree(process.pid)
            process.wait()
            (self._cdc.data_dir / "http").unlink(missing_ok=True)
        else:
            raise AssertionError(f"the daemon ended: {self._cdc.log[-3000:]}")

    def _fail(self) -> None:
        """From now on some of the daemon's commands fail."""
        commands, data = self._random.choice(_FAULTS)
        data = {**data, "failCommands": list(commands), "appName": self._random.choice(CLIENTS)}
        mode = {"activationProbability": self._random.choice([0.02, 0.1, 0.3])}
        self._client.admin.command({"configureFailPoint": "failCommand", "mode": mode, "data": data})
        self.result.faults += 1

    def _stop_failing(self) -> None:
        if self._faults:
            self._client.admin.command({"configureFailPoint": "failCommand", "mode": "off"})

    def _compare(self) -> None:
        verified = self._cdc("verify")
        if verified.returncode:
            self.result.problems.append(f"cdc verify: {verified.stdout}{verified.stderr}")
        names = sorted(self._source.list_collection_names())
        own = [name for name in self._mirror.list_collection_names() if name != "cdc_positions"]
        if sorted(own) != names:
            self.result.problems.append(f"collections: {names} at the source, {sorted(own)} in the mirror")
        for name in names:
            ours, theirs = raw_documents(self._source, name), raw_documents(self._mirror, name)
            self.result.documents += len(ours)
            if ours != theirs:
                lost = f"{len(set(ours) - set(theirs))} missing or different, {len(set(theirs) - set(ours))} too many"
                self.result.problems.append(f"{name}: {lost}")
