"""A mirror that refuses some rows: they wait, with what depends on them, the others flow, and the mirror heals."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest

from cdc.errors import TransientError
from cdc.parking_schedule import Clock
from cdc.position import Position
from cdc.postgres.target_transaction import TargetTransaction
from cdc.sink import SinkContext, Subject
from sinks.postgres import PostgresSink
from tests.command import Cdc
from tests.mirror import Mirror, running_mirror, wait_for
from tests.processes import kill_tree, wait_until
from tests.servers import Database

SCHEMA = (
    "CREATE TABLE items (id int PRIMARY KEY, n int NOT NULL DEFAULT 0, name text UNIQUE)",
    "CREATE TABLE log (n int, what text)",
    "ALTER TABLE log REPLICA IDENTITY FULL",
)

MirrorOf = Callable[..., Mirror]


@pytest.fixture
def mirror_of(source_db: Database, target_db: Database, tmp_path: Path, pg_dump: Path) -> Iterator[MirrorOf]:
    """Starts a mirror of a schema, which parks."""
    with ExitStack() as stack:
        yield lambda *schema: stack.enter_context(
            running_mirror(source_db, target_db, tmp_path, pg_dump, *schema, sink={"on_error": "park"})
        )


def run(mirror: Mirror, *statements: str) -> None:
    """Run statements in one transaction."""
    with mirror.source_db.connect() as connection, connection.transaction():
        for statement in statements:
            connection.execute(statement)


def heal(mirror: Mirror, *tables: str) -> None:
    """Wait until nothing is parked, and compare."""
    mirror.sync()
    wait_for(lambda: mirror.error or not mirror.delivery_stats.parked, "nothing to be parked")
    mirror.assert_equal(*tables)


def test_f89_one_row_is_refused_and_the_others_flow(mirror_of: MirrorOf) -> None:
    mirror = mirror_of(*SCHEMA)
    mirror.target_db.execute("ALTER TABLE items ADD CHECK (id <> 7 OR n < 1)")
    run(mirror, "INSERT INTO items SELECT g, 0, g FROM generate_series(1, 1000) g")
    run(mirror, "UPDATE items SET n = 1", "INSERT INTO log VALUES (1, 'whole')")
    run(mirror, "UPDATE items SET n = 2 WHERE id IN (7, 8)")
    mirror.sync()
    assert mirror.target_db.execute("SELECT id FROM items WHERE n = 0") == [(7,)]
    assert mirror.target_db.value("SELECT n FROM items WHERE id = 8") == 2
    assert mirror.rows("log")[0] == mirror.rows("log")[1]
    assert mirror.delivery_stats.parked == 2
    assert [len(row.keys or ()) for row in mirror.queue.parked("mirror")] == [2, 2], "its id, and its name"
    mirror.target_db.execute("ALTER TABLE items DROP CONSTRAINT items_check")
    heal(mirror, "items", "log")


def test_f89_f94_what_went_well_before_a_refusal_is_not_done_twice(mirror_of: MirrorOf) -> None:
    """A table is altered, so that it goes transaction by transaction; then one is refused. Rows without key tell."""
    log = "CREATE TABLE log (n int); ALTER TABLE log REPLICA IDENTITY FULL"
    mirror = mirror_of("CREATE TABLE items (id int PRIMARY KEY, n int)", log)
    run(mirror, "INSERT INTO items SELECT g, 0 FROM generate_series(1, 10) g")
    mirror.sync()
    mirror.stop()
    mirror.target_db.execute("ALTER TABLE items ADD CONSTRAINT poison CHECK (n <> 666)")
    run(mirror, "INSERT INTO log SELECT generate_series(1, 300)")
    run(mirror, "ALTER TABLE items ADD COLUMN c int", "UPDATE items SET n = 1")
    run(mirror, "INSERT INTO log SELECT generate_series(301, 600)")
    run(mirror, "UPDATE items SET n = 666 WHERE id = 5")
    mirror.start()
    mirror.sync()
    assert mirror.rows("log")[0] == mirror.rows("log")[1]
    assert mirror.delivery_stats.parked
    mirror.target_db.execute("ALTER TABLE items DROP CONSTRAINT poison")
    heal(mirror, "items", "log")


def test_f89_f94_nor_before_a_key_that_is_found_twice_at_the_end(mirror_of: MirrorOf) -> None:
    """The same where the target has taken all, and only a look at its deferrable keys finds the fault."""
    log = "CREATE TABLE log (n int); ALTER TABLE log REPLICA IDENTITY FULL"
    mirror = mirror_of(*SWAPS, log)
    mirror.sync()
    mirror.stop()
    mirror.target_db.execute("INSERT INTO places VALUES (99, 5)")
    run(mirror, "INSERT INTO log SELECT generate_series(1, 300)")
    run(mirror, "ALTER TABLE items ADD COLUMN c int", "INSERT INTO items VALUES (1, 1)")
    run(mirror, "INSERT INTO places VALUES (1, 5)")
    mirror.start()
    mirror.sync()
    assert mirror.rows("log")[0] == mirror.rows("log")[1]
    assert mirror.delivery_stats.parked == 1
    mirror.target_db.execute("DELETE FROM places WHERE id = 99")
    heal(mirror, "items", "log", "places")


IDENTITY_BESIDE_KEY = (
    "CREATE TABLE items (id int PRIMARY KEY, name text NOT NULL CONSTRAINT by_name UNIQUE, n int, note text)",
    "ALTER TABLE items REPLICA IDENTITY USING INDEX by_name",
    "ALTER TABLE items ALTER note SET STORAGE external",
)


def test_f89_f90_no_row_is_taken_for_another_that_has_had_its_primary_key(mirror_of: MirrorOf) -> None:
    """Where something else identifies rows, and the one that had the key is parked."""
    mirror = mirror_of(*IDENTITY_BESIDE_KEY)
    run(mirror, "INSERT INTO items VALUES (9, 'a', 1, repeat('x', 9000)), (99, 'z', 1, 'z')")
    mirror.target_db.execute("ALTER TABLE items ADD CONSTRAINT poison CHECK (n <> 666)")
    run(mirror, "UPDATE items SET id = 10, n = 666 WHERE name = 'a'")
    mirror.sync()
    run(mirror, "INSERT INTO items VALUES (9, 'b', 2, 'b')")
    mirror.sync()
    assert mirror.target_db.execute("SELECT name, n FROM items WHERE id = 9") == [("a", 1)]
    run(mirror, "UPDATE items SET n = 5 WHERE name = 'a'", "UPDATE items SET n = 6 WHERE name = 'a'")
    mirror.sync()
    mirror.target_db.execute("ALTER TABLE items DROP CONSTRAINT poison")
    heal(mirror, "items")
    run(mirror, "DELETE FROM items WHERE name = 'z'", "INSERT INTO items VALUES (98, 'z', 3, 'w')")
    heal(mirror, "items")


SWAPS = (
    "CREATE TABLE places (id int PRIMARY KEY, place int UNIQUE DEFERRABLE INITIALLY DEFERRED)",
    "CREATE TABLE items (id int PRIMARY KEY)",
)


CHECK_ALWAYS = """
DO $$ DECLARE found record; BEGIN
    FOR found IN SELECT tgrelid::regclass AS name, tgname FROM pg_trigger WHERE tgisinternal LOOP
        EXECUTE format('ALTER TABLE %s ENABLE ALWAYS TRIGGER %I', found.name, found.tgname);
    END LOOP;
