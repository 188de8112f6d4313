"""What fails while a MongoDB mirror is written to is tried again, and ends as it should."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pymongo
import pytest
from bson import ObjectId
from pymongo.errors import PyMongoError
from pymongo.monitoring import CommandListener

from cdc.change import TableName
from cdc.errors import PermanentError, ResyncRequired, TransientError
from cdc.mongodb import client as clients
from cdc.mongodb.positions import POSITIONS
from cdc.position import Position
from tests.mongo_mirror import MongoPair
from tests.mongod.process import StandIn

Client = pymongo.MongoClient[dict[str, Any]]


@pytest.fixture(params=["updateLookup", "off"])
def pair(request: pytest.FixtureRequest, stand_in: StandIn, stand_in_client: Client) -> Iterator[MongoPair]:
    url = f"{stand_in.url}&heartbeatFrequencyMS=500"  # a failed command looks as if the server had stepped down
    pair = MongoPair(stand_in_client, url, f"shop_{ObjectId()}", full_document=request.param)
    yield pair
    stand_in.command("configureFailPoint", "failCommand", mode="off")
    pair.close()


def some_changes(pair: MongoPair) -> None:
    orders = pair.source.orders
    orders.insert_many([{"_id": number, "n": number, "list": [1, 2]} for number in range(20)])
    for number in range(10):
        orders.update_one({"_id": number}, {"$set": {f"field{number}": number}, "$push": {"list": 3}})
    orders.delete_many({"_id": {"$gte": 15}})
    pair.source.other.insert_one({"_id": 1})


FAILURES: list[dict[str, Any]] = [
    {"errorCode": 10107},
    {"errorCode": 11602},
    {"errorCode": 91},
    {"closeConnection": True},
    {"writeConcernError": {"code": 91, "errmsg": "shutting down"}},
    {"closeConnectionAfter": True},
]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: "-".join(map(str, failure.items())))
@pytest.mark.parametrize("command", ["insert", "update", "delete", "commitTransaction"])
def test_f62_f94_f97_every_command_may_fail_once(
    pair: MongoPair, stand_in: StandIn, command: str, failure: dict[str, Any]
) -> None:
    """F62, F94, F97: not primary, shut down, connection closed before and after: the target's position decides."""
    pair.source.orders.insert_one({"_id": 1000})
    pair.source.orders.insert_one({"_id": 1001, "a": 1})
    pair.deliver()
    some_changes(pair)
    pair.source.orders.update_one({"_id": 1001}, {"$set": {"a": 2}})
    pair.source.orders.delete_one({"_id": 1000})
    batch = pair.batch()
    data = {"failCommands": [command], "appName": "cdc sink backup", **failure}
    stand_in.command("configureFailPoint", "failCommand", mode={"times": 1}, data=data)
    for _ in range(4):
        try:
            if pair.sink._connection is None:
                stored = pair.sink.open()
                assert stored is not None
                if stored.source == batch.position:
                    break
            pair.sink.apply([batch], Position("queue", pair.seq + 1, batch.position))
        except TransientError:
            pair.sink.close()
        else:
            break
    pair.check_equal()
    stored = pair.new_sink().stored_position()
    assert stored is not None
    assert stored.source == batch.position


def test_f116_an_older_writer_cannot_go_on(pair: MongoPair) -> None:
    """F116: neither with data nor with the position."""
    pair.source.orders.insert_one({"_id": 1})
    pair.deliver()
    newer = pair.new_sink()
    pair.source.orders.insert_one({"_id": 2})
    batch = pair.batch()
    assert newer.open() is not None
    with pytest.raises(TransientError, match="someone else"):
        pair.deliver(batch)
    assert pair.target.orders.count_documents({}) == 1
    with pytest.raises(TransientError, match="someone else"):
        pair.sink._opened().positions.move(Position("queue", 0, b""))
    pair.deliver(batch, sink=newer)
    newer.close()
    pair.check_equal()


def test_f116_what_an_older_writer_has_open_is_ended(pair: MongoPair) -> None:
    pair.source.orders.insert_one({"_id": 1})
    pair.deliver()
    older = pair.sink._opened()
    older.session.start_transaction()
    pair.target.orders.update_one({"_id": 1}, {"$set": {"stale": 1}}, session=None)
    older.client[pair.target.name].orders.update_one({"_id": 1}, {"$set": {"stale": 2}}, session=older.session)
    newer = pair.new_sink()
    assert newer.open() is not None
    with pytest.raises(PyMongoError):
        older.session.commit_transaction()
    newer.close()
    assert pair.target.orders.find_one() == {"_id": 1, "stale": 1}


def test_f115_a_target_without_position_is_not_written_to(pair: MongoPair) -> None:
    pair.target.drop_collection(POSITIONS)
    assert pair.sink.open() is None
    with pytest.raises(TransientError, match="not connected"):
        pair.sink.apply([pair.batch()], Position("queue", 1, b""))


