"""Refused changes among good ones that depend on each other: what is not refused arrives, in order, and once."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pymongo
import pytest

from cdc.mongodb.positions import POSITIONS
from tests.mongo_delivery import Delivered, Interrupted
from tests.mongo_mirror import MongoPair, parking_pair

Client = pymongo.MongoClient[dict[str, Any]]
Document = dict[str, Any]

BAD: Final = "taken"
"""The value of `p` that a document of the mirror has: no other one may."""


@pytest.fixture(params=["updateLookup", "off"])
def pair(request: pytest.FixtureRequest, mongodb: str, mongodb_client: Client) -> Iterator[MongoPair]:
    with parking_pair(mongodb_client, mongodb, request.param) as pair:
        yield pair


@pytest.fixture
def delivered(pair: MongoPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Delivered]:
    monkeypatch.setattr("cdc.delivery.READ_SECONDS", 0.01)
    delivered = Delivered(pair, tmp_path)
    yield delivered
    delivered.close()


class Orders:
    """A collection with a unique index on `n`, whose mirror alone has another one, on `p`: it refuses `p` = `BAD`.

    refused: the `_id`s of those that a mirror cannot have as they are, told by applying all changes in order.
    """

    def __init__(self, pair: MongoPair, delivered: Delivered, numbers: int) -> None:
        self.refused: set[int] = set()
        self._pair, self._delivered = pair, delivered
        self._mirror: dict[int, Document] = {number: {"n": number} for number in range(numbers)}
        self._source = pair.source.orders
        self._source.create_index("n", unique=True, sparse=True)
        self._source.insert_one({"_id": -1, "p": BAD})
        self._source.insert_many([{"_id": number, "n": number} for number in range(numbers)])
        delivered.deliver()
        pair.target.orders.create_index("p", unique=True, sparse=True, name="of the mirror alone")

    def set(self, number: int, **fields: Any) -> None:
        """Change a document, or make it."""
        self._source.update_one({"_id": number}, {"$set": fields}, upsert=True)
        after = {**self._mirror.get(number, {}), **fields}
        others = (each.get("n") for other, each in self._mirror.items() if other != number)
        if after.get("p") == BAD or after.get("n", ...) in others:
            self.refused.add(number)
        if number not in self.refused:
            self._mirror[number] = after

    def delete(self, number: int) -> None:
        self._source.delete_one({"_id": number})
        if number not in self.refused:
            self._mirror.pop(number, None)

    def check_arrived(self) -> None:
        """All that is not refused is on the mirror."""
        found, expected = (
            {each.pop("_id"): each for each in database.orders.find({"_id": {"$nin": list(self.refused)}})}
            for database in (self._pair.target, self._pair.source)
        )
        assert found == expected
        assert self.refused or not self._delivered.stats.parked

    def heal(self) -> None:
        """Put the mirror right: all becomes equal."""
        self._pair.target.orders.drop_index("of the mirror alone")
        self._delivered.now += 400
        self._delivered.deliver(until_healed=True)
        self._pair.check_equal()
        self.refused.clear()


def test_f82_f89_values_are_passed_on_beside_a_refused_change(pair: MongoPair, delivered: Delivered) -> None:
    """And what passed them on is gone at the source by the time it is refused."""
    orders = Orders(pair, delivered, 6)
    for number, value in ((0, 10), (1, 0), (2, 1), (0, 2), (3, 11), (4, 3), (3, 12), (5, 11)):
        orders.set(number, n=value)
    orders.set(9, p=BAD)
    for number, value in ((0, 20), (1, 2), (2, 0), (0, 1)):
        orders.set(number, n=value)
    batch = pair.batch()
    for number in range(6):
        orders.delete(number)
    delivered.deliver(batch)
    assert delivered.stats.parked == 1
    delivered.deliver()
    assert orders.refused == {9}
    orders.check_arrived()
    orders.heal()


def test_f82_f89_only_who_wants_the_value_of_a_refused_document_waits(pair: MongoPair, delivered: Delivered) -> None:
    orders = Orders(pair, delivered, 5)
    orders.set(0, n=10)
    orders.set(1, n=0)
    orders.set(0, n=11)
    orders.set(2, n=10)  # free: the refused document has had it in between
    orders.set(0, n=12, p=BAD)
    orders.set(3, n=11)  # not free on the mirror
    orders.set(4, n=3)
    delivered.deliver()
    assert orders.refused == {0, 3, 4}
    orders.check_arrived()
    assert delivered.stats.parked == 3
    orders.heal()


def test_f82_f89_a_change_is_refused_in_a_collection_that_is_not_folded(pair: MongoPair, delivered: Delivered) -> None:
    """It waits as a whole; what others have of the batch is their last state, and is not written over."""
    pair.source.create_collection("names", collation={"locale": "en", "strength": 2})
    pair.source.names.insert_one({"_id": "first", "p": BAD})
    orders = Orders(pair, delivered, 3)
    pair.target.names.create_index("p", unique=True, sparse=True)
    orders.set(0, n=10)
    pair.source.names.insert_many([{"_id": "before"}, {"_id": "poison", "p": BAD}, {"_id": "behind"}])
    orders.set(1, n=0)
    orders.set(0, n=11)
    delivered.deliver()
    assert pair.documents(pair.target, "orders") == pair.documents(pair.source, "orders")
    assert {each["_id"] for each in pair.target.names.find()} == {"first", "before"}
    assert delivered.stats.parked == 2
    pair.target.names.drop_indexes()
    orders.heal()


@pytest.mark.parametrize("seed", range(5))
def test_f82_f89_at_random_all_that_is_not_refused_arrives(pair: MongoPair, delivered: Delivered, seed: int) -> None:
    choose = random.Random(seed)
    orders = Orders(pair, delivered, 8)
    pass_values_on(orders, pair, choose, changes=60)
    delivered.deliver()
    orders.check_arrived()
    orders.heal()


@pytest.mark.parametrize("seed", range(4))
def test_f82_f83_f89_at_random_interrupted_anywhere(pair: MongoPair, delivered: Delivered, seed: int) -> None:
    """In the end all is equal: no document waits for another one for ever."""
    choose = random.Random(seed)
    interrupted = Interrupted(pair.sink)
    orders = Orders(pair, delivered, 8)
    for _ in range(4):
        pass_values_on(orders, pair, choose, changes=30)
        interrupted.left = choose.randrange(1, 30)
        delivered.deliver()
        delivered.now += choose.choice([0, 1, 400])
    interrupted.left = -1
    orders.heal()


def pass_values_on(orders: Orders, pair: MongoPair, choose: random.Random, *, changes: int) -> None:
    """Documents that come and go change their place in a unique index, to one that is free just now."""
    for _ in range(changes):
        number, kind = choose.randrange(10), choose.random()
        taken = set(pair.source.orders.distinct("n"))
        free = [value for value in range(12) if value not in taken]
        if kind < 0.03:
            orders.set(number, p=BAD)
        elif kind < 0.15 and number not in orders.refused:  # these would be put right by that
            orders.delete(number)
        else:
            orders.set(number, n=choose.choice(free))


@pytest.mark.parametrize("seed", range(6))
def test_f89_f90_f101_at_random(pair: MongoPair, delivered: Delivered, seed: int) -> None:
    """Refused documents among renames, drops and good ones, interrupted anywhere: in the end all is equal."""
    choose = random.Random(seed)
    interrupted = Interrupted(pair.sink)
    deliver, stats = delivered.deliver, delivered.stats
    source = pair.source
    source.orders.insert_one({"_id": "first", "n": 1})
    source.other.insert_one({"_id": 1})
    deliver()
    pair.target.orders.create_index("n", unique=True)
    parked, name = 0, "orders"
    for step in range(5):
        for _ in range(choose.randrange(2, 25)):
            kind, number = choose.random(), choose.randrange(10)
            if kind < 0.1:
                source[name].update_one({"_id": number}, {"$set": {"n": 1}}, upsert=True)  # the mirror refuses this
            elif kind < 0.15 and name in source.list_collection_names():
                source[name].rename(f"archive{choose.randrange(2)}", dropTarget=True)
                name = f"orders{step}"  # what is read again by its name must not be of another collection
            elif kind < 0.2:
                source[choose.choice([name, "archive0", "other"])].drop()
            elif kind < 0.3:
                source[name].delete_one({"_id": number})
            else:
                table = source[choose.choice([name, name, "other", "archive0"])]
                table.update_one(
                    {"_id": number}, {"$set": {"n": f"{step} {choose.random()}", f"f{step}": step}}, upsert=True
                )
        interrupted.left = choose.randrange(1, 40)
        deliver()
        parked += stats.parked
        delivered.now += choose.choice([0, 1, 400])
    interrupted.left = -1
    for each in pair.target.list_collection_names():
        if each != POSITIONS:
            pair.target[each].drop_indexes()
    delivered.now += 400
    source.last.insert_one({"_id": 1})
    deliver(until_healed=True)
    pair.check_equal()
