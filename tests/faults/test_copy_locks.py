"""What the application does to its tables while they are copied must neither wait for ever nor stop the copy."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from cdc.change import TableName
from cdc.errors import TransientError
from cdc.postgres.connection import connect
from cdc.postgres.dump import dump_schema
from cdc.postgres.schema import read_tables
from cdc.postgres.snapshot import PostgresSnapshot, open_snapshot
from tests.processes import wait_until
from tests.servers import Database

NewWaiter = Callable[[str], None]

ITEMS = TableName("public", "items")


def snapshot_of(source: Database) -> PostgresSnapshot:
    with connect(source.url) as connection:
        return open_snapshot(source.url, {ITEMS: read_tables(connection)[ITEMS]})


@pytest.fixture
def waiting_for(source_db: Database) -> Iterator[NewWaiter]:
    """What the application asks for is waiting; it goes on as soon as the snapshot is closed."""
    source_db.execute("CREATE TABLE items (id int PRIMARY KEY, n int DEFAULT 1)")
    source_db.execute("INSERT INTO items SELECT generate_series(1, 100)")
    begun: list[threading.Thread] = []

    def begin(change: str) -> None:
        begun.append(threading.Thread(target=source_db.execute, args=(change,)))
        begun[0].start()
        wait_until(lambda: source_db.value("SELECT count(*) FROM pg_locks WHERE NOT granted"), what="a waiter")

    yield begin
    begun[0].join(timeout=60)
    assert not begun[0].is_alive()


CHANGES = pytest.mark.parametrize(
    "change", ["TRUNCATE items", "ALTER TABLE items ADD COLUMN note text", "DROP TABLE items"]
)


@CHANGES
def test_f30_f51_who_waits_for_the_copy_does_not_make_the_copy_wait_for_him(
    source_db: Database, waiting_for: NewWaiter, change: str
) -> None:
    """The server sees no deadlock: a worker waits behind him, he for the snapshot's locks, they for the worker."""
    with closing(snapshot_of(source_db)) as snapshot:
        waiting_for(change)
        (chunk,) = snapshot.chunks(ITEMS, 1024**2)
        with closing(snapshot.reader()) as reader, pytest.raises(TransientError, match="lock timeout"):
            list(reader.read(chunk, columns=["id"], binary=False))


@CHANGES
def test_f30_f51_a_look_at_the_shapes_does_not_wait_for_him_either(
    source_db: Database, waiting_for: NewWaiter, pg_dump: Path, change: str
) -> None:
    """A server from version 17 on takes a lock to write a column's default as text."""
    schema = dump_schema(source_db.url, [ITEMS], pg_dump=str(pg_dump))
    with closing(snapshot_of(source_db)) as snapshot:
        waiting_for(change)
        with suppress(TransientError):
            snapshot.check_schema(schema, [ITEMS])
