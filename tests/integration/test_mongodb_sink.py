"""Changes arrive on a MongoDB mirror as they were: every type, every kind of update, every order, again and again."""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import bson
import pymongo
import pytest
from bson import Binary, Code, DatetimeMS, Decimal128, Int64, MaxKey, MinKey, ObjectId, Regex, Timestamp
from bson.raw_bson import RawBSONDocument
from pymongo import ReplaceOne, UpdateOne

from cdc.change import TableName
from cdc.mongodb.moment import encode_moment, moment
from cdc.mongodb.positions import POSITIONS, CollectionState, Positions
from cdc.position import Position
from tests.mongo_mirror import RAW, MongoPair

Client = pymongo.MongoClient[dict[str, Any]]

DUPLICATES = b"\x15\x00\x00\x00\x10a\x00\x01\x00\x00\x00\x10a\x00\x02\x00\x00\x00\x00"
LONG_AGO = datetime(2000, 1, 1, tzinfo=UTC)
VALUES: list[Any] = [
    1, Int64(1), 1.0, Decimal128("1"), -0.0, math.nan, math.inf, Decimal128("NaN"), Decimal128("1E-6176"), 2**62, "",
    "\u00e4\0", {}, {"b": 1, "a": {"": 2}}, [], [1, [2.0], {"x": None}], None, True, False, Binary(b"\0\xff"),
    Binary(b"x", 0x80), ObjectId(), LONG_AGO, DatetimeMS(2**60), DatetimeMS(-(2**60)), Timestamp(1, 2),
    Regex("^a", "i"), Code("f()"), Code("f()", {"a": 1}), MinKey(), MaxKey(), {"$ref": "c", "$id": 1},
]  # fmt: skip
IDS = [value for value in VALUES if not isinstance(value, list | Regex) and value != {"$ref": "c", "$id": 1}]


@pytest.fixture(params=["updateLookup", "off"])
def pair(request: pytest.FixtureRequest, mongodb: str, mongodb_client: Client) -> Iterator[MongoPair]:
    pair = MongoPair(mongodb_client, mongodb, f"shop_{ObjectId()}", full_document=request.param)
    yield pair
    pair.close()


def raw_insert(pair: MongoPair, name: str, *documents: bytes) -> None:
    pair.source.get_collection(name, codec_options=RAW).insert_many(
        [RawBSONDocument(document) for document in documents]
    )


def test_f73_values_of_all_types_arrive_byte_for_byte(pair: MongoPair) -> None:
    documents = [bson.encode({"_id": number, "value": value}) for number, value in enumerate(VALUES)]
    duplicated = DUPLICATES[4:-1]
    text = b"\x02t\0\x03\0\0\0\xff\xfe\0"  # no UTF-8
    body = b"\x10_id\0\xe7\x03\0\0" + duplicated + text
    documents.append((len(body) + 5).to_bytes(4, "little") + body + b"\0")
    raw_insert(pair, "every", *documents)
    pair.deliver()
    pair.check_equal()
    source = pair.source.get_collection("every", codec_options=RAW)
    for number, value in enumerate(reversed(VALUES)):
        source.update_one({"_id": number}, {"$set": {"value": value, "more": {"x": value}}})
        source.update_one({"_id": number}, {"$set": {"more.y": value}, "$unset": {"value": 1}})
    pair.deliver()
    pair.check_equal()


def test_f74_ids_of_every_type(pair: MongoPair) -> None:
    names = [f"ids{number}" for number in range(len(IDS))]
    for name, value in zip(names, IDS, strict=True):
        raw_insert(pair, name, bson.encode({"_id": value, "n": 1}))
    pair.deliver()
    pair.check_equal()
    for name in names:
        pair.source[name].update_one({}, {"$set": {"n": 2, "m": 1}})
    pair.deliver()
    pair.check_equal()
    for name in names:
        pair.source[name].delete_many({})
    pair.deliver()
    pair.check_equal()
    assert pair.target[names[0]].count_documents({}) == 0


def test_f73_an_id_that_comes_back_in_other_bytes(pair: MongoPair) -> None:
    for value in (1, {"a": 1}):
        pair.source.orders.insert_one({"_id": value, "n": 1})
    pair.deliver()
    for value, other in ((1, 1.0), ({"a": 1}, {"a": Decimal128("1.0")})):
        pair.source.orders.delete_one({"_id": value})
        pair.source.orders.insert_one({"_id": other, "n": 2})
    pair.deliver()
    pair.check_equal()


