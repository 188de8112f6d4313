"""Tables of the source are altered while they are mirrored: with event triggers that tell, and without."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from cdc.errors import FatalError
from cdc.postgres import ddl_capture
from cdc.postgres import source as postgres_source
from cdc.postgres.catalog_watch import CatalogWatch
from cdc.postgres.connection import Connection, connect
from tests.command import Cdc
from tests.mirror import Mirror, filled_mirror, wait_for
from tests.servers import Database

pytestmark = pytest.mark.usefixtures("quick_looks")

Life = Callable[..., AbstractContextManager[Mirror]]

ALL = {"tables": {"include": ["*"], "exclude": ["*.hidden*"]}}

ITEMS = """
CREATE TABLE items (id int PRIMARY KEY, n int, name varchar(20) NOT NULL DEFAULT 'x', note text);
INSERT INTO items SELECT g, g, 'row ' || g, repeat('note ', g) FROM generate_series(1, 50) g;
"""

COLUMNS = "SELECT attname FROM pg_attribute WHERE attrelid = 'items'::regclass AND attnum > 1 AND NOT attisdropped"

SHAPE = """
SELECT attname, format_type(atttypid, atttypmod), attnotnull, pg_get_expr(adbin, adrelid), attgenerated::text
  FROM pg_attribute LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
 WHERE attrelid = 'items'::regclass AND attnum > 0 AND NOT attisdropped ORDER BY attname
