"""What one version of `cdc` leaves behind, and a later one finds: written by any checkout, kept in tests/data/.

    python -m tests.state CHECKOUT tests/data/queue-N.tar.xz

lets the daemon of a checkout write such a state, for a format of the queue that is no longer the newest. It holds:

data/: the data directory. `shop`, a PostgreSQL source, has a mirror and a feed in SQLite; `orders`, MongoDB, a mirror.
target.sql: the mirror in PostgreSQL, with what is stored beside it. target.json: the one in MongoDB, by collection.

All sinks are paused, and something waits for each of them. One document is parked, for a unique index that only the
mirror had.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import pymongo
from bson import json_util
from pymongo.database import Database as MongoDatabase

from tests.command import Cdc
from tests.mongod.process import start_server
from tests.processes import wait_until
from tests.servers import Database, PostgresServer

ORDERS: Final = "state_orders"
BACKUP: Final = "state_orders_backup"
SINKS: Final = ("mirror", "changes", "backup")
CANONICAL: Final = json_util.CANONICAL_JSON_OPTIONS

Documents = MongoDatabase[dict[str, Any]]


class Installation(Cdc):
    """`cdc` with both kinds of sources, and all kinds of sinks."""

    def configure_all(self, shop: str, mirror: str, orders: str, backup: str) -> None:
        """URLs of the sources and their mirrors."""
        self.configure(shop, mirror)
        with self.file.open("a") as file:
            file.write(
                f"""
                [sinks.changes]
                kind = "data_changes"
                from = "shop"
                [sources.orders]
                url = "{orders}"
                [sinks.backup]
                from = "orders"
                url = "{backup}"
                """
            )

    def sink(self, name: str) -> dict[str, Any]:
        """A sink's status."""
        found: dict[str, Any] = self.status()["sinks"][name]
        return found

    def is_in(self, sink: str, wanted: str) -> bool:
        """Whether a sink is in that state."""
        return bool(self.sink(sink)["state"] == wanted)

    def wait(self, condition: Callable[[], object], what: str) -> None:
        """Wait until something is so."""
        wait_until(condition, timeout_seconds=30, what=lambda: f"{what}: {self.status()}\n{self.log}")


def mongo_url(url: str, database: str) -> str:
    """A MongoDB URL that leads to one database."""
    base, mark, query = url.partition("?")
    return f"{base.rstrip('/')}/{database}{mark}{query}"


def write(cdc: Installation, shop: Database, mirror: Database, orders: Documents, backup: Documents) -> None:
    """Run the daemon, and leave it with work to do."""
    shop.execute("CREATE TABLE items (id int PRIMARY KEY, name text)")
    shop.execute("INSERT INTO items SELECT n, 'copied' FROM generate_series(1, 3) AS n")
    orders.orders.insert_many([{"_id": n, "no": n, "status": "copied"} for n in range(1, 4)])
    with cdc.running():
        cdc.wait(lambda: all(cdc.sink(name)["state"] == "running" for name in SINKS), "sinks to run")
        backup.orders.create_index("no", unique=True)  # the source has none
        shop.execute("INSERT INTO items SELECT n, 'streamed' FROM generate_series(4, 6) AS n")
        orders.orders.insert_many([{"_id": n, "no": n if n > 4 else 1, "status": "streamed"} for n in range(4, 7)])
        cdc.wait(lambda: cdc.sink("backup")["parked"] == 1, "a parked document")
        cdc.wait(lambda: backup.orders.find_one({"_id": 6}), "the documents behind it")
        cdc.wait(lambda: mirror.value("SELECT count(*) FROM items") == 6, "the mirror")
        cdc.wait(lambda: cdc.sink("changes")["lag_bytes"] == 0, "the feed")
        for name in SINKS:
            assert cdc("pause", name).returncode == 0
            cdc.wait(partial(cdc.is_in, name, "paused"), f"{name} to pause")
        shop.execute("UPDATE items SET name = 'waiting' WHERE id IN (1, 6)")
        shop.execute("DELETE FROM items WHERE id = 2")
        orders.orders.update_many({"_id": {"$in": [1, 4, 6]}}, {"$set": {"status": "waiting"}})
        orders.orders.delete_one({"_id": 2})
        end = shop.value("SELECT pg_current_wal_lsn()")
        cdc.wait(lambda: captured(cdc, "shop") >= lsn(end), "the queue of shop")
        cdc.wait(lambda: cdc.status()["sources"]["orders"]["changes"]["delete"] == 1, "the queue of orders")


def captured(cdc: Cdc, source: str) -> int:
    """Up to where a source is in its queue."""
    return lsn(cdc.status()["sources"][source]["confirmed"] or "0/0")


def lsn(text: str) -> int:
    high, _, low = text.partition("/")
    return int(high, 16) << 32 | int(low, 16)


def keep(cdc: Installation, mirror: Database, backup: Documents, archive: Path) -> None:
    """Put all that is left behind into one file."""
    dump(mirror, cdc.folder / "target.sql")
    collections = {name: list(backup[name].find()) for name in sorted(backup.list_collection_names())}
    (cdc.folder / "target.json").write_text(json_util.dumps(collections, json_options=CANONICAL, indent=1))
    pack(cdc, archive, "target.sql", "target.json")


def dump(mirror: Database, file: Path) -> None:
    """Write all of a mirror in PostgreSQL, with what is stored beside it, as SQL."""
    arguments = ("--inserts", "--no-owner", "--no-privileges", "-d", mirror.url)
    command: list[str | Path] = [mirror.server.bin_dir / "pg_dump", *arguments]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    file.write_text(
        "\n".join(line for line in text.splitlines() if not line.startswith(("\\restrict", "\\unrestrict")))
    )


def pack(cdc: Cdc, archive: Path, *files: str) -> None:
    """Put the data directory, and these files beside it, into one."""
    with tarfile.open(archive, "w:xz") as file:
        for name in ("data", *files):
            file.add(cdc.folder / name, name, filter=_nobodys)


def _nobodys(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    return info


def restore(archive: Path, folder: Path, mirror: Database, backup: Documents) -> None:
    """Put it back, but for the index that refused a document."""
    unpack(archive, folder, mirror)
    for name, documents in json_util.loads((folder / "target.json").read_text(), json_options=CANONICAL).items():
        backup[name].insert_many(documents)


def unpack(archive: Path, folder: Path, mirror: Database) -> None:
    """Put the files and a mirror in PostgreSQL back."""
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    mirror.server.psql((folder / "target.sql").read_text(), mirror.name)


def main(checkout: Path, archive: Path) -> None:
    """Write a state with servers of its own."""
    with TemporaryDirectory() as name, PostgresServer(18) as postgres, start_server() as mongod:
        os.environ["PATH"] = f"{postgres.bin_dir}:{os.environ['PATH']}"  # pg_dump
        cdc = Installation(Path(name), checkout)
        shop, mirror = postgres.create_database("shop"), postgres.create_database("shop_backup")
        urls = (mongo_url(mongod.url, database) for database in (ORDERS, BACKUP))
        cdc.configure_all(shop.url, mirror.url, *urls)
        with closing(pymongo.MongoClient[dict[str, Any]](mongod.url)) as client:
            write(cdc, shop, mirror, client[ORDERS], client[BACKUP])
            keep(cdc, mirror, client[BACKUP], archive)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]))
