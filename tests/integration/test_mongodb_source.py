"""The MongoDB source on a server: what is streamed, from where, and what is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bson
import pymongo
import pytest
from bson import Binary, Code, DatetimeMS, Decimal128, Int64, MaxKey, MinKey, ObjectId, Timestamp
from bson.raw_bson import RawBSONDocument

from cdc.change import DDL, UPDATE, Ddl, Delta
from cdc.errors import FatalError, HistoryLost, ResyncRequired
from cdc.queue import Queue
from cdc.stats import CaptureStats, OplogStatus
from tests.mongo_source import Facts, configure, streaming
from tests.mongod.fixture import MongoDatabase, NewStandIn

Client = pymongo.MongoClient[dict[str, Any]]


def test_changes_of_a_database(mongodb: str, mongo_database: MongoDatabase) -> None:
    name = mongo_database.name
    with streaming(configure(mongodb, f"{name}.*", show_expanded_events=False)) as reader:
        orders = mongo_database.orders
        orders.insert_one({"_id": 1, "a": 1, "b": [1, 2]})
        orders.update_one({"_id": 1}, {"$set": {"a": 2}})
        orders.replace_one({"_id": 1}, {"c": 3})
        orders.delete_one({"_id": 1})
        insert, update, replace, delete = reader.changes_until(4)
    assert reader.kinds() == [f"{kind} {name}.orders" for kind in ("insert", "update", "update", "delete")]
    assert insert.key == bson.encode({"_id": 1})
    assert insert.after == bson.encode({"_id": 1, "a": 1, "b": [1, 2]})
    assert isinstance(update.detail, Delta)
    assert bson.decode(update.detail.description)["updatedFields"] == {"a": 2}
    assert replace.after == bson.encode({"_id": 1, "c": 3})
    assert (replace.operation, replace.detail) == (UPDATE, None)
    assert (delete.after, delete.before) == (None, None)
    first, *_ = reader.transactions()
    assert first.complete
    assert first.position == first.end
    assert first.commit_time > 1_000_000_000_000_000


def test_f63_stopped_before_the_first_event(mongodb: str, mongo_database: MongoDatabase) -> None:
    config, facts = configure(mongodb, f"{mongo_database.name}.orders"), Facts()
    with streaming(config, facts=facts) as reader:
        position = reader.position
    mongo_database.orders.insert_one({"_id": 1})
    with streaming(config, position, facts) as reader:
        reader.until(lambda: 1 in reader.documents())


def test_f57_resumed_after_the_last_event(mongodb: str, mongo_database: MongoDatabase) -> None:
    config, facts = configure(mongodb, f"{mongo_database.name}.orders", show_expanded_events=False), Facts()
    with streaming(config, facts=facts) as reader:
        mongo_database.orders.insert_many([{"_id": number} for number in range(10)])
        reader.changes_until(10)
        fifth = reader.transactions()[4].end
    assert isinstance(fifth, bytes)
    with streaming(config, fifth, facts) as reader:
        assert [bson.decode(change.key or b"")["_id"] for change in reader.changes_until(5)] == [5, 6, 7, 8, 9]


def test_f62_what_was_given_out_comes_once(mongodb: str, mongo_database: MongoDatabase) -> None:
    """The queue asks to go on from what is durable in it, and it may be about to store more."""
    config = configure(mongodb, f"{mongo_database.name}.orders", show_expanded_events=False)
    with streaming(config) as reader:
        durable = reader.position
        mongo_database.orders.insert_many([{"_id": number} for number in range(5)])
        reader.changes_until(5)
        mongo_database.orders.insert_one({"_id": 5})
        assert reader.source.open(durable) == durable
        assert [bson.decode(change.key or b"")["_id"] for change in reader.changes_until(6)] == list(range(6))


def test_f58_idle_namespace_advances(new_stand_in: NewStandIn) -> None:
    server = new_stand_in("--noop-seconds", "0")
    with (
        pymongo.MongoClient[dict[str, Any]](server.url) as client,
        streaming(configure(server.url, "shop.*")) as reader,
    ):
        before = reader.position
        client.other.busy.insert_one({"_id": 1})
        reader.until(lambda: reader.position != before)
        assert not reader.changes()
        server.command("cdcTestTruncateOplog")
        client.shop.orders.insert_one({"_id": 1})
        reader.until(lambda: 1 in reader.documents())


def test_f59_history_lost(new_stand_in: NewStandIn) -> None:
    server = new_stand_in()
    config, facts = configure(server.url, "shop.*"), Facts()
    with streaming(config, facts=facts) as reader:
        position = reader.position
    with pymongo.MongoClient[dict[str, Any]](server.url) as client:
        client.shop.orders.insert_many([{"_id": number} for number in range(10)])
    server.command("cdcTestTruncateOplog")
    with pytest.raises(ResyncRequired, match="286") as caught, streaming(config, position, facts):
        pass
    assert isinstance(caught.value, HistoryLost)
    assert "replSetResizeOplog" in caught.value.hint


@pytest.mark.parametrize("token", [{"_data": "zz"}, {"_data": "8200"}, {"x": 1}])
def test_f59_malformed_token(mongodb: str, mongo_database: MongoDatabase, token: dict[str, Any]) -> None:
    with pytest.raises(ResyncRequired), streaming(configure(mongodb, f"{mongo_database.name}.*"), bson.encode(token)):
        pass


def test_f59_f60_stops_with_the_server_s_reason(new_stand_in: NewStandIn) -> None:
    server = new_stand_in()
    data = {"failCommands": ["getMore"], "errorCode": 280, "errorLabels": ["NonResumableChangeStreamError"]}
    with streaming(configure(server.url, "shop.*")) as reader:
        server.command("configureFailPoint", "failCommand", mode={"times": 2}, data=data)
        with pytest.raises(ResyncRequired, match="280"):
            reader.until(lambda: False)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"tables": ("shop.orders",)}, "narrower"),
        ({"exclude": ("shop.tmp",)}, "narrower"),
        ({"full_document": "off"}, "full_document was 'updateLookup' and is 'off'"),
        ({"full_document_before_change": "whenAvailable"}, "full_document_before_change"),
        ({"show_expanded_events": False}, "show_expanded_events"),
    ],
)
def test_f61_token_of_another_stream_is_refused(stand_in: Any, changed: dict[str, Any], named: str) -> None:
    facts = Facts()
    with streaming(configure(stand_in.url, "shop.*"), facts=facts) as reader:
        position = reader.position
    tables = changed.pop("tables", ("shop.*",))
    with (
        pytest.raises(ResyncRequired, match=named) as caught,
        streaming(configure(stand_in.url, *tables, **changed), position, facts),
    ):
        pass
    assert "change it back" in caught.value.hint


def test_f61_wider_includes_are_no_gap(stand_in: Any, stand_in_client: Client) -> None:
    facts = Facts()
    with streaming(configure(stand_in.url, "shop.wide_a", show_expanded_events=False), facts=facts) as reader:
        stand_in_client.shop.wide_a.insert_one({"_id": 1})
        reader.changes_until(1)
        position = reader.position
    stand_in_client.shop.wide_b.insert_one({"_id": 2})
    wider = configure(stand_in.url, "shop.wide_*", show_expanded_events=False)
    with streaming(wider, position, facts) as reader:
        reader.changes_until(1)
        assert reader.kinds() == ["insert shop.wide_b"]
    stand_in_client.drop_database("shop")


def test_f61_another_deployment_is_refused(new_stand_in: NewStandIn) -> None:
    facts = Facts()
    with streaming(configure(new_stand_in().url, "shop.*"), facts=facts) as reader:
        position = reader.position
    other = new_stand_in("--set-name", "rs1")
    with (
        pytest.raises(ResyncRequired, match="replica set of the deployment was 'rs0' and is 'rs1'"),
        streaming(configure(other.url.replace("rs0", "rs1"), "shop.*"), position, facts),
    ):
        pass


def test_f61_another_deployment_of_the_same_name_is_refused(new_stand_in: NewStandIn) -> None:
    facts = Facts()
    with streaming(configure(new_stand_in().url, "shop.*"), facts=facts) as reader:
        position = reader.position
    with (
        pytest.raises(ResyncRequired, match="the id of the deployment was"),
        streaming(configure(new_stand_in().url, "shop.*"), position, facts),
    ):
        pass


def test_status_tells_how_far_the_oplog_reaches(stand_in: Any, stand_in_client: Client) -> None:
    stats = CaptureStats("shop")
    with streaming(configure(stand_in.url, "shop.*")) as reader:
        reader.source.observe(stats)
        assert stats.oplog is not None
        assert 0 <= (stats.oplog.remaining_seconds or 0) <= stats.oplog.window_seconds + 1

        def caught_up() -> bool:
            reader.source.observe(stats)
            return stats.server_end == reader.position

        reader.until(caught_up)
    assert OplogStatus(1000.0, 99.0).is_short
    assert not OplogStatus(1000.0, 101.0).is_short
    assert not OplogStatus(1000.0, None).is_short


def test_f64_f65_collection_dropped_and_made_again(mongodb: str, mongo_database: MongoDatabase) -> None:
    """A stream of one collection ends with the drop; the next one begins right after it, also over a restart."""
    name = f"{mongo_database.name}.orders"
    config, facts = configure(mongodb, name, show_expanded_events=False), Facts()
    with streaming(config, facts=facts) as reader:
        mongo_database.orders.insert_one({"_id": 1})
        mongo_database.orders.drop()
        mongo_database.orders.insert_one({"_id": 2})
        reader.changes_until(4)
        assert reader.kinds() == [f"insert {name}", f"drop {name}", "invalidate -", f"insert {name}"]
        invalidated = reader.transactions()[2].end
    assert isinstance(invalidated, bytes)
    with streaming(config, invalidated, facts) as reader:
        reader.changes_until(1)
        assert reader.kinds() == [f"insert {name}"]


def test_f64_database_dropped(mongodb: str, mongo_database: MongoDatabase) -> None:
    name = mongo_database.name
    with streaming(configure(mongodb, f"{name}.*", show_expanded_events=False)) as reader:
        mongo_database.orders.insert_one({"_id": 1})
        mongo_database.client.drop_database(name)
        mongo_database.orders.insert_one({"_id": 2})
        reader.changes_until(5)
        assert reader.kinds() == [
            f"insert {name}.orders",
            f"drop {name}.orders",
            "dropDatabase -",
            "invalidate -",
            f"insert {name}.orders",
        ]


def test_f66_renamed_within_the_scope(mongodb: str, mongo_database: MongoDatabase) -> None:
    name = mongo_database.name
    with streaming(configure(mongodb, f"{name}.*", show_expanded_events=False)) as reader:
        mongo_database.a.insert_one({"_id": 1})
        mongo_database.b.insert_one({"_id": 2})
        mongo_database.a.rename("b", dropTarget=True)
        reader.until(lambda: f"rename {name}.a" in reader.kinds())
        last = reader.changes()[-1]
        assert isinstance(last.detail, Ddl)
        assert bson.decode(last.detail.description)["to"] == {"db": name, "coll": "b"}


def test_f66_renamed_out_of_the_scope_is_a_drop(mongodb: str, mongo_database: MongoDatabase) -> None:
    name = mongo_database.name
    config = configure(mongodb, f"{name}.*", exclude=(f"{name}.old_*",), show_expanded_events=False)
    with streaming(config) as reader:
        mongo_database.orders.insert_one({"_id": 1})
        mongo_database.orders.rename("old_orders")
        mongo_database.old_orders.insert_one({"_id": 2})
        mongo_database.orders.insert_one({"_id": 3})
        reader.changes_until(3)
        assert reader.kinds() == [f"insert {name}.orders", f"drop {name}.orders", f"insert {name}.orders"]


def test_f66_renamed_into_the_scope_is_read(mongodb: str, mongo_database: MongoDatabase) -> None:
    """As `$out` does: it fills a temporary collection, and renames it over the one that is wanted."""
    name = mongo_database.name
    config = configure(mongodb, f"{name}.orders", show_expanded_events=False)
    mongo_database.tmp.insert_many([{"_id": number, "filling": "x" * 1000} for number in range(3000)])
    with streaming(config) as reader:
        mongo_database.orders.insert_one({"_id": "old"})
        mongo_database.tmp.rename("orders", dropTarget=True)
        mongo_database.orders.insert_one({"_id": "new"})
        reader.until(lambda: "new" in reader.documents())
        parts = [transaction for transaction in reader.transactions() if len(transaction.changes) > 1]
        assert len(parts) > 2
        assert [part.complete for part in parts] == [False] * (len(parts) - 1) + [True]
        ordinals = [part.first_ordinal for part in parts]
        assert ordinals == [sum(len(part.changes) for part in parts[:at]) for at in range(len(parts))]
        drop = reader.kinds().index(f"drop {name}.orders")
        assert reader.kinds()[drop + 1 :].count(f"insert {name}.orders") in {3001, 3002}  # the new one may come twice


def test_f66_renamed_into_the_scope_and_on(mongodb: str, mongo_database: MongoDatabase) -> None:
    """F66: what is read is the collection that was renamed, wherever it is by then, and not what has its name."""
    name = mongo_database.name
    config = configure(mongodb, f"{name}.orders*")
    mongo_database.tmp.insert_many([{"_id": number} for number in range(10)])
    mongo_database.tmp.create_index("n")
    mongo_database.other.insert_one({"_id": "other"})
    with streaming(config) as reader:
        mongo_database.tmp.rename("orders")
        mongo_database.orders.rename("orders_2")
        mongo_database.other.rename("orders")
        mongo_database.orders_2.insert_one({"_id": "last"})
        reader.until(lambda: f"insert {name}.orders_2" in reader.kinds())
        kinds = reader.kinds()
        renamed = kinds.index(f"rename {name}.orders")
        assert kinds.count(f"createIndexes {name}.orders") == 1
        assert kinds[: renamed + 1].count(f"insert {name}.orders") in {10, 11}, kinds
        assert kinds[renamed + 1 :].count(f"insert {name}.orders") == 1, kinds


def test_f117_sinks_on_the_same_server_are_left_out(stand_in: Any, stand_in_client: Client) -> None:
    sinks = {"backup": {"from": "shop", "url": stand_in.url, "rename": {"shop": "shop_backup"}}}
    config = configure(stand_in.url, "*", sinks=sinks, show_expanded_events=False)
    with streaming(config) as reader:
        stand_in_client.shop_backup.orders.insert_one({"_id": 1})
        stand_in_client.other.cdc_positions.insert_one({"_id": 1})
        stand_in_client.shop.orders.insert_one({"_id": 1})
        reader.changes_until(1)
        assert reader.kinds() == ["insert shop.orders"]
        assert "shop_backup" not in {table.schema for table in reader.source.tables()}
    for name in ("shop", "shop_backup", "other"):
        stand_in_client.drop_database(name)


@pytest.mark.parametrize(
    ("before", "full", "expected"),
    [("off", "updateLookup", (None, 2)), ("whenAvailable", "whenAvailable", (1, 2)), ("off", "off", (None, None))],
)
def test_f69_images(
    stand_in: Any, stand_in_client: Client, before: str, full: str, expected: tuple[int | None, int | None]
) -> None:
    stand_in_client.shop.create_collection("images", changeStreamPreAndPostImages={"enabled": True})
    config = configure(
        stand_in.url, "shop.images", full_document=full, full_document_before_change=before, show_expanded_events=False
    )
    with streaming(config) as reader:
        stand_in_client.shop.images.insert_one({"_id": 1, "a": 1})
        stand_in_client.shop.images.update_one({"_id": 1}, {"$set": {"a": 2}})
        _, update = reader.changes_until(2)
        found = tuple(bson.decode(image)["a"] if image else None for image in (update.before, update.after))
        assert found == expected
    stand_in_client.drop_database("shop")


def test_f69_required_image_is_missing(stand_in: Any, stand_in_client: Client) -> None:
    with streaming(configure(stand_in.url, "shop.*", full_document_before_change="required")) as reader:
        stand_in_client.shop.plain.insert_one({"_id": 1})
        stand_in_client.shop.plain.update_one({"_id": 1}, {"$set": {"a": 2}})
        with pytest.raises(ResyncRequired, match="47") as caught:
            reader.until(lambda: False)
        assert "changeStreamPreAndPostImages" in caught.value.hint
    stand_in_client.drop_database("shop")


def test_f69_images_need_a_server_that_has_them(new_stand_in: NewStandIn) -> None:
    with (
        pytest.raises(FatalError, match=r"full_document: MongoDB 5\.0"),
        streaming(configure(new_stand_in("--version", "5.0").url, "shop.*", full_document="required")),
    ):
        pass


@pytest.mark.parametrize("version", ["6.0", "7.0"])
def test_f67_large_event_is_split_and_put_together(new_stand_in: NewStandIn, version: str) -> None:
    server = new_stand_in("--max-event-bytes", "100000", "--version", version)
    config, facts = configure(server.url, "shop.orders", show_expanded_events=False), Facts()
    with pymongo.MongoClient[dict[str, Any]](server.url) as client, streaming(config, facts=facts) as reader:
        client.shop.orders.insert_one({"_id": 1, "a": "x" * 60_000})
        client.shop.orders.update_one({"_id": 1}, {"$set": {"a": "y" * 60_000}})
        client.shop.orders.delete_one({"_id": 2})
        client.shop.orders.insert_one({"_id": 2})
        _, update, _ = reader.changes_until(3)
        assert isinstance(update.detail, Delta)
        assert len(update.detail.description) > 60_000
        large = reader.transactions()[1].end
        assert isinstance(large, bytes)
        with streaming(config, large, facts) as again:
            again.changes_until(1)


def test_f67_large_event_of_an_older_server(new_stand_in: NewStandIn) -> None:
    server = new_stand_in("--max-event-bytes", "100000", "--version", "5.0")
    with (
        pymongo.MongoClient[dict[str, Any]](server.url) as client,
        streaming(configure(server.url, "shop.orders")) as reader,
    ):
        client.shop.orders.insert_one({"_id": 1, "a": "x" * 60_000})
        client.shop.orders.update_one({"_id": 1}, {"$set": {"a": "y" * 60_000}})
        with pytest.raises(FatalError, match="10334") as caught:
            reader.until(lambda: False)
        assert "16 MB" in caught.value.hint


def test_f68_looked_up_document_is_gone(mongodb: str, mongo_database: MongoDatabase) -> None:
    config, facts = configure(mongodb, f"{mongo_database.name}.orders", show_expanded_events=False), Facts()
    with streaming(config, facts=facts) as reader:
        position = reader.position
    mongo_database.orders.insert_one({"_id": 1})
    mongo_database.orders.update_one({"_id": 1}, {"$set": {"a": 1}})
    mongo_database.orders.delete_one({"_id": 1})
    with streaming(config, position, facts) as reader:
        _, update, delete = reader.changes_until(3)
        assert (update.operation, update.after) == (UPDATE, None)
        assert delete.operation == 2


def test_f73_documents_come_byte_for_byte(mongodb: str, mongo_database: MongoDatabase) -> None:
    """Repeated names, invalid UTF-8, a date beyond Python's years."""
    strange = (
        b"\x10_id\x00\x01\x00\x00\x00" b"\x10a\x00\x01\x00\x00\x00" b"\x10a\x00\x02\x00\x00\x00"
        b"\x02s\x00\x03\x00\x00\x00\xff\xfe\x00" b"\x09d\x00\xff\xff\xff\xff\xff\xff\xff\x7f"
    )  # fmt: skip
    raw = (len(strange) + 5).to_bytes(4, "little") + strange + b"\x00"
    with streaming(configure(mongodb, f"{mongo_database.name}.*", show_expanded_events=False)) as reader:
        mongo_database.command("insert", "types", documents=[RawBSONDocument(raw)])
        (insert,) = reader.changes_until(1)
        assert insert.after == raw


