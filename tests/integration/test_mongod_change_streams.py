"""Change streams of a MongoDB server, real or stand-in: scopes, tokens, images, differences, transactions."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import bson
import pymongo
import pytest
from pymongo.errors import OperationFailure

from tests.mongod.fixture import MongoDatabase, NewStandIn
from tests.mongod.process import StandIn

Json = dict[str, Any]
Client = pymongo.MongoClient[Json]


def take(stream: Any, count: int) -> list[Json]:
    return [stream.next() for _ in range(count)]


def kinds(events: list[Json]) -> list[str]:
    return [event["operationType"] for event in events]


def changes(database: MongoDatabase, write: Callable[[Any], None], count: int, **options: Any) -> list[Json]:
    """The events of what `write` does to the collection c."""
    with database.watch(**options) as stream:
        write(database["c"])
        return take(stream, count)


def test_scopes_and_filters(mongodb_client: Client, mongo_database: MongoDatabase) -> None:
    name = mongo_database.name
    only = [{"$match": {"ns.db": name, "$or": [{"ns.coll": {"$regex": "^o"}}, {"operationType": "delete"}]}}]
    with (
        mongodb_client.watch(only) as cluster,
        mongo_database.watch() as database,
        mongo_database["orders"].watch([{"$match": {"operationType": {"$nin": ["update"]}}}]) as collection,
    ):
        mongo_database["orders"].insert_one({"_id": 1})
        mongo_database["other"].insert_one({"_id": 1})
        mongo_database["items"].insert_one({"_id": 1})
        mongo_database["orders"].update_one({"_id": 1}, {"$set": {"a": 1}})
        mongo_database["items"].delete_one({"_id": 1})
        mongo_database["orders"].delete_one({"_id": 1})
        namespaces = [event["ns"]["coll"] for event in take(cluster, 5)]
        assert namespaces == ["orders", "other", "orders", "items", "orders"]
        assert len(take(database, 6)) == 6
        assert kinds(take(collection, 2)) == ["insert", "delete"]


def test_update_descriptions(mongo_database: MongoDatabase) -> None:
    updates: list[Any] = [
        {"$set": {"o.x": 5, "new.deep.er": 1}, "$unset": {"gone": 1}},
        {"$push": {"a": 4}},
        {"$pop": {"a": 1}},
        {"$set": {"a.0": 9}},
        [{"$set": {"a": [9, 2]}}],
        [{"$set": {"o.y": 7}}],
        {"$set": {"o.x": 5}},  # nothing
        {"$rename": {"big": "grand"}},
    ]

    def write(collection: Any) -> None:
        collection.insert_one({"_id": 1, "o": {"x": 1, "y": 2}, "a": [1, 2, 3], "gone": 1, "big": "x" * 200})
        for update in updates:
            collection.update_one({"_id": 1}, update)

    found = [event["updateDescription"] for event in changes(mongo_database, write, len(updates))[1:]]
    expected: list[tuple[Json, list[str], list[Json]]] = [
        ({"new": {"deep": {"er": 1}}, "o.x": 5}, ["gone"], []),
        ({"a.3": 4}, [], []),
        ({"a": [1, 2, 3]}, [], []),
        ({"a.0": 9}, [], []),
        ({}, [], [{"field": "a", "newSize": 2}]),
        ({"o.y": 7}, [], []),
        ({"grand": "x" * 200}, ["big"], []),
    ]
    for got, (updated, removed, truncated) in zip(found, expected, strict=True):
        assert got == {"updatedFields": updated, "removedFields": removed, "truncatedArrays": truncated}


def test_kinds_of_writes(mongo_database: MongoDatabase) -> None:
    def write(collection: Any) -> None:
        collection.update_one({"_id": 1}, {"$set": {"a": 1}}, upsert=True)
        collection.replace_one({"_id": 1}, {"b": 1})
        collection.replace_one({"_id": 1}, {"b": 1})  # the same: no event
        collection.find_one_and_update({"_id": 1}, {"$inc": {"b": 1}})
        collection.delete_many({})

    events = changes(mongo_database, write, 4)
    assert kinds(events) == ["insert", "replace", "update", "delete"]
    assert next(iter(events[0])) == "_id"
    assert [event["documentKey"] for event in events] == [{"_id": 1}] * 4


def test_lookup_is_an_image_from_the_future(mongo_database: MongoDatabase) -> None:
    with mongo_database.watch(full_document="updateLookup") as stream:
        for value in range(3):
            mongo_database["c"].update_one({"_id": 1}, {"$set": {"v": value}}, upsert=True)
        assert [event["fullDocument"]["v"] for event in take(stream, 3)] == [0, 2, 2]


def test_images_where_configured(mongo_database: MongoDatabase) -> None:
    mongo_database.create_collection("c", changeStreamPreAndPostImages={"enabled": True})
    mongo_database.create_collection("without")

    def write(collection: Any) -> None:
        collection.insert_one({"_id": 1, "v": 0})
        collection.update_one({"_id": 1}, {"$set": {"v": 1}})
        collection.update_one({"_id": 1}, {"$set": {"v": 2}})
        collection.delete_one({"_id": 1})

    options = {"full_document": "whenAvailable", "full_document_before_change": "whenAvailable"}
    _, first, second, gone = changes(mongo_database, write, 4, **options)
    assert (first["fullDocument"]["v"], first["fullDocumentBeforeChange"]["v"]) == (1, 0)
    assert (second["fullDocument"]["v"], second["fullDocumentBeforeChange"]["v"]) == (2, 1)
    assert gone["fullDocumentBeforeChange"] == {"_id": 1, "v": 2}

    with mongo_database.watch(full_document="required") as stream:
        mongo_database["without"].insert_one({"_id": 1})
        mongo_database["without"].update_one({"_id": 1}, {"$set": {"a": 1}})
        stream.next()
        with pytest.raises(OperationFailure) as missing:
            stream.next()
    assert missing.value.code == 47


def test_resume(mongo_database: MongoDatabase) -> None:
    collection = mongo_database["c"]
    with mongo_database.watch() as stream:
        start = stream.resume_token
        collection.insert_many([{"_id": at} for at in range(5)])
        events = take(stream, 5)
    for option, value, expected in [
        ("resume_after", start, [0, 1, 2, 3, 4]),
        ("resume_after", events[1]["_id"], [2, 3, 4]),
        ("start_after", events[3]["_id"], [4]),
        ("start_at_operation_time", events[2]["clusterTime"], [2, 3, 4]),
    ]:
        with mongo_database.watch(max_await_time_ms=20, **{option: value}) as stream:
            assert [event["documentKey"]["_id"] for event in take(stream, len(expected))] == expected
            assert stream.try_next() is None


def test_idle_streams_advance_their_token(mongo_database: MongoDatabase) -> None:
    with mongo_database["idle"].watch(max_await_time_ms=20) as stream:
        before = stream.resume_token or {}
        mongo_database["busy"].insert_one({})
        while stream.resume_token == before:
            assert stream.try_next() is None
        after = stream.resume_token or {}
        assert after["_data"] > before["_data"]
    with mongo_database["idle"].watch(resume_after=after) as stream:
        mongo_database["idle"].insert_one({"_id": 1})
        assert stream.next()["documentKey"] == {"_id": 1}


def test_get_more_waits(mongo_database: MongoDatabase) -> None:
    with mongo_database.watch(max_await_time_ms=300) as stream:
        began = time.monotonic()
        assert stream.try_next() is None
        assert time.monotonic() - began > 0.2


def test_invalidate(mongo_database: MongoDatabase) -> None:
    with mongo_database["c"].watch() as stream:
        mongo_database["c"].insert_one({"_id": 1})
        mongo_database["c"].drop()
        mongo_database["c"].insert_one({"_id": 2})
        events = take(stream, 3)
        assert kinds(events) == ["insert", "drop", "invalidate"]
        assert not stream.alive
    with pytest.raises(OperationFailure) as refused, mongo_database["c"].watch(resume_after=events[2]["_id"]):
        pass
    assert refused.value.code == 260
    with mongo_database["c"].watch(start_after=events[2]["_id"]) as stream:
        assert stream.next()["documentKey"] == {"_id": 2}
    with mongo_database["c"].watch(resume_after=events[1]["_id"]) as stream:
        assert stream.next()["operationType"] == "invalidate"


def test_transaction(mongodb_client: Client, mongo_database: MongoDatabase) -> None:
    for name in ("a", "b"):
        mongo_database.create_collection(name)
    with mongo_database.watch() as stream:
        with mongodb_client.start_session() as session:
            session.start_transaction()
            mongo_database["a"].insert_one({"_id": 0}, session=session)
            session.abort_transaction()
            with session.start_transaction():
                mongo_database["a"].insert_one({"_id": 1}, session=session)
                mongo_database["b"].insert_many([{"_id": at} for at in range(3)], session=session)
        events = take(stream, 4)
    assert len({event["clusterTime"] for event in events}) == 1
    assert len({(bytes(event["lsid"]["id"]), event["txnNumber"]) for event in events}) == 1
    with mongo_database.watch(resume_after=events[1]["_id"]) as stream:  # in the middle of it
        assert [event["documentKey"]["_id"] for event in take(stream, 2)] == [1, 2]


def test_definitions_with_expanded_events(mongo_database: MongoDatabase) -> None:
    with mongo_database.watch(show_expanded_events=True) as stream:
        collection = mongo_database.create_collection("c", validator={"a": 1})
        collection.create_index([("x", 1)], unique=True)
        mongo_database.command("collMod", "c", validator={"a": 2})
        collection.drop_index("x_1")
        collection.rename("d")
        mongo_database["d"].drop()
        events = take(stream, 6)
    assert kinds(events) == ["create", "createIndexes", "modify", "dropIndexes", "rename", "drop"]
    create, indexes, modify, dropped, rename, _ = (event.get("operationDescription", {}) for event in events)
    assert create["validator"] == {"a": 1}
    assert create["idIndex"] == {"v": 2, "key": {"_id": 1}, "name": "_id_"}
    assert indexes["indexes"] == dropped["indexes"] == [{"v": 2, "key": {"x": 1}, "name": "x_1", "unique": True}]
    assert modify == {"validator": {"a": 2}}
    assert events[2]["stateBeforeChange"]["collectionOptions"]["validator"] == {"a": 1}
    assert events[4]["to"] == rename["to"] == {"db": mongo_database.name, "coll": "d"}
    assert len({bytes(event["collectionUUID"]) for event in events}) == 1


def test_drop_database(mongo_database: MongoDatabase) -> None:
    mongo_database["a"].insert_one({})
    mongo_database["b"].insert_one({})
    with mongo_database.watch() as stream:
        mongo_database.client.drop_database(mongo_database)
        assert kinds(take(stream, 4)) == ["drop", "drop", "dropDatabase", "invalidate"]


def test_rename_to_another_database(mongodb_client: Client, mongo_database: MongoDatabase) -> None:
    other = mongodb_client[mongo_database.name + "_other"]
    mongo_database["c"].insert_one({"_id": 1})
    other["seed"].insert_one({})
    try:
        with mongodb_client.watch([{"$match": {"ns.db": {"$in": [mongo_database.name, other.name]}}}]) as stream:
            mongodb_client.admin.command("renameCollection", f"{mongo_database.name}.c", to=f"{other.name}.c")
            events = take(stream, 3)
        assert kinds(events) == ["insert", "rename", "drop"]
        assert events[1]["ns"]["coll"] != "c"
        assert events[1]["to"] == {"db": other.name, "coll": "c"}
    finally:
        mongodb_client.drop_database(other)


def test_ambiguous_paths(mongo_database: MongoDatabase) -> None:
    def write(collection: Any) -> None:
        collection.insert_one({"_id": 1, "a": {"1": 1}, "l": [1]})
        collection.update_one({"_id": 1}, {"$set": {"a.1": 2, "l.0": 3}})

    with mongo_database.watch(show_expanded_events=True) as stream:
        write(mongo_database["c"])
        events = [event for event in take(stream, 3) if event["operationType"] == "update"]
    assert events[0]["updateDescription"]["disambiguatedPaths"] == {"a.1": ["a", "1"]}


def test_wrong_use(mongo_database: MongoDatabase) -> None:
    wrong: list[tuple[Json, int]] = [
        ({"resume_after": {"_data": "zz"}}, 9),
        ({"resume_after": {"x": 1}}, 40647),
        ({"start_at_operation_time": bson.Timestamp(1, 1), "pipeline": [{"$group": {"_id": 1}}]}, 20),
    ]
    for options, code in wrong:
        with pytest.raises(OperationFailure) as refused, mongo_database.watch(**options):
            pass
        assert refused.value.code in {code, 40324} if code == 20 else refused.value.code == code


def test_async_client(mongodb: str, mongo_database: MongoDatabase) -> None:
    async def watch() -> list[Json]:
        async with (
            pymongo.AsyncMongoClient[Json](mongodb) as client,
            await client[mongo_database.name].watch() as stream,
        ):
            await client[mongo_database.name]["c"].insert_many([{"_id": at} for at in range(3)])
            return [await stream.next() for _ in range(3)]

    assert [event["fullDocument"]["_id"] for event in asyncio.run(watch())] == [0, 1, 2]


def test_split_of_large_events(new_stand_in: NewStandIn) -> None:
    server = new_stand_in("--max-event-bytes", "3000")
    with Client(server.url) as client:
        database = client["d"]
        database.create_collection("c", changeStreamPreAndPostImages={"enabled": True})
        options: Json = {"full_document": "required", "full_document_before_change": "required"}
        pipeline: list[Json] = [{"$changeStreamSplitLargeEvent": {}}]
        with database.watch(pipeline, **options) as stream:
            database["c"].insert_one({"_id": 1, "a": "x" * 2000})
            database["c"].update_one({"_id": 1}, {"$set": {"a": "y" * 2000}})
            database["c"].insert_one({"_id": 2})
            _, *fragments, last = take(stream, 5)
        assert [one["splitEvent"] for one in fragments] == [{"fragment": at, "of": 3} for at in (1, 2, 3)]
        assert sum(("fullDocument" in one) + ("operationType" in one) for one in fragments) == 2
        assert last["documentKey"] == {"_id": 2}
        with database.watch(pipeline, resume_after=fragments[1]["_id"], **options) as stream:
            assert take(stream, 2) == [fragments[2], last]
        with database.watch(resume_after=fragments[1]["_id"], **options) as stream:
            assert stream.next()["documentKey"] == {"_id": 2}


@pytest.mark.parametrize("version", ["5.0", "8.0"])
def test_what_versions_can_do(new_stand_in: NewStandIn, version: str) -> None:
    with Client(new_stand_in("--version", version).url) as client:
        assert client.server_info()["version"].startswith(version)
        if version == "5.0":
            with pytest.raises(OperationFailure) as refused, client["d"].watch(show_expanded_events=True):
                pass
            assert refused.value.code == 40415
        with client["d"].watch() as stream:
            client["d"]["c"].insert_one({})
            assert ("wallTime" in stream.next()) == (version != "5.0")


def test_standalone(new_stand_in: NewStandIn) -> None:
    with Client(new_stand_in("--standalone").url) as client:
        client["d"]["c"].insert_one({"_id": 1})
        assert client["d"]["c"].count_documents({}) == 1
        with pytest.raises(OperationFailure) as refused, client["d"].watch():
            pass
        assert refused.value.code == 40573


def test_lost_history(stand_in: StandIn, stand_in_client: Client) -> None:
    database = stand_in_client["lost"]
    with database.watch() as stream:
        token = stream.resume_token
        database["c"].insert_many([{} for _ in range(3)])
    stand_in.command("cdcTestTruncateOplog")
    with pytest.raises(OperationFailure) as lost, database.watch(resume_after=token):
        pass
    assert lost.value.code == 286
    with database.watch() as stream:
        database["c"].insert_one({"_id": 1})
        assert stream.next()["documentKey"] == {"_id": 1}