def test_f70_a_replacement_drops_fields_and_an_update_keeps_them(pair: MongoPair) -> None:
    pair.source.orders.insert_many([{"_id": n, "a": 1, "b": 2} for n in range(3)])
    pair.deliver()
    pair.source.orders.update_one({"_id": 0}, {"$set": {"c": 3}})
    pair.source.orders.replace_one({"_id": 1}, {"c": 3})
    pair.source.orders.replace_one({"_id": 2}, {"c": 3})
    pair.source.orders.update_one({"_id": 2}, {"$set": {"d": 4}})
    pair.deliver()
    pair.check_equal()
    assert pair.target.orders.find_one({"_id": 1}) == {"_id": 1, "c": 3}


def test_f71_arrays_are_cut_and_set_at_once(pair: MongoPair) -> None:
    pair.source.orders.insert_one({"_id": 1, "items": [{"n": n} for n in range(10)], "deep": {"list": list(range(9))}})
    pair.deliver()
    source = pair.source.orders
    source.update_one({"_id": 1}, [{"$set": {"items": {"$slice": ["$items", 3]}, "a": 1}}])
    source.update_one({"_id": 1}, {"$set": {"items.1.n": 7, "deep.list.2": "x"}, "$unset": {"a": 1}})
    source.update_one({"_id": 1}, {"$push": {"items": {"$each": [{"n": 8}, {"n": 9}], "$slice": -4}}})
    source.update_one({"_id": 1}, {"$pop": {"deep.list": 1}})
    source.update_one({"_id": 1}, {"$push": {"deep.list": {"$each": list(range(20))}}})
    source.update_one({"_id": 1}, {"$set": {"deep.list": []}})
    pair.deliver()
    pair.check_equal()


def test_f72_numbers_as_field_names(pair: MongoPair) -> None:
    pair.source.orders.insert_one({"_id": 1, "map": {"0": "a", "1": {"0": "b"}}, "list": ["a", {"0": "b"}], "0": "c"})
    pair.deliver()
    pair.source.orders.update_one({"_id": 1}, {"$set": {"map.0": 1, "map.1.0": 2, "list.0": 3, "list.1.0": 4, "0": 5}})
    pair.source.orders.update_one({"_id": 1}, {"$unset": {"map.0": 1}, "$set": {"map.10": 1, "map.9": 2}})
    pair.deliver()
    pair.check_equal()


def test_f72_names_with_dots_and_dollars(pair: MongoPair) -> None:
    raw_insert(pair, "odd", bson.encode({"_id": 1, "a.b": 1, "$c": 2, "d": {"$e": 3, "f.g": 4}, "a": {"b": 5}}))
    pair.deliver()
    pair.check_equal()
    raw_insert(pair, "odd", bson.encode({"_id": 2, "$set": {"a": 1}}))
    pair.source.odd.update_one({"_id": 1}, {"$set": {"a.b": 6, "n": 7}})
    pair.deliver()
    pair.check_equal()
    pair.deliver(pair.batch(), sink=pair.sink)


def test_f73_fields_keep_the_order_in_which_they_came(pair: MongoPair) -> None:
    pair.source.orders.insert_one({"_id": 1, "m": {}})
    pair.deliver()
    for names in ("zebra", "apple", "mango"):
        pair.source.orders.update_one({"_id": 1}, {"$set": {names: 1, f"m.{names}": 1}})
    pair.source.orders.update_one({"_id": 1}, [{"$set": {"z": 1, "k": 2, "a": 3}}])
    pair.source.orders.update_one({"_id": 1}, {"$rename": {"zebra": "cow"}})
    pair.source.orders.update_one({"_id": 1}, {"$unset": {"apple": 1}})
    pair.source.orders.update_one({"_id": 1}, {"$set": {"apple": 2}})
    pair.deliver()
    pair.check_equal()


