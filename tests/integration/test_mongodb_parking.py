"""A mirror that refuses one document: it waits, the others flow, and the mirror heals when it is put right."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import bson
import pymongo
import pytest

from cdc.change import Table
from cdc.errors import PermanentError
from cdc.mongodb.equality import key_bytes
from cdc.position import Position
from tests.command import Cdc
from tests.integration.test_mongo_mirror import Shop
from tests.mongo import raw_documents
from tests.mongo_mirror import MongoPair, parking_pair
from tests.processes import kill_tree

Client = pymongo.MongoClient[dict[str, Any]]


@pytest.fixture(params=["updateLookup", "off"])
def pair(request: pytest.FixtureRequest, mongodb: str, mongodb_client: Client) -> Iterator[MongoPair]:
    with parking_pair(mongodb_client, mongodb, request.param) as pair:
        yield pair


@pytest.fixture
def shop(cdc: Cdc, mongodb: str, mongodb_client: Client) -> Iterator[Shop]:
    found = Shop(cdc, mongodb, mongodb_client)
    yield found
    for database in (found.source, found.mirror):
        mongodb_client.drop_database(database)


def test_f89_f90_f98_one_document_is_refused_and_the_mirror_heals(shop: Shop, cdc: Cdc) -> None:
    source, mirror = shop.source.orders, shop.mirror.orders
    source.insert_one({"_id": "first", "n": 1})
    shop.configure()
    with cdc.running() as process:
        cdc.wait_for_sink("running")
        mirror.create_index("n", unique=True)  # the source has none
        source.insert_one({"_id": "poison", "n": 1, "list": []})
        source.insert_many([{"_id": number, "n": -number} for number in range(1000)])
        for number in range(20):
            source.update_one({"_id": "poison"}, {"$push": {"list": number}})
            source.update_one({"_id": number}, {"$set": {"seen": number}})
        shop.wait_for(lambda: mirror.count_documents({"seen": {"$exists": True}}) == 20, "the others to arrive")
        assert mirror.count_documents({}) == 1001
        assert mirror.find_one({"_id": "first"}) is not None, "what was in its way is still there"
        assert mirror.find_one({"_id": "poison"}) is None
        shop.wait_for(lambda: cdc.status()["sinks"]["mirror"]["parked"] == 21, "all of its changes to be parked")
        sink = cdc.status()["sinks"]["mirror"]
        assert (sink["state"], sink["dead"], sink["torn"]) == ("running", 0, True)
        assert "21 changes are parked" in cdc("status").stdout
        kill_tree(process.pid)
        process.wait()
    (cdc.data_dir / "http").unlink()
    assert cdc.status()["sinks"]["mirror"]["parked"] == 21, "as its file tells"
    with cdc.running():
        source.update_one({"_id": "poison"}, {"$push": {"list": "after"}, "$set": {"n": 1}})
        source.insert_one({"_id": "last"})
        shop.wait_for(lambda: mirror.find_one({"_id": "last"}), "the stream to flow")
        assert shop.table("orders")["missing"]["count"] == 1
        mirror.drop_index("n_1")
        shop.wait_for(lambda: not cdc.status()["sinks"]["mirror"]["parked"], "the mirror to heal")
        assert raw_documents(shop.source, "orders") == raw_documents(shop.mirror, "orders")
        shop.assert_equal("orders")


def test_f98_a_document_that_is_refused_leaves_what_is_in_its_way(pair: MongoPair) -> None:
    pair.source.orders.insert_many([{"_id": number, "n": number} for number in (1, 2, 3)])
    pair.deliver()
    pair.target.orders.create_index("n", unique=True)
    pair.source.orders.update_one({"_id": 2}, {"$set": {"n": 1}})
    batch = pair.batch()
    before = pair.documents(pair.target, "orders")
    for _ in range(2):
        with pytest.raises(PermanentError, match="orders: E11000"):
            pair.deliver(batch)
        assert pair.documents(pair.target, "orders") == before
        pair.sink.close()


def test_f90_a_parked_change_is_applied_behind_the_position(pair: MongoPair) -> None:
    """Any number of times; and what a later copy holds is left out."""
    pair.source.orders.insert_one({"_id": 1, "n": 1})
    first = pair.batch()
    pair.source.orders.update_one({"_id": 1}, {"$set": {"n": 2}})
    pair.source.orders.insert_one({"_id": 2})
    second = pair.batch()
    pair.deliver(first)
    position = pair.new_sink().stored_position()
    for _ in range(2):
        pair.sink.apply_parked([first, second])
    pair.check_equal()
    assert pair.new_sink().stored_position() == position
    pair.sink.apply_part([second], Position("queue", 2, second.position))
    assert pair.new_sink().stored_position() == position
    pair.check_equal()


def test_f90_what_a_change_is_about(pair: MongoPair) -> None:
    """Documents that are one for the server; a whole collection that is dropped or renamed; none for indexes."""
    orders = pair.source.orders
    orders.insert_one({"_id": 1})
    orders.delete_one({"_id": 1})
    orders.insert_one({"_id": 1.0})
    orders.insert_one({"_id": {"a": 1}})
    orders.create_index("n")
    orders.rename("archive")
    pair.source.archive.drop()
    batch = pair.batch()
    assert pair.sink.open() is not None
    names = [table.name for table in batch.tables]
    found = [
        (change.operation, pair.sink.subject_of(batch.tables, change))
        for transaction in batch.transactions
        for change in transaction.changes
    ]
    documents = [subject for operation, subject in found if operation != 5]
    assert documents[0] == documents[1] == documents[2] != documents[3]
    whole = [[table.name for table in subject.tables] for operation, subject in found if subject.keys is None]
    assert whole == [["orders", "archive"], ["archive"]]
    assert names
    assert isinstance(batch.tables[0], Table)


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [(1, 1.0, True), (1, 2, False), ("1", 1, False), (0.0, -0.0, True), (float("inf"), float("-inf"), False)],
)
def test_f74_keys_that_are_stored(one: Any, other: Any, equal: bool) -> None:
    assert (key_bytes(bson.encode({"_id": one})) == key_bytes(bson.encode({"_id": other}))) == equal
