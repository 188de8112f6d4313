"""A mirror that refuses some rows: they wait, with what depends on them, the others flow, and the mirror heals."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest

from cdc.errors import TransientError
from cdc.parking import Clock
from tests.mirror import Mirror, running_mirror, wait_for
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

    def __init__(self, mirror: Mirror) -> None:
        self.left = -1
        self.cut = 0
        self._sink = mirror.sink
        for holder, names in ((mirror.sink, ("_begin", "_apply_fast", "_end")), (mirror.queue, ("park", "unpark"))):
            for name in names:
                setattr(holder, name, self.wrapped(getattr(holder, name)))

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


@pytest.mark.parametrize("seed", range(4))
def test_f89_f90_f94_at_random(
    source_db: Database, target_db: Database, tmp_path: Path, pg_dump: Path, seed: int
) -> None:
    """Refused rows among all that may depend on them, interrupted anywhere: in the end all is equal, and once only."""
    load = Load(seed)
    now = [0.0]
    clock = Clock(lambda: now[0], lambda: now[0])
    options = {"sink": {"on_error": "park"}, "clock": clock}
    with running_mirror(source_db, target_db, tmp_path, pg_dump, *RANDOM_SCHEMA, **options) as mirror:
        for table in TABLES:
            mirror.target_db.execute(f"ALTER TABLE {table} ADD CONSTRAINT poison CHECK (n % 10 <> 3)")
        parked = 0
        interrupted = Interrupted(mirror)
        for _ in range(8):
            interrupted.left = load.choose.randrange(1, 80)
            for _ in range(load.choose.randrange(1, 30)):
                with suppress(psycopg.errors.UniqueViolation, psycopg.errors.ObjectInUse):
                    run(mirror, *load.transaction())
            mirror.sync()
            parked += mirror.delivery_stats.parked
            now[0] += load.choose.choice([0, 1, 400])
            if load.choose.random() < 0.3:
                mirror.restart()
                interrupted = Interrupted(mirror)
        interrupted.left = -1
        assert parked
        for table in TABLES:
            mirror.target_db.execute(f"ALTER TABLE {table} DROP CONSTRAINT poison")

        def healed() -> bool:
            now[0] += 400
            return mirror.delivery_stats.caught_up_at is not None and not mirror.delivery_stats.parked

        wait_for(lambda: mirror.error or healed(), "the mirror to heal")
        mirror.assert_equal(*TABLES)
