"""What is written at the source arrives at the mirror, whatever it is."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cdc.errors import FatalError
from tests.mirror import Mirror, running_mirror, wait_for
from tests.servers import Database, PostgresServer

Start = Callable[..., Mirror]

ITEMS = "CREATE TABLE items (id int PRIMARY KEY, n int NOT NULL DEFAULT 0, name text, document text)"
TOAST = "repeat(md5(random()::text), 400)"  # 12,800 random characters: stored outside the row


@pytest.fixture
def start(source_db: Database, target_db: Database, tmp_path: Path, pg_dump: Path, request: Any) -> Start:
    """Starts a mirror of a schema, on PostgreSQL 18 (and 16 where the test asks for `postgres`)."""

    def start(*schema: str, **options: Any) -> Mirror:
        context = running_mirror(source_db, target_db, tmp_path, pg_dump, *schema, **options)
        mirror = context.__enter__()
        request.addfinalizer(lambda: context.__exit__(None, None, None))
        return mirror

    return start


def run(mirror: Mirror, *statements: str) -> None:
    """Run statements in one transaction."""
    with mirror.source_db.connect() as connection, connection.transaction():
        for statement in statements:
            connection.execute(statement)


def test_inserts_updates_and_deletes_arrive(start: Start, postgres: PostgresServer) -> None:
    mirror = start(ITEMS)
    for count in (10, 500):  # one round trip, and set-wise
        run(mirror, f"INSERT INTO items SELECT g, g, 'row ' || g, NULL FROM generate_series(1, {count}) g")
        mirror.assert_equal("items")
        run(mirror, "UPDATE items SET n = n + 1 WHERE id % 2 = 0", "DELETE FROM items WHERE id % 3 = 0")
        mirror.assert_equal("items")
        run(mirror, "DELETE FROM items")
        mirror.assert_equal("items")
    assert mirror.delivery_stats.fallbacks == mirror.delivery_stats.missing_rows == 0


def test_special_characters_and_nulls_arrive(start: Start) -> None:
    mirror = start(ITEMS)
    nasty = [
        r"a\b",
        "tab\there",
        "line\nbreak",
        "carriage\rreturn",
        r"\N",
        r"\.",
        "",
        "ÄÖ€😀",
        "%s",
        "'\"",
        "{}",
        "\x01",
    ]
    with mirror.source_db.connect() as connection, connection.cursor() as cursor:
        for start_id in (0, 1000):
            cursor.executemany(
                "INSERT INTO items (id, name) VALUES (%s, %s)",
                [(start_id + i, nasty[i % len(nasty)] if i % 17 else None) for i in range(30 if not start_id else 900)],
            )
    mirror.assert_equal("items")


def test_names_that_need_quoting_arrive(start: Start) -> None:
    mirror = start(
        'CREATE TABLE "Odd %s ""name"" {}" ("select" int PRIMARY KEY, "100%" text, "Größe ""x""" int)',
    )
    name = '"Odd %s ""name"" {}"'
    run(mirror, f"INSERT INTO {name} SELECT g, g::text, g FROM generate_series(1, 5) g")
    run(mirror, f'UPDATE {name} SET "100%" = \'x\' WHERE "select" < 3', f'DELETE FROM {name} WHERE "select" = 5')
    mirror.assert_equal(name)
    run(mirror, f"INSERT INTO {name} SELECT g, g::text, g FROM generate_series(10, 500) g")
    run(mirror, f"UPDATE {name} SET \"100%\" = 'y'", f'DELETE FROM {name} WHERE "select" > 400')
    mirror.assert_equal(name)


def test_f18_old_key_is_sent_only_when_it_changed(start: Start) -> None:
    mirror = start(ITEMS)
    run(mirror, "INSERT INTO items VALUES (1, 1, 'a'), (2, 2, 'b')")
    run(mirror, "UPDATE items SET n = 5 WHERE id = 1", "UPDATE items SET id = 9 WHERE id = 2")
    mirror.assert_equal("items")


