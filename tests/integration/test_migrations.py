"""docs/migrations.md, word for word: its configurations, and its commands in their order, on real servers."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pymongo
import pytest

from tests.command import CHECKOUT, Cdc
from tests.mongod.fixture import MongoDatabase
from tests.processes import wait_until
from tests.servers import Database
from tests.state import mongo_url

PAGE = (CHECKOUT / "docs" / "migrations.md").read_text()


class Recipe(Cdc):
    """One section of the page. Where it says `cdc run`, the daemon runs until the section says `cdc drop`."""

    def __init__(self, folder: Path, heading: str, **environment: str) -> None:
        super().__init__(folder)
        section = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
        assert section is not None
        toml = re.search(r"^```toml\n(.*?)^```$", section[1], re.DOTALL | re.MULTILINE)
        assert toml is not None
        here = f'[daemon]\ndata_dir = "{self.data_dir}"\n[http]\naddress = "127.0.0.1:0"\n[queue]\nmin_free_bytes = 0\n'
        self.file.write_text(here + toml[1])
        self.commands = re.findall(r"^ {4,}cdc (.*)$", section[1], re.MULTILINE)
        self.environment = environment

    def surroundings(self, environment: dict[str, str] | None = None) -> dict[str, Any]:
        return super().surroundings({**self.environment, **(environment or {})})

    def until(self, word: str) -> Iterator[str]:
        """Commands up to the next that begins with a word, which is taken too, and not given."""
        while self.commands and (command := self.commands.pop(0)).split()[0] != word:
            yield command

    def do(self, command: str) -> subprocess.CompletedProcess[str]:
        """As it stands there; it must succeed."""
        result = self(*shlex.split(command))
        assert result.returncode == 0, f"cdc {command}: {result.stdout}{result.stderr}"
        return result

    def wait_running(self, sink: str) -> None:
        wait_until(
            lambda: self.status()["sinks"][sink]["state"] == "running", timeout_seconds=60, what=lambda: self.log
        )


@pytest.fixture
def orders(mongodb_client: pymongo.MongoClient[dict[str, Any]]) -> Iterator[MongoDatabase]:
    names = ("ordersDB", "ordersDB_backup")
    yield mongodb_client["ordersDB"]
    for name in names:
        mongodb_client.drop_database(name)


def test_postgresql_to_another_postgresql(
    tmp_path: Path, source_db: Database, target_db: Database, pg_dump: Path
) -> None:
    path = f"{pg_dump.parent}:{os.environ['PATH']}"
    recipe = Recipe(tmp_path, "PostgreSQL to another PostgreSQL", OLD=source_db.url, NEW=target_db.url, PATH=path)
    source_db.execute("CREATE TABLE orders (id serial PRIMARY KEY, note text)")
    source_db.execute("INSERT INTO orders (note) SELECT 'before' FROM generate_series(1, 100)")
    for command in recipe.until("run"):
        recipe.do(command)
    assert target_db.value("SELECT count(*) FROM orders") == 100
    with recipe.running():
        recipe.wait_running("new")
        source_db.execute("INSERT INTO orders (note) VALUES ('meanwhile')")
        for command in recipe.until("cutover"):
            recipe.do(command)
        result = recipe.do("cutover new")
        assert "sequence" in result.stdout, result.stdout
    target_db.execute("INSERT INTO orders (note) VALUES ('after')")
    assert target_db.execute("SELECT id, note FROM orders ORDER BY id DESC LIMIT 2") == [
        (102, "after"),
        (101, "meanwhile"),
    ]
    (last,) = recipe.commands
    recipe.do(last)
    assert source_db.execute("SELECT FROM pg_replication_slots WHERE database = current_database()") == []
    assert source_db.execute("SELECT FROM pg_publication") == []


def test_orders_to_their_backup(tmp_path: Path, mongodb: str, orders: MongoDatabase) -> None:
    recipe = Recipe(tmp_path, "`ordersDB` to `ordersDB_backup`", MONGODB=mongo_url(mongodb, "ordersDB"))
    backup = orders.client["ordersDB_backup"]
    orders.orders.insert_many([{"orderNo": f"ORDER{number}"} for number in range(100, 200)])
    orders.orders.create_index("orderNo", expireAfterSeconds=3600)
    for command in recipe.until("run"):
        recipe.do(command)
    with recipe.running():
        recipe.wait_running("backup")
        backup.orders.update_one({"orderNo": "ORDER123"}, {"$set": {"wrong": True}})
        (verify, sync) = recipe.until("cutover")
        assert recipe(*shlex.split(verify)).returncode == 1, "something is wrong, and it says so"
        recipe.do(sync)
        recipe.do(verify)
        assert "expireAfterSeconds" not in backup.orders.index_information()["orderNo_1"]
        recipe.do("cutover backup")
        assert backup.orders.index_information()["orderNo_1"]["expireAfterSeconds"] == 3600
    (last,) = recipe.commands
    recipe.do(last)
    assert list(orders.orders.find()) == list(backup.orders.find())