def test_f74_ids_of_every_type(mongodb: str, mongo_database: MongoDatabase) -> None:
    ids = [
        "text", 1, Int64(2**40), 1.5, float("nan"), Decimal128("1E+10"), None, True, ObjectId(), Binary(b"x", 4),
        Binary(b""),
        {"b": 1, "a": {"c": 2}}, {}, Timestamp(5, 6), DatetimeMS(-(2**62)), MinKey(), MaxKey(), Code("x"), "", -0.5,
    ]  # fmt: skip
    with streaming(configure(mongodb, f"{mongo_database.name}.*", show_expanded_events=False)) as reader:
        for each in ids:
            mongo_database.ids.insert_one({"_id": each})
            mongo_database.ids.delete_one({"_id": {"$eq": each}})
        keys = [change.key for change in reader.changes_until(2 * len(ids))]
        assert keys == [bson.encode({"_id": each}) for each in ids for _ in range(2)]


@pytest.mark.parametrize("version", ["5.0", "7.0"])
def test_f75_f76_transaction_is_one(new_stand_in: NewStandIn, version: str) -> None:
    server = new_stand_in("--version", version)
    config = configure(server.url, "shop.*", show_expanded_events=False)
    with pymongo.MongoClient[dict[str, Any]](server.url) as client, streaming(config) as reader:
        client.shop.b.insert_one({"_id": 0})
        with client.start_session() as session, session.start_transaction():
            client.shop.a.insert_many([{"_id": number} for number in range(10)], session=session)
            client.shop.b.update_one({"_id": 0}, {"$set": {"a": 1}}, session=session)
        client.shop.a.insert_one({"_id": "after"})
        reader.changes_until(13)
        assert [len(transaction.changes) for transaction in reader.transactions()] == [1, 11, 1]
        assert reader.kinds()[11] == "update shop.b"


