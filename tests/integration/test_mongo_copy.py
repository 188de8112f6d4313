"""The initial copy of MongoDB collections."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any, cast
from uuid import uuid4

import bson
import pytest
from bson.raw_bson import RawBSONDocument
from pymongo.errors import OperationFailure
from structlog.testing import capture_logs

from cdc.change import TableName
from cdc.config import SourceConfig
from cdc.copy import Copy, CopyResult
from cdc.errors import FatalError, PermanentError, TransientError
from cdc.mongodb.client import connect
from cdc.mongodb.collections import read_collections, read_indexes
from cdc.mongodb.moment import encode_moment, has_passed, moment
from cdc.mongodb.positions import Positions
from cdc.mongodb.snapshot import MongoSnapshot, now
from cdc.mongodb.target import MongoCopyTarget
from cdc.position import Position
from cdc.secret import Secret
from cdc.sink import Mirror
from cdc.source import Source
from tests.mongo import CollectionSource, corpus, insert_raw, raw_documents, sink_config
from tests.mongod.fixture import MongoDatabase

START = Position("queue", 0, encode_moment(1))
LATER = encode_moment(2**63)
_names = itertools.count(1)


@pytest.fixture
def target_database(mongodb_client: Any) -> Iterator[MongoDatabase]:
    database = mongodb_client[f"mirror_{os.getpid()}_{next(_names)}"]
    yield database
    mongodb_client.drop_database(database)


class Copying:
    """A database, its mirror, and copies from one to the other."""

    def __init__(self, url: str, source: MongoDatabase, target: MongoDatabase) -> None:
        self.url, self.db, self.mirror_db = url, source, target
        self.source = CollectionSource(url, source)
        self.config = sink_config(url, source, target)

    def target(self) -> MongoCopyTarget:
        return MongoCopyTarget(self.config)

    def copy(self, *, target: MongoCopyTarget | None = None, **options: Any) -> CopyResult:
        parts = cast("Source", self.source), cast("Mirror", target or self.target())
        return Copy(*parts, self.source.tables(), START, **options).run()

    def name(self, collection: str) -> TableName:
        return TableName(self.db.name, collection)

    def assert_equal(self, *collections: str) -> None:
        for name in collections:
            assert raw_documents(self.mirror_db, name) == raw_documents(self.db, name)

    def info(self, database: MongoDatabase, name: str) -> Any:
        with connect(self.url) as client:
            (found,) = read_collections(client, databases=[database.name], wanted=lambda table: table.name == name)
            return found

    def indexes(self, database: MongoDatabase, name: str) -> dict[str, dict[str, Any]]:
        with connect(self.url) as client:
            found = read_indexes(client, TableName(database.name, name))
        return {index.name: bson.decode(index.spec) for index in found}


@pytest.fixture
def copying(mongodb: str, mongo_database: MongoDatabase, target_database: MongoDatabase) -> Copying:
    return Copying(mongodb, mongo_database, target_database)


@pytest.mark.parametrize("chunk_bytes", [1 << 20, 300])
def test_f53_f73_f74_every_type_as_value_and_as_id_is_copied_once_byte_for_byte(
    copying: Copying, chunk_bytes: int
) -> None:
    insert_raw(copying.db, "all", corpus())
    copying.db.create_collection("empty")
    result = copying.copy(chunk_bytes=chunk_bytes, workers=3)
    assert (result.rows, result.complete, result.finished) == (len(corpus()), True, False)
    assert len(raw_documents(copying.db, "all")) == len(corpus())
    copying.assert_equal("all", "empty")
    assert "empty" in copying.mirror_db.list_collection_names()


def test_f53_ranges_hold_every_document_once_also_where_ids_are_equal_to_a_collation(copying: Copying) -> None:
    copying.db.create_collection("names", collation={"locale": "en", "strength": 2})
    copying.db.names.insert_many([{"_id": f"{letter}{n}"} for n in range(50) for letter in "aBcD"] + [{"_id": 5}])
    snapshot = MongoSnapshot(copying.url, [copying.name("names")])
    chunks = snapshot.chunks(copying.name("names"), 300)
    blocks = [b"".join(snapshot.reader().read(chunk, columns=(), binary=False)) for chunk in chunks]
    snapshot.close()
    assert len(chunks) > 5
    assert sorted(b"".join(blocks)) == sorted(b"".join(raw_documents(copying.db, "names")))
    copying.copy(chunk_bytes=300)
    copying.assert_equal("names")


class Interrupted(Exception):
    """The copy was killed."""


def kill_after(target: MongoCopyTarget, chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the process "die" when so many ranges are recorded."""
    record, left = target.chunk_copied, itertools.count(chunks, -1)

    def chunk_copied(chunk: Any, rows: int) -> None:
        if next(left) == 0:
            raise Interrupted
        record(chunk, rows)

    monkeypatch.setattr(target, "chunk_copied", chunk_copied)


