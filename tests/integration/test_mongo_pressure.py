"""A MongoDB mirror whose target or queue cannot keep up: nothing is lost, the status says why, and it catches up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pymongo
import pytest

from tests.command import Cdc
from tests.mongo import at, raw_documents
from tests.mongod.fixture import MongoDatabase, NewStandIn
from tests.mongod.process import StandIn
from tests.processes import wait_until

Client = pymongo.MongoClient[dict[str, Any]]


class Pair:
    """A database on one stand-in, and its mirror on another."""

    def __init__(self, cdc: Cdc, source: StandIn, target: StandIn) -> None:
        self.cdc, self.target = cdc, target
        self._clients: list[Client] = [pymongo.MongoClient(server.url) for server in (source, target)]
        self.source: MongoDatabase = self._clients[0].shop
        self.mirror: MongoDatabase = self._clients[1].shop
        quick = ("heartbeatFrequencyMS=500", "serverSelectionTimeoutMS=500")
        urls = (at(server.url, "shop", *quick) for server in (source, target))
        cdc.configure(*urls)

    def sink(self) -> dict[str, Any]:
        found = self.cdc.status()["sinks"]["mirror"]
        assert isinstance(found, dict)
        return found

    def wait_for_state(self, kind: str, name: str, state: str) -> dict[str, Any]:
        def there() -> dict[str, Any] | None:
            found = self.cdc.status()[kind][name]
            return found if found["state"] == state else None

        return wait_until(there, timeout_seconds=60, what=lambda: f"{name} to be {state}: {self.cdc.log[-2000:]}")

    def wait_until_equal(self) -> None:
        wait_until(
            lambda: raw_documents(self.source, "orders") == raw_documents(self.mirror, "orders"),
            timeout_seconds=60,
            what=lambda: f"the mirror to be equal: {self.cdc.log[-2000:]}",
        )

    def close(self) -> None:
        for client in self._clients:
            client.close()


@pytest.fixture
def pair(cdc: Cdc, new_stand_in: NewStandIn) -> Iterator[Pair]:
    found = Pair(cdc, new_stand_in(), new_stand_in())
    found.source.orders.insert_one({"_id": 0})
    yield found
    found.close()


def test_f93_a_target_that_is_away_is_waited_for(pair: Pair) -> None:
    with pair.cdc.running() as process:
        pair.wait_for_state("sinks", "mirror", "running")
        pair.target.command("cdcTestBlackout", 4)
        pair.source.orders.insert_many([{"_id": number} for number in range(1, 2001)])
        waiting = pair.wait_for_state("sinks", "mirror", "waiting")
        assert waiting["error"]
        assert waiting["retries"] >= 1
        pair.wait_until_equal()
        assert process.poll() is None
        pair.wait_for_state("sinks", "mirror", "running")


@pytest.mark.parametrize(
    "code", [112, 24, 50, 246], ids=["WriteConflict", "LockTimeout", "MaxTimeMSExpired", "Snapshot"]
)
def test_f95_what_passes_by_itself_is_tried_again_as_a_whole(pair: Pair, code: int) -> None:
    with pair.cdc.running():
        pair.wait_for_state("sinks", "mirror", "running")
        data = {"failCommands": ["insert", "update"], "appName": "cdc sink mirror", "errorCode": code}
        pair.target.command("configureFailPoint", "failCommand", mode={"times": 3}, data=data)
        pair.source.orders.insert_many([{"_id": number, "n": 0} for number in range(1, 301)])
        pair.source.orders.update_many({"_id": {"$lte": 100}}, {"$inc": {"n": 1}})
        pair.wait_until_equal()
        assert pair.sink()["parked"] == 0
        assert pair.sink()["retries"] >= 1


def test_f91_a_full_queue_slows_the_source_and_loses_nothing(pair: Pair) -> None:
    text = pair.cdc.file.read_text()
    pair.cdc.file.write_text(text.replace("min_free_bytes = 0", "min_free_bytes = 0\nmax_bytes = 2_000_000"))
    with pair.cdc.running():
        pair.wait_for_state("sinks", "mirror", "running")
        assert pair.cdc("pause", "mirror").returncode == 0
        for first in range(1, 10_001, 1000):
            pair.source.orders.insert_many([{"_id": first + n, "text": "x" * 1500} for n in range(1000)])
        full = pair.wait_for_state("sources", "shop", "waiting")
        assert "queue is full" in full["error"]
        assert pair.cdc.status()["sources"]["shop"]["queue"]["bytes"] < 6_000_000
        assert pair.cdc("resume", "mirror").returncode == 0
        pair.wait_until_equal()
        pair.wait_for_state("sources", "shop", "running")