def test_f73_a_timestamp_of_zero_is_not_replaced_by_the_time(pair: MongoPair) -> None:
    pair.source.orders.insert_one({"_id": 1})
    pair.source.orders.update_one({"_id": 1}, {"$set": {"t": Timestamp(0, 0)}})
    pair.deliver()
    pair.check_equal()
    assert pair.target.orders.find_one() == {"_id": 1, "t": Timestamp(0, 0)}


def test_f68_a_document_that_was_gone_when_it_was_looked_up(pair: MongoPair) -> None:
    """F68: no delete; and the delete comes later. An image that is newer than its event converges."""
    pair.source.orders.insert_many([{"_id": 1, "a": 1}, {"_id": 2, "a": 1}])
    pair.source.orders.update_one({"_id": 1}, {"$set": {"a": 2}})
    pair.source.orders.update_one({"_id": 2}, {"$set": {"a": 2}})
    pair.source.orders.update_one({"_id": 2}, {"$set": {"b": 3}})
    pair.source.orders.delete_one({"_id": 1})
    events = pair.events()
    for event in events[:-1]:
        pair.deliver(pair.batch([event]))
    assert pair.target.orders.find_one({"_id": 1}) == {"_id": 1, "a": 2}
    pair.deliver(pair.batch(events[-1:]))
    pair.check_equal()


def test_f68_an_image_from_the_future_meets_a_unique_index(pair: MongoPair) -> None:
    """F68, F82: the update is looked up with a value that another document still has on the mirror."""
    orders = pair.source.orders
    orders.create_index("n", unique=True)
    orders.insert_many([{"_id": 1, "n": 1}, {"_id": 2, "n": 2}])
    pair.deliver()
    orders.update_one({"_id": 1}, {"$set": {"a": 1}})
    orders.delete_one({"_id": 2})
    orders.update_one({"_id": 1}, {"$set": {"n": 2}})
    events = pair.events()
    for event in events:
        pair.deliver(pair.batch([event]))
    pair.check_equal()


@pytest.mark.parametrize("together", [True, False])
def test_f82_documents_exchange_unique_values(pair: MongoPair, together: bool) -> None:
    orders = pair.source.orders
    orders.create_index("n", unique=True)
    orders.insert_many([{"_id": number, "n": number} for number in range(5)])
    pair.deliver()
    for number, value in ((0, -1), (1, 0), (2, 1), (0, 2)):
        orders.update_one({"_id": number}, {"$set": {"n": value}})
    orders.delete_one({"_id": 3})
    orders.insert_one({"_id": 7, "n": 3})
    orders.replace_one({"_id": 4}, {"n": 44})
    orders.insert_one({"_id": 8, "n": 4})
    events = pair.events()
    for part in [events] if together else [[event] for event in events]:
        pair.deliver(pair.batch(part))
    pair.check_equal()


def test_f82_a_batch_that_was_partly_applied_is_replayed(pair: MongoPair) -> None:
    """F82, F96, F101: documents that are further than the changes hold values that others have on the way."""
    orders = pair.source.orders
    orders.create_index("n", unique=True)
    orders.insert_many([{"_id": number, "n": number} for number in range(6)])
    pair.deliver()
    for number, value in ((0, 10), (1, 0), (2, 1), (0, 2), (3, 11), (4, 3), (3, 12), (5, 11)):
        orders.update_one({"_id": number}, {"$set": {"n": value}})
    events = pair.events()
    for number in (0, 4, 5):  # as an earlier attempt may have left them, or a later look
        document = orders.find_one({"_id": number})
        assert document is not None
        pair.target.orders.delete_many({"$or": [{"_id": number}, {"n": document["n"]}]})
        pair.target.orders.insert_one(document)
    pair.deliver(pair.batch(events))
    pair.check_equal()


def busy(pair: MongoPair) -> list[bytes]:
    """Changes of many kinds, with a drop and a rename among them."""
    source = pair.source
    source.a.create_index("n", unique=True)
    source.a.insert_many([{"_id": number, "n": number, "list": [1, 2, 3]} for number in range(4)])
    source.a.update_one({"_id": 0}, {"$set": {"x": {"y": 1}}})
    source.a.update_one({"_id": 0}, {"$set": {"x": 5}})
    source.a.update_one({"_id": 0}, {"$set": {"x": {"z": [1]}}})
    source.a.update_one({"_id": 0}, {"$set": {"x.z.1": 2}})
    source.a.update_one({"_id": 1}, {"$set": {"n": 10}})
    source.a.update_one({"_id": 2}, {"$set": {"n": 1}})
    source.b.insert_many([{"_id": number} for number in range(3)])
    source.a.rename("b", dropTarget=True)
    source.a.insert_one({"_id": 9, "new": 1})
    source.b.delete_one({"_id": 3})
    source.b.update_one({"_id": 2}, [{"$set": {"list": {"$slice": ["$list", 1]}}}])
    source.c.insert_one({"_id": 1})
    source.c.drop()
    source.c.insert_one({"_id": 2})
    source.c.replace_one({"_id": 2}, {"r": 1})
    return pair.events()


