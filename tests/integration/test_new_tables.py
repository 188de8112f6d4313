"""Tables that come and go in the life of a mirror, and targets that are not what they were."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from cdc import delivery
from cdc.change import TableName
from cdc.errors import FatalError, PermanentError, ResyncRequired, TransientError
from cdc.filling import GROWING, filled_fact
from cdc.postgres.snapshot import PostgresSnapshot
from cdc.postgres.source import PostgresSource
from tests.mirror import Mirror, filled_mirror, wait_for
from tests.servers import Database, PostgresServer

Life = Callable[..., AbstractContextManager[Mirror]]

SHOP = """
CREATE TYPE mood AS ENUM ('sad', 'glad');
CREATE TABLE regions (id int PRIMARY KEY, name text UNIQUE);
CREATE TABLE customers (id int PRIMARY KEY, mood mood, region int REFERENCES regions, name text UNIQUE);
CREATE INDEX ON customers (mood);
INSERT INTO regions VALUES (1, 'north'), (2, 'south');
INSERT INTO customers SELECT n, 'glad', n % 2 + 1, 'customer ' || n FROM generate_series(1, 50) n
"""

MORE = """
CREATE SCHEMA sales;
CREATE TYPE sales.colour AS ENUM ('red', 'green');
CREATE TYPE sales.address AS (street text, colours sales.colour[]);
CREATE DOMAIN sales.amount AS int CHECK (VALUE > 0);
CREATE SEQUENCE sales.numbers START 1000;
CREATE FUNCTION sales.next_number() RETURNS int LANGUAGE sql AS $$SELECT nextval('sales.numbers')::int$$;
CREATE FUNCTION sales.forbid() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN RAISE 'fired'; END$$;
CREATE TABLE sales.orders (
    id serial PRIMARY KEY, customer int REFERENCES customers, "to" sales.address, amount sales.amount, mood mood,
    number int DEFAULT sales.next_number(), other bigint DEFAULT nextval('sales.numbers') UNIQUE,
    line int GENERATED ALWAYS AS IDENTITY, double int GENERATED ALWAYS AS (amount * 2) STORED
);
CREATE INDEX ON sales.orders (customer);
COMMENT ON TABLE sales.orders IS 'what they want';
CREATE VIEW sales.who AS SELECT c.name, o.amount FROM customers c JOIN sales.orders o ON o.customer = c.id;
CREATE TABLE sales.visits (id int, day int, PRIMARY KEY (id, day)) PARTITION BY RANGE (day);
CREATE TABLE sales.visits_1 PARTITION OF sales.visits FOR VALUES FROM (0) TO (10);
CREATE INDEX ON sales.visits (day);
CREATE TABLE sales.favourites (since int, PRIMARY KEY (id)) INHERITS (customers);
INSERT INTO sales.favourites VALUES (1001, 'sad', 1, 'first', 1);
INSERT INTO sales.orders (customer, "to", amount, mood)
SELECT n % 50 + 1, ('main', '{red,green}'::sales.colour[])::sales.address, n, 'sad' FROM generate_series(1, 200) n;
INSERT INTO sales.visits SELECT n, n % 10 FROM generate_series(1, 100) n;
CREATE TRIGGER forbidden BEFORE INSERT ON sales.orders FOR EACH ROW EXECUTE FUNCTION sales.forbid();
ALTER TABLE sales.orders DISABLE TRIGGER forbidden
"""

OBJECTS = """
SELECT object FROM (
SELECT conrelid::regclass || ' ' || conname AS object FROM pg_constraint WHERE contype IN ('p', 'u', 'f')
UNION SELECT format('%s valid: %s', indexrelid::regclass, indisvalid) FROM pg_index WHERE indexrelid > 16384
UNION SELECT oid::regclass || ' ' || relkind::text FROM pg_class WHERE oid > 16384 AND relkind IN ('r', 'v', 'S', 'p')
UNION SELECT tgname::text FROM pg_trigger WHERE NOT tgisinternal
UNION SELECT attrelid::regclass || ' ' || pg_get_expr(adbin, adrelid) FROM pg_attrdef
        JOIN pg_attribute ON attrelid = adrelid AND attnum = adnum
) AS objects WHERE object !~ '^(cdc[.]|pg_toast|information_schema)' ORDER BY 1
"""

ALL = {"tables": {"include": ["*"]}}


@pytest.fixture(autouse=True)
def eager_upkeep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "UPKEEP_SECONDS", 0.05)


@pytest.fixture
def life(source_db: Database, target_db: Database, tmp_path: Path, pg_dump: Path) -> Life:
    """Runs a daemon for a while; several in turn go on where the last one was."""

    @contextmanager
    def life(*, source: dict[str, Any] | None = None, **options: Any) -> Iterator[Mirror]:
        with filled_mirror(source_db, target_db, tmp_path, pg_dump, source=source or ALL, **options) as mirror:
            yield mirror

    return life


def without(*tables: str) -> dict[str, Any]:
    """A source's options that leave out some tables of `public`."""
    return {"tables": {"include": ["*"], "exclude": [f"public.{table}" for table in tables]}}