@pytest.mark.parametrize("rows", [5, 300])
def test_f19_identity_full_changes_exactly_one_of_equal_rows(start: Start, rows: int) -> None:
    mirror = start(
        "CREATE TABLE log (a int, b text, c json, d point, e numeric, f float8)",
        "ALTER TABLE log REPLICA IDENTITY FULL",
    )
    run(
        mirror,
        f"INSERT INTO log SELECT g % 3, NULL, '{{\"a\":  1}}', '(1,2)', 1.0, '-0' FROM generate_series(1, {rows}) g",
        "INSERT INTO log VALUES (1, NULL, '{\"a\": 1}', '(1,2)', 1.00, 0)",
    )
    mirror.assert_equal("log")
    one = "ctid = (SELECT ctid FROM log WHERE a = 1 AND e::text = '1.0' LIMIT 1)"
    run(mirror, f"DELETE FROM log WHERE {one}", f"UPDATE log SET b = 'changed' WHERE {one}")
    run(mirror, "UPDATE log SET c = NULL WHERE e::text = '1.00'")
    mirror.assert_equal("log")


def test_f20_identity_by_index_switched_in_mid_stream(start: Start) -> None:
    mirror = start(
        "CREATE TABLE codes (id int PRIMARY KEY, code text NOT NULL UNIQUE, n int)",
        "ALTER TABLE codes REPLICA IDENTITY USING INDEX codes_code_key",
    )
    run(mirror, "INSERT INTO codes SELECT g, 'c' || g, 0 FROM generate_series(1, 200) g")
    run(mirror, "UPDATE codes SET n = 1 WHERE id <= 100", "DELETE FROM codes WHERE id = 7")
    run(mirror, "UPDATE codes SET code = 'moved' WHERE id = 8")
    run(mirror, "ALTER TABLE codes REPLICA IDENTITY DEFAULT", "UPDATE codes SET code = 'by id' WHERE id = 9")
    run(mirror, "ALTER TABLE codes REPLICA IDENTITY FULL", "DELETE FROM codes WHERE id = 10")
    mirror.assert_equal("codes")


def test_f21_insert_only_table(start: Start) -> None:
    mirror = start(ITEMS, "CREATE TABLE events (at timestamptz, what text)", source={"insert_only": ["public.events"]})
    run(mirror, "INSERT INTO events VALUES (now(), 'a'), (now(), 'b')")
    mirror.assert_equal("events")
    run(mirror, "DELETE FROM events WHERE what = 'a'")  # must not fail at the source
    mirror.sync()
    assert len(mirror.rows("events")[1]) == 2
    assert mirror.capture_stats.insert_only == ("public.events",)


@pytest.mark.parametrize("rows", [3, 300])
def test_f22_unchanged_toast_is_left_alone(start: Start, rows: int) -> None:
    mirror = start(ITEMS)
    run(mirror, f"INSERT INTO items SELECT g, 0, 'a', {TOAST} FROM generate_series(1, {rows}) g")
    mirror.assert_equal("items")
    run(mirror, "UPDATE items SET n = n + 1")
    mirror.assert_equal("items")
    # the insert and the update that does not carry the value meet in one batch
    run(
        mirror,
        f"INSERT INTO items SELECT 1000 + g, 0, 'b', {TOAST} FROM generate_series(1, {rows}) g",
        "UPDATE items SET n = n + 1 WHERE id > 1000",
        "UPDATE items SET id = id + 5000 WHERE id > 1000",
        "UPDATE items SET document = NULL WHERE id = 1",
    )
    mirror.assert_equal("items")


def test_f22_unchanged_toast_with_identity_full(start: Start) -> None:
    mirror = start(ITEMS, "ALTER TABLE items REPLICA IDENTITY FULL")
    run(mirror, f"INSERT INTO items SELECT g, 0, 'a', {TOAST} FROM generate_series(1, 100) g")
    run(mirror, "UPDATE items SET n = 1", "UPDATE items SET id = id + 1000 WHERE id < 50")
    mirror.assert_equal("items")


@pytest.mark.parametrize("rows", [3, 300])
def test_f23_key_update_is_an_update_in_place(start: Start, rows: int) -> None:
    mirror = start(ITEMS)
    run(mirror, f"INSERT INTO items SELECT g, g, 'a', {TOAST} FROM generate_series(1, {rows}) g")
    run(mirror, "UPDATE items SET id = -id")
    mirror.assert_equal("items")
    assert mirror.delivery_stats.fallbacks == 0


@pytest.mark.parametrize("rows", [4, 300])
def test_f24_keys_swapped_and_shifted_in_one_transaction(start: Start, rows: int) -> None:
    mirror = start(ITEMS)
    run(mirror, f"INSERT INTO items SELECT g, g, 'row ' || g FROM generate_series(1, {rows}) g")
    run(
        mirror,
        "UPDATE items SET id = 0 WHERE id = 1",
        "UPDATE items SET id = 1 WHERE id = 2",
        "UPDATE items SET id = 2 WHERE id = 0",
        *(f"UPDATE items SET id = {g + 1} WHERE id = {g}" for g in range(rows, 2, -1)),
    )
    mirror.assert_equal("items")


