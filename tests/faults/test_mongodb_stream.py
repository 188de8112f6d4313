"""A MongoDB source whose server fails it: everything is captured, each event once, in order."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import bson
import pymongo
import pytest
from pymongo.errors import PyMongoError

from cdc.capture import Capture
from cdc.change import Change
from cdc.mongodb import source as source_module
from cdc.mongodb.source import NO_MAJORITY, MongoSource
from cdc.queue import Queue
from cdc.stats import CaptureStats, State
from tests.mongo_source import configure, streaming
from tests.mongod.fixture import NewStandIn
from tests.mongod.process import StandIn
from tests.processes import wait_until

RESUMABLE = {"errorLabels": ["ResumableChangeStreamError"]}
FAULTS: list[dict[str, Any]] = [
    {"failCommands": ["getMore"], "errorCode": 91, **RESUMABLE},
    {"failCommands": ["getMore"], "errorCode": 43},
    {"failCommands": ["getMore"], "errorCode": 10107, **RESUMABLE},
    {"failCommands": ["getMore"], "closeConnection": True},
    {"failCommands": ["aggregate"], "closeConnection": True},
    {"failCommands": ["aggregate", "getMore"], "closeConnection": True},
    {"failCommands": ["aggregate", "getMore"], "errorCode": 11602, **RESUMABLE},
    {"failCommands": ["aggregate"], "errorCode": 189, **RESUMABLE},
    {"failCommands": ["hello", "aggregate", "getMore", "buildInfo"], "closeConnection": True},
]


@contextmanager
def capturing(url: str, folder: Path, *tables: str) -> Iterator[tuple[Queue, CaptureStats, Capturing]]:
    """A capture in a thread, into a queue that nobody reads."""
    config = configure(url, *tables, show_expanded_events=False)
    queue = Queue(folder / "shop.queue", max_bytes=2**30, min_free_bytes=0)
    queue.register("nobody")
    stats, stop = CaptureStats("shop"), threading.Event()
    capture = Capture(MongoSource(config, config.sources["shop"], queue), queue, stats, applied=lambda: None)
    with ThreadPoolExecutor(1) as thread:
        done = thread.submit(capture.run, stop)
        try:
            wait_until(lambda: queue.position is not None or done.done(), what="the capture to begin")
            yield queue, stats, Capturing(capture, queue)
        finally:
            stop.set()
            queue.wake()
            done.result()
            queue.close()


class Capturing:
    """What a capture has put into its queue."""

    def __init__(self, capture: Capture, queue: Queue) -> None:
        self.capture = capture
        self._queue = queue
        self._changes: list[Change] = []
        self._seq = 0

    def changes(self) -> list[Change]:
        """All so far."""
        for stored in self._queue.read(self._seq, max_bytes=2**30, timeout_seconds=0.05):
            self._seq = stored.seq
            self._changes += [change for each in stored.batch.transactions for change in each.changes]
        return self._changes

    def keys(self) -> list[Any]:
        """Of all changes, in order."""
        return [bson.decode(change.key)["_id"] for change in self.changes() if change.key is not None]


def write(url: str, first: int, count: int) -> None:
    """Insert one by one, however often the server is not there."""
    with pymongo.MongoClient[dict[str, Any]](url, serverSelectionTimeoutMS=10_000) as client:
        for number in range(first, first + count):
            while True:
                try:
                    client.shop.orders.update_one({"_id": number}, {"$setOnInsert": {"a": number}}, upsert=True)
                    break
                except PyMongoError:
                    continue


def fail(server: StandIn, data: dict[str, Any], times: int) -> None:
    server.command("configureFailPoint", "failCommand", mode={"times": times}, data={**data, "appName": "cdc shop"})


@pytest.mark.parametrize(
    "fault", FAULTS, ids=lambda fault: f"{fault['failCommands'][0]}-{fault.get('errorCode', 'close')}"
)
@pytest.mark.parametrize("times", [1, 3])
def test_f62_one_fault(stand_in: StandIn, tmp_path: Path, fault: dict[str, Any], times: int) -> None:
    try:
        with capturing(stand_in.url, tmp_path, "shop.orders") as (_, stats, captured):
            write(stand_in.url, 0, 10)
            wait_until(lambda: len(captured.keys()) == 10, what="ten changes")
            fail(stand_in, fault, times)
            write(stand_in.url, 10, 10)
            wait_until(lambda: len(captured.keys()) >= 20, what="ten more")
            assert captured.keys() == list(range(20))
            if times == 1 and fault["failCommands"] == ["getMore"]:
                assert stats.retries == 0, "the stream resumes by itself"
    finally:
        stand_in.command("configureFailPoint", "failCommand", mode="off")
        with pymongo.MongoClient[dict[str, Any]](stand_in.url) as client:
            client.drop_database("shop")


def test_f62_faults_at_random_under_load(new_stand_in: NewStandIn, tmp_path: Path) -> None:
    server = new_stand_in()
    chance = random.Random(62)
    with capturing(server.url, tmp_path, "shop.*") as (_, stats, captured), ThreadPoolExecutor(1) as thread:
        written = thread.submit(write, server.url, 0, 4000)
        while not written.done():
            fail(server, chance.choice(FAULTS), chance.randint(1, 3))
            before = len(captured.keys())
            wait_until(lambda: len(captured.keys()) > before or written.done(), what="progress")  # noqa: B023
        server.command("configureFailPoint", "failCommand", mode="off")
        written.result()
        wait_until(lambda: len(captured.keys()) >= 4000, what="all changes")
        assert captured.keys() == list(range(4000))
        assert stats.state == State.RUNNING


@pytest.mark.parametrize("breakage", ["cdcTestBlackout", "replSetStepDown"])
def test_f62_server_is_away(new_stand_in: NewStandIn, tmp_path: Path, breakage: str) -> None:
    server = new_stand_in()
    with capturing(server.url, tmp_path, "shop.*") as (_, stats, captured):
        write(server.url, 0, 100)
        wait_until(lambda: len(captured.keys()) == 100, what="a hundred changes")
        server.command(breakage, 1)
        write(server.url, 100, 100)
        wait_until(lambda: len(captured.keys()) >= 200, what="a hundred more")
        assert captured.keys() == list(range(200))
        wait_until(lambda: stats.state == State.RUNNING, what="the capture to run again")


def test_f62_paused_and_resumed(stand_in: StandIn, tmp_path: Path) -> None:
    """What was given out and is not durable yet must not come twice."""
    with (
        pymongo.MongoClient[dict[str, Any]](stand_in.url) as client,
        capturing(stand_in.url, tmp_path, "paused.*") as (_, stats, captured),
    ):
        for number in range(5):
            client.paused.orders.insert_many([{"_id": number * 1000 + each} for each in range(1000)])
            captured.capture.pause()
            wait_until(lambda: stats.state == State.PAUSED, what="the pause")
            captured.capture.resume()
        wait_until(lambda: len(captured.keys()) >= 5000, what="all changes")
        assert captured.keys() == list(range(5000))
        client.drop_database("paused")


def test_f81_without_a_majority_the_status_says_so(
    new_stand_in: NewStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_module, "OBSERVE_SECONDS", 0.1)
    monkeypatch.setattr(source_module, "STALLED_SECONDS", 0.5)
    server = new_stand_in()
    with capturing(server.url, tmp_path, "shop.*") as (_, stats, captured):
        server.command("cdcTestHoldMajority", True)

        def stalled() -> bool:
            write(server.url, len(written), 1)
            written.append(1)
            return stats.error == NO_MAJORITY

        written: list[int] = []
        wait_until(stalled, what="the status to notice")
        assert stats.state == State.WAITING
        assert captured.keys() == []
        server.command("cdcTestHoldMajority", False)
        wait_until(lambda: stats.state == State.RUNNING, what="the status to notice that it is over")
        wait_until(lambda: len(captured.keys()) == len(written), what="all changes")


def test_f113_errors_hold_no_credentials() -> None:
    secret = "geheim"
    for url in (
        f"mongodb://me:{secret}@127.0.0.1:1/shop?serverSelectionTimeoutMS=50",
        f"mongodb://me:{secret}/x@127.0.0.1:1/shop",
        f"mongodb://me:{secret}@127.0.0.1:port/shop",
        f"mongodb://me:{secret}@127.0.0.1:1/shop?serverSelectionTimeoutMS=50&authMechanism={secret}",
    ):
        with pytest.raises(Exception) as caught, streaming(configure(url, "shop.*")):  # noqa: PT011 - of any kind
            pass
        assert secret not in f"{caught.value} {getattr(caught.value, 'hint', '')}"