def wait_until_built(mirror: Mirror) -> None:
    pending = "SELECT kind, name FROM cdc.post_data WHERE NOT done"
    wait_for(lambda: mirror.error or not mirror.target_db.execute(pending), "all to be built")
    if mirror.error is not None:
        raise mirror.error


# tables that come


def test_f15_tables_captured_later_are_created_copied_and_streamed(
    life: Life, postgres: PostgresServer, source_db: Database, target_db: Database
) -> None:
    source_db.execute(SHOP)
    with life(source=without("regions")) as mirror:
        mirror.assert_equal("customers")
        wait_until_built(mirror)
    assert target_db.value("SELECT to_regclass('regions')") is None
    source_db.execute(MORE)
    source_db.execute("UPDATE customers SET mood = 'sad' WHERE id % 3 = 0")
    with life() as mirror:
        source_db.execute("INSERT INTO regions VALUES (3, 'east'); UPDATE customers SET region = 3 WHERE id < 9")
        source_db.execute("INSERT INTO sales.orders (customer, amount) SELECT 7, 1 FROM generate_series(1, 100)")
        source_db.execute("UPDATE sales.orders SET amount = amount + 1; DELETE FROM sales.orders WHERE id % 3 = 0")
        source_db.execute("DELETE FROM sales.visits WHERE day = 3; UPDATE sales.favourites SET since = 2")
        mirror.assert_equal("ONLY customers", "regions", "sales.orders", "sales.visits_1", "sales.who")
        mirror.assert_equal("sales.favourites", "customers")
        wait_until_built(mirror)
        mirror.assert_equal("sales.orders")
    made = "SELECT obj_description('sales.orders'::regclass)"
    assert target_db.execute(OBJECTS) == source_db.execute(OBJECTS)
    assert target_db.value(made) == "what they want"
    assert target_db.value("SELECT nextval('sales.numbers')") == 1400, "where it stood after the copy"


def test_f15_foreign_keys_between_old_and_new_tables_wait_for_the_stream(
    life: Life, source_db: Database, target_db: Database, tmp_path: Path, pg_dump: Path
) -> None:
    """The copies are of different times: what refers to each other fits only when the stream has passed the later."""
    source_db.execute(SHOP)
    with life(source=without("regions")) as mirror:
        wait_until_built(mirror)
    source_db.execute("CREATE TABLE notes (id int PRIMARY KEY, customer int REFERENCES customers)")
    source_db.execute("INSERT INTO regions VALUES (9, 'new'); INSERT INTO customers VALUES (99, 'glad', 9, 'late')")
    source_db.execute("INSERT INTO notes VALUES (1, 99)")
    mirror = Mirror(source_db, target_db, tmp_path, pg_dump, source=ALL)
    try:
        mirror.fill()
        assert mirror.rows("notes")[1] == ["(1,99)"]
        assert target_db.value("SELECT max(id) FROM customers") == 50, "not delivered yet"
        foreign = "SELECT conname FROM pg_constraint WHERE contype = 'f' ORDER BY 1"
        assert target_db.execute(foreign) == []
        keys = "SELECT conname FROM pg_constraint WHERE contype = 'p' AND connamespace = 2200 ORDER BY 1"
        assert target_db.execute(keys) == [("customers_pkey",), ("notes_pkey",), ("regions_pkey",)]
        mirror.deliver()
        wait_until_built(mirror)
        assert target_db.execute(foreign) == [("customers_region_fkey",), ("notes_customer_fkey",)]
        mirror.assert_equal("customers", "regions", "notes")
    finally:
        mirror.close()