def test_f24_keys_shifted_by_a_deferrable_key(start: Start) -> None:
    mirror = start(
        "CREATE TABLE ranks (id int PRIMARY KEY DEFERRABLE, name text)", "ALTER TABLE ranks REPLICA IDENTITY FULL"
    )
    run(mirror, "INSERT INTO ranks SELECT g, 'name ' || g FROM generate_series(1, 200) g")
    run(mirror, "UPDATE ranks SET id = id + 1")
    run(mirror, "UPDATE ranks SET id = CASE id WHEN 2 THEN 3 WHEN 3 THEN 2 END WHERE id IN (2, 3)")
    mirror.assert_equal("ranks")


def test_f25_truncate_of_several_tables_in_order(start: Start) -> None:
    mirror = start(
        "CREATE TABLE parents (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, name text)",
        "CREATE TABLE children (id int PRIMARY KEY, parent int REFERENCES parents)",
    )
    for count in (3, 300):
        run(
            mirror,
            f"INSERT INTO parents (name) SELECT 'a' FROM generate_series(1, {count})",
            "INSERT INTO children SELECT id, id FROM parents",
            "TRUNCATE parents RESTART IDENTITY CASCADE",
            "INSERT INTO parents (name) VALUES ('after')",
            "INSERT INTO children SELECT id, id FROM parents",
        )
        mirror.assert_equal("parents", "children")
        run(mirror, "TRUNCATE children", "TRUNCATE parents, children RESTART IDENTITY")
        mirror.assert_equal("parents", "children")


def test_f27_generated_columns_are_never_written(start: Start, postgres: PostgresServer) -> None:
    mirror = start(
        "CREATE TABLE areas (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, w int, h int,"
        " area int GENERATED ALWAYS AS (w * h) STORED)"
    )
    run(mirror, "INSERT INTO areas (w, h) SELECT g, 2 FROM generate_series(1, 200) g")
    run(mirror, "UPDATE areas SET w = 5 WHERE id < 3", "DELETE FROM areas WHERE id = 9")
    mirror.assert_equal("areas")


def test_f33_a_relation_message_sent_again_after_a_restart_changes_nothing(start: Start) -> None:
    mirror = start(ITEMS)
    run(mirror, "INSERT INTO items VALUES (1)")
    mirror.sync()
    for n in (2, 3):
        mirror.restart()
        run(mirror, f"INSERT INTO items VALUES ({n})")
        mirror.assert_equal("items")


def test_f41_subtransactions_and_their_rollback(start: Start) -> None:
    mirror = start(ITEMS)
    run(
        mirror,
        "INSERT INTO items VALUES (1)",
        "SAVEPOINT a",
        "INSERT INTO items SELECT g FROM generate_series(100, 400) g",
        "ROLLBACK TO a",
        "INSERT INTO items VALUES (2)",
        "SAVEPOINT b",
        "UPDATE items SET n = 7",
        "RELEASE b",
    )
    mirror.assert_equal("items")
    assert len(mirror.rows("items")[1]) == 2


def test_f43_logical_messages_are_no_commit_marks(start: Start) -> None:
    mirror = start(ITEMS)
    connection = mirror.source_db.connect(autocommit=False)
    connection.execute("INSERT INTO items VALUES (1)")
    connection.execute("SELECT pg_logical_emit_message(false, 'app', 'outside')")
    connection.execute("SELECT pg_logical_emit_message(true, 'app', 'inside')")
    mirror.source.nudge()
    run(mirror, "INSERT INTO items VALUES (2)")
    mirror.sync()
    assert mirror.rows("items")[1] == ["(2,0,,)"]
    connection.rollback()
    connection.execute("SELECT pg_logical_emit_message(true, 'app', 'inside')")
    connection.execute("INSERT INTO items VALUES (3)")
    connection.commit()
    connection.close()
    mirror.assert_equal("items")
    assert mirror.delivery_stats.changes["message"] == 1


