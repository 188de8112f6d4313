"""`cdc sync` between two PostgreSQL databases."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.command import Cdc, assert_complaint
from tests.servers import Database

SCHEMA = """
    CREATE TABLE items (id int PRIMARY KEY, name text, price numeric, always int GENERATED ALWAYS AS IDENTITY);
    CREATE TABLE parts (a text, b int, n int, PRIMARY KEY (a, b));
    CREATE TABLE busy (id int PRIMARY KEY, n int);
    CREATE TABLE keyless (n int);
    ALTER TABLE keyless REPLICA IDENTITY FULL;
    INSERT INTO items (id, name, price) SELECT n, 'item ' || n, n + 0.10 FROM generate_series(1, 100) n;
    INSERT INTO parts VALUES ('x', 1, 1), ('x', 2, 2);
    INSERT INTO busy SELECT n, 0 FROM generate_series(1, 10) n;
"""


@pytest.fixture
def running(cdc: Cdc, source_db: Database, target_db: Database, pg_dump: Path) -> Iterator[Cdc]:
    source_db.execute(SCHEMA)
    cdc.configure(source_db.url, target_db.url, source=f'pg_dump = "{pg_dump}"')
    with cdc.running():
        cdc.wait_for_sink("running")
        yield cdc


@contextmanager
def writing(database: Database) -> Iterator[None]:
    stop = threading.Event()

    def write() -> None:
        with database.connect() as connection:
            while not stop.is_set():
                connection.execute("UPDATE busy SET n = n + 1")
                connection.execute("UPDATE items SET price = price + 1 WHERE id > 90")

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_rows_are_put_right_in_order_with_the_stream(running: Cdc, source_db: Database, target_db: Database) -> None:
    target_db.execute("UPDATE items SET name = NULL WHERE id = 1")
    target_db.execute("DELETE FROM items WHERE id = 2")
    target_db.execute("INSERT INTO items (id, name) VALUES (1000, 'alien')")
    target_db.execute("UPDATE busy SET n = -1")
    with writing(source_db):
        dry = running(
            "sync", "mirror", "public.items", "--id", "1", "--id", "2", "--id", "1000", "--id", "5", "--dry-run"
        )
        assert dry.returncode == 1, "they differ"
        assert set(dry.stdout.splitlines()[:3]) == {
            "1: would be replaced", "2: would be inserted", "1000: would be deleted"
        }  # fmt: skip
        assert target_db.value("SELECT count(*) FROM items WHERE id = 2") == 0
        done = running("sync", "mirror", "public.items", "--where", "id <= 2 OR id >= 90", "--json")
        assert done.returncode == 0, done.stderr
        actions = {row["key"]: row["action"] for row in json.loads(done.stdout)["rows"]}
        assert (actions["1"], actions["2"], actions["1000"]) == ("replaced", "inserted", "deleted")
        assert {actions[str(key)] for key in range(90, 101)} == {"equal"}, (
            "what is being written is as far as the mirror"
        )
        assert running("sync", "mirror", "public.busy", "--where", "true").returncode == 0
    verified = running("verify")
    assert verified.returncode == 0, verified.stdout


def test_keys_of_several_columns_are_json_arrays(running: Cdc, target_db: Database) -> None:
    target_db.execute("UPDATE parts SET n = 0")
    done = running("sync", "mirror", "public.parts", "--id", '["x", 2]')
    assert done.stdout.splitlines()[0] == "x, 2: replaced", done.stderr
    assert target_db.execute("SELECT n FROM parts ORDER BY b") == [(0,), (2,)]
    assert_complaint(running("sync", "mirror", "public.parts", "--id", "x"), 1, "is not a key", "a, b")


def test_what_cannot_be_synced_is_refused(running: Cdc) -> None:
    assert_complaint(running("sync", "mirror", "public.keyless", "--where", "true"), 1, "no key", "copy")
    assert_complaint(running("sync", "mirror", "public.other", "--id", "1"), 1, "no table public.other")


def test_what_is_no_key_or_condition_is_told_with_what_is(running: Cdc) -> None:
    table = "public.items"
    wrong_type = running("sync", "mirror", table, "--id", "abc")
    assert_complaint(wrong_type, 1, "'abc' is not a key of public.items: invalid input syntax", r"id \(integer\)")
    wrong_column = running("sync", "mirror", "public.parts", "--id", '["x", "abc"]')
    assert_complaint(wrong_column, 1, "is not a key of public.parts", r"a \(text\), b \(integer\)")
    unknown_column = running("sync", "mirror", table, "--where", "nope = 1")
    assert_complaint(unknown_column, 1, 'not a condition .*"nope" does not exist', "columns: id, name, price, always")
    assert_complaint(running("sync", "mirror", table, "--where", "id ="), 1, "not a condition .*syntax", "columns: id")


@pytest.mark.parametrize(
    ("condition", "error"),
    [
        ("not ( sql", "syntax error at end of input"),
        ("id = 1) OR (true", r"syntax error at or near \"\)\""),
        ("true; SELECT 1", "cannot insert multiple commands"),
        ("id = 1 /*", "unterminated /\\* comment"),
    ],
)
def test_of_a_condition_that_does_not_end_what_was_written_is_blamed(running: Cdc, condition: str, error: str) -> None:
    result = running("sync", "mirror", "public.items", "--where", condition)
    assert_complaint(result, 1, f"not a condition on public.items: {error}", "columns: id")


def test_a_condition_may_end_with_a_comment(running: Cdc) -> None:
    done = running("sync", "mirror", "public.items", "--where", "id = 1 -- the first", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    assert [row["key"] for row in json.loads(done.stdout)["rows"]] == ["1"]


def test_a_key_that_is_on_neither_side_is_listed(running: Cdc) -> None:
    done = running("sync", "mirror", "public.items", "--id", "1", "--id", "777", "--id", "777", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"] == [{"key": "1", "action": "equal"}, {"key": "777", "action": "absent"}]
    dry = running("sync", "mirror", "public.parts", "--id", '["y", 7]', "--dry-run")
    assert dry.stdout.splitlines() == ["y, 7: absent", "public.parts: 1 absent"]
    assert dry.returncode == 0, "nothing differs"


def test_without_a_daemon_nothing_is_synced(cdc: Cdc, source_db: Database, target_db: Database, pg_dump: Path) -> None:
    source_db.execute("CREATE TABLE items (id int PRIMARY KEY)")
    cdc.configure(source_db.url, target_db.url, source=f'pg_dump = "{pg_dump}"')
    assert cdc("copy").returncode == 0
    assert_complaint(cdc("sync", "mirror", "public.items", "--id", "1"), 1, "no daemon runs", "cdc run")
