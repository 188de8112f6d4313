"""`cdc` between two MongoDB databases, as a user runs it: copy, stream, verify, sync, cut-over."""

from __future__ import annotations

import itertools
import json
import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pymongo
import pytest

from tests.command import Cdc, assert_complaint
from tests.mongo import at, corpus, insert_raw, raw_documents
from tests.mongod.fixture import MongoDatabase
from tests.processes import kill_tree, wait_until

_names = itertools.count(1)


class Shop:
    """A source database, its mirror on the same deployment, and the command line between them."""

    def __init__(self, cdc: Cdc, url: str, client: pymongo.MongoClient[dict[str, Any]]) -> None:
        name = f"shop_{os.getpid()}_{next(_names)}"
        self.cdc, self.url = cdc, url
        self.source: MongoDatabase = client[name]
        self.mirror: MongoDatabase = client[f"{name}_backup"]

    def configure(self, **options: str) -> None:
        """The classic case: the sink's url is left out."""
        self.cdc.configure(at(self.url, self.source.name), **options)

    def name(self, collection: str) -> str:
        return f"{self.source.name}.{collection}"

    def verify(self) -> dict[str, Any]:
        result = self.cdc("verify", "--json")
        assert result.stdout, result.stderr
        report = json.loads(result.stdout)
        assert (result.returncode == 0) == report["equal"]
        found = report["sinks"]["mirror"]
        return {**found, "tables": {each["table"]: each for each in found["tables"]}}

    def table(self, collection: str) -> dict[str, Any]:
        found = self.verify()["tables"][self.name(collection)]
        assert isinstance(found, dict)
        return found

    def assert_equal(self, *collections: str) -> None:
        report = self.verify()
        assert report["equal"], report
        for name in collections:
            assert raw_documents(self.source, name) == raw_documents(self.mirror, name)

    def logs(self, text: str, after: int = 0) -> bool:
        return f'"{text}"' in self.cdc.log[after:]

    def wait_for(self, condition: Callable[[], Any], what: str) -> None:
        wait_until(condition, timeout_seconds=60, what=lambda: f"{what}: {self.cdc.log[-3000:]}")


@pytest.fixture
def mirrored_shop(cdc: Cdc, mongodb: str, mongodb_client: pymongo.MongoClient[dict[str, Any]]) -> Iterator[Shop]:
    found = Shop(cdc, mongodb, mongodb_client)
    yield found
    for database in (found.source, found.mirror):
        mongodb_client.drop_database(database)


@contextmanager
def customers(database: MongoDatabase, seed: int = 1) -> Iterator[None]:
    """Write to the source all the while."""
    stop, errors = threading.Event(), []

    def shop() -> None:
        choose = random.Random(seed)
        try:
            for number in itertools.count():
                one = choose.randrange(100, 300)
                database.orders.insert_one({"_id": f"new {number}", "unique": f"new {number}"})
                database.orders.update_one({"_id": one}, {"$set": {"seen": number}, "$push": {"list": number}})
                database.orders.update_one({"_id": one}, {"$pop": {"list": -1}, "$unset": {"seen": 1}})
                database.orders.delete_one({"_id": f"new {number - 20}"})
                database.orders.replace_one({"_id": choose.randrange(100, 300)}, {"unique": f"replaced {number}"})
                if stop.wait(0.002):
                    return
        except Exception as exc:  # noqa: BLE001 - raised below
            errors.append(exc)

    thread = threading.Thread(target=shop)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    assert not errors, errors


def fill(database: MongoDatabase) -> None:
    database.orders.insert_many([{"_id": n, "unique": n, "text": "x" * 200} for n in range(300)])
    database.orders.create_index("unique", unique=True)
    insert_raw(database, "all", corpus())


def test_f48_f50_f82_f83_what_is_copied_under_load_and_killed_is_equal_in_the_end(mirrored_shop: Shop) -> None:
    shop = mirrored_shop
    fill(shop.source)
    shop.configure()
    with customers(shop.source):
        for _ in range(3):
            with shop.cdc.running() as process:
                count = len(shop.cdc.log)
                shop.wait_for(partial(shop.logs, "delivering", count), "deliveries")
                kill_tree(process.pid)
                process.wait()
            (shop.cdc.data_dir / "http").unlink()
        with shop.cdc.running():
            shop.cdc.wait_for_sink("running")
            report = shop.verify()
            orders = report["tables"][shop.name("orders")]
            assert not orders["missing"]["count"] + orders["extra"]["count"] + orders["different"]["count"], orders
            assert report["exact"]
    with shop.cdc.running():
        shop.cdc.wait_for_sink("running")
        shop.assert_equal("orders", "all")
        shop.wait_for(lambda: "unique_1" in shop.mirror.orders.index_information(), "the index")
        assert shop.mirror.orders.index_information()["unique_1"]["unique"]