def test_f45_row_filter_turns_updates_into_inserts_and_deletes(start: Start) -> None:
    mirror = start(
        "CREATE TABLE branches (id int, region text, n int, PRIMARY KEY (id, region))",
        sink={"tables": {"public.branches": {"where": "region = 'north'"}}},
    )
    run(
        mirror,
        "INSERT INTO branches SELECT g, CASE g % 2 WHEN 0 THEN 'north' ELSE 'south' END, g"
        " FROM generate_series(1, 200) g",
    )
    run(
        mirror, "UPDATE branches SET region = 'north' WHERE id = 1", "UPDATE branches SET region = 'south' WHERE id = 2"
    )
    mirror.sync()
    query = "SELECT t::text FROM branches t WHERE region = 'north' ORDER BY 1"
    assert mirror.source_db.execute(query) == mirror.target_db.execute("SELECT t::text FROM branches t ORDER BY 1")


def test_column_subset_leaves_the_rest_alone(start: Start) -> None:
    mirror = start(
        "CREATE TABLE people (id int PRIMARY KEY, name text, secret text NOT NULL)",
        sink={"tables": {"public.people": {"columns": ["id", "name"]}}},
    )
    run(mirror, "INSERT INTO people SELECT g, 'n', 's' FROM generate_series(1, 200) g", "UPDATE people SET name = 'x'")
    mirror.sync()
    assert mirror.target_db.value("SELECT count(*) FROM people WHERE name = 'x' AND secret IS NULL") == 200


def test_renamed_tables(start: Start) -> None:
    mirror = start(
        ITEMS, "CREATE TABLE other (id int PRIMARY KEY)", sink={"rename": {"public": "m", "public.items": "m.things"}}
    )
    run(mirror, "INSERT INTO items VALUES (1)", "INSERT INTO other VALUES (1)", "UPDATE items SET n = 2")
    mirror.sync()
    assert mirror.target_db.execute(
        "SELECT id, n FROM m.things, m.other USING (id)".replace(", m.other", " JOIN m.other")
    ) == [(1, 2)]


def test_f40_a_transaction_larger_than_a_batch_becomes_visible_at_once(start: Start) -> None:
    mirror = start(ITEMS)
    counts: set[int] = set()
    done = threading.Event()

    def watch() -> None:
        with mirror.target_db.connect() as connection:
            while not done.is_set():
                counts.add(connection.execute("SELECT count(*) FROM items").fetchone()[0])  # type: ignore[index]

    watcher = threading.Thread(target=watch)
    watcher.start()
    run(
        mirror,
        "INSERT INTO items SELECT g, 0, repeat('x', 50) FROM generate_series(1, 100000) g",
        "UPDATE items SET n = 1 WHERE id <= 20000",
    )
    mirror.assert_equal("items")
    done.set()
    watcher.join()
    assert mirror.queue.stats().last_seq > 5, "the transaction should have come in several batches"
    assert counts == {0, 100_000}


def test_f82_unique_secondary_index_conflicts_inside_a_batch_resolve_in_order(start: Start) -> None:
    mirror = start("CREATE TABLE users (id int PRIMARY KEY, email text UNIQUE)")
    run(mirror, "INSERT INTO users SELECT g, 'u' || g FROM generate_series(1, 200) g")
    mirror.assert_equal("users")
    run(
        mirror,
        "UPDATE users SET email = NULL WHERE id = 1",
        "UPDATE users SET email = 'u1' WHERE id = 2",
        "UPDATE users SET email = 'u2' WHERE id = 1",
        "UPDATE users SET email = 'new' || id WHERE id > 2",
        "UPDATE users SET email = 'u' || (id - 1) WHERE id > 100",
    )
    mirror.assert_equal("users")


def test_f99_triggers_and_foreign_keys_of_the_mirror_do_not_fire(start: Start) -> None:
    mirror = start(
        ITEMS,
        "CREATE FUNCTION twice() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.n := NEW.n * 2; RETURN NEW; END $$",
        "CREATE TRIGGER twice BEFORE INSERT ON items FOR EACH ROW EXECUTE FUNCTION twice()",
    )
    run(mirror, "INSERT INTO items VALUES (1, 5)")
    mirror.assert_equal("items")
    assert mirror.target_db.execute("SELECT n FROM items") == [(10,)]
    assert mirror.target_db.value("SELECT count(*) FROM pg_trigger WHERE tgname = 'twice'") == 1


