"""A mirror beside its source, and a mirror of a mirror: no change goes round in circles, none is lost on the way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import pytest

from tests.conftest import NewDatabase
from tests.mirror import Mirror
from tests.servers import Database

SCHEMA = (
    "CREATE TABLE items (id int PRIMARY KEY, n int NOT NULL DEFAULT 0, document text)",
    "ALTER TABLE items ALTER document SET STORAGE EXTERNAL",
    "CREATE TABLE log (n int, what text)",
    "ALTER TABLE log REPLICA IDENTITY FULL",
)


class Chain:
    """Three databases, and the two daemons between them."""

    def __init__(self, databases: list[Database], folder: Path, pg_dump: Path) -> None:
        self.databases = databases
        self.mirrors: list[Mirror] = []
        with ExitStack() as stack:
            for number, (source, target) in enumerate(pairwise(databases)):
                place = folder / str(number)
                place.mkdir()
                slot = f"cdc_link_{number}"
                everything = {"slot": slot, "publication": slot, "tables": {"include": ["*"]}}
                mirror = Mirror(source, target, place, pg_dump, source=everything)
                stack.callback(mirror.close)
                mirror.prepare()
                mirror.start()
                self.mirrors.append(mirror)
            self.close = stack.pop_all().close

    def assert_equal(self) -> None:
        """Wait for each link in turn, then compare the last database with the first."""
        for mirror in self.mirrors:
            mirror.assert_equal("items", "log")


@pytest.fixture(params=["one server", "two servers"])
def chain(
    request: pytest.FixtureRequest, source_db: Database, new_database: NewDatabase, tmp_path: Path, pg_dump: Path
) -> Iterator[Chain]:
    for statement in SCHEMA:
        source_db.execute(statement)
    middle = source_db.server if request.param == "one server" else request.getfixturevalue("target18")
    chain = Chain([source_db, new_database(middle), new_database(source_db.server)], tmp_path, pg_dump)
    yield chain
    chain.close()


def test_f117_changes_pass_through_a_chain_of_mirrors_once(chain: Chain) -> None:
    first, _, last = chain.databases
    for rows in (3, 300):  # one by one, and set-wise
        first.execute(
            f"""INSERT INTO items SELECT g, 0, repeat(md5(g::text), 300) FROM generate_series(1, {rows}) g;
                INSERT INTO log SELECT g % 3, 'duplicates' FROM generate_series(1, {rows}) g;
                UPDATE items SET n = n + 1;
                DELETE FROM log WHERE ctid = (SELECT min(ctid) FROM log);
                UPDATE items SET id = id + 1000 WHERE id % 2 = 0"""
        )
        chain.assert_equal()
        first.execute("TRUNCATE items")
    chain.assert_equal()
    assert last.value("SELECT count(*) FROM log") == 301
    assert last.value("SELECT count(*) FROM items") == 0


def test_f117_the_bookkeeping_of_a_mirror_is_not_mirrored_and_nothing_moves_without_changes(chain: Chain) -> None:
    first, middle, last = chain.databases
    first.execute("INSERT INTO items VALUES (1)")
    chain.assert_equal()
    published = middle.execute("SELECT schemaname || '.' || tablename FROM pg_publication_tables ORDER BY 1")
    assert published == [("public.items",), ("public.log",)]
    assert last.execute("SELECT sink, count(*) FROM cdc.positions GROUP BY 1") == [("mirror", 1)]
    for mirror in chain.mirrors:
        mirror.sync()
    counts = [dict(mirror.delivery_stats.changes) for mirror in chain.mirrors]
    for mirror in [*chain.mirrors, *chain.mirrors]:
        mirror.sync()
    assert [mirror.delivery_stats.changes for mirror in chain.mirrors] == counts
    assert all(count["insert"] == 1 for count in counts)


def test_f117_each_link_of_a_chain_goes_on_where_it_was(chain: Chain) -> None:
    first = chain.databases[0]
    for n in range(4):
        first.execute(f"INSERT INTO log SELECT {n}, 'x' FROM generate_series(1, 100)")
        chain.mirrors[n % 2].restart()
        first.execute("DELETE FROM log WHERE ctid IN (SELECT ctid FROM log LIMIT 10)")
    chain.assert_equal()
    assert chain.databases[-1].value("SELECT count(*) FROM log") == 360
