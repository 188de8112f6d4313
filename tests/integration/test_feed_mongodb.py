"""What is special to a feed in a MongoDB database."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest

from cdc.errors import FatalError, TransientError
from cdc.feed.place import Place, reader, writer
from cdc.feed.store import FeedReader
from cdc.position import Position
from tests.feed_stores import START, change, event, opened, place_at, read_all, state, with_database, write
from tests.mongod.fixture import MongoDatabase, NewStandIn


@pytest.fixture
def place(mongodb: str, mongo_database: MongoDatabase, tmp_path: Path) -> Place:
    return place_at(with_database(mongodb, mongo_database.name), tmp_path)


def test_the_collection_is_for_people_too(place: Place, mongo_database: MongoDatabase) -> None:
    with opened(place) as to:
        write(to, change(1, after=b'{"price":12.50,"tags":["a"]}', scope_after=b'{"c":"x"}', changed=("price",)))
    found = mongo_database.data_changes.find_one({"after.price": {"$gt": 12}, "_id": {"$gt": 0}})
    assert found is not None
    assert found["after"] == {"price": 12.5, "tags": ["a"]}
    assert found["json"] == {"after": '{"price":12.50,"tags":["a"]}'}
    assert found["scope_after"] == {"c": "x"}
    assert found["changed"] == ["price"]
    assert found["changed_at"] == datetime(2025, 11, 21, 21, 3, 20)  # noqa: DTZ001 - as PyMongo gives it
    assert found["changed_at_micros"] == 1


def test_what_grows_as_a_document_is_kept_as_text(place: Place, feed: FeedReader) -> None:
    many = b'{"n":[' + b",".join([b"0"] * 1_000_000) + b"]}"
    with opened(place) as to:
        write(to, change(1, before=many, after=many))
    (record,) = read_all(feed)
    assert record.after == record.before == many


def test_a_standalone_server_is_refused(new_stand_in: NewStandIn, tmp_path: Path) -> None:
    server = new_stand_in("--standalone")
    with pytest.raises(FatalError, match="standalone") as caught:
        writer(place_at(server.url, tmp_path), "shop").open()
    assert "replSet" in caught.value.hint


def test_nothing_is_lost_whatever_the_url_says(mongodb: str, mongo_database: MongoDatabase, tmp_path: Path) -> None:
    url = with_database(mongodb, mongo_database.name) + "&w=0&journal=false&readConcernLevel=local&retryWrites=false"
    with opened(place_at(url, tmp_path)) as to:
        write(to, change(1))
        client = to._session._client  # type: ignore[attr-defined]
        assert client.write_concern.document == {"w": "majority", "j": True}
        assert to.open() == Position("q", 1, 2)


def test_a_server_that_is_away_is_worth_another_attempt(new_stand_in: NewStandIn, tmp_path: Path) -> None:
    server = new_stand_in()
    place = place_at(server.url + "&serverSelectionTimeoutMS=500", tmp_path)
    with opened(place) as to:
        to.publish(event("e1"))
        found = reader(place)
        found.open()
        with found.listen() as listener:
            server.stop()
            for action in (found.head, lambda: listener.wait(0), lambda: to.publish(event("e2"))):
                with pytest.raises(TransientError):
                    action()
            with pytest.raises(TransientError):
                write(to, change(1))
            found.close()


def test_what_a_dead_writer_left_open_is_ended(place: Place, feed: FeedReader) -> None:
    """Else its transaction would hold the lock until the server ends it, after a minute."""
    dead = writer(place, "shop")
    dead.open()
    dead.append([change(1)], [state(1)])
    looks = writer(place, "shop")  # who only looks ends nothing
    assert looks.open() == START
    looks.close()
    dead.append([change(3)], [state(3)])
    with opened(place) as to:
        write(to, change(2))
    assert [record.position for record in read_all(feed)] == ["0/2:0"]
    with pytest.raises(TransientError):
        dead.commit(Position("q", 9, 9))
    dead.close()


def test_the_lock_is_waited_for_with_an_end(place: Place, feed: FeedReader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cdc.mongodb.feed.LOCK_SECONDS", 0.1)
    with opened(place, "one") as one, opened(place, "two") as two:
        one.append([change(1, source="one")], [])
        with pytest.raises(TransientError):
            two.states([])
        one.commit(Position("q", 1, 2))


@pytest.mark.parametrize("name", ["data_changes", "data_changes_state", "data_changes_entities"])
def test_a_collection_that_is_not_ours_is_left_as_it_is(place: Place, mongo_database: MongoDatabase, name: str) -> None:
    mongo_database[name].insert_one({"_id": 1, "mine": "x"})
    with pytest.raises(FatalError, match="is not a feed"):
        writer(place, "shop").open()
    assert list(mongo_database[name].find()) == [{"_id": 1, "mine": "x"}]
    assert mongo_database.list_collection_names() == [name]


def test_an_unknown_format_is_left_as_it_is(place: Place, feed: FeedReader, mongo_database: MongoDatabase) -> None:
    mongo_database.data_changes_state.update_one({}, {"$set": {"format": 99}})
    for attempt in (writer(place, "shop").open, reader(place).open):
        with pytest.raises(FatalError, match="format 99"):
            attempt()
    assert mongo_database.data_changes_state.distinct("format") == [99]


def test_what_a_killed_run_had_not_created_is_created(place: Place, mongo_database: MongoDatabase) -> None:
    with opened(place):
        pass
    mongo_database.data_changes_pruned.drop()
    mongo_database.data_changes.drop()
    with opened(place) as to:
        write(to, change(1))
        assert to.prune(None, 2**51, 10) == 1
    assert set(mongo_database.data_changes.index_information()) == {"_id_", "source", "history", "types", "recorded"}


def test_a_counter_behind_its_rows_is_noticed(place: Place, mongo_database: MongoDatabase) -> None:
    with opened(place) as to:
        write(to, change(1), change(2))
        mongo_database.data_changes_state.update_one({}, {"$set": {"last_id": 1}})
        with pytest.raises(Exception, match="E11000"):
            write(to, change(3), seq=2)