"""


@pytest.fixture(params=["triggers", "catalog"])
def capture(request: pytest.FixtureRequest) -> str:
    """How changes of shape are noticed."""
    return str(request.param)


@pytest.fixture
def life(source_db: Database, target_db: Database, tmp_path: Path, pg_dump: Path, request: Any) -> Life:
    """Runs a daemon for a while; several in turn go on where the last one was."""

    @contextmanager
    def life(*, source: dict[str, Any] | None = None, **options: Any) -> Iterator[Mirror]:
        if "capture" in request.fixturenames and request.getfixturevalue("capture") == "triggers":
            install(source_db)
        with filled_mirror(source_db, target_db, tmp_path, pg_dump, source=source or ALL, **options) as mirror:
            yield mirror

    return life


def install(database: Database) -> None:
    with connect(database.url) as connection:
        ddl_capture.execute(connection, ddl_capture.installation("postgres"))


def rows(database: Database, table: str) -> list[Any]:
    """Whatever the order of the columns is."""
    return database.execute(f"SELECT to_jsonb(t)::text FROM {table} AS t ORDER BY 1")


def assert_same(mirror: Mirror, *tables: str) -> None:
    """Rows and shape are the same, sooner or later: without DML only the look into the catalog tells."""

    def same() -> bool:
        mirror.sync()
        try:
            return all(rows(mirror.source_db, table) == rows(mirror.target_db, table) for table in tables or ("items",))
        except psycopg.errors.UndefinedTable:  # a new table is copied once the stream is past its creation
            return False

    wait_for(same, f"{tables} to be the same")
    if not tables:
        wait_for(
            lambda: mirror.error or mirror.target_db.execute(SHAPE) == mirror.source_db.execute(SHAPE),
            "the same columns",
        )
    if mirror.error:
        raise mirror.error


@contextmanager
def load(database: Database) -> Iterator[None]:
    """Small transactions on `items`, whatever its columns are."""
    stop = threading.Event()

    def run() -> None:
        with database.connect() as connection:
            for n in range(1000, 100_000):
                if stop.is_set():
                    return
                connection.execute(f"INSERT INTO items (id) VALUES ({n})")
                connection.execute(f"UPDATE items SET id = -id WHERE id = {n} AND {n} % 3 = 0")
                connection.execute(f"DELETE FROM items WHERE id = {n} - 20 AND {n} % 2 = 0")

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


NO_COPY = [
    "ADD COLUMN c int",
    "ADD COLUMN c int DEFAULT 7",
    "ADD COLUMN c int NOT NULL DEFAULT 7",
    "ADD COLUMN c timestamptz DEFAULT now()",
    "ADD COLUMN c text[] DEFAULT '{a,\"b c\"}', ADD COLUMN d jsonb DEFAULT '{\"a\": \"''%s''\"}'",
    "DROP COLUMN n",
    "RENAME COLUMN n TO m",
    "ALTER COLUMN name TYPE varchar(40)",
    "ALTER COLUMN name TYPE text",
    "ALTER COLUMN name DROP NOT NULL, ALTER COLUMN name SET DEFAULT 'y'",
    "ADD COLUMN g text GENERATED ALWAYS AS (name || '!') STORED",
    "DROP COLUMN n, ADD COLUMN n text DEFAULT 'n'",
]

COPY = [
    "ADD COLUMN c float8 DEFAULT random()",
    "ADD COLUMN c bigserial",
    "ALTER COLUMN n TYPE bigint",
    "ALTER COLUMN n TYPE text USING 'n' || n",
]


@pytest.mark.parametrize("alter", NO_COPY)
def test_f28_f29_columns_are_altered_under_load(life: Life, source_db: Database, capture: str, alter: str) -> None:
    source_db.execute(ITEMS)
    with life() as mirror:
        with load(source_db):
            mirror.sync()
            source_db.execute(f"ALTER TABLE items {alter}")
            mirror.sync()
        assert_same(mirror)
        assert mirror.fillings == 0, "a copy that was not necessary"


@pytest.mark.parametrize("alter", COPY)
def test_f31_rows_that_were_rewritten_are_copied_again(
    life: Life, source_db: Database, capture: str, alter: str
) -> None:
    source_db.execute(ITEMS)
    with life() as mirror:
        with load(source_db):
            mirror.sync()
            source_db.execute(f"ALTER TABLE items {alter}")
            wait_for(lambda: mirror.error or mirror.fillings, "a copy")
        assert_same(mirror)
        assert mirror.fillings == 1


def test_f31_columns_keep_their_places_where_they_got_other_names_before_the_copy(
    life: Life, source_db: Database, target_db: Database, capture: str
) -> None:
    order = "SELECT attname FROM pg_attribute WHERE attrelid = 'items'::regclass AND attnum > 0 AND NOT attisdropped"
    source_db.execute(ITEMS)
    with life() as mirror:
        mirror.delivery.pause()
        wait_for(lambda: mirror.delivery_stats.state == "paused", "the pause")
        source_db.execute("ALTER TABLE items ADD COLUMN c float8 DEFAULT random()")
        source_db.execute("ALTER TABLE items RENAME COLUMN n TO m")
        source_db.execute("ALTER TABLE items RENAME COLUMN name TO n")
        source_db.execute("UPDATE items SET m = m + 1")
        mirror.delivery.resume()
        wait_for(lambda: mirror.error or mirror.fillings, "a copy")
        assert_same(mirror)
        assert target_db.execute(f"{order} ORDER BY attnum") == source_db.execute(f"{order} ORDER BY attnum")


def test_f31_columns_of_foreign_keys_get_another_type(
    life: Life, source_db: Database, target_db: Database, capture: str
) -> None:
    source_db.execute(ITEMS + "CREATE TABLE orders (id int PRIMARY KEY, item int REFERENCES items)")
    source_db.execute("INSERT INTO orders SELECT id, id FROM items")
    keys = """SELECT conrelid::regclass::text, pg_get_constraintdef(oid), convalidated FROM pg_constraint
               WHERE contype = 'f'"""
    with life() as mirror:
        mirror.sync()
        source_db.execute("ALTER TABLE items ALTER id TYPE bigint; INSERT INTO items VALUES (3000000000)")
        assert_same(mirror)
        source_db.execute("ALTER TABLE orders ALTER item TYPE bigint; INSERT INTO orders VALUES (100, 3000000000)")
        assert_same(mirror, "items", "orders")
        wait_for(lambda: mirror.error or target_db.execute(keys) == source_db.execute(keys), "the key")
        source_db.execute("ALTER TABLE orders DROP CONSTRAINT orders_item_fkey")
        source_db.execute("ALTER TABLE items ALTER id TYPE text; INSERT INTO items VALUES ('a')")
        assert_same(mirror)
        left = "SELECT FROM cdc.post_data WHERE NOT done"
        wait_for(lambda: mirror.error or not target_db.execute(left), "all to be built")
        source_db.execute("ALTER TABLE orders ALTER item TYPE text; INSERT INTO orders VALUES (101, 'a')")
        assert_same(mirror, "items", "orders")
        assert target_db.execute(keys) == [], "one that only the mirror has, and that did not fit in between"


def test_f30_the_shape_changes_between_two_changes_of_a_transaction(
    life: Life, source_db: Database, target_db: Database, capture: str
) -> None:
    source_db.execute(ITEMS)
    with life() as mirror, source_db.connect() as connection:
        with connection.transaction():
            connection.execute("INSERT INTO items VALUES (100, 1, 'old', 'shape')")
            connection.execute("ALTER TABLE items ADD COLUMN c int DEFAULT 5, DROP COLUMN note")
            connection.execute("UPDATE items SET n = n + 1 WHERE id > 90")
            connection.execute("INSERT INTO items VALUES (101, 1, 'new', 6)")
            connection.execute("ALTER TABLE items RENAME COLUMN n TO m")
            connection.execute("UPDATE items SET m = m + 1, c = c + 1 WHERE id > 90")
            with connection.transaction():  # a savepoint
                connection.execute("ALTER TABLE items ADD COLUMN d int")
            connection.execute("UPDATE items SET d = 1 WHERE id > 100")
            connection.execute("DO $$ BEGIN ALTER TABLE items DROP COLUMN d; EXCEPTION WHEN OTHERS THEN NULL; END $$")
            connection.execute("DELETE FROM items WHERE id = 1")
            with connection.transaction(force_rollback=True):
                connection.execute("ALTER TABLE items ADD COLUMN never int")
            connection.execute("DELETE FROM items WHERE id = 2")
        assert_same(mirror)
        if capture == "triggers":
            assert mirror.fillings == 0


def test_f29_several_changes_before_anything_is_delivered(
    life: Life, source_db: Database, target_db: Database, capture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cdc.postgres.source.CATALOG_SECONDS", 3600.0)  # else a slow machine looks in between
    source_db.execute(ITEMS)
    with life() as mirror:
        mirror.sync()
        mirror.delivery.pause()
        source_db.execute("INSERT INTO items VALUES (101, 1)")
        source_db.execute("ALTER TABLE items ADD COLUMN c int DEFAULT 5")
        source_db.execute("INSERT INTO items VALUES (102, 1)")
        source_db.execute("ALTER TABLE items ADD COLUMN d int DEFAULT 6")
        source_db.execute("UPDATE items SET d = 7, c = 8 WHERE id > 100")
        source_db.execute("ALTER TABLE items DROP COLUMN n")
        source_db.execute("INSERT INTO items (id) VALUES (103)")
        mirror.delivery.resume()
        assert_same(mirror)
        assert mirror.fillings == 0
        mirror.delivery.pause()
        source_db.execute("ALTER TABLE items RENAME COLUMN c TO e")
        source_db.execute("INSERT INTO items (id, e) VALUES (104, 1)")
        source_db.execute("ALTER TABLE items RENAME COLUMN e TO f")
        source_db.execute("INSERT INTO items (id, f) VALUES (105, 1)")
        mirror.delivery.resume()
        assert_same(mirror)
        assert mirror.fillings == (capture == "catalog"), "nothing tells what `e` was"


def test_f29_f33_altered_while_the_daemon_was_down_and_described_again(
    life: Life, source_db: Database, target_db: Database, capture: str
) -> None:
    source_db.execute(ITEMS)
    with life() as mirror:
        mirror.sync()
    source_db.execute("INSERT INTO items VALUES (101, 1)")
    source_db.execute("ALTER TABLE items DROP COLUMN note, ALTER COLUMN name DROP NOT NULL, ADD COLUMN c int DEFAULT 3")
    source_db.execute("INSERT INTO items VALUES (102, 1, NULL)")
    with life() as mirror:
        assert_same(mirror)
        assert mirror.fillings == 0
        altered = target_db.execute("SELECT shape FROM cdc.tables")
        for _ in range(2):
            source_db.execute("UPDATE items SET n = n + 1")
            mirror.restart()
            assert_same(mirror)
        assert target_db.execute("SELECT shape FROM cdc.tables") == altered
        assert mirror.fillings == 0


def test_f33_what_is_delivered_once_more_does_not_undo_later_changes(
    life: Life, source_db: Database, target_db: Database, tmp_path: Path, capture: str
) -> None:
    source_db.execute(ITEMS)
    with life(keep_seconds=3600) as mirror:
        mirror.sync()
        ((before, seq),) = target_db.execute("SELECT position::text, seq FROM cdc.positions")
        source_db.execute("INSERT INTO items VALUES (101, 1, 'a', 'b')")
        source_db.execute("ALTER TABLE items ADD COLUMN c int DEFAULT 3")
        source_db.execute("UPDATE items SET c = id, n = 2 WHERE id % 2 = 0")
        source_db.execute("ALTER TABLE items DROP COLUMN note")
        source_db.execute("INSERT INTO items (id, c) VALUES (102, 9)")
        assert_same(mirror)
        mirror.stop()
        target_db.execute(f"UPDATE cdc.positions SET position = '{before}', seq = {seq}")
        mirror.delivery_stats.position = None
        mirror.start()
        assert_same(mirror)
        assert mirror.fillings == 1, "nothing tells what `c` was in the rows of the first shape"


def test_f16_a_new_table_is_copied_and_streamed_without_a_restart(
    life: Life, source_db: Database, target_db: Database, capture: str
) -> None:
    source_db.execute(ITEMS)
    with life() as mirror:
        with load(source_db):
            mirror.sync()
            source_db.execute("CREATE TYPE mood AS ENUM ('good'); CREATE SCHEMA sales")
            source_db.execute("CREATE TABLE sales.orders (id serial PRIMARY KEY, item int REFERENCES items, m mood)")
            source_db.execute("CREATE INDEX ON sales.orders (item)")
            source_db.execute("CREATE TABLE hidden (id int PRIMARY KEY); CREATE TEMP TABLE mine (id int)")
            source_db.execute("INSERT INTO sales.orders (m) SELECT 'good' FROM generate_series(1, 100)")
            wait_for(lambda: mirror.error or mirror.fillings, "a copy")
            source_db.execute(
                "UPDATE sales.orders SET item = id WHERE id <= 50; DELETE FROM sales.orders WHERE id > 90"
            )
        assert_same(mirror, "items", "sales.orders")
        assert target_db.value("SELECT to_regclass('hidden')") is None
        built = """SELECT array_agg(pg_get_indexdef(indexrelid) ORDER BY 1), (
                       SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conrelid = indrelid AND contype = 'f')
                     FROM pg_index WHERE indrelid = 'sales.orders'::regclass GROUP BY indrelid"""
        wait_for(lambda: mirror.error or target_db.execute(built) == source_db.execute(built), "indexes")
        assert mirror.fillings == 1


@pytest.mark.parametrize("locked", ["items", "parts_1"])
def test_f30_who_holds_a_table_for_long_holds_up_no_other(
    life: Life, source_db: Database, monkeypatch: pytest.MonkeyPatch, locked: str
) -> None:
    """In the middle of a migration, say. The catalog is looked at by the thread that captures all tables."""
    look, looks = CatalogWatch.look, list[None]()

    def counted(watch: CatalogWatch, connection: Connection, **options: Any) -> None:
        look(watch, connection, **options)
        looks.append(None)

    monkeypatch.setattr(CatalogWatch, "look", counted)
    source_db.execute(ITEMS + "CREATE TABLE other (id int PRIMARY KEY)")
    source_db.execute("CREATE TABLE parts (id int PRIMARY KEY) PARTITION BY LIST (id)")
    source_db.execute("CREATE TABLE parts_1 PARTITION OF parts FOR VALUES IN (1)")
    with life() as mirror:
        mirror.sync()
        with source_db.connect() as migration, migration.transaction():
            migration.execute(f"LOCK TABLE {locked}")
            before = len(looks)
            wait_for(lambda: mirror.error or len(looks) > before + 1, "one look that has begun since")
            source_db.execute("ALTER TABLE other ADD COLUMN n int DEFAULT 7; INSERT INTO other VALUES (1)")
            assert_same(mirror, "other")
        source_db.execute("ALTER TABLE items ADD COLUMN more int DEFAULT 8")
        assert_same(mirror)


def test_f30_a_start_beside_who_holds_a_table_says_whom_it_waits_for(
    life: Life, source_db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_source, "LOCK_SECONDS", 0.1)
    source_db.execute(ITEMS)
    with life() as mirror:
        mirror.sync()
        mirror.stop()
        with source_db.connect() as migration, migration.transaction():
            migration.execute("LOCK TABLE items")
            mirror.restart()
            wait_for(lambda: "lock timeout" in (mirror.capture_stats.error or ""), "the error")
            assert "pg_locks" in (mirror.capture_stats.hint or "")
            migration.execute("INSERT INTO items (id) VALUES (100)")
        assert_same(mirror)


def test_f16_what_a_new_table_has_is_built_without_a_restart(
    life: Life, source_db: Database, target_db: Database
) -> None:
    source_db.execute(ITEMS)
    with life() as mirror:
        mirror.sync()
        source_db.execute("CREATE TABLE fresh (id int PRIMARY KEY, n int UNIQUE, item int REFERENCES items)")
        source_db.execute("CREATE INDEX ON fresh (item); INSERT INTO fresh VALUES (1, 1, 1)")
        assert_same(mirror, "fresh")
        built = "SELECT count(*) FROM pg_index WHERE indrelid = to_regclass('fresh')"
        keys = "SELECT count(*) FROM pg_constraint WHERE conrelid = to_regclass('fresh') AND contype = 'f'"
        wait_for(
            lambda: mirror.error or (target_db.value(built), target_db.value(keys)) == (3, 1),
            "indexes and foreign key",
        )
        assert mirror.error is None


def test_f32_dropped_and_created_again(life: Life, source_db: Database, target_db: Database, capture: str) -> None:
    source_db.execute(ITEMS + "CREATE TABLE other (id int PRIMARY KEY); INSERT INTO other VALUES (1)")
    with life() as mirror:
        mirror.sync()
        target_db.execute("CREATE VIEW seen AS SELECT id FROM items")
        source_db.execute("UPDATE items SET n = 0")
        source_db.execute(
            "DROP TABLE items; CREATE TABLE items (id int, day date, PRIMARY KEY (id, day)); DROP TABLE other"
        )
        source_db.execute("INSERT INTO items VALUES (1, '2020-02-29'), (1, '2020-03-01')")
        wait_for(lambda: mirror.error or mirror.fillings, "a copy")
        source_db.execute("DELETE FROM items WHERE day > '2020-02-29'; INSERT INTO items VALUES (2, '2020-03-01')")
        assert_same(mirror)
        assert target_db.execute("SELECT * FROM other") == [(1,)], "often the last copy"
        wait_for(
            lambda: target_db.value("SELECT position > '1/0' FROM cdc.tables WHERE source_table = 'other'"),
            "the mirror to let go of what was dropped",
        )


def test_f32_tables_get_other_names(life: Life, source_db: Database, target_db: Database, capture: str) -> None:
    source_db.execute(ITEMS + "CREATE SCHEMA sales; CREATE TABLE hidden (id int PRIMARY KEY)")
    with life() as mirror:
        mirror.sync()
        source_db.execute("UPDATE items SET n = 0")
        source_db.execute("ALTER TABLE items RENAME TO things; ALTER TABLE things ADD COLUMN c int DEFAULT 1")
        source_db.execute("UPDATE things SET n = 1 WHERE id < 9")
        wait_for(lambda: mirror.error or target_db.value("SELECT to_regclass('things')"), "the new name")
        assert_same(mirror, "things")
        source_db.execute("ALTER TABLE things SET SCHEMA sales; UPDATE sales.things SET n = 2 WHERE id < 5")
        wait_for(lambda: mirror.error or target_db.value("SELECT to_regclass('sales.things')"), "the new schema")
        assert_same(mirror, "sales.things")
        assert mirror.fillings == 0
    source_db.execute("ALTER TABLE sales.things RENAME TO a; UPDATE sales.a SET n = 3 WHERE id < 3")
    with life() as mirror:
        assert_same(mirror, "sales.a")
        source_db.execute("ALTER TABLE sales.a RENAME TO hidden_a; UPDATE sales.hidden_a SET n = 4")
        mirror.sync()
        wait_for(
            lambda: mirror.error or target_db.value("SELECT position > '1/0' FROM cdc.tables WHERE source_table = 'a'"),
            "it to leave",
        )
        assert target_db.value("SELECT max(n) FROM sales.a") == 3 or capture == "catalog"
        source_db.execute("ALTER TABLE sales.hidden_a RENAME TO a")
        wait_for(lambda: mirror.error or mirror.fillings, "it to come back")
        assert_same(mirror, "sales.a")


def test_f32_a_table_takes_the_name_of_a_dropped_one(
    life: Life, source_db: Database, target_db: Database, capture: str
) -> None:
    source_db.execute(ITEMS + "CREATE TABLE items_new (LIKE items INCLUDING ALL); ALTER TABLE items_new ADD extra int")
    with life() as mirror:
        mirror.sync()
        with source_db.connect() as connection, connection.transaction():
            connection.execute("INSERT INTO items_new SELECT *, 5 FROM items")
            connection.execute("DROP TABLE items")
            connection.execute("ALTER TABLE items_new RENAME TO items")
        source_db.execute("UPDATE items SET extra = 6 WHERE id < 20")
        wait_for(lambda: mirror.error or mirror.fillings, "a copy")
        assert_same(mirror)


def test_f29_the_policy_stop_names_table_and_change(
    life: Life, source_db: Database, target_db: Database, capture: str
) -> None:
    source_db.execute(ITEMS)
    with life(sink={"schema_changes": "stop"}) as mirror:
        mirror.sync()
        source_db.execute("ALTER TABLE items ADD COLUMN c int DEFAULT 3, DROP COLUMN note")
        source_db.execute("INSERT INTO items (id, c) VALUES (101, 1)")
        error = mirror.failure()
        assert "table public.items has changed at the source: add column c integer" in str(error)
        assert 'schema_changes = "stop"' in str(error)
        assert isinstance(error, FatalError)
        assert "alter the mirror" in error.hint
        target_db.execute("ALTER TABLE items ADD COLUMN c int DEFAULT 3")
        mirror.restart()
        mirror.sync()
        assert target_db.value("SELECT count(*) FROM items WHERE c = 1") == 1
        source_db.execute("ALTER TABLE items ALTER COLUMN c TYPE text USING 'c' || c")
        source_db.execute("INSERT INTO items (id, c) VALUES (102, 1)")
        error = mirror.failure()
        assert "public.items" in str(error)
        assert isinstance(error, FatalError)
        assert 'must be copied again: set schema_changes = "apply" for sink mirror' in error.hint
        assert mirror.fillings == 0
    with life() as mirror:
        assert_same(mirror)


def test_f30_another_primary_key_holds_from_the_next_row_on(life: Life, source_db: Database, capture: str) -> None:
    """What was a row's key may be another row's value now. Without event triggers the key's columns tell."""
    source_db.execute(ITEMS.replace("name varchar(20)", "name varchar(20) UNIQUE"))
    source_db.execute(
        "CREATE TABLE pairs (id int PRIMARY KEY, u text NOT NULL); INSERT INTO pairs SELECT id, name FROM items"
    )
    with life() as mirror:
        mirror.sync()
        source_db.execute("ALTER TABLE items DROP CONSTRAINT items_pkey, ADD PRIMARY KEY (name)")
        source_db.execute("UPDATE items SET n = 7 WHERE name = 'row 2'; INSERT INTO items VALUES (1, 3, 'new', 'y')")
        source_db.execute("ALTER TABLE pairs DROP CONSTRAINT pairs_pkey, ADD PRIMARY KEY (u)")
        source_db.execute("UPDATE pairs SET id = 5 WHERE u = 'row 4'")
        assert_same(mirror)
        assert_same(mirror, "pairs")
        key = "SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conrelid = 'pairs'::regclass AND contype = 'p'"
        wait_for(lambda: mirror.error or mirror.target_db.value(key) == "PRIMARY KEY (u)", "the mirror's key")
        source_db.execute("ALTER TABLE pairs DROP CONSTRAINT pairs_pkey; INSERT INTO pairs VALUES (5, 'row 4')")
        assert_same(mirror, "pairs")
        assert mirror.fillings == 0