END $$
"""
"""A session of a replica does not check deferrable constraints otherwise. (One that may not be a replica does.)"""


@pytest.mark.parametrize("rows", [0, 300])
def test_f89_rows_change_places_beside_one_that_is_refused(mirror_of: MirrorOf, rows: int) -> None:
    mirror = mirror_of(*SWAPS)
    mirror.target_db.execute(CHECK_ALWAYS)
    mirror.target_db.execute("ALTER TABLE items ADD CONSTRAINT poison CHECK (id <> 7)")
    run(mirror, "INSERT INTO places VALUES (1, 1), (2, 2), (3, 3)")
    run(
        mirror,
        "UPDATE places SET place = 2 WHERE id = 1",
        f"INSERT INTO items SELECT g + 10 FROM generate_series(1, {rows}) g",
        "INSERT INTO items VALUES (7)",
        "UPDATE places SET place = 1 WHERE id = 2",
        "INSERT INTO items VALUES (8)",
    )
    run(mirror, "INSERT INTO items VALUES (9)")
    mirror.assert_equal("places")
    assert mirror.target_db.value("SELECT count(*) FROM items") == rows + 2
    assert mirror.delivery_stats.parked == 1
    mirror.target_db.execute("ALTER TABLE items DROP CONSTRAINT poison")
    heal(mirror, "places", "items")


@pytest.mark.parametrize("server_checks", [True, False])
@pytest.mark.parametrize("then", ["", "INSERT INTO items VALUES (8)"])
def test_f89_a_transaction_whose_rest_fails_its_deferred_check_waits_as_a_whole(
    mirror_of: MirrorOf, then: str, *, server_checks: bool
) -> None:
    """One half of a swap is refused: the other is not, but may not stay without it. Later ones are not held."""
    mirror = mirror_of(*SWAPS)
    if server_checks:
        mirror.target_db.execute(CHECK_ALWAYS)
    mirror.target_db.execute("ALTER TABLE places ADD CONSTRAINT poison CHECK (id <> 2 OR place <> 1)")
    run(mirror, "INSERT INTO places VALUES (1, 1), (2, 2), (3, 3)")
    mirror.sync()
    swap = ("UPDATE places SET place = 2 WHERE id = 1", "UPDATE places SET place = 1 WHERE id = 2", then)
    run(mirror, *filter(None, swap))
    run(mirror, "UPDATE places SET place = 4 WHERE id = 3")
    run(mirror, "UPDATE places SET place = 5 WHERE id = 1")
    mirror.sync()
    assert sorted(mirror.target_db.execute("TABLE places")) == [(1, 1), (2, 2), (3, 4)]
    assert mirror.delivery_stats.parked >= 3
    mirror.target_db.execute("ALTER TABLE places DROP CONSTRAINT poison")
    heal(mirror, "places", "items")


def test_f89_a_deferred_check_is_made_where_the_end_of_a_transaction_waits(mirror_of: MirrorOf) -> None:
    mirror = mirror_of(*SWAPS)
    mirror.target_db.execute("ALTER TABLE places ADD CONSTRAINT poison CHECK (id <> 2 OR place <> 1)")
    mirror.target_db.execute("ALTER TABLE items ADD CONSTRAINT poison CHECK (id <> 7)")
    run(mirror, "INSERT INTO places VALUES (1, 1), (2, 2), (3, 3)", "INSERT INTO items VALUES (7)")
    mirror.sync()
    run(mirror, "UPDATE places SET place = CASE id WHEN 1 THEN 2 ELSE 1 END WHERE id < 3", "DELETE FROM items")
    run(mirror, "UPDATE places SET place = 4 WHERE id = 3")
    mirror.sync()
    assert sorted(mirror.target_db.execute("TABLE places")) == [(1, 1), (2, 2), (3, 4)]
    mirror.target_db.execute("ALTER TABLE places DROP CONSTRAINT poison; ALTER TABLE items DROP CONSTRAINT poison")
    heal(mirror, "places", "items")


def test_f89_who_wants_what_a_parked_change_would_free_waits(mirror_of: MirrorOf) -> None:
    """Also where only a deferrable constraint says that a value is unique."""
    mirror = mirror_of(*SWAPS)
    mirror.target_db.execute("ALTER TABLE places ADD CONSTRAINT poison CHECK (place <> 9)")
    run(mirror, "INSERT INTO places VALUES (1, 1), (2, 2)")
    run(mirror, "UPDATE places SET place = 9 WHERE id = 1")
    run(mirror, "INSERT INTO places SELECT g, g FROM generate_series(100, 200) g", "INSERT INTO places VALUES (3, 1)")
    run(mirror, "UPDATE places SET place = 3 WHERE id = 2")
    mirror.sync()
    assert mirror.target_db.execute("SELECT id, place FROM places WHERE id < 10 ORDER BY id") == [(1, 1), (2, 3)]
    mirror.target_db.execute("ALTER TABLE places DROP CONSTRAINT poison")
    heal(mirror, "places")


def test_f40_f89_a_large_transaction_becomes_visible_without_what_is_refused(mirror_of: MirrorOf) -> None:
    """It comes in several batches; the refused row is in its middle, a pair that depends on each other at its ends."""
    mirror = mirror_of(*SWAPS, "CREATE TABLE wide (id int PRIMARY KEY, body text)")
    mirror.target_db.execute(CHECK_ALWAYS)
    mirror.target_db.execute("ALTER TABLE wide ADD CONSTRAINT poison CHECK (id <> 30000)")
    run(mirror, "INSERT INTO places VALUES (1, 1), (2, 2)")
    run(
        mirror,
        "UPDATE places SET place = 2 WHERE id = 1",
        "INSERT INTO wide SELECT g, repeat('x', 60) FROM generate_series(1, 50000) g",
        "INSERT INTO items SELECT g FROM generate_series(1, 9) g",
        "UPDATE places SET place = 1 WHERE id = 2",
    )
    mirror.sync()
    mirror.assert_equal("places", "items")
    assert mirror.delivery_stats.parked == 1
    mirror.target_db.execute("ALTER TABLE wide DROP CONSTRAINT poison")
    heal(mirror, "wide")


def test_f89_a_parked_change_is_not_lost_between_two_positions_of_a_batch(mirror_of: MirrorOf) -> None:
    """A hold cuts a batch after the refused transaction, and the sink is opened again behind that."""
    mirror = mirror_of(*SCHEMA)
    mirror.target_db.execute("ALTER TABLE items ADD CONSTRAINT poison CHECK (n <> 3)")
    mirror.delivery.hold(None, 60)  # until it is held elsewhere: it must not be further by then
    with mirror.source_db.connect() as connection:
        connection.execute(
            "BEGIN; INSERT INTO items VALUES (1); COMMIT; BEGIN; INSERT INTO items VALUES (2, 3); COMMIT"
        )
        until = connection.execute("SELECT pg_current_wal_insert_lsn() - '0/0'").fetchone()[0]  # type: ignore[index]
        connection.execute(
            "BEGIN; INSERT INTO items VALUES (3, 3); COMMIT; BEGIN; INSERT INTO items VALUES (4); COMMIT"
        )
    mirror.source.nudge()
    wait_for(lambda: (mirror.queue.position or 0) > until, "all to be captured")
    assert mirror.delivery.hold(int(until), 30) <= until
    assert mirror.target_db.execute("SELECT id FROM items") == [(1,)]
    assert mirror.delivery_stats.parked == 1
    mirror.restart()
    mirror.sync()
    wait_for(lambda: mirror.error or mirror.delivery_stats.parked == 2, "both to be parked")
    mirror.target_db.execute("ALTER TABLE items DROP CONSTRAINT poison")
    heal(mirror, "items")


@pytest.mark.parametrize("others", [["INSERT INTO items VALUES (1)"], []], ids=["refused", "accepted"])
def test_f94_what_is_there_already_is_noticed(mirror_of: MirrorOf, others: Sequence[str]) -> None:
    """An old connection has committed after the position was read: nothing may be applied on top of that."""
    mirror = mirror_of(*SCHEMA)
    mirror.sync()
    mirror.stop()
    run(mirror, *others, "INSERT INTO log VALUES (1, 'once')")
    mirror.start(delivery=False)
    end = mirror.source_db.value("SELECT pg_current_wal_lsn() - '0/0'")
    mirror.source.nudge()
    wait_for(lambda: (mirror.queue.position or 0) >= end, "all to be captured")
    late, early = mirror.sink, PostgresSink(mirror.sink.config, SinkContext())
    position = late.open()
    assert position is not None
    pieces = mirror.queue.read(mirror.queue.seek(position), max_bytes=10**6, timeout_seconds=0)
    batches = [piece.batch for piece in pieces if piece.batch.transactions]
    reached = Position(position.queue_id, pieces[-1].seq, batches[-1].position)
    with closing(early), closing(late):
        early.open()
        early.apply(batches, reached)
        with pytest.raises(TransientError, match="someone else wrote there"):
            late.apply(batches, reached)
    assert mirror.target_db.value("SELECT count(*) FROM log") == 1


def test_f120_what_a_change_is_about(mirror_of: MirrorOf) -> None:
    """Rows by keys that are compared as bytes, and by what they take of unique columns; else the whole table."""
    mirror = mirror_of(
        "CREATE TYPE mood AS ENUM ('good', 'bad')",
        "CREATE DOMAIN label AS text",
        "CREATE DOMAIN price AS numeric",
        "CREATE TABLE plain (a int, b label, c mood, PRIMARY KEY (a, b), UNIQUE (c))",
        "CREATE TABLE numbers (a numeric PRIMARY KEY)",
        "CREATE TABLE prices (a price PRIMARY KEY)",
        "CREATE TABLE floats (a float8 PRIMARY KEY)",
        "CREATE TABLE padded (a char(5) PRIMARY KEY)",
        "CREATE TABLE later (a int PRIMARY KEY DEFERRABLE)",
        "ALTER TABLE later REPLICA IDENTITY FULL",
        "CREATE TABLE keyless (a int)",
        "ALTER TABLE keyless REPLICA IDENTITY FULL",
    )
    others = ("numbers", "prices", "floats", "padded", "later", "keyless")
    mirror.queue.register("a sink that never moves")
    run(mirror, "INSERT INTO plain VALUES (1, 'x', 'good')", *(f"INSERT INTO {each} VALUES ('1')" for each in others))
    run(mirror, "UPDATE plain SET b = 'y', c = NULL", "DELETE FROM plain", f"TRUNCATE plain, {others[0]}")
    mirror.sync()
    mirror.stop()
    mirror.sink.open()
    found: dict[str, list[Subject]] = {}
    for piece in mirror.queue.read(mirror.queue.stats().pruned_seq, max_bytes=10**6, timeout_seconds=0):
        for transaction in piece.batch.transactions:
            for change in transaction.changes:
                subject = mirror.sink.subject_of(piece.batch.tables, change)
                for table in subject.tables:
                    found.setdefault(table.name, []).append(subject)
    mirror.sink.close()
    insert, update, delete, truncate = found.pop("plain")
    assert [len(each.keys or ()) for each in (insert, update, delete)] == [2, 2, 1]
    assert set(insert.keys or ()) & set(update.keys or ()), "the old key"
    assert set(update.keys or ()) > set(delete.keys or ())
    assert (len(truncate.tables), truncate.keys) == (2, None)
    assert {name: {each.keys for each in subjects} for name, subjects in found.items()} == {
        name: {None} for name in others
    }


def test_f89_f98_the_daemon_tells_and_a_killed_one_forgets_nothing(
    source_db: Database, target_db: Database, cdc: Cdc, pg_dump: Path
) -> None:
    source_db.execute("CREATE TABLE items (id int PRIMARY KEY, n int); INSERT INTO items VALUES (1, 1), (2, 1)")
    parking = 'on_error = "park"\nretry = {max = 2, attempts = 1000}'  # however slow the machine is
    cdc.configure(source_db.url, target_db.url, source=f'pg_dump = "{pg_dump}"', sink=parking)
    with cdc.running() as process:
        cdc.wait_for_sink("running")
        target_db.execute("ALTER TABLE items ADD CONSTRAINT poison CHECK (id <> 1 OR n < 2)")
        source_db.execute("UPDATE items SET n = 2")
        wait_until(lambda: target_db.value("SELECT n FROM items WHERE id = 2") == 2, what="the other row")
        wait_until(lambda: cdc.status()["sinks"]["mirror"]["parked"] == 1, what="one to be parked")
        sink = cdc.status()["sinks"]["mirror"]
        assert (sink["state"], sink["torn"]) == ("running", True)
        assert "transactions are torn" in cdc("status").stdout
        verified = cdc("verify")
        assert verified.returncode == 1
        assert "1 change is parked: rows that differ may be theirs" in verified.stdout
        assert '"parked":1' in cdc("verify", "--json").stdout.replace(" ", "")
        kill_tree(process.pid)
        process.wait()
    (cdc.data_dir / "http").unlink()
    with cdc.running():
        source_db.execute("UPDATE items SET n = 3 WHERE id = 1")
        wait_until(lambda: cdc.status()["sinks"]["mirror"]["parked"] == 2, what="the next one to wait")
        target_db.execute("ALTER TABLE items DROP CONSTRAINT poison")
        wait_until(lambda: not cdc.status()["sinks"]["mirror"]["parked"], what="the mirror to heal")
        assert cdc("verify").returncode == 0


RANDOM_SCHEMA = (
    "CREATE TABLE items (id int PRIMARY KEY, n int NOT NULL, name text UNIQUE, body text)",
    "ALTER TABLE items ALTER body SET STORAGE EXTERNAL",
    "CREATE TABLE places (id int, kind text, n int, place int UNIQUE DEFERRABLE INITIALLY DEFERRED, "
    "PRIMARY KEY (id, kind))",
    "CREATE TABLE ranks (rank int PRIMARY KEY DEFERRABLE, n int)",
    "ALTER TABLE ranks REPLICA IDENTITY FULL",
    "CREATE TABLE codes (code numeric PRIMARY KEY, n int)",
    "CREATE TABLE log (n int, what text)",
    "ALTER TABLE log REPLICA IDENTITY FULL",
)
TABLES = ("items", "places", "ranks", "codes", "log")
DUPLICATES = """
SELECT 'place', place FROM places WHERE place IS NOT NULL GROUP BY 2 HAVING count(*) > 1
UNION ALL SELECT 'rank', rank FROM ranks GROUP BY 2 HAVING count(*) > 1
"""


class Load:
    """Random transactions; an n that ends with 3 is what the mirror refuses."""

    def __init__(self, seed: int) -> None:
        self.choose = random.Random(seed)

    def transaction(self) -> Iterator[str]:
        for _ in range(self.choose.randrange(1, 5)):
            yield self.choose.choice(
                [self.item, self.item, self.item, self.key, self.again, self.names, self.place, self.swap, self.rank,
                 self.code, self.log, self.log]
            )()  # fmt: skip
        if self.choose.random() < 0.03:
            yield f"TRUNCATE {self.choose.choice(['items', 'log', 'codes, log', 'places'])}"

    def n(self) -> int:
        return self.choose.randrange(1000) if self.choose.random() < 0.4 else 10 * self.choose.randrange(100)

    def id(self) -> int:
        return self.choose.randrange(12)

    def item(self) -> str:
        body = "NULL" if self.choose.random() < 0.3 else f"repeat('{self.n()} ', 900)"
        return f"""INSERT INTO items VALUES ({self.id()}, {self.n()}, NULL, {body})
                       ON CONFLICT (id) DO UPDATE SET n = excluded.n"""

    def key(self) -> str:
        return f"""UPDATE items SET id = {self.id()}, n = {self.n()} WHERE id = {self.id()}
                      AND NOT EXISTS (SELECT FROM items WHERE id IN ({self.id()}, 0, 1, 2, 3, 4, 5))"""

    def again(self) -> str:
        number = self.id()
        return f"DELETE FROM items WHERE id = {number}; INSERT INTO items VALUES ({number}, {self.n()}, NULL, 'again')"

    def names(self) -> str:
        """A name passes from one row to another."""
        one, other, name = self.id(), self.id(), f"name {self.choose.randrange(3)}"
        return f"""UPDATE items SET name = NULL WHERE name = '{name}';
                   UPDATE items SET name = '{name}', n = {self.n()} WHERE id = {one};
                   UPDATE items SET n = {self.n()} WHERE id = {other}"""

    def place(self) -> str:
        return f"""INSERT INTO places SELECT g, 'x', {self.n()}, g FROM generate_series(1, 6) g
                       ON CONFLICT (id, kind) DO NOTHING"""

    def swap(self) -> str:
        """All move on by one, and only at the end are they in different places."""
        return f"UPDATE places SET place = place % 6 + 1, n = {self.n()} + id"

    def rank(self) -> str:
        start = self.choose.randrange(100)
        return f"""INSERT INTO ranks SELECT coalesce(max(rank), 0) + 1 + {self.id()}, 0 FROM ranks;
                   UPDATE ranks SET rank = rank + 1, n = {self.n()} WHERE rank > {start}"""

    def code(self) -> str:
        return f"""INSERT INTO codes VALUES ({self.id()}, {self.n()})
                       ON CONFLICT (code) DO UPDATE SET code = codes.code + 0.00, n = excluded.n"""

    def log(self) -> str:
        if self.choose.random() < 0.2:
            return "DELETE FROM log WHERE ctid = (SELECT min(ctid) FROM log)"
        return f"INSERT INTO log SELECT {self.n()}, 'twice' FROM generate_series(1, {self.choose.choice([1, 2, 90])})"


class Interrupted:
    """Cuts the connection to the target before or after the n-th step of a sink, or of what is parked in its queue."""

    def __init__(self, mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left = -1
        self.cut = 0
        self._sink = mirror.sink
        steps: dict[object, Sequence[str]] = {
            mirror.sink: ("_apply_fast", "_at_once"),
            TargetTransaction: ("begin", "end"),
            mirror.queue: ("park", "unpark"),
        }
        for holder, names in steps.items():
            for name in names:
                monkeypatch.setattr(holder, name, self.wrapped(getattr(holder, name)))

    def wrapped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.count()
            result = function(*arguments, **options)
            self.count()
            return result

        return call

    def count(self) -> None:
        self.left -= 1
        if self.left == 0:
            self.cut += 1
            self._sink.close()
            raise TransientError("interrupted")


@pytest.mark.parametrize("seed", range(2))
def test_f89_f90_f94_at_random(
    source_db: Database, target_db: Database, tmp_path: Path, pg_dump: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused rows among all that may depend on them, interrupted anywhere: in the end all is equal, and once only."""
    load = Load(seed)
    now = [0.0]
    clock = Clock(lambda: now[0], lambda: now[0])
    options = {"sink": {"on_error": "park"}, "clock": clock}
    with running_mirror(source_db, target_db, tmp_path, pg_dump, *RANDOM_SCHEMA, **options) as mirror:
        for table in TABLES:
            mirror.target_db.execute(f"ALTER TABLE {table} ADD CONSTRAINT poison CHECK (n % 10 <> 3)")
        if seed % 2:
            mirror.target_db.execute(CHECK_ALWAYS)
        parked = 0
        interrupted = Interrupted(mirror, monkeypatch)
        for _ in range(8):
            interrupted.left = load.choose.randrange(1, 80)
            for _ in range(load.choose.randrange(1, 30)):
                with suppress(psycopg.errors.UniqueViolation, psycopg.errors.ObjectInUse):
                    run(mirror, *load.transaction())
            mirror.sync()
            assert not mirror.target_db.execute(DUPLICATES)
            parked += mirror.delivery_stats.parked
            now[0] += load.choose.choice([0, 1, 400])
            if load.choose.random() < 0.3:
                mirror.restart()
                interrupted = Interrupted(mirror, monkeypatch)
        interrupted.left = -1
        assert parked
        for table in TABLES:
            mirror.target_db.execute(f"ALTER TABLE {table} DROP CONSTRAINT poison")

        def healed() -> bool:
            now[0] += 400
            return mirror.delivery_stats.caught_up_at is not None and not mirror.delivery_stats.parked

        wait_for(lambda: mirror.error or healed(), "the mirror to heal")
        mirror.assert_equal(*TABLES)
