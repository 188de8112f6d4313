"""Documents and their keys on a MongoDB server, real or stand-in: bytes, equality, order, constraints."""

from __future__ import annotations

import struct
from typing import Any

import bson
import pymongo
import pytest
from bson import Binary, Code, DBRef, Decimal128, Int64, MaxKey, MinKey, ObjectId, Regex, Timestamp
from bson.codec_options import CodecOptions
from bson.raw_bson import RawBSONDocument
from pymongo.collection import Collection
from pymongo.errors import BulkWriteError, DuplicateKeyError, OperationFailure, WriteError

from tests.mongod.fixture import MongoDatabase

RAW: CodecOptions[RawBSONDocument] = CodecOptions(
    document_class=RawBSONDocument,
    datetime_conversion=bson.codec_options.DatetimeConversion.DATETIME_AUTO,
    unicode_decode_error_handler="replace",
)
NAN = float("nan")

VALUES: list[Any] = [
    None, True, False, 1, Int64(1), 2**40, 1.5, -0.0, NAN, float("inf"), Decimal128("1.10"), Decimal128("NaN"), "", "é",
    {"b": 1, "a": {"x": Int64(2)}}, [1, [2, {"y": 3}]], Binary(b"\0\1", 0), Binary(b"\0" * 16, 4), Binary(b"x", 128),
    ObjectId("65f000000000000000000001"), Timestamp(1, 2), Regex("^a", "im"), Code("f()"), Code("f()", {"x": 1}),
    DBRef("coll", 1), MinKey(), MaxKey(), bson.DatetimeMS(2**62), bson.DatetimeMS(-(2**62)), bson.DatetimeMS(0),
]  # fmt: skip


def raw_document(body: bytes) -> RawBSONDocument:
    return RawBSONDocument(struct.pack("<i", len(body) + 5) + body + b"\0", RAW)


def ids(database: MongoDatabase, name: str, *arguments: Any, **options: Any) -> list[Any]:
    return [document["_id"] for document in database[name].find(*arguments, **options)]


def test_documents_keep_their_bytes(mongo_database: MongoDatabase) -> None:
    documents = [RawBSONDocument(bson.encode({"_id": at, "v": value, "z": 1}), RAW) for at, value in enumerate(VALUES)]
    documents.append(raw_document(b"\x10_id\0\xff\0\0\0\x10a\0\1\0\0\0\x10a\0\2\0\0\0"))  # the field a twice
    documents.append(raw_document(b"\x10_id\0\xfe\0\0\0\x02a\0\3\0\0\0\xff\xfe\0"))  # text that is not UTF-8
    collection: Collection[Any] = mongo_database.get_collection("c", RAW)
    collection.insert_many(documents)
    assert [document.raw for document in collection.find()] == [document.raw for document in documents]
    for at, document in enumerate(documents[: len(VALUES)]):
        collection.replace_one({"_id": at}, document)
    assert [document.raw for document in collection.find(sort={"$natural": 1})] == [one.raw for one in documents]


def test_updates_change_only_what_they_name(mongo_database: MongoDatabase) -> None:
    collection: Collection[Any] = mongo_database.get_collection("c", RAW)
    collection.insert_one(
        raw_document(b"\x10_id\0\1\0\0\0\x10a\0\1\0\0\0\x10a\0\2\0\0\0\x03o\0\x05\0\0\0\0\x12n\0" + b"\1" * 8)
    )
    collection.update_one({"_id": 1}, {"$set": {"o.x": Int64(1)}, "$inc": {"n": 1}})
    found = collection.find_one()
    assert found is not None
    inner = bson.encode({"x": Int64(1)})
    number = struct.pack("<q", int.from_bytes(b"\1" * 8, "little") + 1)
    assert found.raw == raw_document(
        b"\x10_id\0\1\0\0\0\x10a\0\1\0\0\0\x10a\0\2\0\0\0\x03o\0" + inner + b"\x12n\0" + number
    ).raw  # fmt: skip


def test_insert_puts_the_id_in_front_and_stamps(mongo_database: MongoDatabase) -> None:
    mongo_database.command(
        "insert", "c", documents=[raw_document(b"\x10a\0\1\0\0\0\x10_id\0\2\0\0\0\x11t\0" + b"\0" * 8)]
    )
    found = mongo_database["c"].find_one() or {}
    assert list(found) == ["_id", "a", "t"]
    assert found["t"].time > 0


