"""The newest version goes on with what earlier ones left behind; what a later one left it does not touch."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pymongo
import pytest

from cdc.queue.format import FORMAT
from tests import parked_state, state
from tests.command import CHECKOUT, NOWHERE, Cdc
from tests.feed import FeedDaemon, assert_ordered
from tests.letters import fates, letters, mirror, none_is_parked
from tests.mongod.fixture import MongoDatabase
from tests.processes import wait_until
from tests.servers import Database
from tests.state import Installation

STATES = sorted((CHECKOUT / "tests" / "data").glob("queue-*.tar.xz"))
PARKED = sorted((CHECKOUT / "tests" / "data").glob("parked-*.tar.xz"))
NO_MONGODB = "mongodb://127.0.0.1:1/state_orders?serverSelectionTimeoutMS=200"

Client = pymongo.MongoClient[dict[str, Any]]


@pytest.fixture(params=STATES, ids=lambda path: path.name.partition(".")[0])
def archive(request: pytest.FixtureRequest) -> Path:
    """A state that an earlier version has written."""
    assert isinstance(request.param, Path)
    return request.param


@pytest.fixture
def backup(mongodb_client: Client) -> Iterator[MongoDatabase]:
    yield mongodb_client[state.BACKUP]
    mongodb_client.drop_database(state.BACKUP)


@pytest.fixture
def cdc(tmp_path: Path, archive: Path, target_db: Database, backup: MongoDatabase, mongodb: str) -> Installation:
    """The state where it was, but for its sources: they are away, so all there is comes from the state."""
    state.restore(archive, tmp_path, target_db, backup)
    found = Installation(tmp_path)
    found.configure_all(NOWHERE, target_db.url, NO_MONGODB, state.mongo_url(mongodb, state.BACKUP))
    return found


def format_of(archive: Path) -> int:
    """As its name tells."""
    return int(archive.name.partition(".")[0].rpartition("-")[2])


def queue_format(path: Path) -> int:
    with closing(sqlite3.connect(path)) as connection:
        return int(connection.execute("PRAGMA user_version").fetchone()[0])


def test_there_is_a_state_of_each_earlier_format() -> None:
    assert [path.name for path in STATES] == [f"queue-{number}.tar.xz" for number in range(1, FORMAT)]


def test_f92_what_an_earlier_version_left_goes_on_where_it_was(
    cdc: Installation, archive: Path, target_db: Database, backup: MongoDatabase
) -> None:
    number = format_of(archive)
    assert queue_format(cdc.data_dir / "shop.queue") == number
    before = cdc.status()
    assert {name: sink["parked"] for name, sink in before["sinks"].items()} == {"mirror": 0, "changes": 0, "backup": 1}
    assert all(source["queue"]["batches"] for source in before["sources"].values()), "something waits"
    assert queue_format(cdc.data_dir / "shop.queue") == number, "whoever only looks leaves it as it is"
    with cdc.running():
        for name in state.SINKS:
            cdc.wait(partial(cdc.is_in, name, "paused"), f"{name} to be paused, as it was")
            assert cdc("resume", name).returncode == 0
        cdc.wait(lambda: cdc.sink("backup")["parked"] == 0, "the parked document to be applied")
        cdc.wait(lambda: not any(each["queue"]["batches"] for each in cdc.status()["sources"].values()), "the rest")
        after = cdc.status()
    assert queue_format(cdc.data_dir / "shop.queue") == FORMAT
    items = [(1, "waiting"), (3, "copied"), (4, "streamed"), (5, "streamed"), (6, "waiting")]
    assert target_db.execute("SELECT id, name FROM items ORDER BY id") == items
    orders = [(1, "waiting"), (3, "copied"), (4, "waiting"), (5, "streamed"), (6, "waiting")]
    assert [(each["_id"], each["status"]) for each in backup.orders.find(sort=[("_id", 1)])] == orders
    records = FeedDaemon(cdc.folder, NOWHERE).records()
    told = [("CREATE", "4"), ("CREATE", "5"), ("CREATE", "6"), ("UPDATE", "1"), ("UPDATE", "6"), ("DELETE", "2")]
    assert [(record.change_type.value, record.entity_id) for record in records] == told
    assert_ordered(records)
    assert after["sinks"]["mirror"]["changes"] == {
        **dict.fromkeys(("insert", "truncate", "message", "ddl"), 0),
        "update": 2,
        "delete": 1,
    }, "what was delivered before does not come again"
    assert after["sources"]["shop"]["queue"]["last_seq"] == before["sources"]["shop"]["queue"]["last_seq"]


@pytest.mark.parametrize("archive", PARKED, ids=lambda path: path.name.partition(".")[0])
def test_f92_what_an_earlier_version_has_parked_is_applied_in_order(
    tmp_path: Path, target_db: Database, archive: Path
) -> None:
    """Of a mirror in PostgreSQL: a dead change, two that wait behind it, and one that is tried when it goes on."""
    state.unpack(archive, tmp_path, target_db)
    cdc = Cdc(tmp_path)
    parked_state.configure(cdc, NOWHERE, target_db.url, attempts=5, seconds=36_000)
    assert queue_format(cdc.data_dir / "shop.queue") == format_of(archive)
    before = letters(cdc)
    assert [each["state"] for each in before] == ["dead", "waiting", "waiting", "retrying"]
    with cdc.running():
        assert letters(cdc) == before
        target_db.execute("ALTER TABLE items DROP CONSTRAINT poison")
        assert cdc("resume", "mirror").returncode == 0
        wait_until(lambda: target_db.execute("SELECT id FROM items WHERE id = 8"), what=lambda: cdc.log)
        wait_until(lambda: letters(cdc) == before[:3], what=lambda: f"the last to be tried: {letters(cdc)}")
        assert fates(cdc, "retry", "--all") == (0, ["applied"])
        none_is_parked(cdc)
        applied = mirror(cdc)["changes"]
    items = [(1, "bad"), (2, "item 2"), (3, "item 3"), (8, "waiting"), (70, "good")]
    assert target_db.execute("SELECT id, name FROM items ORDER BY id") == items
    assert applied["insert"] + applied["update"] == 5, applied


@pytest.mark.parametrize("archive", STATES[-1:], indirect=True)
class TestLaterVersions:
    """Each kind of state tells its format. One that is not known is refused, and left as it is."""

    def test_f92_queues(self, cdc: Installation) -> None:
        """Nothing is left that the daemon could do: it ends."""
        for name in ("shop", "orders"):
            with closing(sqlite3.connect(cdc.data_dir / f"{name}.queue")) as connection:
                connection.execute(f"PRAGMA user_version = {FORMAT + 1}")
        before = content(cdc.data_dir)
        result = cdc("run")
        error, hint = (line for line in result.stderr.splitlines() if not line.startswith("{"))
        assert result.returncode == 1
        assert re.match(f"error: .*has format {FORMAT + 1}, this version of cdc reads format {FORMAT}", error)
        assert re.match("hint: run the version that wrote it", hint)
        assert content(cdc.data_dir) == before

    def test_f92_targets(self, cdc: Installation, target_db: Database, backup: MongoDatabase) -> None:
        """The sinks fail, each with one line and a hint, and the daemon runs on."""
        with closing(sqlite3.connect(cdc.data_dir / "data_changes.sqlite")) as connection, connection:
            connection.execute("UPDATE data_changes_state SET format = 2")
        target_db.execute("CREATE TABLE cdc.format AS SELECT 2 AS format")
        backup.cdc_positions.update_one({"_id": "backup"}, {"$set": {"format": 2}})
        with cdc.running() as daemon:
            for name in state.SINKS:
                assert cdc("resume", name).returncode == 0
                cdc.wait(partial(cdc.is_in, name, "failed"), f"{name} to fail")
                assert "format 2, this version of cdc knows format 1" in cdc.sink(name)["error"]
                assert "version of cdc" in cdc.sink(name)["hint"]
            assert cdc("status").returncode == 1
            assert daemon.poll() is None


def content(folder: Path) -> dict[str, bytes]:
    """Queues and feeds."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in {".queue", ".sqlite"}}
