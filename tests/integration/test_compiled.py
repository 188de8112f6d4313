"""What the compiled half of the daemon queues, the plain one delivers, and the other way round."""

from __future__ import annotations

from pathlib import Path

import pytest

from cdc import packed_rows
from cdc.change import Summarized
from cdc.postgres import replication, steps
from cdc.postgres.copy_text import plain_text_in_python
from tests.mirror import Mirror, running_mirror, wait_for
from tests.servers import Database

SCHEMA = """
    CREATE TABLE items (id int PRIMARY KEY, n int, name text);
    CREATE TABLE parts (item int, number int, document text, PRIMARY KEY (item, number));
    CREATE TABLE entries (id int, note text); ALTER TABLE entries REPLICA IDENTITY FULL
"""
TABLES = ("items", "parts", "entries")


def write(database: Database, first: int) -> None:
    """Transactions of every kind, 700 rows of each table; half of them are touched again."""
    last = first + 699
    rows = f"generate_series({first}, {last}) g"
    big = "repeat(md5(g::text), 100)"
    for statement in (
        f"INSERT INTO items SELECT g, 0, E'tab\\t ' || g FROM {rows}",
        f"INSERT INTO parts SELECT g, g % 3, {big} FROM {rows}; INSERT INTO entries SELECT g, NULL FROM {rows}",
        *(f"UPDATE items SET n = n + 1 WHERE id BETWEEN {first} AND {first + 300}" for _ in range(3)),
        f"UPDATE parts SET number = number + 1 WHERE item % 2 = 0 AND item >= {first}",
        f"UPDATE entries SET note = 'x' WHERE id % 2 = 0 AND id >= {first}; DELETE FROM entries WHERE id = {last}",
        f"UPDATE items SET id = -id WHERE id = {first}; DELETE FROM items WHERE id > {last - 50}",
        *(f"UPDATE items SET name = '{n}' WHERE id = {first + 1}" for n in range(20)),
        "SELECT pg_logical_emit_message(true, 'mine', 'hello')",
        f"INSERT INTO items SELECT g, 0, 'again' FROM {rows} WHERE g > {last - 50}",
    ):
        with database.connect() as connection, connection.transaction():
            connection.execute(statement)


def queued(mirror: Mirror, first: int) -> list[bool]:
    """Write while nothing is delivered; whether each batch that came of it is packed."""
    mirror.delivery.pause()
    wait_for(lambda: mirror.delivery_stats.state == "paused", "the sink to pause")
    before = mirror.delivery_stats.seq
    write(mirror.source_db, first)
    end = mirror.source_db.value("SELECT pg_current_wal_lsn() - '0/0'")
    mirror.source.nudge()
    wait_for(lambda: (mirror.queue.position or 0) >= end, "all to be captured")
    stored = mirror.queue.read(before, max_bytes=10**9, timeout_seconds=1)
    return [isinstance(each.batch.transactions, Summarized) for each in stored]


def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where there was none."""
    monkeypatch.setattr(replication, "compiled", None)
    monkeypatch.setattr(steps, "_fold", None)
    monkeypatch.setattr(steps, "plain_text", plain_text_in_python)
    monkeypatch.setattr(packed_rows, "unpack", packed_rows.unpack_in_python)


def test_what_one_form_has_queued_the_other_delivers(
    source_db: Database, target_db: Database, tmp_path: Path, pg_dump: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cdc.postgres._frames", reason="there was no C compiler when this was installed")
    with running_mirror(source_db, target_db, tmp_path, pg_dump, SCHEMA) as mirror:
        write(source_db, 1)
        mirror.assert_equal(*TABLES)
        assert any(queued(mirror, 1001))
        with monkeypatch.context() as plain:
            without_compiler(plain)
            mirror.restart()
            mirror.assert_equal(*TABLES)
            assert not any(queued(mirror, 2001))
            mirror.stop()
        mirror.restart()
        mirror.assert_equal(*TABLES)
        write(source_db, 3001)
        mirror.assert_equal(*TABLES)
        assert mirror.delivery_stats.missing_rows == 0