def test_f30_f89_who_wants_a_value_of_a_renamed_unique_column_waits(
    life: Life, source_db: Database, target_db: Database, capture: str
) -> None:
    source_db.execute(
        "CREATE TABLE items (id int PRIMARY KEY, u text UNIQUE, n int); INSERT INTO items VALUES (9, '9')"
    )
    with life(sink={"on_error": "park"}) as mirror:
        mirror.sync()
        unique = "SELECT count(*) FROM pg_index WHERE indrelid = 'items'::regclass AND indisunique"
        wait_for(lambda: mirror.error or target_db.value(unique) == 2, "the index")
        source_db.execute("ALTER TABLE items RENAME u TO v; INSERT INTO items VALUES (8, '8')")
        assert_same(mirror)
        target_db.execute("ALTER TABLE items ADD CONSTRAINT poison CHECK (n <> 666)")
        source_db.execute("INSERT INTO items VALUES (1, 'a', 666); UPDATE items SET v = 'x' WHERE id = 1")
        source_db.execute("INSERT INTO items VALUES (2, 'a', 1)")
        mirror.sync()
        parked = mirror.queue.parked("mirror")
        assert (len(parked) >= 3, sum(bool(row.attempts) for row in parked)) == (True, 1), "the others were not tried"
        target_db.execute("ALTER TABLE items DROP CONSTRAINT poison")
        wait_for(lambda: mirror.error or not mirror.delivery_stats.parked, "nothing to be parked")
        assert_same(mirror)