def test_f101_a_replay_from_every_earlier_position_converges(pair: MongoPair, monkeypatch: pytest.MonkeyPatch) -> None:
    """F101, F65, F66: everything up to some event applied, but the position not stored; then all of it, twice."""
    events = busy(pair)
    whole = pair.batch(events)
    begin = pair.target[POSITIONS].find_one({"_id": "backup"})
    assert begin is not None
    for length in range(1, len(events)):
        part = pair.batch(events[:length])
        assert pair.sink.open() is not None
        with monkeypatch.context() as patch:
            patch.setattr(Positions, "move", killed)
            with pytest.raises(Killed):
                pair.sink.apply([part], Position("queue", pair.seq + 1, part.position))
        pair.sink.close()
        pair.deliver(whole)
        pair.check_equal()
        pair.sink.close()
        earlier = {name: begin[name] for name in ("queue_id", "seq", "token")}
        pair.target[POSITIONS].update_one({"_id": "backup"}, {"$set": earlier})
        pair.deliver(whole)
        pair.check_equal()
        pair.sink.close()
        pair.target.client.drop_database(pair.target.name)
        pair.target[POSITIONS].insert_one(begin)


class Killed(Exception):
    """The process ends here."""


def killed(*arguments: Any, **options: Any) -> None:
    raise Killed


def test_f64_f65_f66_drops_and_renames(pair: MongoPair) -> None:
    source = pair.source
    source.a.insert_many([{"_id": number} for number in range(3)])
    source.b.insert_one({"_id": "b"})
    source.d.insert_one({"_id": 1})
    pair.deliver()
    source.a.rename("b", dropTarget=True)
    source.b.insert_one({"_id": "new"})
    source.d.drop()
    source.d.insert_one({"_id": 2})
    source.b.rename("e")
    pair.deliver()
    pair.check_equal()
    source.client.drop_database(source.name)
    source.f.insert_one({"_id": 1})
    pair.deliver()
    pair.check_equal()
    assert pair.target[POSITIONS].find_one({"_id": "backup"}) is not None


def test_f75_a_transaction_over_collections(pair: MongoPair) -> None:
    pair.source.a.insert_one({"_id": 0})
    pair.source.create_collection("b")
    with pair.source.client.start_session() as session, session.start_transaction():
        for number in range(1, 50):
            pair.source.a.insert_one({"_id": number}, session=session)
            pair.source.b.insert_one({"_id": number}, session=session)
            pair.source.a.update_one({"_id": 0}, {"$set": {"n": number}}, session=session)
    pair.deliver()
    pair.check_equal()


def test_f77_a_delete_and_an_insert_of_one_key_keep_their_order(pair: MongoPair) -> None:
    pair.source.a.insert_one({"_id": 1, "region": "eu"})
    pair.deliver()
    with pair.source.client.start_session() as session, session.start_transaction():
        pair.source.a.delete_one({"_id": 1}, session=session)
        pair.source.a.insert_one({"_id": 1, "region": "us"}, session=session)
    pair.deliver()
    pair.check_equal()


@pytest.mark.parametrize("batches", [1, 2])
def test_f72_f73_a_name_that_comes_twice_beside_a_timestamp_of_zero(pair: MongoPair, batches: int) -> None:
    """A replacement would get the time instead: see `cdc.mongodb.delta.replacement`."""
    pair.source.a.insert_one(RawBSONDocument(b"".join((
        (31).to_bytes(4, "little"), b"\x10_id\0\1\0\0\0", b"\x10n\0\1\0\0\0", b"\x10n\0\2\0\0\0", b"\x0at\0", b"\0",
    ))))  # fmt: skip
    if batches == 2:
        pair.deliver()
    pair.source.a.update_one({"_id": 1}, {"$set": {"t": Timestamp(0, 0)}})
    pair.deliver()
    pair.check_equal()


