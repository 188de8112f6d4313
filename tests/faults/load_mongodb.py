"""Everything that users of MongoDB do, at random, with a journal in which nothing can be lost unnoticed."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import pymongo
from pymongo.errors import PyMongoError

from tests.beside import Threads
from tests.mongo_random import Workload

KEYS: Final = 40

_BIG: Final = "x" * 300_000
"""Several of them are one transaction."""

_PAUSE_SECONDS: Final = 0.01


class Load(Threads):
    """Works until it is stopped, also while the server fails now and then. transactions: rounds that it has done.

    It moves no fields: a delta does not tell of that; and it takes nothing away from capped collections, where that
    makes a difference if it is applied twice (docs/limits.md has both).
    """

    def __init__(self, client: pymongo.MongoClient[dict[str, Any]], database: str, *, seed: int) -> None:
        super().__init__("load", self._work)
        self.transactions = 0
        self._database = client[database]
        self._rng = random.Random(seed)
        self._documents = Workload(client, database, seed, moves=False, thins_capped=False, ddl=False)
        self._collections = Workload(client, database, seed, moves=False, thins_capped=False, drops_database=False)
        self._turn = threading.Lock()

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Nothing is written meanwhile."""
        with self._turn:
            yield

    def _work(self, stopping: threading.Event) -> None:
        while not stopping.wait(_PAUSE_SECONDS):
            with self._turn:
                self._round()
            self.transactions += 1

    def _round(self) -> None:
        self._documents.run(3)
        if self._rng.random() < 0.02:
            self._collections.run(5)
        try:
            self._keep_journal()
            if self._rng.random() < 0.01:
                self._write_much()
        except PyMongoError:  # the server was away
            return

    def _keep_journal(self) -> None:
        """Each key counts its changes."""
        key = self._rng.randrange(KEYS)
        self._database.journal.update_one({"_id": key}, {"$inc": {"seq": 1}, "$set": {"at": self._rng.random()}})

    def _write_much(self) -> None:
        """More than a megabyte in one transaction, and its end in another."""
        database = self._database
        with database.client.start_session() as session, session.start_transaction():
            for number in range(5):
                document = {"text": _BIG, "round": self.transactions}
                database.bulk.replace_one({"_id": number}, document, upsert=True, session=session)
        with database.client.start_session() as session, session.start_transaction():
            database.bulk.delete_many({}, session=session)


def prepare(client: pymongo.MongoClient[dict[str, Any]], database: str, *, seed: int) -> None:
    """What is there before a mirror is."""
    client[database].journal.insert_many([{"_id": key, "seq": 0} for key in range(KEYS)])
    for name in ("bulk", "marks", "poisoned"):
        client[database][name].insert_one({"_id": "the first"})
    Workload(client, database, seed, drops_database=False).run(100)


def journal(client: pymongo.MongoClient[dict[str, Any]], database: str) -> dict[str, int]:
    """How often each key was changed."""
    return {str(found["_id"]): found["seq"] for found in client[database].journal.find()}