def test_f115_a_target_ahead_of_its_position_is_noticed(pair: MongoPair) -> None:
    pair.source.orders.insert_one({"_id": 1})
    pair.deliver()
    pair.sink._opened().positions.move_through(b"elsewhere", pair.seq + 2)
    pair.sink.close()
    pair.source.orders.insert_one({"_id": 2})
    pair.deliver()
    assert pair.target.orders.count_documents({}) == 1, "was applied before, says the mark"
    with pytest.raises(ResyncRequired):
        pair.deliver()


def test_f98_what_the_target_refuses_is_named_and_not_skipped(pair: MongoPair) -> None:
    """F98: a document breaks a unique index that only the mirror has."""
    pair.source.orders.insert_one({"_id": 1, "n": 1})
    pair.deliver()
    pair.target.orders.create_index("n", unique=True)
    pair.source.orders.insert_one({"_id": 2, "n": 1})
    batch = pair.batch()
    with pytest.raises(PermanentError, match="orders: E11000"):
        pair.deliver(batch)
    pair.sink.close()
    stored = pair.new_sink().stored_position()
    assert stored is not None
    assert stored.source != batch.position


class Commands(CommandListener):
    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def started(self, event: Any) -> None:
        self.seen.append(dict(event.command))

    def succeeded(self, event: Any) -> None:
        pass

    def failed(self, event: Any) -> None:
        pass


def test_f97_writes_are_durable_whatever_the_url_says(
    pair: MongoPair, stand_in: StandIn, stand_in_client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F97, F83: every write waits for a majority and for the journal."""
    commands = Commands()
    real = clients.connect
    monkeypatch.setattr(
        "sinks.mongodb.connect",
        lambda url, **options: real(f"{url}&w=0&journal=false", event_listeners=[commands], **options),
    )
    pair.sink = pair.new_sink()
    pair.source.orders.create_index("n")
    some_changes(pair)
    pair.source.other.drop()
    pair.source.orders.update_one({"_id": 3}, {"$set": {"a": 5}})
    pair.deliver()
    pair.check_equal()
    writes = {"insert", "update", "delete", "findAndModify", "commitTransaction", "create", "drop", "createIndexes"}
    seen = set()
    for command in commands.seen:
        name = next(iter(command))
        if name in writes and not (command.get("autocommit") is False and name != "commitTransaction"):
            concern = command.get("writeConcern", {})
            assert (concern.get("w"), concern.get("j")) == ("majority", True), name
            seen.add(name)
    assert {"insert", "create", "drop", "createIndexes"} <= seen


def test_f94_data_and_position_are_one_transaction_where_deltas_are_needed(
    stand_in: StandIn, stand_in_client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = Commands()
    real = clients.connect
    monkeypatch.setattr(
        "sinks.mongodb.connect", lambda url, **options: real(url, event_listeners=[commands], **options)
    )
    pair = MongoPair(stand_in_client, stand_in.url, f"shop_{ObjectId()}", full_document="off")
    try:
        pair.source.orders.insert_one({"_id": 1, "a": 1})
        pair.deliver()
        pair.source.orders.update_one({"_id": 1}, {"$set": {"a": 2}})
        commands.seen.clear()
        pair.deliver()
        pair.check_equal()
        updates = [command for command in commands.seen if "update" in command]
        assert {command["update"] for command in updates} == {"orders", POSITIONS}
        assert len({command["txnNumber"] for command in updates}) == 1
        assert all(command["autocommit"] is False for command in updates)
        assert any("commitTransaction" in command for command in commands.seen)
    finally:
        pair.close()


def test_f94_a_mark_of_how_far_collections_are_counts_until_it_is_passed(
    pair: MongoPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F94: what comes after a drop fails; then the batches come in other groups, and there is another failure."""
    batches = []
    for number in range(3):
        pair.source.items.insert_one({"_id": number})
        if number == 1:
            pair.source.orders.insert_one({"_id": 1})
            pair.source.orders.drop()
        batches.append(pair.batch())

    def fails(*_: object, **__: object) -> None:
        raise TransientError("away")

    assert pair.sink.open() is not None
    monkeypatch.setattr(pair.sink._opened().positions, "move", fails)
    with pytest.raises(TransientError):
        pair.deliver(*batches)
    pair.seq = 0
    for group in (batches[:2], batches[2:]):
        pair.sink.close()
        pair.deliver(*group)
    pair.check_equal()


def test_f66_f79_a_rename_that_is_repeated_loses_nothing(pair: MongoPair, monkeypatch: pytest.MonkeyPatch) -> None:
    """F66, F79: it is done, and that it is was not stored. What the indexes are at the source is still known."""
    pair.source.orders.create_index("at", expireAfterSeconds=5)
    pair.deliver()
    pair.source.orders.rename("archive")
    batch = pair.batch()

    def fails(*_: object) -> None:
        raise TransientError("away")

    for attempt in range(2):
        assert pair.sink.open() is not None
        if not attempt:
            monkeypatch.setattr(pair.sink._opened().positions, "move_through", fails)
            with pytest.raises(TransientError):
                pair.deliver(batch)
    pair.deliver(batch)
    states = pair.sink._opened().positions.collections()
    archive = states[TableName(pair.source.name, "archive")]
    assert archive.expiring
    assert archive.uuid
    assert not states[TableName(pair.source.name, "orders")].expiring
    pair.check_equal()