def test_f75_large_transaction_comes_in_parts(mongodb: str, mongo_database: MongoDatabase) -> None:
    config = configure(mongodb, f"{mongo_database.name}.*", show_expanded_events=False)
    mongo_database.create_collection("a")
    with streaming(config) as reader:
        with mongo_database.client.start_session() as session, session.start_transaction():
            for start in range(0, 3000, 500):
                documents = [{"_id": number, "x": "y" * 1000} for number in range(start, start + 500)]
                mongo_database.a.insert_many(documents, session=session)
        reader.changes_until(3000)
        parts = reader.transactions()
        assert len(parts) > 2
        assert [part.complete for part in parts] == [False] * (len(parts) - 1) + [True]
        assert parts[1].first_ordinal == len(parts[0].changes)


def test_f75_restart_within_a_transaction(mongodb: str, mongo_database: MongoDatabase, tmp_path: Path) -> None:
    """What the queue has of it is dropped, and all of it comes again."""
    config = configure(mongodb, f"{mongo_database.name}.*", show_expanded_events=False)
    mongo_database.create_collection("a")
    queue = Queue(tmp_path / "q", max_bytes=2**30, min_free_bytes=0)
    with streaming(config, facts=queue) as reader:
        queue.begin(reader.position)
        with mongo_database.client.start_session() as session, session.start_transaction():
            mongo_database.a.insert_many([{"_id": number, "x": "y" * 1000} for number in range(3000)], session=session)
        reader.until(lambda: bool(reader.batches))
        queue.append(reader.batches[0])
    assert not reader.batches[0].complete
    queue.close()
    queue = Queue(tmp_path / "q", max_bytes=2**30, min_free_bytes=0)
    with streaming(config, queue.position, queue) as again:
        again.changes_until(3000)
        assert again.transactions()[0].first_ordinal == 0
    queue.close()