def test_f28_f32_random_changes_of_rows_and_shapes(life: Life, source_db: Database, capture: str) -> None:
    source_db.execute(ITEMS)
    chance = random.Random(5)
    with life() as mirror:
        for number in range(60):
            table, columns = "items", [name for (name,) in source_db.execute(COLUMNS)]
            name, size = chance.choice(columns or ["none"]), chance.choice([3, 90])
            statement = chance.choice(
                [
                    f"ALTER TABLE items ADD COLUMN c{number} int DEFAULT {number}",
                    f"ALTER TABLE items ADD COLUMN c{number} text",
                    f"ALTER TABLE items RENAME COLUMN {name} TO r{number}",
                    f"ALTER TABLE items DROP COLUMN {name}, ADD COLUMN {name} timestamptz DEFAULT now()",
                    f"ALTER TABLE items ALTER COLUMN {name} TYPE text",
                    f"ALTER TABLE items DROP COLUMN {name}",
                ]
                if columns and chance.random() < 0.4
                else [
                    f"INSERT INTO {table} (id) SELECT {number + 1}00 + g FROM generate_series(1, {size}) g",
                    f"UPDATE {table} SET id = -id WHERE id % 7 = {number % 7}",
                    f"DELETE FROM {table} WHERE id % 11 = {number % 11}",
                    f"UPDATE {table} SET {name} = NULL WHERE id % 3 = {number % 3}" if columns else "SELECT 1",
                ]
            )
            source_db.execute(statement)
        assert_same(mirror)


