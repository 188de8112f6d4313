"""What happens to a target: it refuses for a while, goes back in time, and has an equality of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.mirror import Mirror, running_mirror, wait_for
from tests.servers import Database

SCHEMA = (
    "CREATE TABLE items (id int PRIMARY KEY, n int NOT NULL DEFAULT 0, name text UNIQUE)",
    "CREATE TABLE log (n int, what text)",
    "ALTER TABLE log REPLICA IDENTITY FULL",
)


BREAK_SINK = """SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
                 WHERE datname = current_database() AND application_name = 'cdc sink mirror'"""
BREAK_SOURCE = (
    "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = 'cdc_shop' AND active"
)

MirrorOf = Callable[..., Mirror]


@pytest.fixture
def mirror_of(source_db: Database, target_db: Database, tmp_path: Path, pg_dump: Path) -> Iterator[MirrorOf]:
    """Starts a mirror of a schema."""
    with ExitStack() as stack:
        yield lambda *schema: stack.enter_context(running_mirror(source_db, target_db, tmp_path, pg_dump, *schema))


@pytest.fixture
def mirror(mirror_of: MirrorOf) -> Mirror:
    return mirror_of(*SCHEMA)


def run(mirror: Mirror, *statements: str) -> None:
    """Run statements in one transaction."""
    with mirror.source_db.connect() as connection, connection.transaction():
        for statement in statements:
            connection.execute(statement)


def test_f90_no_retry_lets_an_older_change_overtake_a_newer_one(mirror: Mirror) -> None:
    """The mirror's table refuses to go backwards, while both of its connections are broken again and again."""
    run(mirror, "INSERT INTO items VALUES (1), (2)")
    mirror.sync()
    mirror.target_db.execute(
        """CREATE FUNCTION only_forward() RETURNS trigger LANGUAGE plpgsql AS
               $$ BEGIN IF NEW.n < OLD.n THEN RAISE 'older change of row %', NEW.id; END IF; RETURN NEW; END $$;
           CREATE TRIGGER only_forward BEFORE UPDATE ON items FOR EACH ROW EXECUTE FUNCTION only_forward();
           ALTER TABLE items ENABLE ALWAYS TRIGGER only_forward"""
    )
    mirror.delivery.pause()
    wait_for(lambda: mirror.delivery_stats.state == "paused", "the sink to pause")
    with mirror.source_db.connect() as connection:
        for n in range(400):
            connection.execute("UPDATE items SET n = n + 1 WHERE id = %s", [n % 2 + 1])
            if n == 100:
                mirror.delivery.resume()  # with many transactions at once
            if n > 100 and n % 50 == 20:
                wait_for(lambda: mirror.target_db.value(BREAK_SINK), "the sink to be connected")
            if n % 50 == 45:
                wait_for(lambda: connection.execute(BREAK_SOURCE).rowcount, "the source to be connected")
    mirror.assert_equal("items")
    assert mirror.delivery_stats.fallbacks == 0, "it went backwards, and was put right"
    assert mirror.delivery_stats.retries > 0
    assert mirror.capture_stats.retries > 0


@pytest.mark.parametrize("rows", [3, 300])
def test_f94_a_commit_that_succeeds_although_its_connection_breaks_is_not_repeated(mirror: Mirror, rows: int) -> None:
    """The target waits for a standby that does not exist, between its commit and the answer that never comes."""
    target = mirror.target_db
    waiting = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'SyncRep'"
    set_standbys = "ALTER SYSTEM SET synchronous_standby_names = '{}'; SELECT pg_reload_conf()"
    mirror.sync()
    target.server.psql(set_standbys.format("nobody"))
    try:
        run(mirror, f"INSERT INTO log SELECT g, 'once' FROM generate_series(1, {rows}) g")
        ((pid,),) = wait_for(lambda: target.execute(waiting), "the commit")
        target.execute(f"SET synchronous_commit = local; SELECT pg_terminate_backend({pid})")
    finally:
        target.server.psql(set_standbys.format(""))
    mirror.assert_equal("log")
    assert mirror.delivery_stats.retries == 1


@pytest.mark.parametrize("rows", [3, 300])
@pytest.mark.parametrize("on_error", ["stop", "park"])
def test_f94_a_connection_that_was_lost_while_nothing_came_is_made_anew(
    source_db: Database, target_db: Database, tmp_path: Path, pg_dump: Path, on_error: str, rows: int
) -> None:
    sink = {"on_error": on_error}
    with running_mirror(source_db, target_db, tmp_path, pg_dump, *SCHEMA, sink=sink) as mirror:
        mirror.sync()
        assert target_db.value(BREAK_SINK) >= 1
        run(mirror, f"INSERT INTO log SELECT g, 'once' FROM generate_series(1, {rows}) g")
        mirror.assert_equal("log")