def test_f78_views_and_time_series_are_left_out(stand_in: Any, stand_in_client: Client) -> None:
    database = stand_in_client.shop
    with streaming(configure(stand_in.url, "shop.*")) as reader:
        database.create_collection("plain", capped=True, size=10_000)
        database.create_collection("view", viewOn="plain", pipeline=[])
        database.create_collection("series", timeseries={"timeField": "t"})
        database.plain.insert_one({"_id": 1})
        reader.until(lambda: "insert shop.plain" in reader.kinds())
        assert reader.kinds() == ["create shop.plain", "insert shop.plain"]
        assert [str(table) for table in reader.source.tables()] == ["shop.plain"]
    stand_in_client.drop_database("shop")


def test_expanded_events(stand_in: Any, stand_in_client: Client) -> None:
    database = stand_in_client.shop
    with streaming(configure(stand_in.url, "shop.*")) as reader:
        database.create_collection("made")
        database.made.create_index("a", name="by_a")
        database.command("collMod", "made", validationLevel="off")
        database.made.drop_index("by_a")
        reader.until(lambda: "dropIndexes shop.made" in reader.kinds())
        assert reader.kinds() == [f"{kind} shop.made" for kind in ("create", "createIndexes", "modify", "dropIndexes")]
        assert all(change.operation == DDL for change in reader.changes())
    stand_in_client.drop_database("shop")