def test_f28_to_f33_the_shapes_that_mirrors_keep_and_what_the_user_made(
    life: Life, source_db: Database, target_db: Database
) -> None:
    source_db.execute(
        ITEMS + "CREATE TABLE small (id int PRIMARY KEY, v int); CREATE TABLE renamed (id int PRIMARY KEY)"
    )
    target_db.execute("CREATE TABLE small (id bigint PRIMARY KEY, v bigint, mine text DEFAULT 'm')")
    target_db.execute("CREATE SCHEMA crm; CREATE TABLE crm.people (id int PRIMARY KEY)")
    target_db.execute("CREATE TABLE items (id int PRIMARY KEY, n int, name varchar(20) NOT NULL, note text)")
    options = {"rename": {"public.renamed": "crm.people"}, "tables": {"public.items": {"columns": ["id", "n", "name"]}}}
    with life(sink=options) as mirror:
        mirror.sync()
        target_db.execute("UPDATE cdc.tables SET shape = NULL WHERE source_table = 'small'")  # of an older version
        mirror.stop()
        mirror.queue.set("shapes", None)
        mirror.restart()
        source_db.execute("ALTER TABLE small ADD COLUMN w int NOT NULL DEFAULT 4; INSERT INTO small VALUES (1, 2, 3)")
        source_db.execute("ALTER TABLE renamed ADD COLUMN c int DEFAULT 4; INSERT INTO renamed VALUES (1, 2)")
        source_db.execute("ALTER TABLE items ADD COLUMN c int NOT NULL DEFAULT 4; INSERT INTO items (id) VALUES (101)")
        source_db.execute("ALTER TABLE items DROP COLUMN note; INSERT INTO items (id) VALUES (102)")
        mirror.sync()
        wait_for(lambda: mirror.error or target_db.execute("SELECT * FROM small") == [(1, 2, "m", 3)], "small")
        assert target_db.execute("SELECT * FROM crm.people") == [(1, 2)]
        assert target_db.value("SELECT count(*) FROM items WHERE name IS NOT NULL") == 52
        assert mirror.error is None


