"""What those notice who look at a mirror under load, and at a feed: who sees nothing proves nothing."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from tests.faults.feed_check import FeedCheck
from tests.faults.load_postgres import SCHEMA
from tests.faults.watch_postgres import Snapshot, look
from tests.faults.world_postgres import compare
from tests.servers import Database


@pytest.fixture
def mirror(target_db: Database) -> Database:
    """What the watcher takes for a mirror, at rest."""
    target_db.execute(SCHEMA)
    target_db.execute(
        "CREATE SCHEMA cdc; CREATE TABLE cdc.positions AS SELECT 'mirror' AS sink, '0/100'::pg_lsn AS position"
    )
    target_db.execute("CREATE TABLE cdc.tables AS TABLE cdc.positions")
    target_db.execute("UPDATE journal SET seq = 1")
    target_db.execute("INSERT INTO entries SELECT key, seq FROM journal")
    target_db.execute("INSERT INTO orders OVERRIDING SYSTEM VALUE VALUES (7, 1)")
    target_db.execute("INSERT INTO order_lines VALUES (7, 1, 1)")
    return target_db


def snapshot(mirror: Database) -> Snapshot:
    with mirror.connect() as connection:
        taken = look(connection)
    assert taken is not None
    return taken


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        ("UPDATE accounts SET balance = balance - 1 WHERE id = 3", "sum of all balances is 39999"),
        ("INSERT INTO entries VALUES (5, 1)", "5 is at 1 with 2 up to 1"),
        ("DELETE FROM entries WHERE key = 5", "5 is at 1 with  up to"),
        ("UPDATE journal SET seq = 2 WHERE key = 5", "5 is at 2 with 1 up to 1"),
        ("DELETE FROM order_lines", "7 has  of 1 lines"),
        ("DELETE FROM orders", "7 has 1 of  lines"),
        ("DELETE FROM bulk WHERE id = 9", "bulk has 14999 rows of 1 runs"),
        ("UPDATE bulk SET run = 9 WHERE id = 9", "bulk has 15000 rows of 2 runs"),
        ("UPDATE counters SET n = -1 WHERE id = 9", "a counter went back"),
        ("DELETE FROM counters WHERE id = 9", "a counter went back"),
        ("UPDATE journal SET seq = 0; DELETE FROM entries", "a key of the journal went back"),
        ("UPDATE bulk SET run = -1", "bulk went back"),
        ("UPDATE cdc.positions SET position = '0/0'; UPDATE cdc.tables SET position = '0/0'", "the position went back"),
    ],
)
def test_the_watcher_sees_what_cannot_be(mirror: Database, damage: str, problem: str) -> None:
    before = snapshot(mirror)
    assert before.problems() == before.problems_after(before) == []
    mirror.execute(damage)
    after = snapshot(mirror)
    assert problem in "; ".join(after.problems() + after.problems_after(before))


def test_the_watcher_waits_until_the_copy_is_consistent(mirror: Database) -> None:
    mirror.execute("UPDATE cdc.tables SET position = '0/200'")
    with mirror.connect() as connection:
        assert look(connection) is None
        mirror.execute("UPDATE cdc.tables SET position = NULL")
        assert look(connection) is None


def test_the_watcher_waits_while_a_resync_writes_rows_of_other_moments(mirror: Database) -> None:
    mirror.execute("CREATE TABLE cdc.resyncs AS TABLE cdc.positions")
    with mirror.connect() as connection:
        assert look(connection) is None
        mirror.execute("TRUNCATE cdc.resyncs")
        assert look(connection) is not None


def test_the_comparison_counts_equal_rows(source_db: Database, target_db: Database) -> None:
    for database in (source_db, target_db):
        database.execute("CREATE TABLE twins (n int, note text)")
        database.execute("INSERT INTO twins VALUES (1, NULL), (1, NULL), (2, '')")
    assert compare(source_db, target_db, "twins") == []
    target_db.execute("INSERT INTO twins VALUES (1, NULL); DELETE FROM twins WHERE n = 2")
    assert compare(source_db, target_db, "twins") == [
        'twins: 1 rows are missing from the mirror, as (2,"")',
        "twins: 1 rows are too many in the mirror, as (1,)",
    ]


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([(1, 5), (2, 6), (3, 7)], ""),
        ([(1, 5), (2, 7)], "feed: ('journal', 'a') counts 7 after 5"),
        ([(1, 5), (2, 6), (3, 6)], "feed: ('journal', 'a') counts 6 after 6"),
        ([(1, 5), (3, 6)], "feed: ('journal', 'a') has version 3 after 1"),
        ([(2, 5)], "feed: ('journal', 'a') has version 2 after 0"),
    ],
)
def test_a_feed_with_holes_is_seen(tmp_path: Path, rows: list[tuple[int, int]], complaint: str) -> None:
    check = feed_check(tmp_path / "feed.sqlite", rows)
    assert "; ".join(check.problems()) == complaint
    assert check.missing("journal", {"before": 3}, {"a": rows[-1][1], "never": 0, "before": 3}) == []
    assert check.missing("journal", {}, {"a": 9}) == [
        f"feed: journal a was changed 9 times, but the feed tells of {rows[-1][1]}"
    ]


def test_a_feed_may_jump_once_over_a_gap_and_never_back(tmp_path: Path) -> None:
    check = feed_check(tmp_path / "feed.sqlite", [(1, 5), (2, 9), (3, 12), (4, 11)])
    check.gaps = 1
    assert check.problems() == ["feed: ('journal', 'a') counts 12 after 9", "feed: ('journal', 'a') counts 11 after 12"]
    assert check.gaps == 0
    assert check.missing("journal", {"a": 20}, {"a": 20}) == []


def test_what_is_first_changed_long_after_a_gap_goes_on_behind_it(tmp_path: Path) -> None:
    file = tmp_path / "feed.sqlite"
    check = feed_check(file, [(1, 5)])
    check.gaps = 1
    assert check.problems() == check.missing("journal", {"a": 7}, {"a": 7}) == []
    add_rows(file, [(2, 8), (3, 10)])
    assert check.problems() == ["feed: ('journal', 'a') counts 10 after 8"]


def add_rows(file: Path, rows: list[tuple[int, int]]) -> None:
    with closing(sqlite3.connect(file, isolation_level=None)) as connection:
        values = [("journal", "a", version, f'{{"seq": {seq}}}', None, "UPDATE") for version, seq in rows]
        connection.executemany("INSERT INTO data_changes VALUES (NULL, ?, ?, ?, ?, ?, ?)", values)


def feed_check(file: Path, rows: list[tuple[int, int]]) -> FeedCheck:
    """Of a feed that tells of one row: version, and how often it was changed."""
    with closing(sqlite3.connect(file, isolation_level=None)) as connection:
        columns = "entity_type, entity_id, version, after, delta, change_type"
        connection.execute(f"CREATE TABLE data_changes (id INTEGER PRIMARY KEY, {columns})")
    add_rows(file, rows)
    return FeedCheck(file, {"journal": lambda change: change["after"]["seq"]}, lambda _: True)
