"""Retryable writes and transactions of a MongoDB server, real or stand-in."""

from __future__ import annotations

import threading
from typing import Any

import pymongo
import pytest
from bson import Int64
from pymongo.errors import OperationFailure

from tests.mongod.fixture import MongoDatabase

Client = pymongo.MongoClient[dict[str, Any]]


def test_a_retried_write_is_not_written_twice(mongodb: str, mongo_database: MongoDatabase) -> None:
    mongo_database["c"].insert_one({"_id": 0, "n": 0})
    with Client(mongodb) as client, client.start_session() as session:  # of its own: sessions are used again
        write_again(client[mongo_database.name], session)


def write_again(mongo_database: MongoDatabase, session: Any) -> None:
    def retryable(number: int) -> dict[str, Any]:
        return {"txnNumber": Int64(number), "session": session}

    increment = [{"q": {"_id": 0}, "u": {"$inc": {"n": 1}}}]
    for _ in range(2):
        reply = mongo_database.command("update", "c", updates=increment, **retryable(1))
        assert (reply["n"], reply["nModified"]) == (1, 1)
    assert mongo_database["c"].find_one() == {"_id": 0, "n": 1}
    find: dict[str, Any] = {"query": {"_id": 0}, "update": {"$inc": {"n": 1}}, "new": True}
    values = [mongo_database.command("findAndModify", "c", **find, **retryable(2))["value"] for _ in range(2)]
    assert values == [{"_id": 0, "n": 2}] * 2
    documents = [{"_id": 1}, {"_id": 2}]
    for count in (1, 2):  # the second time with one statement more
        reply = mongo_database.command("insert", "c", documents=documents[:count], **retryable(3))
        assert reply["n"] == count
    with pytest.raises(OperationFailure) as stale:
        mongo_database.command("insert", "c", documents=[{}], **retryable(1))
    assert stale.value.code == 225


def test_transactions_are_invisible_until_committed(mongodb_client: Client, mongo_database: MongoDatabase) -> None:
    collection = mongo_database["c"]
    collection.insert_many([{"_id": at, "n": 0} for at in range(3)])
    with mongodb_client.start_session() as session:
        session.start_transaction()
        collection.insert_one({"_id": 9}, session=session)
        collection.update_one({"_id": 1}, {"$set": {"n": 1}}, session=session)
        collection.delete_one({"_id": 2}, session=session)
        assert [one["_id"] for one in collection.find({}, session=session, sort={"_id": 1})] == [0, 1, 9]
        assert [one["n"] for one in collection.find()] == [0, 0, 0]
        session.commit_transaction()
        session.commit_transaction()  # may be repeated
    assert list(collection.find(sort={"_id": 1})) == [{"_id": 0, "n": 0}, {"_id": 1, "n": 1}, {"_id": 9}]


def test_write_conflicts(mongodb_client: Client, mongo_database: MongoDatabase) -> None:
    collection = mongo_database["c"]
    collection.insert_one({"_id": 1, "n": 0})
    with mongodb_client.start_session() as one, mongodb_client.start_session() as other:
        one.start_transaction()
        other.start_transaction()
        collection.update_one({"_id": 1}, {"$inc": {"n": 1}}, session=one)
        with pytest.raises(OperationFailure) as conflict:
            collection.update_one({"_id": 1}, {"$inc": {"n": 1}}, session=other)
        assert conflict.value.code == 112
        assert conflict.value.has_error_label("TransientTransactionError")
        one.commit_transaction()
        other.abort_transaction()
        other.start_transaction()
        collection.find_one({"_id": 1}, session=other)
        collection.update_one({"_id": 1}, {"$inc": {"n": 1}})
        with pytest.raises(OperationFailure) as late:
            collection.update_one({"_id": 1}, {"$inc": {"n": 1}}, session=other)
        assert late.value.code == 112
    assert collection.find_one() == {"_id": 1, "n": 2}


def test_other_writers_wait_for_a_transaction(mongodb_client: Client, mongo_database: MongoDatabase) -> None:
    collection = mongo_database["c"]
    collection.insert_many([{"_id": 0, "n": 0}, {"_id": 1, "n": 0}])
    with mongodb_client.start_session() as session:
        session.start_transaction()
        collection.update_one({"_id": 1}, {"$inc": {"n": 1}}, session=session)
        writer = threading.Thread(target=collection.update_many, args=({}, {"$inc": {"n": 10}}))
        writer.start()
        writer.join(0.1)
        assert writer.is_alive()
        session.commit_transaction()
        writer.join()
    assert [one["n"] for one in collection.find()] == [10, 11]


def test_an_error_aborts_the_transaction(mongodb_client: Client, mongo_database: MongoDatabase) -> None:
    collection = mongo_database["c"]
    collection.insert_one({"_id": 1})
    with mongodb_client.start_session() as session:
        session.start_transaction()
        collection.insert_one({"_id": 2}, session=session)
        with pytest.raises(OperationFailure):
            collection.insert_one({"_id": 1}, session=session)
        with pytest.raises(OperationFailure) as gone:
            session.commit_transaction()
        assert gone.value.code == 251
    assert collection.count_documents({}) == 1


def test_with_transaction_retries(mongodb_client: Client, mongo_database: MongoDatabase) -> None:
    collection = mongo_database["c"]
    collection.insert_one({"_id": 1, "n": 0})
    attempts = []

    def work(session: Any) -> None:
        attempts.append(1)
        found = collection.find_one({"_id": 1}, session=session) or {}
        if len(attempts) == 1:
            collection.update_one({"_id": 1}, {"$inc": {"n": 5}})
        collection.update_one({"_id": 1}, {"$set": {"n": found["n"] + 1}}, session=session)

    with mongodb_client.start_session() as session:
        session.with_transaction(work)
    assert collection.find_one() == {"_id": 1, "n": 6}
    assert len(attempts) == 2
