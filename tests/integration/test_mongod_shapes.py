"""The stand-in's replies have the shape of those that were recorded from a real server: names, order and types."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bson
import pymongo
import pytest
from bson import json_util
from pymongo.database import Database
from pymongo.errors import OperationFailure

from tests.mongod.fixture import NewStandIn

Json = dict[str, Any]
RECORDED = Path(__file__).parents[1] / "mongod" / "recorded.jsonl"
NEWER_FIELDS = {"truncatedArrays", "topologyVersion"}
"""Fields of 5.0 that the recorded 4.2 does not have."""


def recorded(scenario: str) -> Iterator[tuple[Json, Json]]:
    """Commands and replies of a scenario."""
    options = json_util.JSONOptions(json_mode=json_util.JSONMode.CANONICAL, document_class=dict)
    with RECORDED.open(encoding="utf-8") as lines:
        for line in lines:
            entry = json_util.loads(line, json_options=options) if scenario in line else {}
            if entry.get("scenario") == scenario:
                yield entry["command"], entry.get("reply") or entry["failure"]


def shape(value: Any) -> Any:
    """Names, order and types of all fields, without the values."""
    if isinstance(value, dict):
        return [(name, shape(inner)) for name, inner in value.items() if name not in NEWER_FIELDS]
    if isinstance(value, list):
        return [shape(inner) for inner in value]
    return "bytes" if isinstance(value, (bytes, uuid.UUID)) else type(value).__name__


def events(reply: Json) -> list[Json]:
    """The batch of a reply."""
    cursor = reply["cursor"]
    found: list[Json] = cursor["firstBatch"] if "firstBatch" in cursor else cursor["nextBatch"]
    return found


class Player:
    """Sends recorded commands again."""

    def __init__(self, client: pymongo.MongoClient[Json]) -> None:
        self.client = client
        self.database: Database[Json] = client["trace"]
        self.cursor = 0
        self.token: Any = None

    def play(self, command: Json, wanted: int = 0) -> Json:
        """The reply or failure; a getMore is sent until it has as many events as were recorded."""
        command = dict(command)
        database = self.client[command.pop("$db")]
        if "getMore" in command:
            command["getMore"] = bson.Int64(self.cursor)
            if wanted:
                command["batchSize"] = wanted
            return self._read(database, command, wanted)
        if "killCursors" in command:
            command["cursors"] = [bson.Int64(self.cursor)]
        for spec in [stage.get("$changeStream", {}) for stage in command.get("pipeline", ())]:
            for option in {"resumeAfter", "startAfter"} & set(spec):
                if self.token is not None and "_data" in spec[option] and len(spec[option]["_data"]) > 8:
                    spec[option] = self.token
        reply = self._send(database, command)
        self.cursor = reply.get("cursor", {}).get("id", self.cursor) or self.cursor
        return reply

    def _read(self, database: Database[Json], command: Json, wanted: int) -> Json:
        found: list[Json] = []
        while True:
            reply = self._send(database, command)
            if not reply["ok"]:
                return reply
            found += events(reply)
            if len(found) >= wanted:
                reply["cursor"]["nextBatch"] = found
                self.token = reply["cursor"]["postBatchResumeToken"]
                return reply

    @staticmethod
    def _send(database: Database[Json], command: Json) -> Json:
        try:
            return database.command(command)
        except OperationFailure as exc:
            return dict(exc.details or {})


def write_everything(database: Database[Json]) -> None:
    """The writes behind the first scenario."""
    orders = database["orders"]
    key = {"_id": bson.ObjectId("65f000000000000000000001")}
    orders.insert_one(
        key
        | {
            "orderNo": "ORDER1",
            "items": [1, 2, 3, 4],
            "address": {"city": "x", "zip": 1},
            "total": bson.Decimal128("12.30"),
            "n": bson.Int64(5),
        }
    )
    orders.update_one(key, {"$set": {"address.city": "y", "status": "paid"}, "$unset": {"n": 1}})
    orders.update_one(key, {"$push": {"items": 5}})
    orders.update_one(key, {"$pop": {"items": 1}})
    orders.update_one(key, {"$set": {"items.0": 9}})
    orders.update_one(key, [{"$replaceWith": {"_id": key["_id"], "computed": 3}}])
    orders.replace_one(key, {"orderNo": "ORDER1", "replaced": True})
    orders.delete_one(key)
    orders.insert_one({"_id": {"k": 1}, "x": 1})
    orders.insert_many([{"_id": number} for number in range(3)])
    orders.update_many({"_id": {"$lte": 2, "$gte": 0}}, {"$set": {"v": 1}})
    orders.update_one({"_id": 0}, {"$set": {"v": 1}})  # changes nothing: no event
    orders.update_one({"_id": 0}, {"$rename": {"v": "w"}})


def write_transaction(database: Database[Json]) -> None:
    client = database.client
    with client.start_session() as session, session.start_transaction():
        database["t1"].insert_one({"_id": 1}, session=session)
        database["t2"].insert_one({"_id": 1}, session=session)
        database["t1"].update_one({"_id": 1}, {"$set": {"x": 1}}, session=session)


def write_definitions(database: Database[Json]) -> None:
    database["t1"].create_index("a")
    database["t1"].rename("t3")
    database["t2"].rename("t3", dropTarget=True)
    database["t3"].drop()
    other = database.client["trace2"]
    other["z"].insert_one({"_id": 1})
    database.client.drop_database(other)


def write_rename(database: Database[Json]) -> None:
    database["inv"].insert_one({"_id": 1})
    database["inv"].rename("inv2")
    database["inv"].insert_one({"_id": 7})


def write_lookup(database: Database[Json]) -> None:
    database["orders"].insert_one({"_id": "gone"})
    database["orders"].update_one({"_id": "gone"}, {"$set": {"a": 1}})
    database["orders"].delete_one({"_id": "gone"})


@pytest.fixture
def player(new_stand_in: NewStandIn) -> Iterator[Player]:
    server = new_stand_in("--version", "5.0", "--max-event-bytes", "5000")
    with pymongo.MongoClient[Json](server.url) as client:
        yield Player(client)


def check(player: Player, scenario: str, *writes: Callable[[Database[Json]], object]) -> list[Json]:
    """Play a scenario; writes happen once the stream is open, one group before each recorded batch."""
    groups = list(writes)
    replies = []
    for command, expected in recorded(scenario):
        if "getMore" in command and groups:
            groups.pop(0)(player.database)
        wanted = len(events(expected)) if "cursor" in expected else 0
        reply = player.play(command, wanted)
        replies.append(reply)
        if scenario.startswith("database: writes") and wanted:
            compare_writes(reply, expected)
        else:
            assert shape(reply) == shape(expected), json.dumps(json_util._json_convert(reply))
    return replies


def compare_writes(reply: Json, expected: Json) -> None:
    """Like `shape`, but for the replacing pipeline and looked-up documents, which depend on when they are read."""
    got, want = events(reply), events(expected)
    assert [event["operationType"] for event in got] == [event["operationType"] for event in want]
    for one, other in zip(got, want, strict=True):
        for event in (one, other):
            if event["operationType"] != "insert":
                event.pop("fullDocument", None)
            updated = event.get("updateDescription", {}).get("updatedFields", {})
            for name in sorted(updated):  # 4.2 goes by path, later servers have the inner fields last
                updated[name] = updated.pop(name)
        assert shape(one) == shape(other)
        if one["operationType"] == "update":
            other["updateDescription"]["truncatedArrays"] = []
            assert one["updateDescription"] == other["updateDescription"]
    reply["cursor"]["nextBatch"] = expected["cursor"]["nextBatch"] = []
    assert shape(reply) == shape(expected)


def test_writes_of_every_kind(player: Player) -> None:
    check(player, "database: writes of every kind", write_everything)


def test_lookup_of_a_deleted_document(player: Player) -> None:
    replies = check(player, "database: updateLookup of a document deleted meanwhile", write_lookup)
    assert [event.get("fullDocument", "absent") for event in events(replies[1])] == [{"_id": "gone"}, None, "absent"]


def test_transaction_and_definitions(player: Player) -> None:
    check(player, "cluster: transaction over two collections", write_transaction)
    check(player, "cluster: create, index, rename, drop, dropDatabase", write_definitions)


def test_invalidate(player: Player) -> None:
    check(player, "collection: rename then invalidate, then startAfter", write_rename)
    check(player, "collection: resumeAfter an invalidate token")
    check(player, "collection: startAfter an invalidate token")
    player.client["trace2"]["q"].insert_one({})
    check(player, "database: dropDatabase then invalidate", lambda db: db.client.drop_database("trace2"))


def test_failures(player: Player) -> None:
    check(player, "malformed resume token")
    check(player, "pipeline that removes _id", lambda db: db["orders"].insert_one({"_id": "p"}))


def test_killed_cursor(player: Player) -> None:
    check(player, "killed cursor", lambda db: db.command("killCursors", "orders", cursors=[player.cursor]))


def test_event_too_large(player: Player) -> None:
    def write(database: Database[Json]) -> None:
        database["big"].insert_one({"_id": 1, "a": "s"})
        database["big"].update_one({"_id": 1}, {"$set": {"a": "x" * 6000}})

    check(player, "event larger than 16 MB", write)


def test_standalone(new_stand_in: NewStandIn) -> None:
    server = new_stand_in("--version", "5.0", "--standalone")
    with pymongo.MongoClient[Json](server.url) as client:
        for scenario in ("standalone server", "standalone server: isMaster"):
            check(Player(client), scenario)


def test_is_master(player: Player) -> None:
    check(player, "replica set: isMaster")