def test_equal_ids(mongo_database: MongoDatabase) -> None:
    collection = mongo_database["c"]
    equals: list[list[Any]] = [
        [1, 1.0, Int64(1), Decimal128("1"), Decimal128("1.0")],
        [0.0, -0.0, 0],
        [NAN, Decimal128("NaN")],
    ]
    for group in equals:
        collection.insert_one({"_id": group[0]})
        for other in group[1:]:
            with pytest.raises(DuplicateKeyError):
                collection.insert_one({"_id": other})
            assert collection.count_documents({"_id": other}) == 1
    collection.insert_one({"_id": {"a": 1, "b": 1}})
    collection.insert_one({"_id": {"b": 1, "a": 1}})
    assert collection.find_one({"_id": {"a": 1.0, "b": Int64(1)}}) == {"_id": {"a": 1, "b": 1}}
    collection.insert_many([{"_id": "a"}, {"_id": "A"}, {"_id": True}, {"_id": None}])


def test_ids_by_collation(mongo_database: MongoDatabase) -> None:
    collection = mongo_database.create_collection("c", collation={"locale": "en", "strength": 2})
    collection.insert_one({"_id": "Abc"})
    with pytest.raises(DuplicateKeyError):
        collection.insert_one({"_id": "aBC"})
    assert collection.find_one({"_id": "ABC"}) == {"_id": "Abc"}
    assert next(collection.list_indexes())["collation"]["strength"] == 2


def test_order_of_ids(mongo_database: MongoDatabase) -> None:
    ordered: list[Any] = [
        MinKey(), None, NAN, float("-inf"), -1, Decimal128("0.5"), 1, Int64(2), 2.5, float("inf"), "", "B", "a", {},
        {"a": 1}, {"a": 1, "b": 1}, {"b": 1}, {"a": "x"}, Binary(b"z", 0), Binary(b"aa", 0), ObjectId(), False, True,
        bson.DatetimeMS(-5), bson.DatetimeMS(5), Timestamp(1, 1), MaxKey(),
    ]  # fmt: skip
    collection = mongo_database["c"]
    collection.insert_many([{"_id": value, "at": at} for at, value in reversed(list(enumerate(ordered)))])
    assert [one["at"] for one in collection.find(sort={"_id": 1})] == list(range(len(ordered)))
    assert [one["at"] for one in collection.find(sort={"_id": -1})] == list(range(len(ordered)))[::-1]
    assert ids(mongo_database, "c", {"_id": {"$gte": 1}}, sort={"_id": 1}) == [1, 2, 2.5, float("inf")]  # only numbers
    assert ids(mongo_database, "c", {"_id": {"$lt": "b", "$gt": ""}}, sort={"_id": 1}) == ["B", "a"]
    found = collection.find({}, hint=[("_id", 1)]).min([("_id", 1)]).max([("_id", {"a": 1})])
    assert [one["_id"] for one in found] == [1, 2, 2.5, float("inf"), "", "B", "a", {}]  # all types between
    assert collection.count_documents({"_id": {"$gte": MinKey()}}) == len(ordered)


def test_find_with_options(mongo_database: MongoDatabase) -> None:
    collection = mongo_database["c"]
    collection.insert_many([{"_id": at, "n": at % 3, "d": {"x": at, "y": 0}} for at in range(250)])
    assert len(list(collection.find(batch_size=7))) == 250
    assert len(list(collection.find({"n": 1}))) == 83
    assert ids(mongo_database, "c", {"n": {"$in": [0, 2]}}, sort=[("n", -1), ("_id", 1)], limit=2, skip=1) == [5, 8]
    assert collection.find_one({"_id": 7}, {"d.x": 1}) == {"_id": 7, "d": {"x": 7}}
    assert collection.find_one({"_id": 7}, {"d.x": 0, "_id": 0}) == {"n": 1, "d": {"y": 0}}
    assert collection.count_documents({"n": 0}) == 84
    assert collection.estimated_document_count() == 250
    assert collection.distinct("n") == [0, 1, 2]
    grouped = collection.aggregate([{"$group": {"_id": "$n", "sum": {"$sum": "$_id"}}}, {"$sort": {"_id": 1}}])
    assert next(one["sum"] for one in grouped) == sum(range(0, 250, 3))
    assert len(list(collection.aggregate([{"$sample": {"size": 5}}]))) == 5
    assert sum(1 for _ in collection.find_raw_batches(batch_size=100)) == 3