def test_f29_partitioned_tables_are_altered_by_their_root(
    life: Life, source_db: Database, target_db: Database, capture: str
) -> None:
    source_db.execute("CREATE TABLE items (id int PRIMARY KEY, n int) PARTITION BY HASH (id)")
    source_db.execute("CREATE TABLE items_0 PARTITION OF items FOR VALUES WITH (MODULUS 2, REMAINDER 0)")
    source_db.execute("CREATE TABLE items_1 PARTITION OF items FOR VALUES WITH (MODULUS 2, REMAINDER 1)")
    source_db.execute("INSERT INTO items SELECT g, g FROM generate_series(1, 20) g")
    with life() as mirror:
        mirror.sync()
        source_db.execute("ALTER TABLE items ADD COLUMN c int DEFAULT 5, DROP COLUMN n")
        source_db.execute("INSERT INTO items VALUES (21, 6)")
        assert_same(mirror)
        assert mirror.fillings == 0
        source_db.execute(
            "ALTER TABLE items ALTER COLUMN c TYPE text USING 'c' || c; UPDATE items SET c = 'd' WHERE id = 1"
        )
        wait_for(lambda: mirror.error or mirror.fillings, "a copy")
        assert_same(mirror)


def test_f29_what_depends_on_a_column_of_the_mirror_is_not_dropped(
    life: Life, source_db: Database, target_db: Database
) -> None:
    source_db.execute(ITEMS)
    with life() as mirror:
        mirror.sync()
        target_db.execute("CREATE VIEW report AS SELECT note FROM items")
        source_db.execute("ALTER TABLE items DROP COLUMN note; INSERT INTO items (id) VALUES (101)")
        error = mirror.failure()
        assert "schema change of public.items (drop column note) is refused" in str(error)
        assert isinstance(error, FatalError)
        assert "view public.report" in error.hint
        target_db.execute("DROP VIEW report")
        mirror.restart()
        assert_same(mirror)