def test_verify_and_sync_name_what_is_wrong_and_put_it_right(mirrored_shop: Shop) -> None:
    shop = mirrored_shop
    shop.source.orders.insert_many([{"_id": n, "orderNo": f"ORDER{n}"} for n in range(100)])
    shop.configure()
    with shop.cdc.running():
        shop.cdc.wait_for_sink("running")
        shop.mirror.orders.delete_one({"_id": 1})
        shop.mirror.orders.update_one({"_id": 2}, {"$set": {"orderNo": "ORDER0002"}})
        shop.mirror.orders.insert_one({"_id": "alien", "orderNo": "ORDER3"})
        found = shop.table("orders")
        assert [found[kind]["keys"] for kind in ("missing", "different", "extra")] == [["1"], ["2"], ['"alien"']]
        with customers(shop.source):  # in order with what is in the queue
            dry = shop.cdc("sync", "mirror", shop.name("orders"), "--id", "1", "--id", "2", "--dry-run")
            assert dry.stdout.splitlines()[:2] == ["1: would be inserted", "2: would be replaced"], dry.stderr
            assert dry.stdout.splitlines()[-1].endswith(": 1 would be inserted, 1 would be replaced")
            assert dry.returncode == 1
            assert shop.mirror.orders.find_one({"_id": 1}) is None
            done = shop.cdc(
                "sync", "mirror", shop.name("orders"), "--where", '{"orderNo": {"$in": ["ORDER1", "ORDER2"]}}'
            )
            assert (done.returncode, done.stdout.splitlines()[:2]) == (0, ["1: inserted", "2: replaced"]), done.stderr
            done = shop.cdc("sync", "mirror", shop.name("orders"), "--where", '{"orderNo": "ORDER3"}', "--json")
        rows = json.loads(done.stdout)["rows"]
        assert {row["key"]: row["action"] for row in rows} == {"3": "equal", '"alien"': "deleted"}
        shop.assert_equal("orders")


def test_sync_without_a_daemon_keeps_one_from_starting(mirrored_shop: Shop) -> None:
    shop = mirrored_shop
    shop.source.orders.insert_many([{"_id": n} for n in range(10)])
    shop.configure()
    assert shop.cdc("copy").returncode == 0
    shop.mirror.orders.delete_one({"_id": 1})
    shop.source.orders.update_one({"_id": 2}, {"$set": {"v": 1}})
    done = shop.cdc("sync", "mirror", shop.name("orders"), "--id", "1", "--id", "2")
    assert (done.returncode, done.stdout.splitlines()[:2]) == (0, ["1: inserted", "2: replaced"]), done.stderr
    unknown = "6a6a6a6a6a6a6a6a6a6a6a6a"
    done = shop.cdc("sync", "mirror", shop.name("orders"), "--id", "3", "--id", unknown, "--json")
    assert [(row["key"], row["action"]) for row in json.loads(done.stdout)["rows"]] == [
        ("3", "equal"), (f'"{unknown}"', "absent"),
    ]  # fmt: skip
    with shop.cdc.running():
        shop.cdc.wait_for_sink("running")
        shop.assert_equal("orders")


def test_sync_refuses_what_it_cannot_read(mirrored_shop: Shop) -> None:
    shop = mirrored_shop
    shop.source.orders.insert_one({"_id": 1})
    shop.configure()
    assert shop.cdc("copy").returncode == 0
    table = shop.name("orders")
    assert_complaint(shop.cdc("sync", "mirror", table, "--where", "orderNo = 1"), 1, "not a filter", "--where")
    assert_complaint(shop.cdc("sync", "mirror", table), 1, "not said what to sync", "--id")
    assert_complaint(shop.cdc("sync", "mirror", "shop.other", "--id", "1"), 1, "shop.other is not captured", "source")