def test_update_operators(mongo_database: MongoDatabase) -> None:
    collection = mongo_database["c"]
    collection.insert_one({"_id": 1, "a": [1, 2, 3], "b": [{"k": 1, "v": 1}, {"k": 2, "v": 2}], "s": "x"})

    def after(update: Any, field: str, condition: Any = None, **options: Any) -> Any:
        collection.update_one({"_id": 1, **(condition or {})}, update, **options)
        return (collection.find_one() or {}).get(field)

    assert after({"$push": {"a": {"$each": [9, 0], "$sort": 1, "$slice": 4}}}, "a") == [0, 1, 2, 3]
    assert after({"$addToSet": {"a": 2.0}}, "a") == [0, 1, 2, 3]
    assert after({"$pull": {"a": {"$gte": 2}}}, "a") == [0, 1]
    assert after({"$pop": {"a": -1}}, "a") == [1]
    assert after({"$set": {"b.$.v": 7}}, "b", {"b.k": 2}) == [{"k": 1, "v": 1}, {"k": 2, "v": 7}]
    assert after({"$inc": {"b.$[one].v": 1}}, "b", array_filters=[{"one.k": 1}])[0] == {"k": 1, "v": 2}
    assert after({"$unset": {"b.$[].k": 1}}, "b") == [{"v": 2}, {"v": 7}]
    assert after({"$rename": {"s": "t"}}, "t") == "x"
    assert after({"$min": {"m": 5}, "$max": {"x": 5}, "$mul": {"z": 2}}, "z") == 0
    assert after([{"$set": {"sum": {"$add": [1, "$m"]}}}, {"$unset": ["m"]}], "sum") == 6
    with pytest.raises(WriteError) as refused:
        collection.update_one({"_id": 1}, {"$set": {"t.x": 1}})
    assert refused.value.code == 28
    with pytest.raises(WriteError) as refused:
        collection.update_one({"_id": 1}, {"$set": {"_id": 2}})
    assert refused.value.code == 66


def test_upserts_and_find_and_modify(mongo_database: MongoDatabase) -> None:
    collection = mongo_database["c"]
    result = collection.update_one(
        {"_id": 5, "k": {"$eq": 1}}, {"$set": {"v": 1}, "$setOnInsert": {"w": 2}}, upsert=True
    )
    assert result.upserted_id == 5
    assert collection.find_one() == {"_id": 5, "k": 1, "v": 1, "w": 2}
    assert collection.replace_one({"k": 9}, {"x": 1}, upsert=True).upserted_id is not None
    options: dict[str, Any] = {"return_document": pymongo.ReturnDocument.AFTER}
    assert collection.find_one_and_update({"_id": 5}, {"$inc": {"v": 1}}, {"v": 1}, **options) == {"_id": 5, "v": 2}
    assert collection.find_one_and_delete({"_id": 5}) == {"_id": 5, "k": 1, "v": 2, "w": 2}
    assert collection.find_one_and_replace({"_id": 6}, {"y": 1}, upsert=True, **options) == {"_id": 6, "y": 1}
    assert collection.update_many({}, {"$set": {"all": 1}}).modified_count == 2
    assert collection.delete_many({"all": 1}).deleted_count == 2


def test_unique_indexes_and_bulk_errors(mongo_database: MongoDatabase) -> None:
    collection = mongo_database["c"]
    collection.create_index("e", unique=True)
    operations: list[Any] = [pymongo.InsertOne({"_id": at, "e": e}) for at, e in enumerate([1, 2, 1, 3])]
    with pytest.raises(BulkWriteError) as ordered:
        collection.bulk_write(operations)
    error = ordered.value.details["writeErrors"][0]
    assert (error["index"], error["code"], error["keyPattern"], error["keyValue"]) == (2, 11000, {"e": 1}, {"e": 1})
    assert "index: e_1 dup key: { e: 1 }" in error["errmsg"]
    assert ids(mongo_database, "c") == [0, 1]
    with pytest.raises(BulkWriteError):
        collection.bulk_write(operations[2:], ordered=False)
    assert ids(mongo_database, "c") == [0, 1, 3]
    collection.update_one({"_id": 0}, {"$set": {"e": 7}})
    collection.insert_one({"_id": 9, "e": 1})  # free again
    with pytest.raises(DuplicateKeyError):
        mongo_database["c"].update_one({"_id": 9}, {"$set": {"e": 7}})


def test_validation(mongo_database: MongoDatabase) -> None:
    collection = mongo_database.create_collection("c", validator={"n": {"$gt": 0}})
    with pytest.raises(WriteError) as refused:
        collection.insert_one({"n": 0})
    assert refused.value.code == 121
    collection.with_options().insert_one({"n": 0}, bypass_document_validation=True)
    with pytest.raises(OperationFailure) as unknown:
        mongo_database.command("noSuchCommand")
    assert unknown.value.code == 59