def test_f50_a_killed_copy_goes_on_with_the_ranges_that_were_not_complete(
    copying: Copying, monkeypatch: pytest.MonkeyPatch
) -> None:
    copying.db.orders.insert_many([{"_id": n, "text": "x" * 100} for n in range(500)])
    killed = copying.target()
    kill_after(killed, 3, monkeypatch)
    with pytest.raises(Interrupted):
        copying.copy(target=killed, chunk_bytes=6_000, workers=1)
    result = copying.copy(chunk_bytes=6_000, workers=1)
    assert result.complete
    assert 200 < result.rows < 500, "finished ranges are not read again"
    copying.assert_equal("orders")
    assert copying.copy().copied == (), "nothing is left"


def test_f49_a_document_that_an_earlier_attempt_wrote_stays_as_it_was(
    copying: Copying, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What changed since comes by the stream, in order: no copy may be ahead of an older one in between."""
    copying.db.orders.insert_many([{"_id": n, "v": 1} for n in range(100)])
    killed = copying.target()
    kill_after(killed, 0, monkeypatch)
    with pytest.raises(Interrupted):
        copying.copy(target=killed)
    copying.db.orders.update_many({}, {"$set": {"v": 2}})
    copying.db.orders.delete_one({"_id": 7})
    copying.copy()
    assert copying.mirror_db.orders.count_documents({"v": 1}) == 100


def test_f48_the_mirror_is_right_only_when_the_stream_has_passed_the_end_of_the_copy(copying: Copying) -> None:
    copying.db.orders.insert_many([{"_id": n, "a": n} for n in range(10)])
    copying.db.orders.create_index("a", unique=True)
    target = copying.target()
    with connect(copying.url) as client:
        before = now(client)
    copying.copy(target=target)
    end = target.copied()[copying.name("orders")]
    assert moment(end) >= before
    assert moment(target.applied_from()[copying.name("orders")]) <= moment(end)
    for position in (encode_moment(before - 1), end):
        assert not target.finish_copy(position)
        assert copying.indexes(copying.mirror_db, "orders") == {}
    assert target.finish_copy(encode_moment(moment(end) + 1))
    assert copying.indexes(copying.mirror_db, "orders")["a_1"]["unique"]


def test_a_resume_token_tells_its_cluster_time(copying: Copying) -> None:
    with copying.db.watch() as stream:
        start = RawBSONDocument(bson.encode(cast("Any", stream.resume_token)))
        copying.db.orders.insert_one({"_id": 1})
        copying.db.orders.insert_one({"_id": 2})
        first, second = (next(stream) for _ in range(2))
    stamp = first["clusterTime"]
    assert moment(bson.encode(first["_id"])) == stamp.time << 32 | stamp.inc
    assert has_passed(bson.encode(second["_id"]), bson.encode(first["_id"]))
    assert not has_passed(bson.encode(first["_id"]), bson.encode(first["_id"]))
    assert not has_passed(bytes(start.raw), bson.encode(first["_id"]))


def test_f79_options_and_indexes_of_every_kind_are_made_on_the_mirror(copying: Copying) -> None:
    db = copying.db
    db.create_collection(
        "orders",
        validator={"$jsonSchema": {"required": ["n"]}},
        validationAction="warn",
        collation={"locale": "de", "strength": 2},
    )
    db.create_collection("log", capped=True, size=4096, max=100)
    db.create_collection("images", changeStreamPreAndPostImages={"enabled": True})
    db.orders.create_index([("a", 1), ("b", -1)], name="both", unique=True, sparse=True)
    db.orders.create_index([("seen", 1)], expireAfterSeconds=60)
    db.orders.create_index([("c", 1)], partialFilterExpression={"c": {"$gt": 5}}, collation={"locale": "simple"})
    db.orders.create_index([("d", "hashed")], hidden=True)
    db.orders.create_index([("place", "2dsphere")])
    db.orders.create_index([("$**", 1)], name="wild", wildcardProjection={"a": 0})
    target = copying.target()
    copying.copy(target=target)
    assert target.finish_copy(LATER)
    for name in ("orders", "log", "images"):
        assert bson.decode(copying.info(copying.mirror_db, name).options) == bson.decode(copying.info(db, name).options)
    source, mirror = copying.indexes(db, "orders"), copying.indexes(copying.mirror_db, "orders")
    assert source["seen_1"].pop("expireAfterSeconds") == 60
    assert {name: dict(sorted(spec.items())) for name, spec in mirror.items()} == {
        name: dict(sorted(spec.items())) for name, spec in source.items()
    }


def test_f79_what_the_source_holds_is_written_whatever_its_validator_says(copying: Copying) -> None:
    copying.db.orders.insert_one({"_id": 1, "n": "old"})
    copying.db.command("collMod", "orders", validator={"n": {"$type": "int"}})
    copying.copy()
    copying.assert_equal("orders")


def test_f78_a_capped_collection_keeps_its_order(copying: Copying, monkeypatch: pytest.MonkeyPatch) -> None:
    copying.db.create_collection("log", capped=True, size=100_000)
    copying.db.log.insert_many([{"_id": (n * 7) % 50} for n in range(50)])
    killed = copying.target()
    kill_after(killed, 0, monkeypatch)
    with pytest.raises(Interrupted):
        copying.copy(target=killed, chunk_bytes=100)
    copying.db.log.insert_many([{"_id": 100 - n} for n in range(10)])
    copying.copy(chunk_bytes=100)
    order = [document["_id"] for document in copying.mirror_db.log.find().sort("$natural", 1)]
    assert order == [(n * 7) % 50 for n in range(50)] + [100 - n for n in range(10)]


def test_f78_a_capped_collection_that_is_copied_on_keeps_what_its_source_keeps(
    copying: Copying, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was deleted since the copy was killed would push out what the source still has."""
    copying.db.create_collection("log", capped=True, size=100_000, max=5)
    copying.db.log.insert_many([{"_id": n} for n in range(5)])
    killed = copying.target()
    kill_after(killed, 0, monkeypatch)
    with pytest.raises(Interrupted):
        copying.copy(target=killed)
    copying.db.log.delete_one({"_id": 2})
    copying.db.log.insert_one({"_id": 5})
    copying.copy()
    assert [document["_id"] for document in copying.mirror_db.log.find()] == [0, 1, 3, 4, 5]


def test_f78_views_and_time_series_are_refused_by_name(copying: Copying) -> None:
    copying.db.create_collection("measured", timeseries={"timeField": "at"})
    with pytest.raises(FatalError, match=r"measured is a time-series collection") as caught:
        copying.source.dump_schema()
    assert "exclude" in caught.value.hint


def test_what_is_not_ours_on_the_target_is_left_alone(copying: Copying) -> None:
    copying.db.orders.insert_one({"_id": 1})
    copying.mirror_db.orders.insert_one({"_id": "mine"})
    with pytest.raises(FatalError, match="documents that this sink did not copy"):
        copying.copy()
    assert copying.mirror_db.orders.find_one() == {"_id": "mine"}
    copying.mirror_db.orders.delete_one({})
    assert copying.copy().complete


def test_f117_a_sink_that_leads_to_its_source_is_refused(copying: Copying) -> None:
    copying.db.orders.insert_one({"_id": 1})
    config = sink_config(copying.url, copying.db, copying.db)
    with pytest.raises(FatalError, match="source's own"):
        copying.copy(target=MongoCopyTarget(config))


def change(database: MongoDatabase, what: str) -> None:
    """Rename or drop `orders`, or make it anew."""
    if what == "rename":
        database.orders.rename("archive")
    else:
        database.orders.drop()
    if what != "drop":
        database.orders.insert_one({"_id": "new"})


@pytest.mark.parametrize("what", ["rename", "drop", "drop and create"])
def test_f65_f66_a_collection_that_is_not_what_it_was_is_copied_again(
    copying: Copying, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    copying.db.orders.insert_many([{"_id": n} for n in range(10)])
    target = copying.target()
    record = target.chunk_copied

    def chunk_copied(chunk: Any, rows: int) -> None:
        change(copying.db, what)
        record(chunk, rows)

    monkeypatch.setattr(target, "chunk_copied", chunk_copied)
    with pytest.raises(TransientError, match="orders was renamed, dropped or made anew"):
        copying.copy(target=target)
    assert copying.name("orders") not in target.copied()
    assert copying.copy().complete
    copying.assert_equal(*(table.name for table in copying.source.tables()))


@pytest.mark.parametrize("what", ["rename", "drop", "drop and create"])
@pytest.mark.parametrize("when", ["described", "begun"])
@pytest.mark.parametrize("killed", [True, False])
def test_f65_f66_a_collection_that_goes_when_its_copy_is_to_begin_is_copied_again(
    copying: Copying, what: str, when: str, monkeypatch: pytest.MonkeyPatch, *, killed: bool
) -> None:
    """Before there is a snapshot, or after; an earlier copy may have planned its ranges, and finished some."""
    copying.db.orders.insert_many([{"_id": n, "text": "x" * 100} for n in range(100)])
    target = copying.target()
    if killed:
        kill_after(target, 3, monkeypatch)
        with pytest.raises(Interrupted):
            copying.copy(target=target, chunk_bytes=2_000, workers=1)
        monkeypatch.undo()
    owner, step = (copying.source, "snapshot") if when == "described" else (target, "pending")
    go_on = getattr(owner, step)

    def lose(*args: Any) -> Any:
        change(copying.db, what)
        return go_on(*args)

    monkeypatch.setattr(owner, step, lose)
    with pytest.raises(TransientError, match="orders was renamed, dropped or made anew"):
        copying.copy(target=target)
    monkeypatch.undo()
    assert copying.name("orders") not in target.copied()
    assert copying.copy().complete
    copying.assert_equal(*(table.name for table in copying.source.tables()))


def test_a_collection_that_comes_back_is_copied_again(copying: Copying) -> None:
    copying.db.orders.insert_one({"_id": 1})
    copying.db.items.insert_one({"_id": 1})
    target = copying.target()
    copying.copy(target=target)
    target.mirror_only([copying.name("items")])
    assert list(target.copied()) == [copying.name("items")]
    copying.db.orders.replace_one({"_id": 1}, {"changed": True})
    copying.copy()
    copying.assert_equal("orders", "items")


@pytest.mark.parametrize("is_another", [True, False])
def test_f65_a_resync_keeps_no_index_of_a_collection_that_was_made_anew(copying: Copying, is_another: bool) -> None:
    """Its drop is never mirrored: the copy is of what came after. One that the mirror's owner made stays otherwise."""
    copying.db.orders.insert_one({"_id": 1})
    for name in ("a", "b"):
        copying.db.orders.create_index(name)
    copying.copy()
    assert copying.target().finish_copy(LATER)
    copying.mirror_db.orders.create_index("own")
    if is_another:
        copying.db.drop_collection("orders")
        copying.db.orders.insert_one({"_id": 1})
        copying.db.orders.create_index("b", sparse=True)
        copying.db.orders.create_index("c")
    source = SourceConfig(name="shop", url=Secret(copying.url))
    target = MongoCopyTarget(copying.config, source)
    target.want_resync(None, START)
    copying.copy(target=target)
    assert target.finish_copy(LATER)
    found = copying.indexes(copying.mirror_db, "orders")
    assert found.keys() == ({"b_1", "c_1"} if is_another else {"a_1", "b_1", "own_1"})
    assert found["b_1"].get("sparse", False) == is_another


FailCommand = Callable[..., None]


@pytest.fixture
def failing(mongodb_client: Any) -> Iterator[FailCommand]:
    """Makes commands fail, as a server in trouble does; skips where the server has no fail points."""

    def fail(times: int, *commands: str, **data: Any) -> None:
        try:
            mongodb_client.admin.command(
                "configureFailPoint", "failCommand", mode={"times": times}, data={"failCommands": commands, **data}
            )
        except Exception:  # noqa: BLE001 - a real server without enableTestCommands
            pytest.skip("the server has no fail points")

    yield fail
    mongodb_client.admin.command("configureFailPoint", "failCommand", mode="off")


@pytest.mark.parametrize(
    "data", [{"closeConnection": True}, {"errorCode": 43}, {"errorCode": 262}], ids=["closed", "cursor", "too slow"]
)
def test_f62_reading_goes_on_after_an_error_from_the_last_document(
    copying: Copying, failing: FailCommand, data: dict[str, Any]
) -> None:
    copying.db.orders.insert_many([{"_id": n, "text": "x" * 4000} for n in range(1000)])
    failing(2, "getMore", appName="cdc-copy", **data)
    with capture_logs() as logs:
        result = copying.copy()
    assert "reading on after an error" in [line["event"] for line in logs]
    assert result.complete
    copying.assert_equal("orders")


def test_f98_a_document_that_the_target_refuses_stops_the_copy(copying: Copying) -> None:
    """A unique index that the user made on a collection of his own."""
    copying.db.orders.insert_many([{"_id": 1, "a": 1}, {"_id": 2, "a": 1}])
    copying.mirror_db.orders.create_index("a", unique=True)
    with pytest.raises(PermanentError, match="E11000"):
        copying.copy()


def test_f116_what_a_killed_writer_left_open_holds_up_nobody(copying: Copying) -> None:
    copying.db.orders.insert_one({"_id": 1})
    copying.copy()
    with connect(copying.url) as client, client.start_session(causal_consistency=False) as session:
        positions = Positions(client, copying.mirror_db.name, "mirror")
        standing = positions.take_over(session.session_id["id"].as_uuid())
        assert standing is not None
        session.start_transaction()
        positions.move(standing.position, session)
        target = copying.target()
        target.mirror_only([])
        with connect(copying.url) as other:
            assert Positions(other, copying.mirror_db.name, "mirror").take_over(uuid4()) is not None
        assert copying.copy(target=target).complete
        with pytest.raises(OperationFailure):
            session.commit_transaction()


def test_f82_documents_of_several_moments_do_not_keep_a_unique_index_from_being_built(copying: Copying) -> None:
    """F82: the stream has images of its own that were looked up later; the index waits until they fit."""
    copying.db.orders.create_index("n", unique=True)
    copying.db.orders.insert_many([{"_id": 1, "n": 1}, {"_id": 2, "n": 2}])
    copying.copy()
    copying.mirror_db.orders.update_one({"_id": 2}, {"$set": {"n": 1}})
    target = copying.target()
    assert not target.finish_copy(LATER)
    assert target.pending_indexes() == [copying.name("orders")]
    copying.mirror_db.orders.update_one({"_id": 1}, {"$set": {"n": 2}})
    assert target.finish_copy(LATER)
    assert copying.mirror_db.orders.index_information()["n_1"]["unique"]