def test_whole_deployment(stand_in: Any, stand_in_client: Client) -> None:
    config = configure(stand_in.url, "one*.a", "two?.*", exclude=("*.tmp",), show_expanded_events=False)
    with streaming(config) as reader:
        for name in ("one.a", "one.b", "one.x.a", "two.a", "twos.b", "twos.tmp", "onex.a"):
            database, _, collection = name.partition(".")
            stand_in_client[database][collection].insert_one({"_id": 1})
        stand_in_client.drop_database("two")
        stand_in_client.drop_database("one")
        reader.until(lambda: "dropDatabase -" in reader.kinds())
        inserted = [kind.partition(" ")[2] for kind in reader.kinds() if kind.startswith("insert")]
        assert inserted == ["one.a", "one.x.a", "twos.b", "onex.a"]
        assert [str(table) for table in reader.source.tables()] == ["onex.a", "twos.b"]
    for name in ("twos", "onex"):
        stand_in_client.drop_database(name)


def test_reread(mongodb: str, mongo_database: MongoDatabase) -> None:
    with streaming(configure(mongodb, f"{mongo_database.name}.*", show_expanded_events=False)) as reader:
        mongo_database.orders.insert_one({"_id": {"k": 1}, "a": 1})
        (insert,) = reader.changes_until(1)
        mongo_database.orders.update_one({"_id": {"k": 1}}, {"$set": {"a": 2}})
        table, key = reader.batches[0].tables[0], insert.key or b""
        assert reader.source.reread(table, key) == bson.encode({"_id": {"k": 1}, "a": 2})
        mongo_database.orders.delete_many({})
        assert reader.source.reread(table, key) is None


def test_standalone_says_how_to_become_a_replica_set(new_stand_in: NewStandIn) -> None:
    with (
        pytest.raises(FatalError, match="standalone") as caught,
        streaming(configure(new_stand_in("--standalone").url, "shop.*")),
    ):
        pass
    assert "rs.initiate()" in caught.value.hint