def test_f78_capped_collections_keep_their_order(pair: MongoPair) -> None:
    pair.source.create_collection("log", capped=True, size=100_000, max=5)
    pair.source.log.insert_many([{"_id": number} for number in (5, 1, 4, 2, 3, 9, 8)])
    pair.deliver()
    pair.source.log.insert_many([{"_id": number} for number in (7, 6)])
    pair.deliver()
    assert [each["_id"] for each in pair.target.log.find()] == [each["_id"] for each in pair.source.log.find()]
    assert pair.target.log.options()["capped"]


def test_f78_a_collection_that_becomes_capped_within_a_batch_keeps_its_order(pair: MongoPair) -> None:
    """What is let go of is the same on both sides only if all came in the same order."""
    pair.source.create_collection("new", capped=True, size=100_000, max=5)
    pair.source.new.insert_many([{"_id": number} for number in (1, 2, 3)])
    pair.source.new.delete_one({"_id": 1})
    pair.source.new.insert_one({"_id": 1})
    pair.source.new.rename("log")
    pair.source.log.delete_one({"_id": 2})
    pair.source.log.insert_many([{"_id": number} for number in (2, 4, 5)])
    pair.deliver()
    assert [each["_id"] for each in pair.source.log.find()] == [3, 1, 2, 4, 5]
    assert [each["_id"] for each in pair.target.log.find()] == [3, 1, 2, 4, 5]
    pair.source.log.insert_one({"_id": 6})
    pair.deliver()
    pair.check_equal()


def test_f73_a_collation_makes_more_ids_equal(pair: MongoPair) -> None:
    pair.source.create_collection("names", collation={"locale": "en", "strength": 1})
    pair.source.names.insert_many([{"_id": "anna", "n": 1}, {"_id": "bob", "n": 1}])
    pair.source.names.delete_one({"_id": "anna"})
    pair.source.names.insert_one({"_id": "ANNA", "n": 2})
    pair.source.names.update_one({"_id": "bob"}, {"$set": {"n": 2}})
    batch = pair.batch()
    pair.deliver(batch)
    pair.check_equal()
    pair.deliver(batch)
    pair.check_equal()
    assert "names" in {table.name for table in pair.sink._opened().ddl.in_order}


def test_f79_indexes_come_over_and_ttl_deletes_nothing(pair: MongoPair) -> None:
    orders = pair.source.orders
    orders.insert_one({"_id": 1, "at": LONG_AGO, "n": 1})
    orders.create_index("at", name="ttl", expireAfterSeconds=60)
    orders.create_index("n", name="unique", unique=True)
    orders.create_index([("n", -1)], name="partial", partialFilterExpression={"n": {"$gt": 1}})
    orders.create_index("m", name="gone")
    orders.drop_index("gone")
    pair.deliver()
    indexes = pair.target.orders.index_information()
    assert indexes.keys() == {"_id_", "ttl", "unique", "partial"}
    assert indexes["unique"]["unique"]
    assert "expireAfterSeconds" not in indexes["ttl"]

    def expiring() -> list[Any]:
        state = pair.sink._opened().positions.collections()
        return [bson.decode(spec) for each in state.values() for spec in each.expiring]

    assert [spec["expireAfterSeconds"] for spec in expiring()] == [60]
    pair.source.command("collMod", "orders", index={"name": "ttl", "expireAfterSeconds": 3600})
    pair.source.command("collMod", "orders", validator={"n": {"$gte": 0}})
    pair.deliver()
    assert [spec["expireAfterSeconds"] for spec in expiring()] == [3600]
    assert "expireAfterSeconds" not in pair.target.orders.index_information()["ttl"]
    assert pair.target.orders.options()["validator"] == {"n": {"$gte": 0}}
    orders.drop_index("ttl")
    pair.deliver()
    assert expiring() == []


def test_f79_the_mirror_takes_what_its_validator_would_refuse(pair: MongoPair) -> None:
    pair.source.create_collection("strict", validator={"n": {"$exists": True}})
    pair.source.strict.insert_one({"_id": 1}, bypass_document_validation=True)
    pair.deliver()
    pair.check_equal()