def test_f15_new_tables_of_a_renamed_mirror(life: Life, source_db: Database, target_db: Database) -> None:
    sink = {"rename": {"public": "shop", "public.regions": "shop.customers", "public.customers": "crm.regions"}}
    source_db.execute(SHOP)
    source_db.execute("CREATE SEQUENCE numbers; CREATE TABLE a (id int DEFAULT nextval('numbers') PRIMARY KEY)")
    with life(source=without("regions"), sink=sink) as mirror:
        wait_until_built(mirror)
    source_db.execute("CREATE TABLE b (id int DEFAULT nextval('numbers') PRIMARY KEY, mood mood, a int REFERENCES a)")
    source_db.execute("CREATE VIEW pairs AS SELECT b.id FROM a JOIN b ON b.a = a.id")
    source_db.execute("INSERT INTO a DEFAULT VALUES; INSERT INTO b (mood, a) VALUES ('sad', 1)")
    with life(sink=sink) as mirror:
        mirror.sync()
        wait_until_built(mirror)
    assert target_db.execute("SELECT id, mood::text, a FROM shop.b") == [(2, "sad", 1)]
    assert target_db.value("SELECT count(*) FROM shop.customers") == 2, "the regions"
    assert target_db.value("SELECT count(*) FROM public.pairs") == 1
    foreign = "SELECT conrelid::regclass::text, confrelid::regclass::text FROM pg_constraint WHERE contype = 'f'"
    assert sorted(target_db.execute(foreign)) == [("crm.regions", "shop.customers"), ("shop.b", "shop.a")]
    sequences = "SELECT oid::regclass::text FROM pg_class WHERE relkind = 'S'"
    assert target_db.execute(sequences) == [("shop.numbers",)]
    assert target_db.value("SELECT pg_get_expr(adbin, adrelid) FROM pg_attrdef WHERE adrelid = 'shop.b'::regclass") == (
        "nextval('shop.numbers'::regclass)"
    )


def test_f15_what_the_user_has_made_already_is_taken(life: Life, source_db: Database, target_db: Database) -> None:
    source_db.execute(SHOP)
    with life():
        pass
    types = "CREATE TYPE colour AS ENUM ('red'); CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT 1';"
    tables = "CREATE TABLE a (id int PRIMARY KEY, c colour DEFAULT 'red', n int DEFAULT f());"
    source_db.execute(types + tables + "CREATE TABLE b (id int PRIMARY KEY, c colour); INSERT INTO a VALUES (1)")
    target_db.execute(types + "CREATE TABLE b (id int PRIMARY KEY, c colour)")
    with life() as mirror:
        source_db.execute("INSERT INTO b VALUES (1, 'red')")
        mirror.assert_equal("a", "b")
        wait_until_built(mirror)


def test_a_view_in_the_place_of_a_new_table_is_an_error(life: Life, source_db: Database, target_db: Database) -> None:
    source_db.execute(SHOP)
    with life():
        pass
    source_db.execute("CREATE TABLE a (id int PRIMARY KEY)")
    target_db.execute("CREATE VIEW a AS SELECT 1 AS id")
    with pytest.raises(PermanentError, match=r'creating the tables on the target: relation "a" already exists'), life():
        pass


def test_f102_a_mirror_that_the_user_made_is_left_to_him(life: Life, source_db: Database, target_db: Database) -> None:
    source_db.execute("CREATE TABLE a (id int PRIMARY KEY)")
    target_db.execute("CREATE TABLE a (id int PRIMARY KEY)")
    with life():
        pass
    source_db.execute("CREATE TABLE b (id int PRIMARY KEY); INSERT INTO b VALUES (1)")
    with pytest.raises(FatalError, match=r"missing on the target: public\.b$"), life():
        pass
    target_db.execute("CREATE TABLE b (id int PRIMARY KEY)")
    with life() as mirror:
        mirror.assert_equal("a", "b")