@pytest.mark.parametrize("rows", [3, 300])
@pytest.mark.parametrize("state", ["40P01", "40001", "55P03"], ids=["deadlock", "serialization", "lock-timeout"])
def test_f95_what_passes_by_itself_is_tried_again_as_a_whole(mirror: Mirror, state: str, rows: int) -> None:
    """A trigger refuses the end of a transaction twice; its beginning is a table where a repetition would show."""
    mirror.target_db.execute(
        f"""CREATE SEQUENCE attempts;
            CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
               $$ BEGIN IF nextval('public.attempts') < 3 THEN RAISE 'not now' USING ERRCODE = '{state}'; END IF;
                        RETURN NEW; END $$;
            CREATE TRIGGER refuse BEFORE INSERT ON items FOR EACH ROW EXECUTE FUNCTION refuse();
            ALTER TABLE items ENABLE ALWAYS TRIGGER refuse"""
    )
    run(
        mirror,
        f"INSERT INTO log SELECT g, 'once' FROM generate_series(1, {rows}) g",
        f"INSERT INTO items SELECT g FROM generate_series(1, {rows}) g",
    )
    mirror.assert_equal("log", "items")
    assert mirror.target_db.value("SELECT last_value FROM attempts") == rows + 2
    assert mirror.delivery_stats.retries == 2


def test_f101_f115_a_restored_target_is_brought_up_to_date_by_what_the_queue_keeps(mirror: Mirror) -> None:
    mirror.queue.register("a sink that never moves")
    run(mirror, "INSERT INTO items SELECT g, 0, 'name ' || g FROM generate_series(1, 300) g")
    mirror.sync()
    mirror.stop()
    target, backup = mirror.target_db, f"{mirror.target_db.name}_backup"
    with target.server.connect() as connection:
        connection.execute(f"CREATE DATABASE {backup} TEMPLATE {target.name}")
        mirror.start()
        for n in range(3):
            run(
                mirror,
                "INSERT INTO log SELECT g % 5, 'twice would show' FROM generate_series(1, 200) g",
                "DELETE FROM log WHERE ctid = (SELECT min(ctid) FROM log)",
                f"UPDATE items SET id = id + 1000 WHERE id % 7 = {n}",
                f"UPDATE items SET n = n + 1, name = 'new ' || {n} || name WHERE id % 3 = {n}",
                f"DELETE FROM items WHERE id % 11 = {n}",
                f"INSERT INTO items VALUES ({n - 10}, 1, 'x' || {n})",
            )
            mirror.assert_equal("items", "log")
        mirror.stop()
        connection.execute(f"DROP DATABASE {target.name} WITH (FORCE)")
        connection.execute(f"ALTER DATABASE {backup} RENAME TO {target.name}")
    assert len(mirror.rows("log")[1]) == 0
    mirror.restart()
    mirror.assert_equal("items", "log")


SPELLINGS = {
    "numeric": ("g + 0.0", "g + 0.00"),
    "interval": ("make_interval(days => g)", "make_interval(hours => 24 * g)"),
    "jsonb": ("format('[%s.0]', g)::jsonb", "format('[%s.00]', g)::jsonb"),
}


@pytest.mark.parametrize("key", SPELLINGS)
@pytest.mark.parametrize("rows", [3, 300])
def test_f120_keys_are_equal_where_the_target_says_so(mirror_of: MirrorOf, key: str, rows: int) -> None:
    """One key in two spellings, in one transaction: 1.0 and 1.00, a day and 24 hours."""
    mirror = mirror_of(f"CREATE TABLE codes (code {key} PRIMARY KEY, n int)")
    one, other = SPELLINGS[key]
    respelled = f"(SELECT {other} AS code FROM generate_series(1, {rows}) g) AS other"
    run(mirror, f"INSERT INTO codes SELECT {one}, g FROM generate_series(1, {rows}) g")
    mirror.assert_equal("codes")
    run(
        mirror,
        "UPDATE codes SET n = n + 1",
        "DELETE FROM codes WHERE n % 2 = 0",
        f"INSERT INTO codes SELECT {other}, 0 FROM generate_series(1, {rows}) g ON CONFLICT DO NOTHING",
        f"UPDATE codes SET code = other.code, n = n * 10 FROM {respelled} WHERE codes.code = other.code",
        "DELETE FROM codes WHERE n = 0",
    )
    mirror.assert_equal("codes")
    assert mirror.delivery_stats.missing_rows == 0


def test_f40_f94_a_large_transaction_is_never_seen_in_parts_though_the_target_breaks_in_its_middle(
    mirror: Mirror,
) -> None:
    """Most of it is on the target, uncommitted, when the connection is cut; then it comes once more, and once only."""
    counts: set[int] = set()
    done = threading.Event()

    def watch() -> None:
        with mirror.target_db.connect() as connection:
            while not done.is_set():
                counts.update(count for (count,) in connection.execute("SELECT count(*) FROM log").fetchall())

    watcher = threading.Thread(target=watch)
    watcher.start()
    applied: list[int] = []
    apply = mirror.sink.apply

    def apply_and_break(*arguments: object) -> object:
        result = apply(*arguments)  # type: ignore[arg-type]
        applied.append(result.changes)
        if len(applied) in (1, 3):
            mirror.sink._connection.close()  # type: ignore[union-attr]
        return result

    mirror.sink.apply = apply_and_break  # type: ignore[method-assign, assignment]
    try:
        run(mirror, "INSERT INTO log SELECT g, repeat('x', 60) FROM generate_series(1, 60000) g")
        mirror.assert_equal("log")
    finally:
        done.set()
        watcher.join()
    assert sum(applied) > 60_000, "nothing was cut in its middle"
    wait_for(lambda: mirror.delivery_stats.retries == 2, "both breaks to be counted")
    assert counts <= {0, 60_000}