def test_f100_what_is_missing_is_counted_and_healed(pair: MongoPair) -> None:
    orders = pair.source.orders
    orders.insert_many([{"_id": number, "n": 0} for number in range(4)])
    pair.deliver()
    pair.target.orders.delete_many({"_id": {"$lt": 3}})
    orders.update_one({"_id": 0}, {"$set": {"n": 1}})
    orders.replace_one({"_id": 1}, {"n": 2})
    orders.delete_one({"_id": 2})
    applied = pair.deliver()
    pair.check_equal()
    assert applied.missing_rows == 3
    assert applied.healed_rows == 2


def test_f72_a_delta_that_does_not_fit_is_resolved_by_reading_again(pair: MongoPair) -> None:
    orders = pair.source.orders
    orders.insert_one({"_id": 1, "a": {"b": 1}, "list": [1, 2, 3]})
    pair.deliver()
    pair.target.orders.replace_one({"_id": 1}, {"a": 5, "list": "text"})
    orders.update_one({"_id": 1}, {"$set": {"a.b": 2}})
    orders.update_one({"_id": 1}, [{"$set": {"list": {"$slice": ["$list", 1]}}}])
    pair.deliver()
    pair.check_equal()


def test_unknown_kinds_of_events_are_passed_over(pair: MongoPair) -> None:
    """F80."""
    pair.source.a.insert_one({"_id": 1})
    events = pair.events()
    event = bson.decode(events[-1])
    odd = bson.encode({**event, "operationType": "reshardCollection", "_id": event["_id"]})
    pair.deliver(pair.batch([*events, odd]))
    pair.check_equal()


def test_writes_of_one_batch_over_many_collections(pair: MongoPair) -> None:
    for round_ in range(3):
        for name in "abc":
            pair.source[name].bulk_write(
                [UpdateOne({"_id": n}, {"$inc": {"n": 1}}, upsert=True) for n in range(20)]
                + [ReplaceOne({"_id": n}, {"n": 100 * round_}) for n in range(0, 20, 3)]
            )
    pair.deliver()
    pair.check_equal()


def test_f53_the_copy_holds_what_came_before_it(pair: MongoPair) -> None:
    """F53, F66: what a copy holds for certain is left out, and a rename from before it destroys nothing."""
    source = pair.source
    source.a.insert_one({"_id": 1, "old": 1})
    source.a.rename("b")
    source.b.update_one({"_id": 1}, {"$set": {"new": 1}})
    source.c.insert_one({"_id": 1})
    before = pair.batch()
    position = before.transactions[-1].position
    assert isinstance(position, bytes)
    pair.target.b.insert_many(source.b.find())
    pair.target.c.insert_many(source.c.find())
    assert pair.sink.open() is not None
    copied = encode_moment(moment(position))
    tables = [TableName(source.name, name) for name in "bc"]
    pair.sink._opened().positions.put(
        CollectionState(table=table, copied_at=copied, copied_from=copied) for table in tables
    )
    pair.sink.close()
    source.b.insert_one({"_id": 2})
    source.b.rename("d")
    pair.deliver(before)
    pair.deliver()
    pair.check_equal()


def test_f96_a_bulk_write_that_fails_in_its_middle_goes_on_behind_that(pair: MongoPair) -> None:
    """F96: in source order, from the change after the one that failed; that one is read from the source again."""
    pair.source.create_collection("names", collation={"locale": "en", "strength": 1})
    names = pair.source.names
    names.insert_many([{"_id": number, "a": {"b": 0}} for number in range(9)])
    pair.deliver()
    for number in (2, 5):
        pair.target.names.update_one({"_id": number}, {"$set": {"a": "no document"}})
    pair.target.names.delete_one({"_id": 7})
    for number in range(9):
        names.update_one({"_id": number}, {"$set": {"a.b": number + 1}})
        names.update_one({"_id": number}, {"$set": {"a.c": number}})
    names.delete_one({"_id": 8})
    applied = pair.deliver()
    pair.check_equal()
    assert {bson.decode(key)["_id"] for key in pair.rereads} == {2, 5, 7}
    assert applied.missing_rows == 1


