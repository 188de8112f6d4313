"""Collections, options and indexes of a MongoDB server, real or stand-in."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pymongo
import pytest
from pymongo.errors import CollectionInvalid, DuplicateKeyError, OperationFailure

from tests.mongod.fixture import MongoDatabase
from tests.mongod.process import StandIn

Client = pymongo.MongoClient[dict[str, Any]]


def code_of(call: Any, *arguments: Any, **options: Any) -> int | None:
    with pytest.raises(OperationFailure) as failure:
        call(*arguments, **options)
    return failure.value.code


def test_collections(mongo_database: MongoDatabase) -> None:
    mongo_database.create_collection("plain")
    options: dict[str, Any] = {"validator": {"a": {"$exists": True}}, "capped": True, "size": 4096, "max": 3}
    mongo_database.create_collection("special", collation={"locale": "de", "strength": 1}, **options)
    listed = {one["name"]: one for one in mongo_database.list_collections()}
    assert list(listed["plain"]) == ["name", "type", "options", "info", "idIndex"]
    special = listed["special"]["options"]
    assert {name: special[name] for name in options} == options
    assert special["collation"]["locale"] == "de"
    assert listed["special"]["info"]["uuid"] != listed["plain"]["info"]["uuid"]
    assert mongo_database.list_collection_names(filter={"name": "plain"}) == ["plain"]
    with pytest.raises(CollectionInvalid):
        mongo_database.create_collection("plain")
    assert code_of(mongo_database.command, "create", "plain", capped=True, size=1) == 48
    assert code_of(mongo_database.command, "listIndexes", "none") == 26
    assert code_of(mongo_database.command, "collMod", "none", validator={}) == 26
    assert mongo_database.name in mongo_database.client.list_database_names()


def test_capped_collections_forget_the_oldest(mongo_database: MongoDatabase) -> None:
    collection = mongo_database.create_collection("c", capped=True, size=100_000, max=3)
    collection.insert_many([{"_id": at} for at in (5, 1, 4, 2)])
    assert [one["_id"] for one in collection.find()] == [1, 4, 2]
    assert [one["_id"] for one in collection.find(sort={"$natural": -1})] == [2, 4, 1]


def test_views_and_time_series_are_told_apart(mongo_database: MongoDatabase) -> None:
    mongo_database["c"].insert_one({"_id": 1})
    mongo_database.create_collection("view", viewOn="c", pipeline=[])
    mongo_database.create_collection("series", timeseries={"timeField": "t"})
    kinds = {one["name"]: one["type"] for one in mongo_database.list_collections()}
    assert (kinds["c"], kinds["view"], kinds["series"]) == ("collection", "view", "timeseries")
    assert list(mongo_database["view"].find()) == [{"_id": 1}]


def test_indexes(mongo_database: MongoDatabase) -> None:
    collection = mongo_database["c"]
    collection.insert_many([{"_id": at, "x": at, "y": 1} for at in range(3)])
    collection.create_index([("x", 1), ("y", -1)], unique=True, partialFilterExpression={"x": {"$gt": 0}})
    collection.create_index("t", expireAfterSeconds=60)
    collection.create_index("s", name="ours", collation={"locale": "en", "strength": 2})
    found = list(collection.list_indexes())
    assert [one["name"] for one in found] == ["_id_", "x_1_y_-1", "t_1", "ours"]
    assert dict(found[1]) == {
        "v": 2, "key": {"x": 1, "y": -1}, "name": "x_1_y_-1", "unique": True,
        "partialFilterExpression": {"x": {"$gt": 0}},
    }  # fmt: skip
    assert (found[2]["expireAfterSeconds"], found[3]["collation"]["strength"]) == (60, 2)
    assert collection.create_index("t", expireAfterSeconds=60) == "t_1"  # again: nothing happens
    assert code_of(collection.create_index, "t", name="other", expireAfterSeconds=60) == 85
    assert code_of(collection.create_index, "other", name="t_1") == 86
    assert code_of(collection.create_index, "t", expireAfterSeconds=5) in {85, 86}
    assert code_of(collection.drop_index, "none") == 27
    with pytest.raises(DuplicateKeyError):
        collection.create_index("y", unique=True)
    mongo_database.command("collMod", "c", index={"name": "t_1", "expireAfterSeconds": 7})
    assert {one["name"]: one for one in collection.list_indexes()}["t_1"]["expireAfterSeconds"] == 7
    collection.drop_index("ours")
    collection.drop_indexes()
    assert [one["name"] for one in collection.list_indexes()] == ["_id_"]


def test_rename(mongo_database: MongoDatabase) -> None:
    mongo_database["a"].insert_one({"_id": "a"})
    mongo_database["b"].insert_one({"_id": "b"})
    assert code_of(mongo_database["a"].rename, "b") == 48
    assert code_of(mongo_database["none"].rename, "c") == 26
    mongo_database["a"].rename("b", dropTarget=True)
    assert list(mongo_database["b"].find()) == [{"_id": "a"}]
    assert mongo_database.list_collection_names() == ["b"]


def test_expiry_on_demand(stand_in_client: Client, stand_in: StandIn) -> None:
    collection = stand_in_client["expiry"]["c"]
    collection.create_index("t", expireAfterSeconds=60)
    now = dt.datetime.now(dt.UTC)
    collection.insert_many([{"_id": 1, "t": now}, {"_id": 2, "t": now - dt.timedelta(seconds=90)}, {"_id": 3}])
    assert stand_in.command("cdcTestExpire")["deleted"] == 1
    assert [one["_id"] for one in collection.find()] == [1, 3]