def test_messages_without_the_key_are_not_believed(life: Life, source_db: Database, target_db: Database) -> None:
    source_db.execute(ITEMS)
    with life() as mirror:
        mirror.sync()
        oid = source_db.value("SELECT 'items'::regclass::oid::int")
        forged = f'{{"oid": {oid}, "schema": "public", "name": "items", "columns": []}}'
        for prefix in ("cdc.ddl", "cdc.ddl:", "cdc.ddl:guess"):
            source_db.execute(f"SELECT pg_logical_emit_message(true, '{prefix}', '{forged}')")
        assert_same(mirror)


def test_ddl_capture_is_installed_checked_and_removed(cdc: Cdc, source_db: Database, target_db: Database) -> None:
    source_db.execute(ITEMS)
    cdc.configure(source_db.url, target_db.url)
    assert "by looking into the catalog" in cdc("check").stdout
    printed = cdc("init", "--ddl-capture", "--print").stdout
    assert "CREATE EVENT TRIGGER" in printed
    assert source_db.value("SELECT count(*) FROM pg_event_trigger") == 0
    for _ in range(2):
        assert cdc("init", "--ddl-capture", "shop").returncode == 0
    assert "told by event triggers" in cdc("check").stdout
    source_db.execute("CREATE TEMP TABLE mine (a int); DROP TABLE mine")
    source_db.execute("DROP TABLE cdc.ddl_capture")
    source_db.execute("ALTER TABLE items ADD COLUMN c int")  # warned, not refused
    assert cdc("init", "--ddl-capture", "--remove").returncode == 0
    assert source_db.value("SELECT count(*) FROM pg_event_trigger") == 0