def test_f78_views_and_time_series_are_not_made(pair: MongoPair) -> None:
    """F78: should an event tell of one, which those of servers so far do not."""
    pair.source.a.insert_one({"_id": 1})
    created = next(event for event in map(bson.decode, pair.events()) if event["operationType"] == "create")
    events = []
    for name, options in (("view", {"viewOn": "a", "pipeline": []}), ("series", {"timeseries": {"timeField": "t"}})):
        ns = {"db": pair.source.name, "coll": name}
        events.append(bson.encode({**created, "ns": ns, "operationDescription": options}))
    pair.deliver(pair.batch([*events]))
    assert pair.target.list_collection_names() == [POSITIONS]


def test_f71_many_changes_that_must_be_read_again(pair: MongoPair) -> None:
    """F71, F72: a thousand in a row, each of which no statement can say."""
    document = {"_id": 1, "n": {"a.b": list(range(1200))}}
    pair.source.orders.insert_one(document)
    pair.deliver()
    events = []
    pair.source.orders.update_one({"_id": 1}, {"$set": {"x": 1}})
    (event,) = [bson.decode(each) for each in pair.events()]
    for number in range(1100):
        description = {"updatedFields": {"x": 1}, "removedFields": [], "truncatedArrays": [], "odd": number}
        events.append(bson.encode({**event, "fullDocument": None, "updateDescription": description}))
    pair.deliver(pair.batch(events))
    pair.check_equal()


def test_f66_f72_what_must_be_read_again_was_renamed_meanwhile(pair: MongoPair) -> None:
    """F66, F72: the document is to be found under its collection's new name, and not where another one has the old."""
    orders = pair.source.orders
    orders.insert_many([{"_id": 1, "a": {"b": 1}}, {"_id": 2, "a": {"b": 1}}])
    pair.deliver()
    for number in (1, 2):
        orders.update_one({"_id": number}, {"$set": {"a.b": 2}})
        orders.update_one({"_id": number}, {"$set": {"a": 5}})
    later = [bson.encode({**bson.decode(event), "fullDocument": None}) for event in pair.events()]
    pair.target.orders.update_many({}, {"$set": {"a": 5}})  # an image that was looked up later
    orders.rename("archive")
    orders.insert_one({"_id": 2, "other": 1})
    pair.deliver(pair.batch(later))
    pair.deliver()
    pair.check_equal()


def test_f53_f79_how_a_collection_is_made_may_change_before_its_copy_begins(pair: MongoPair) -> None:
    """F53, F79: what the copy made is from a little before the moment from which on its documents are."""
    source = pair.source
    source.a.create_index("old")
    source.drop_collection("a")
    source.a.insert_one({"_id": 1})
    source.a.create_index("new")
    source.command("collMod", "a", validator={"n": 1})
    before = pair.batch()
    position = before.transactions[-1].position
    assert isinstance(position, bytes)
    pair.target.a.insert_many(source.a.find())
    assert pair.sink.open() is not None
    copied = encode_moment(moment(position))
    (found,) = source.list_collections(filter={"name": "a"})
    state = CollectionState(
        table=TableName(source.name, "a"), copied_at=copied, copied_from=copied, uuid=bytes(found["info"]["uuid"])
    )
    pair.sink._opened().positions.put([state])
    pair.sink.close()
    pair.deliver(before)
    assert set(pair.target.a.index_information()) == {"_id_", "new_1"}
    assert pair.target.a.options()["validator"] == {"n": 1}
    pair.check_equal()


def test_f66_a_collection_that_the_mirror_never_saw_is_renamed_over_another(
    mongodb: str, mongodb_client: Client
) -> None:
    """F66: servers before 6.0 tell nothing of a collection until it has a document."""
    pair = MongoPair(mongodb_client, mongodb, f"shop_{ObjectId()}", expanded=False)
    pair.source.a.insert_one({"_id": 1})
    pair.source.b.insert_one({"_id": 2})
    pair.source.a.drop()
    pair.deliver()
    pair.source.create_collection("a")
    pair.source.a.rename("b", dropTarget=True)
    batch = pair.batch()
    pair.deliver(batch)
    assert not list(pair.target.b.find())
    pair.source.b.insert_one({"_id": 3})
    pair.deliver()
    pair.check_equal()
    pair.close()