def test_f100_an_update_of_a_missing_row_is_counted_and_healed_from_the_change(start: Start) -> None:
    mirror = start(ITEMS)
    run(mirror, "INSERT INTO items SELECT g, g, 'a' FROM generate_series(1, 200) g")
    mirror.sync()
    mirror.target_db.execute("DELETE FROM items WHERE id IN (1, 2, 3)")
    run(mirror, "UPDATE items SET n = -1 WHERE id = 1")
    mirror.sync()
    assert (mirror.delivery_stats.missing_rows, mirror.delivery_stats.healed_rows) == (1, 1)
    run(mirror, "UPDATE items SET n = -1 WHERE id > 1", "DELETE FROM items WHERE id = 200")
    mirror.assert_equal("items")
    mirror.target_db.execute("DELETE FROM items WHERE id = 5")
    run(mirror, "DELETE FROM items WHERE id = 5")
    mirror.assert_equal("items")
    assert (mirror.delivery_stats.missing_rows, mirror.delivery_stats.healed_rows) == (4, 3)


def test_f100_an_update_without_all_columns_is_healed_by_reading_the_source(start: Start) -> None:
    mirror = start(ITEMS)
    run(mirror, f"INSERT INTO items SELECT g, g, 'a', {TOAST} FROM generate_series(1, 200) g")
    mirror.sync()
    mirror.target_db.execute("DELETE FROM items WHERE id <= 100")
    run(mirror, "UPDATE items SET n = 0", "UPDATE items SET name = 'b' WHERE id = 7")
    mirror.assert_equal("items")
    assert mirror.delivery_stats.healed_rows == 100


def test_an_insert_of_a_row_that_is_there_is_healed(start: Start) -> None:
    mirror = start(ITEMS)
    mirror.target_db.execute("INSERT INTO items SELECT g, -1, 'intruder' FROM generate_series(1, 100) g")
    run(mirror, "INSERT INTO items SELECT g, g, 'a' FROM generate_series(1, 200) g")
    mirror.assert_equal("items")


def test_f98_a_refused_change_stops_the_sink_and_is_named(start: Start) -> None:
    mirror = start(ITEMS)
    mirror.target_db.execute("ALTER TABLE items ADD CHECK (n < 100)")
    run(mirror, "INSERT INTO items VALUES (1, 1)")
    mirror.sync()
    run(mirror, "INSERT INTO items VALUES (2, 500)", "INSERT INTO items VALUES (3, 1)")
    error = mirror.failure()
    assert isinstance(error, FatalError)
    assert "INSERT of public.items" in str(error)
    assert "items_n_check" in str(error)
    assert mirror.rows("items")[1] == ["(1,1,,)"]
    mirror.target_db.execute("ALTER TABLE items DROP CONSTRAINT items_n_check")
    mirror.restart()
    mirror.assert_equal("items")


def test_f102_a_column_missing_on_the_mirror_is_named(start: Start) -> None:
    mirror = start(ITEMS, sink={"schema_changes": "stop"})
    run(mirror, "ALTER TABLE items ADD COLUMN extra int", "INSERT INTO items VALUES (1, 1, 'a', 'b', 5)")
    error = mirror.failure()
    assert "public.items" in str(error)
    assert "extra" in str(error)
    mirror.target_db.execute("ALTER TABLE items ADD COLUMN extra int")
    mirror.restart()
    mirror.assert_equal("items")


def test_pausing_and_resuming_either_half(start: Start) -> None:
    mirror = start(ITEMS)
    mirror.delivery.pause()
    wait_for(lambda: mirror.delivery_stats.state == "paused", "the sink to pause")
    run(mirror, "INSERT INTO items VALUES (1)")
    wait_for(lambda: mirror.queue.stats().batches, "the change to be queued")
    assert mirror.rows("items")[1] == []
    mirror.delivery.resume()
    mirror.assert_equal("items")
    mirror.capture.pause()
    wait_for(lambda: mirror.capture_stats.state == "paused", "the source to pause")
    run(mirror, "INSERT INTO items VALUES (2)")
    mirror.capture.resume()
    mirror.assert_equal("items")


def test_a_hold_stops_the_mirror_at_exactly_one_position(start: Start) -> None:
    mirror = start(ITEMS)
    run(mirror, "INSERT INTO items VALUES (0)")
    mirror.sync()
    mirror.delivery.hold(None, 30)
    positions = []
    for n in range(1, 20):
        run(mirror, f"INSERT INTO items VALUES ({n})")
        positions.append(mirror.source_db.value("SELECT pg_current_wal_insert_lsn() - '0/0'"))
    for n in (5, 11, 12):
        mirror.source.nudge()
        assert mirror.delivery.hold(int(positions[n]), 30) == int(positions[n])
        assert mirror.target_db.value("SELECT max(id) FROM items") == n + 1
    mirror.delivery.release()
    mirror.assert_equal("items")