def test_f29_a_column_is_dropped_and_added_again(life: Life, source_db: Database, capture: str) -> None:
    """Of the same type: rows of the new column look like rows of the old one, until the catalog is looked at."""
    source_db.execute(ITEMS)
    with life() as mirror:
        mirror.sync()
        mirror.delivery.pause()
        with source_db.connect() as connection, connection.transaction():
            connection.execute("ALTER TABLE items DROP COLUMN note")
            connection.execute("ALTER TABLE items ADD COLUMN note text")
            connection.execute("INSERT INTO items VALUES (101, 1, 'a', 'new')")
        source_db.execute("UPDATE items SET note = 'other' WHERE id = 3")
        mirror.delivery.resume()
        assert_same(mirror)
        assert mirror.fillings == (capture == "catalog")


def test_f32_an_index_has_the_name_of_one_of_a_table_that_is_gone(
    life: Life, source_db: Database, target_db: Database
) -> None:
    """The mirror keeps the table, and its indexes with their names."""
    source_db.execute(ITEMS + "CREATE TABLE rest (id int PRIMARY KEY)")
    with life() as mirror:
        mirror.sync()
        source_db.execute("DROP TABLE items")
        source_db.execute("CREATE TABLE others (id int CONSTRAINT items_pkey PRIMARY KEY)")
        source_db.execute("INSERT INTO others VALUES (1)")
        wait_for(lambda: mirror.error or target_db.value("SELECT to_regclass('others')") is not None, "a copy")
        assert_same(mirror, "others")
