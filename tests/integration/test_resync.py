"""A mirror's tables are read again and put right beside the stream."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from psycopg.errors import SerializationFailure, UniqueViolation

from cdc.change import TableName
from cdc.postgres import refresh, refresh_read
from tests.mirror import Mirror, running_mirror
from tests.processes import wait_until
from tests.servers import Database

SCHEMA = """
    CREATE TABLE items (id int PRIMARY KEY, name text, price numeric, big text, doc json);
    ALTER TABLE items ALTER big SET STORAGE EXTERNAL;
    CREATE TABLE names (name text PRIMARY KEY, n int, mail text UNIQUE);
    CREATE TABLE pairs (a text, b int, n int, PRIMARY KEY (b, a)) PARTITION BY HASH (b);
    CREATE TABLE pairs_0 PARTITION OF pairs FOR VALUES WITH (MODULUS 2, REMAINDER 0);
    CREATE TABLE pairs_1 PARTITION OF pairs FOR VALUES WITH (MODULUS 2, REMAINDER 1);
    CREATE TABLE keyless (n int, t text);
    ALTER TABLE keyless REPLICA IDENTITY FULL;
"""
TABLES = ("items", "names", "pairs", "keyless")
ROWS = 600
BIG = 3000


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many rounds of many parts, though there are few rows."""
    monkeypatch.setattr(refresh_read, "PART_ROWS", 40)
    monkeypatch.setattr(refresh, "ROUND_SECONDS", 0.3)


@pytest.fixture
def mirror(source_db: Database, target_db: Database, tmp_path: Path, pg_dump: Path) -> Iterator[Mirror]:
    with running_mirror(source_db, target_db, tmp_path, pg_dump, SCHEMA) as mirror:
        source_db.execute(
            f"""
            INSERT INTO items SELECT n, 'item ' || n, n + 0.10, repeat(md5(n::text), {BIG // 32}), '{{"a": 1}}'
              FROM generate_series(1, {ROWS}) n;
            INSERT INTO names SELECT 'Name ' || n, n, 'm' || n FROM generate_series(1, {ROWS}) n;
            INSERT INTO pairs SELECT chr(97 + n % 5), n, n FROM generate_series(1, {ROWS}) n;
            INSERT INTO keyless SELECT n % 10, 'k' FROM generate_series(1, 20) n;
            """
        )
        mirror.assert_equal(*TABLES)
        yield mirror


def resync(mirror: Mirror, *tables: str) -> None:
    """As `cdc resync` orders it: written down while the sink stands still, and found when it goes on."""
    mirror.stop()
    names = [TableName("public", table) for table in tables]
    mirror.sink.want_resync(names or None, None)
    mirror.refill()


def wait_until_done(mirror: Mirror) -> None:
    stats = mirror.delivery_stats
    wait_until(
        lambda: mirror.error or (stats.state == "running" and mirror.sink.consistent),
        what=lambda: f"the end of the resync: {stats}",
    )
    assert mirror.error is None, mirror.error


def spoil(target: Database) -> None:
    """What a mirror may look like that has missed changes."""
    target.execute(
        """
        SET session_replication_role = replica;
        DELETE FROM items WHERE id % 7 = 0;
        UPDATE items SET name = 'stale', big = 'stale' WHERE id % 5 = 0;
        UPDATE items SET doc = '{"a":1}' WHERE id = 1;
        INSERT INTO items (id, name) SELECT n, 'gone' FROM generate_series(-50, 0) n;
        INSERT INTO items (id, name) SELECT n, 'gone' FROM generate_series(100000, 100100) n;
        DELETE FROM names WHERE n % 3 = 0;
        UPDATE names SET mail = 'x' || n;
        UPDATE names SET mail = 'm' || (n + 1) WHERE n % 3 = 1;
        INSERT INTO names SELECT 'gone ' || n, n, 'm' || n FROM generate_series(1, 600, 3) n ON CONFLICT DO NOTHING;
        UPDATE pairs SET n = -1;
        INSERT INTO keyless VALUES (5, 'alien');
        """
    )


@contextmanager
def writing(database: Database, seed: int) -> Iterator[None]:
    stop = threading.Event()

    def write() -> None:
        rng = random.Random(seed)
        with database.connect() as connection:
            while not stop.wait(0.004):
                one, other = rng.randrange(1, ROWS), rng.randrange(1, ROWS)
                statement = rng.choice(STATEMENTS)
                with suppress(SerializationFailure, UniqueViolation), connection.transaction():
                    connection.execute(statement.replace("%1", str(one)).replace("%2", str(other)).encode())

    threads = [threading.Thread(target=write) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


STATEMENTS = [
    "UPDATE items SET price = price + 1 WHERE id = %1",
    "UPDATE items SET name = 'n%2' WHERE id BETWEEN %1 AND %1 + 3",
    f"UPDATE items SET big = repeat(md5('%2'), {BIG // 32}) WHERE id = %1",
    "DELETE FROM items WHERE id = %1",
    f"INSERT INTO items VALUES (%1, 'new', %2, repeat(md5('%2'), {BIG // 32}), '[]') ON CONFLICT DO NOTHING",
    "UPDATE items SET id = -id WHERE id = %1 AND NOT EXISTS (SELECT FROM items WHERE id = -%1)",
    "UPDATE items SET id = -id WHERE id = -%1 AND NOT EXISTS (SELECT FROM items WHERE id = %1)",
    "UPDATE names SET mail = NULL WHERE name = 'Name %1'; UPDATE names SET mail = 'm%1' WHERE name = 'Name %2'"
    " AND NOT EXISTS (SELECT FROM names WHERE mail = 'm%1')",
    "DELETE FROM names WHERE n = %1; INSERT INTO names VALUES ('name %2', %2) ON CONFLICT DO NOTHING",
    "UPDATE pairs SET n = %2 WHERE b = %1",
    "UPDATE pairs SET b = b + 1000 WHERE b = %1 AND NOT EXISTS (SELECT FROM pairs WHERE b = %1 + 1000)",
    "INSERT INTO keyless VALUES (%1, 'new')",
    "DELETE FROM keyless WHERE n = %1",
]


@pytest.mark.parametrize("seed", [1, 2])
def test_whatever_the_mirror_holds_it_becomes_right_beside_the_stream(
    mirror: Mirror, source_db: Database, target_db: Database, seed: int
) -> None:
    spoil(target_db)
    with writing(source_db, seed):
        resync(mirror)
        assert not mirror.sink.consistent or mirror.delivery_stats.state != "running"
        wait_until_done(mirror)
    mirror.assert_equal(*TABLES)
    assert target_db.value("SELECT count(*) FROM cdc.resyncs") == 0
