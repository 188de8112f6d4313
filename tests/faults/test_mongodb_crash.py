"""kill -9 at random moments of a MongoDB mirror's life: while it copies, catches up and streams."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.command import Cdc
from tests.mongo import at, raw_documents
from tests.mongod.fixture import MongoDatabase
from tests.processes import kill_tree

DOCUMENTS = 10_000
KILLS = int(os.environ.get("CDC_TEST_KILLS", "8"))

_names = itertools.count(1)


class Load(threading.Thread):
    """Everything that a source can do to its mirror, at random, as a context manager."""

    def __init__(self, database: MongoDatabase, seed: int) -> None:
        super().__init__()
        self._database = database
        self._random = random.Random(seed)
        self._stop_it = threading.Event()
        self._error: Exception | None = None

    def __enter__(self) -> None:
        self.start()

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
                if number % 200 == 0:
                    self._replace_a_collection(number)
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

    def _replace_a_collection(self, number: int) -> None:
        name = f"c{number % 600}"
        self._database[name].drop()
        self._database[name].insert_one({"_id": number})
        if number % 600 == 0:
            self._database[name].rename("renamed", dropTarget=True)

    def _any(self) -> int:
        return self._random.randrange(DOCUMENTS)


@pytest.fixture
def databases(mongodb_client: Any) -> Iterator[tuple[MongoDatabase, MongoDatabase]]:
    name = f"crash_{os.getpid()}_{next(_names)}"
    yield mongodb_client[name], mongodb_client[f"{name}_backup"]
    for each in (name, f"{name}_backup"):
        mongodb_client.drop_database(each)


@pytest.mark.slow
@pytest.mark.parametrize("full_document", ["updateLookup", "off"])
def test_f48_f50_f65_f66_f82_f83_f101_killed_at_random_moments_it_ends_equal(
    cdc: Cdc, mongodb: str, databases: tuple[MongoDatabase, MongoDatabase], full_document: str
) -> None:
    source, mirror = databases
    fill(source)
    cdc.configure(at(mongodb, source.name), source=f'full_document = "{full_document}"')
    cdc.file.write_text(f"{cdc.file.read_text()}\n[sinks.mirror.copy]\nchunk_bytes = 300_000\n")
    moments = random.Random(full_document)
    with Load(source, seed=1):
        for _ in range(KILLS):
            run_and_kill(cdc, moments.uniform(0.6, 2.5))
    with cdc.running():
        cdc.wait_for_sink("running")
        verified = cdc("verify")
        assert verified.returncode == 0, verified.stdout + cdc.log[-3000:]
    names = sorted(source.list_collection_names())
    assert names == sorted(name for name in mirror.list_collection_names() if name != "cdc_positions")
    for name in names:
        assert raw_documents(source, name) == raw_documents(mirror, name)


def fill(database: MongoDatabase) -> None:
    database.orders.insert_many([{"_id": n, "unique": n, "text": "x" * 300} for n in range(DOCUMENTS)])
    database.orders.create_index("unique", unique=True)


def run_and_kill(cdc: Cdc, seconds: float) -> None:
    """Run the daemon for a while, and end it as a power cut would. It must not have ended by itself."""
    with (cdc.folder / "log").open("a") as log:
        process = subprocess.Popen(cdc.command("run"), **{**cdc.surroundings(), "stdout": log, "stderr": log})
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        kill_tree(process.pid)
        process.wait()
        (cdc.data_dir / "http").unlink(missing_ok=True)
    else:
        raise AssertionError(f"the daemon ended: {cdc.log[-3000:]}")