def test_f102_a_table_that_was_dropped_on_the_mirror_is_not_quietly_empty(
    life: Life, source_db: Database, target_db: Database
) -> None:
    source_db.execute(SHOP)
    with life() as mirror:
        wait_until_built(mirror)
    target_db.execute("DROP TABLE regions CASCADE")
    source_db.execute("CREATE TABLE a (id int PRIMARY KEY)")
    with pytest.raises(FatalError, match=r"gone from the target: public\.regions$") as caught, life():
        pass
    assert "exclude" in caught.value.hint
    with life(source=without("regions")) as mirror:
        mirror.assert_equal("a", "customers")
    with life() as mirror:
        mirror.assert_equal("regions", "customers")
        wait_until_built(mirror)
    assert target_db.execute(OBJECTS) == source_db.execute(OBJECTS)


def test_f50_killed_while_new_tables_are_copied(
    life: Life, source_db: Database, target_db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    source_db.execute(SHOP)
    with life() as mirror:
        wait_until_built(mirror)
    source_db.execute(MORE)
    original = PostgresSource.snapshot

    def broken(source: PostgresSource) -> PostgresSnapshot:
        monkeypatch.setattr(PostgresSource, "snapshot", original)
        source_db.execute("CREATE INDEX late ON sales.orders (mood)")
        raise FatalError("killed here")

    monkeypatch.setattr(PostgresSource, "snapshot", broken)
    with pytest.raises(FatalError, match="killed here"), life():
        pass
    with life() as mirror:
        mirror.assert_equal("sales.orders", "sales.visits")
        wait_until_built(mirror)
    assert target_db.execute(OBJECTS) == source_db.execute(OBJECTS)


def test_f16_a_table_created_while_others_are_copied_is_copied_too(
    life: Life, source_db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The snapshot publishes it, so its changes come: they must find a copy."""
    source_db.execute(SHOP)
    original = PostgresSource.snapshot

    def late(source: PostgresSource) -> PostgresSnapshot:
        monkeypatch.setattr(PostgresSource, "snapshot", original)
        source_db.execute("CREATE TABLE late (id int PRIMARY KEY); INSERT INTO late VALUES (1)")
        return original(source)

    monkeypatch.setattr(PostgresSource, "snapshot", late)
    with life() as mirror:
        source_db.execute("INSERT INTO late VALUES (2)")
        mirror.assert_equal("late", "customers")


def test_a_table_that_vanishes_while_it_is_prepared_is_left_out(
    life: Life, source_db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    source_db.execute(SHOP + "; CREATE TABLE one (id int); CREATE TABLE other (id int)")
    source_db.execute("ALTER TABLE one REPLICA IDENTITY FULL; ALTER TABLE other REPLICA IDENTITY FULL")
    snapshot, dump = PostgresSource.snapshot, PostgresSource.dump_schema

    def dump_without(source: PostgresSource) -> object:
        source_db.execute("DROP TABLE IF EXISTS one")
        return dump(source)

    def snapshot_without(source: PostgresSource) -> PostgresSnapshot:
        source_db.execute("DROP TABLE IF EXISTS other")
        return snapshot(source)

    monkeypatch.setattr(PostgresSource, "dump_schema", dump_without)
    monkeypatch.setattr(PostgresSource, "snapshot", snapshot_without)
    with life() as mirror:
        assert mirror.delivery_stats.retries == 2
        mirror.assert_equal("customers", "regions")
        wait_until_built(mirror)


def test_a_growing_mirror_waits_for_its_source(
    life: Life, source_db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A complete one does not; but changes of a table whose copy was interrupted would find nothing."""
    source_db.execute(SHOP)
    with life():
        pass
    asked = []

    def away(source: PostgresSource) -> list[TableName]:
        asked.append(source)
        if len(asked) > 1:
            monkeypatch.undo()
        raise TransientError("the source is away")

    monkeypatch.setattr(PostgresSource, "tables", away)
    with life() as mirror:
        assert len(asked) == 1
        mirror.queue.set(filled_fact("mirror"), GROWING)
    with life():
        assert len(asked) == 2


# tables that go


def copy_but(monkeypatch: pytest.MonkeyPatch, life: Life, table: str) -> None:
    """Fill a mirror that fails when this table is complete."""
    remember = Mirror.fill

    def fill(mirror: Mirror) -> None:
        done = mirror.sink.table_copied

        def refuse(copied: TableName, position: int, rows: int) -> None:
            if copied.name == table:
                raise FatalError(f"{table} cannot be copied")
            done(copied, position, rows)

        mirror.sink.table_copied = refuse  # type: ignore[method-assign, assignment]
        remember(mirror)

    monkeypatch.setattr(Mirror, "fill", fill)
    with pytest.raises(FatalError, match="cannot be copied"), life():
        pass
    monkeypatch.setattr(Mirror, "fill", remember)


def test_f15_a_table_removed_before_it_was_complete_keeps_nothing_waiting(
    life: Life, source_db: Database, target_db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is anything built that is about it: the foreign key to it could not be."""
    source_db.execute(SHOP)
    copy_but(monkeypatch, life, "regions")
    target_db.execute("DELETE FROM regions")
    with life(source=without("regions")) as mirror:
        source_db.execute("UPDATE customers SET mood = 'sad' WHERE id < 10")
        source_db.execute("INSERT INTO regions VALUES (3, 'east')")
        mirror.assert_equal("customers")
        wait_until_built(mirror)
        indexes = "SELECT indexrelid::regclass::text FROM pg_index WHERE indrelid = %s::regclass ORDER BY 1"
        built = [("customers_mood_idx",), ("customers_name_key",), ("customers_pkey",)]
        assert target_db.execute(indexes, ["customers"]) == built
        assert target_db.execute(indexes, ["regions"]) == []
    with life() as mirror:
        mirror.assert_equal("customers", "regions")
        wait_until_built(mirror)
    assert target_db.execute(OBJECTS) == source_db.execute(OBJECTS)


def test_f15_a_removed_table_stops_changing_and_is_copied_anew_when_it_is_back(
    life: Life, source_db: Database, target_db: Database
) -> None:
    source_db.execute(SHOP)
    with life() as mirror:
        mirror.assert_equal("regions")
        wait_until_built(mirror)
        mirror.delivery.hold(None, 60)
        source_db.execute("INSERT INTO regions VALUES (3, 'queued'); UPDATE customers SET region = 3 WHERE id = 1")
        end = source_db.value("SELECT pg_current_wal_lsn() - '0/0'")
        wait_for(lambda: (mirror.queue.position or 0) >= end, "the changes to be queued")
    with life(source=without("regions")) as mirror:
        source_db.execute("INSERT INTO regions VALUES (4, 'streamed')")
        source_db.execute("TRUNCATE regions, customers")
        source_db.execute("INSERT INTO regions VALUES (5, 'after'); INSERT INTO customers VALUES (1, 'sad', 5, 'one')")
        mirror.assert_equal("customers")
        assert mirror.rows("regions")[1] == ["(1,north)", "(2,south)"]
    with life() as mirror:
        source_db.execute("INSERT INTO regions VALUES (6, 'back')")
        mirror.assert_equal("regions", "customers")
        wait_until_built(mirror)
    assert target_db.execute(OBJECTS) == source_db.execute(OBJECTS)


def test_f15_rows_of_a_removed_table_may_refer_to_what_is_gone(
    life: Life, source_db: Database, target_db: Database
) -> None:
    source_db.execute("CREATE TABLE a (id int PRIMARY KEY); CREATE TABLE b (id int PRIMARY KEY, a int REFERENCES a)")
    source_db.execute("INSERT INTO a VALUES (1), (2); INSERT INTO b VALUES (1, 1), (2, 2)")
    with life() as mirror:
        wait_until_built(mirror)
    source_db.execute("DELETE FROM b WHERE id = 1; DELETE FROM a WHERE id = 1")
    with life(source=without("b")) as mirror:
        mirror.assert_equal("a")
    with life() as mirror:
        mirror.assert_equal("a", "b")


@pytest.mark.parametrize("include", ["pubilc.*", "other.*"])
def test_a_mistake_in_the_globs_does_not_cost_the_mirror(
    life: Life, source_db: Database, target_db: Database, include: str
) -> None:
    source_db.execute(SHOP + "; CREATE SCHEMA other; CREATE TABLE other.a (id int PRIMARY KEY)")
    with life(source={"tables": {"include": ["public.*"]}}):
        pass
    before = target_db.execute("SELECT * FROM cdc.tables")
    told = r"no table matches|none of the tables that it mirrors is captured any more"
    with pytest.raises(FatalError, match=told), life(source={"tables": {"include": [include]}}):
        pass
    assert target_db.execute("SELECT * FROM cdc.tables") == before
    with life(source={"tables": {"include": ["public.*"]}}) as mirror:
        mirror.assert_equal("customers")


# targets and queues that are not what they were


@pytest.mark.parametrize("emptied", ["DELETE FROM cdc.positions", "DROP SCHEMA cdc CASCADE; DROP TABLE customers"])
def test_f115_a_mirror_that_was_complete_is_not_filled_again(
    life: Life, source_db: Database, target_db: Database, emptied: str
) -> None:
    source_db.execute(SHOP)
    with life():
        pass
    target_db.execute(emptied)
    with pytest.raises(ResyncRequired, match="sink mirror: the target has no position") as caught, life():
        pass
    assert "`cdc resync mirror --yes`" in caught.value.hint


def test_f115_nor_where_the_whole_database_is_gone(life: Life, source_db: Database, target_db: Database) -> None:
    source_db.execute(SHOP)
    with life():
        pass
    target_db.drop()
    with pytest.raises(ResyncRequired, match="the target has no position"), life():
        pass


def test_a_lost_data_directory_loses_nothing_where_the_slot_still_has_it(
    source_db: Database, target_db: Database, tmp_path: Path, pg_dump: Path
) -> None:
    """The target stands where the new queue begins: nothing is copied again, and what comes is applied."""
    source_db.execute(SHOP)
    first = Mirror(source_db, target_db, tmp_path, pg_dump, source=ALL)
    first.fill()
    first.close()
    source_db.execute("UPDATE customers SET mood = 'sad'")
    start = "UPDATE cdc.positions SET position = (SELECT %s::pg_lsn)"
    slot = "SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = 'cdc_shop'"
    target_db.execute(start, [source_db.value(slot)])
    copies = target_db.execute("SELECT * FROM cdc.tables")
    (tmp_path / "new").mkdir()
    with filled_mirror(source_db, target_db, tmp_path / "new", pg_dump, source=ALL) as mirror:
        mirror.assert_equal("customers", "regions")
        assert mirror.delivery_stats.changes["update"] == 50
    assert target_db.execute("SELECT * FROM cdc.tables") == copies


def test_a_lost_data_directory_is_noticed_where_changes_are_missing(
    life: Life, source_db: Database, target_db: Database, tmp_path: Path, pg_dump: Path
) -> None:
    source_db.execute(SHOP)
    with life() as mirror:
        mirror.sync()
        mirror.delivery.hold(None, 60)
        source_db.execute("UPDATE customers SET mood = 'sad'")
        end = source_db.value("SELECT pg_current_wal_lsn() - '0/0'")
        confirmed = "SELECT confirmed_flush_lsn - '0/0' FROM pg_replication_slots WHERE slot_name = 'cdc_shop'"
        wait_for(lambda: source_db.value(confirmed) >= end, "the changes to be confirmed")
    (tmp_path / "new").mkdir()
    before = target_db.execute("SELECT * FROM cdc.tables")
    with (
        pytest.raises(ResyncRequired, match=r"sink mirror: the target stands at .*, the queue begins at"),
        filled_mirror(source_db, target_db, tmp_path / "new", pg_dump, source=ALL),
    ):
        pass
    assert target_db.execute("SELECT * FROM cdc.tables") == before