def test_f79_verify_compares_how_collections_are_made(mirrored_shop: Shop) -> None:
    shop = mirrored_shop
    shop.source.orders.create_index("a")
    shop.configure()
    with shop.cdc.running():
        shop.cdc.wait_for_sink("running")
        assert shop.table("orders")["equal"]
        shop.mirror.orders.drop_index("a_1")
        shop.mirror.command("collMod", "orders", validator={"a": 1})
        report = shop.table("orders")
        assert not report["equal"]
        assert report["definition"][0] == "index a_1 is missing on the mirror"
        assert report["definition"][1].startswith("option validator is not set, on the mirror {'a'")


def test_verify_names_a_collection_that_only_the_mirror_has(mirrored_shop: Shop) -> None:
    shop = mirrored_shop
    for name in ("orders", "items"):
        shop.source[name].insert_one({"_id": 1})
    shop.configure()
    assert shop.cdc("copy").returncode == 0
    shop.source.items.drop()
    report = shop.verify()
    assert not report["exact"], "no daemon runs: the drop may be on its way"
    assert report["tables"][shop.name("items")]["extra"]["count"] == 1
    with shop.cdc.running():
        shop.cdc.wait_for_sink("running")
        shop.wait_for(lambda: "items" not in shop.mirror.list_collection_names(), "the drop")
        assert list(shop.verify()["tables"]) == [shop.name("orders")]


def test_f55_f79_a_cutover_proves_equality_and_lets_documents_expire_again(mirrored_shop: Shop) -> None:
    shop = mirrored_shop
    shop.source.orders.insert_many([{"_id": n, "unique": n} for n in range(10)])
    shop.source.orders.create_index("unique", unique=True)
    shop.source.orders.create_index("seen", expireAfterSeconds=3600)
    shop.configure()
    with shop.cdc.running():
        shop.cdc.wait_for_sink("running")
        shop.wait_for(lambda: "seen_1" in shop.mirror.orders.index_information(), "the index")
        assert "expireAfterSeconds" not in shop.mirror.orders.index_information()["seen_1"]
        with customers(shop.source):
            busy = shop.cdc("cutover", "mirror")
        assert (busy.returncode, "NOT READY: the source was written to" in busy.stdout) == (1, True), busy.stderr
        done = shop.cdc("cutover", "mirror")
        assert (done.returncode, "READY: the mirror equals the source" in done.stdout) == (0, True), done.stderr
    assert shop.mirror.orders.index_information()["seen_1"]["expireAfterSeconds"] == 3600


def test_a_sink_can_be_dropped_and_made_again(mirrored_shop: Shop) -> None:
    shop = mirrored_shop
    shop.source.orders.insert_one({"_id": 1})
    shop.configure()
    assert shop.cdc("copy").returncode == 0
    assert shop.cdc("drop", "mirror", "--yes").returncode == 0
    again = shop.cdc("copy")
    assert "documents that this sink did not copy" in again.stderr
    shop.mirror.orders.drop()
    assert shop.cdc("copy").returncode == 0
    assert shop.cdc("drop", "shop", "--yes").returncode == 0


def test_f65_f66_collections_come_go_and_change_names(mirrored_shop: Shop) -> None:
    """Into the captured names and out of them, as `$out` does; over another one; dropped and made again."""
    shop = mirrored_shop
    excluded = f'tables = {{include = ["{shop.source.name}.*"], exclude = ["{shop.source.name}.tmp*"]}}'
    shop.source.orders.insert_many([{"_id": number, "is": "old"} for number in range(100)])
    shop.source.left.insert_one({"_id": 1})
    shop.source.again.insert_one({"_id": 1})
    shop.source.tmp.insert_many([{"_id": number, "is": "new", "filling": "x" * 900} for number in range(50, 3000)])
    shop.configure(source=excluded)
    with shop.cdc.running():
        shop.cdc.wait_for_sink("running")
        shop.source.tmp.rename("orders", dropTarget=True)
        shop.source.orders.update_one({"_id": 60}, {"$set": {"is": "changed"}})
        shop.source.left.rename("tmp_left")
        shop.source.again.drop()
        shop.source.again.insert_one({"_id": 2})
        shop.source.late.insert_one({"_id": "last"})
        shop.wait_for(lambda: shop.mirror.late.find_one({"_id": "last"}), "the last change")
        shop.assert_equal("orders", "again", "late")
        assert set(shop.mirror.list_collection_names()) == {"orders", "again", "late", "cdc_positions"}
