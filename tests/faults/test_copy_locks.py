"""What the application does to its tables while they are copied must neither wait for ever nor stop the copy."""

from __future__ import annotations

import threading
from contextlib import closing

import pytest

from cdc.change import TableName
from cdc.errors import TransientError
from cdc.postgres.connection import connect
from cdc.postgres.schema import read_tables
from cdc.postgres.snapshot import PostgresSnapshot, open_snapshot
from tests.processes import wait_until
from tests.servers import Database

ITEMS = TableName("public", "items")


def snapshot_of(source: Database) -> PostgresSnapshot:
    with connect(source.url) as connection:
        return open_snapshot(source.url, {ITEMS: read_tables(connection)[ITEMS]})


@pytest.mark.parametrize("change", ["TRUNCATE items", "ALTER TABLE items ADD COLUMN note text", "DROP TABLE items"])
def test_f30_f51_who_waits_for_the_copy_does_not_make_the_copy_wait_for_him(source_db: Database, change: str) -> None:
    """The server sees no deadlock: a worker waits behind him, he for the snapshot's locks, they for the worker."""
    source_db.execute("CREATE TABLE items (id int PRIMARY KEY); INSERT INTO items SELECT generate_series(1, 100)")
    with closing(snapshot_of(source_db)) as snapshot:
        application = threading.Thread(target=source_db.execute, args=(change,))
        application.start()
        wait_until(lambda: source_db.value("SELECT count(*) FROM pg_locks WHERE NOT granted"), what="a waiter")
        (chunk,) = snapshot.chunks(ITEMS, 1024**2)
        with closing(snapshot.reader()) as reader, pytest.raises(TransientError, match="lock timeout"):
            list(reader.read(chunk, columns=["id"], binary=False))
    application.join(timeout=10)
    assert not application.is_alive(), "it goes on as soon as the snapshot is closed"
