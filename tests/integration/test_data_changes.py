"""The feed, as an application finds it: behind real sources, through a real daemon, in every kind of store."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path

import httpx
import pytest

from tests.command import NOWHERE, assert_complaint
from tests.conftest import NewDatabase
from tests.feed import FeedDaemon, after, assert_ordered
from tests.mongod.fixture import MongoDatabase
from tests.processes import kill_tree, wait_until
from tests.servers import Database, PostgresServer

PRODUCTS = "CREATE TABLE products (id int PRIMARY KEY, name text, branch text, price numeric)"


@pytest.fixture(params=["sqlite", "postgres", "mongodb"])
def feed_url(request: pytest.FixtureRequest, new_database: NewDatabase) -> Iterator[str | None]:
    """Where the feed is kept: each kind of store in turn."""
    if request.param == "sqlite":
        yield None
    elif request.param == "postgres":
        server: PostgresServer = request.getfixturevalue("target18")
        yield new_database(server).url
    else:
        database: MongoDatabase = request.getfixturevalue("mongo_database")
        yield with_database(request.getfixturevalue("mongodb"), database.name)


def with_database(url: str, name: str) -> str:
    """A MongoDB URL that leads to one database."""
    base, mark, query = url.partition("?")
    return f"{base.rstrip('/')}/{name}{mark}{query}"


def test_rows_become_records(tmp_path: Path, source_db: Database, feed_url: str | None) -> None:
    source_db.execute(PRODUCTS)
    daemon = FeedDaemon(tmp_path, source_db.url, feed_url)
    daemon.write('location = "branch"\n[sinks.changes.entities]\n"public.products" = "Product"')
    with daemon.following():
        source_db.execute("INSERT INTO products VALUES (1, 'tea', 'north', 12.50)")
        with source_db.connect() as connection, connection.transaction():
            connection.execute("SELECT pg_logical_emit_message(true, 'cdc.context', '{\"userId\": \"u5\"}')")
            connection.execute("UPDATE products SET price = 13")
        source_db.execute("DELETE FROM products")
        created, updated, deleted = daemon.wait_for(lambda seen: len(seen) == 3)
    assert (created.entity_type, created.entity_id, created.change_type) == ("Product", "1", "CREATE")
    assert created.after == b'{"id":1,"name":"tea","branch":"north","price":12.50}', "all digits are there"
    assert (updated.change_type, updated.user_id, updated.version) == ("UPDATE", "u5", 2)
    assert (deleted.change_type, deleted.location_id, deleted.version) == ("DELETE", "north", 3)
    assert created.changed_at <= created.recorded_at
    assert created.position.rpartition(":")[2] == "0"


def test_documents_become_records(
    tmp_path: Path, mongodb: str, mongo_database: MongoDatabase, feed_url: str | None
) -> None:
    source = mongo_database.client[f"{mongo_database.name}_orders"]
    daemon = FeedDaemon(tmp_path, with_database(mongodb, source.name), feed_url)
    daemon.write('location = "store"')
    try:
        with daemon.following():
            source.orders.insert_one({"_id": "A1", "status": "new", "store": "north"})
            for status in ("paid", "packed", "sent"):
                source.orders.update_one({"_id": "A1"}, {"$set": {"status": status}})
            source.orders.delete_one({"_id": "A1"})
            records = daemon.wait_for(lambda seen: len(seen) == 5)
    finally:
        mongo_database.client.drop_database(source.name)
    assert [after(record) and after(record)["status"] for record in records] == ["new", "paid", "packed", "sent", None]
    assert [record.changed for record in records[1:4]] == [("status",)] * 3
    assert (records[4].change_type, records[4].location_id) == ("DELETE", "north")
    assert_ordered(records)


def test_killed_under_load_every_change_is_told_once(tmp_path: Path, source_db: Database, feed_url: str | None) -> None:
    """F4, F83, F94: positions and records are committed together."""
    source_db.execute("CREATE TABLE counters (id int PRIMARY KEY, n int)")
    source_db.execute("INSERT INTO counters SELECT i, 0 FROM generate_series(1, 10) i")
    daemon = FeedDaemon(tmp_path, source_db.url, feed_url)
    daemon.write()
    done = threading.Event()
    written = [0]

    def write() -> None:
        with source_db.connect() as connection:
            while not done.is_set() and written[0] < 2000:
                with connection.transaction():
                    connection.execute("UPDATE counters SET n = n + 1 WHERE id IN (%s, %s)", [*pair(written[0])])
                written[0] += 1
                done.wait(0.004)  # not all servers of these tests are fast ones

    with daemon.following():
        pass
    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(4):
            before = len(daemon.records())
            with daemon.running() as process:
                daemon.wait_for(lambda seen: len(seen) >= min(before + 50, 4000))  # noqa: B023 - used at once
                kill_tree(process.pid)
    finally:
        done.set()
        writer.join()
    with daemon.following():
        records = daemon.wait_for(lambda seen: len(seen) >= 2 * written[0])
    assert len(records) == 2 * written[0]
    assert len({record.position for record in records}) == len(records)
    assert_ordered(records)
    for record in records:
        assert after(record)["n"] == record.version


def pair(number: int) -> tuple[int, int]:
    return number % 10 + 1, (number + 1) % 10 + 1


@pytest.mark.parametrize("feed_url", ["sqlite", "postgres"], indirect=True)
def test_f40_a_large_transaction_is_told_as_a_whole(tmp_path: Path, source_db: Database, feed_url: str | None) -> None:
    """Though it travels in many batches: readers see nothing of it, or everything."""
    source_db.execute("CREATE TABLE rows (id int PRIMARY KEY, text text)")
    daemon = FeedDaemon(tmp_path, source_db.url, feed_url)
    daemon.write()
    with daemon.following():
        before = daemon.head()
        source_db.execute("INSERT INTO rows SELECT i, repeat('x', 200) FROM generate_series(1, 60000) i")
        heads = set()

        def told() -> bool:
            heads.add(daemon.head() - before)
            return 60_000 in heads

        wait_until(told, timeout_seconds=120, what=lambda: f"60000 records: {heads} {daemon.log[-2000:]}")
    assert heads == {0, 60_000}


def test_a_feed_in_its_own_source_does_not_go_in_circles(tmp_path: Path, source_db: Database) -> None:
    source_db.execute(PRODUCTS)
    daemon = FeedDaemon(tmp_path, source_db.url, source_db.url)
    daemon.write()
    with daemon.following():
        source_db.execute("INSERT INTO products VALUES (1, 'tea', 'north', 1)")
        daemon.wait_for(lambda seen: len(seen) == 1)
    with daemon.following():  # what was made meanwhile would be published now
        source_db.execute("INSERT INTO products VALUES (2, 'tea', 'north', 1)")
        records = daemon.wait_for(lambda seen: len(seen) == 2)
    assert {record.entity_type for record in records} == {"products"}
    published = source_db.execute("SELECT tablename FROM pg_publication_tables")
    assert published == [("products",)]


def test_a_feed_beside_a_mirror(tmp_path: Path, source_db: Database, target_db: Database, pg_dump: Path) -> None:
    source_db.execute(PRODUCTS)
    source_db.execute("INSERT INTO products VALUES (1, 'tea', 'north', 1)")
    daemon = FeedDaemon(tmp_path, source_db.url)
    mirror = f'[sinks.mirror]\nfrom = "shop"\nurl = "{target_db.url}"'
    daemon.write(source=f'pg_dump = "{pg_dump}"', more=mirror)
    with daemon.following():
        source_db.execute("INSERT INTO products VALUES (2, 'tea', 'north', 1)")
        (record,) = daemon.wait_for(lambda seen: len(seen) == 1)
        daemon.wait_for_sink("running")
        wait_until(lambda: target_db.value("SELECT count(*) FROM products") == 2)
        assert daemon("verify").returncode == 0
        assert_complaint(daemon("verify", "changes"), 1, "changes is no mirror", hint="name a mirror")
    assert record.entity_id == "2", "what was there before is no change"


def test_a_feed_that_was_emptied_stops_and_begins_anew_when_it_is_told_to(
    tmp_path: Path, source_db: Database, target_db: Database
) -> None:
    source_db.execute(PRODUCTS)
    daemon = FeedDaemon(tmp_path, source_db.url, target_db.url)
    daemon.write()
    with daemon.following():
        source_db.execute("INSERT INTO products VALUES (1, 'tea', 'north', 1)")
        daemon.wait_for(lambda seen: len(seen) == 1)
    for (name,) in target_db.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'"):
        target_db.execute(f"DROP TABLE {name}")
    with daemon.running():
        wait_until(lambda: daemon.sink["state"] == "failed", what=lambda: f"it to stop: {daemon.log}")
        assert re.match("resync required: .* no position", daemon.sink["error"])
        assert "the feed begins anew with what the queue still has" in daemon.sink["hint"]
        assert "`cdc resync changes --yes`" in daemon.sink["hint"]
        assert daemon("resync", "changes", "--yes").returncode == 0
        wait_until(lambda: daemon.sink["state"] == "running", what=lambda: daemon.log)
    daemon.read_anew()
    with daemon.following():
        source_db.execute("INSERT INTO products VALUES (2, 'tea', 'north', 1)")
        daemon.wait_for(lambda seen: [record.entity_id for record in seen] == ["2"])


def test_dropped_and_begun_again_nothing_is_told_twice(tmp_path: Path, source_db: Database) -> None:
    """The queue still has what was told: it comes again, and adds nothing."""
    source_db.execute(PRODUCTS)
    daemon = FeedDaemon(tmp_path, source_db.url)
    daemon.write()
    daemon.file.write_text(daemon.file.read_text().replace("[queue]", "[queue]\nkeep_seconds = 3600"))
    numbers = itertools.count(1)
    insert = "INSERT INTO products VALUES (%s, 'tea', 'north', 1)"
    with daemon.following():
        for _ in range(3):
            source_db.execute(insert, [next(numbers)])
        source_db.execute("UPDATE products SET price = 2")
        daemon.wait_for(lambda seen: len(seen) == 6)
    assert daemon("drop", "changes", "--yes").returncode == 0
    with daemon.following():
        source_db.execute("UPDATE products SET price = 3")
        records = daemon.wait_for(lambda seen: len(seen) == 9)
    assert_ordered(records)


def test_columns_that_identify_are_asked_for_where_the_stream_does_not_tell(
    tmp_path: Path, source_db: Database
) -> None:
    source_db.execute(PRODUCTS)
    source_db.execute("ALTER TABLE products REPLICA IDENTITY FULL")
    daemon = FeedDaemon(tmp_path, source_db.url)
    daemon.write()
    with daemon.following():
        source_db.execute("INSERT INTO products VALUES (1, 'tea', 'north', 1)")
        source_db.execute("UPDATE products SET name = 'coffee'")
        source_db.execute("DELETE FROM products")
        records = daemon.wait_for(lambda seen: len(seen) == 3)
    assert [record.entity_id for record in records] == ["1", "1", "1"]
    assert records[1].changed == ("name",)
    assert records[2].before == b'{"id":1,"name":"coffee","branch":"north","price":1}'


def test_f93_a_store_that_is_away_is_waited_for(
    tmp_path: Path, source_db: Database, new_database: NewDatabase, postgres16: PostgresServer
) -> None:
    source_db.execute(PRODUCTS)
    daemon = FeedDaemon(tmp_path, source_db.url, new_database(postgres16).url)
    daemon.write()
    with daemon.following():
        postgres16.stop("immediate")
        source_db.execute("INSERT INTO products VALUES (1, 'tea', 'north', 1)")
        wait_until(lambda: daemon.sink["state"] == "waiting", what=lambda: daemon.log)
        postgres16.start()
        daemon.wait_for(lambda seen: len(seen) == 1)


def test_check_looks_at_the_feed(tmp_path: Path, source_db: Database) -> None:
    source_db.execute(PRODUCTS)
    daemon = FeedDaemon(tmp_path, source_db.url, NOWHERE)
    daemon.write()
    checked = daemon("check")
    assert checked.returncode == 1
    assert "sink changes" in checked.stdout
    assert "geheim" not in checked.stdout


def test_f109_a_poll_that_waits_is_answered_when_the_daemon_ends(tmp_path: Path, source_db: Database) -> None:
    source_db.execute(PRODUCTS)
    daemon = FeedDaemon(tmp_path, source_db.url)
    daemon.write()
    with daemon.following():
        url = httpx.URL(daemon.address.url)
        begun = httpx.get(url.join("/api/changes/poll"), params={"since": "now"}).json()["cursor"]
        client = HTTPConnection(url.host, url.port, timeout=60)
        client.request("GET", f"/api/changes/poll?since={begun}&wait=60")
        assert httpx.get(url.join("/health")).status_code == 200  # which comes behind it
    with closing(client):
        answer = client.getresponse()
        found = json.load(answer)
    assert (answer.status, found["changes"], found["cursor"]) == (200, [], begun)
    assert '"level": "error"' not in daemon.log


def test_f104_a_feed_that_was_lost_with_its_directory_says_so(tmp_path: Path, source_db: Database) -> None:
    """It begins anew where the slot stands. Readers of the lost one hear of the gap, whenever they come."""
    source_db.execute(PRODUCTS)
    daemon = FeedDaemon(tmp_path, source_db.url)
    daemon.write()
    with daemon.following():
        source_db.execute("INSERT INTO products VALUES (1)")
        (lost,) = daemon.wait_for(lambda seen: len(seen) == 1)
        assert "the slot is older than the queue" not in daemon.log
    shutil.rmtree(daemon.data_dir)
    with daemon.following():
        assert "the slot is older than the queue" in daemon.log
        source_db.execute("INSERT INTO products SELECT generate_series(2, 9)")
        daemon.read_anew()
        found = daemon.wait_for(lambda seen: seen and seen[-1].entity_id == "9")
        assert found[0].id > lost.id
        polled = httpx.get(f"{daemon.address.url}/api/changes/poll", params={"since": lost.id})
        assert (polled.status_code, int(polled.json()["oldest"])) == (410, found[0].id)
