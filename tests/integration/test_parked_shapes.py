"""Changes are parked, or delivered once more, while the table that they are about is altered."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from cdc.postgres import ddl_capture
from cdc.postgres.connection import connect
from tests.mirror import Mirror, filled_mirror, wait_for
from tests.servers import Database

pytestmark = pytest.mark.usefixtures("quick_looks")

Life = Callable[..., AbstractContextManager[Mirror]]

ITEMS = """
CREATE TABLE items (id int PRIMARY KEY, name text, note text);
INSERT INTO items SELECT g, 'row ' || g, 'note' FROM generate_series(1, 20) g;
"""
POISON = "ALTER TABLE items ADD CONSTRAINT poison CHECK (id <> 107)"
CURE = "ALTER TABLE items DROP CONSTRAINT poison"


@pytest.fixture
def life(source_db: Database, target_db: Database, tmp_path: Path, pg_dump: Path) -> Life:
    """Mirrors `items`, and parks what it refuses."""

    @contextmanager
    def life(*, triggers: bool, **options: Any) -> Iterator[Mirror]:
        if triggers:
            with connect(source_db.url) as connection:
                ddl_capture.execute(connection, ddl_capture.installation("postgres"))
        source_db.execute(ITEMS)
        options |= {"sink": {"on_error": "park"}}
        with filled_mirror(source_db, target_db, tmp_path, pg_dump, **options) as mirror:
            mirror.sync()
            yield mirror

    return life


def assert_same(mirror: Mirror) -> None:
    """Rows are the same, whatever the order of columns, sooner or later."""
    query = "SELECT to_jsonb(t)::text FROM items AS t ORDER BY 1"

    def same() -> bool:
        mirror.sync()
        return not mirror.delivery_stats.parked and mirror.source_db.execute(query) == mirror.target_db.execute(query)

    wait_for(lambda: mirror.error or same(), "items to be the same")
    if mirror.error:
        raise mirror.error


def test_f30_f89_a_transaction_alters_the_table_before_and_after_what_is_refused(life: Life) -> None:
    with life(triggers=True) as mirror, mirror.source_db.connect() as connection:
        mirror.target_db.execute(POISON)
        with connection.transaction():
            connection.execute("ALTER TABLE items ADD COLUMN c int")
            connection.execute("INSERT INTO items VALUES (107, 'a', 'b', 1)")
            connection.execute("ALTER TABLE items ADD COLUMN d int")
            connection.execute("INSERT INTO items VALUES (108, 'a', 'b', 1, 2)")
        mirror.sync()
        assert mirror.delivery_stats.parked >= 3
        mirror.target_db.execute(CURE)
        assert_same(mirror)
        assert mirror.fillings == 0


@pytest.mark.parametrize("triggers", [True, False])
@pytest.mark.parametrize(
    "alter", ["RENAME name TO title", "ADD COLUMN c timestamptz NOT NULL DEFAULT now()", "ADD COLUMN c int"]
)
def test_f33_rows_are_written_once_more_in_a_shape_that_the_mirror_has_left(
    life: Life, alter: str, triggers: bool
) -> None:
    with life(triggers=triggers, keep_seconds=3600) as mirror:
        stored = mirror.sink.stored_position()
        assert stored is not None
        mirror.source_db.execute("UPDATE items SET name = 'new' WHERE id = 1; DELETE FROM items WHERE id = 2")
        mirror.source_db.execute("INSERT INTO items VALUES (2, 'again', 'x')")
        mirror.source_db.execute(f"ALTER TABLE items {alter}")
        mirror.source_db.execute("INSERT INTO items VALUES (108, 'c', 'd')")
        assert_same(mirror)
        fillings = mirror.fillings
        mirror.stop()
        mirror.sink.rewind(mirror.queue.rewind("mirror", stored.seq))
        mirror.delivery_stats.position = None
        mirror.start()
        assert_same(mirror)
        assert mirror.fillings - fillings == (alter != "ADD COLUMN c int"), "a copy that was not necessary"


def test_f101_replayed_rows_are_known_by_what_identifies_them_whatever_their_primary_keys_were(life: Life) -> None:
    with life(triggers=False, keep_seconds=3600) as mirror:
        mirror.source_db.execute("ALTER TABLE items ALTER name SET NOT NULL, ADD CONSTRAINT by_name UNIQUE (name)")
        mirror.source_db.execute("ALTER TABLE items REPLICA IDENTITY USING INDEX by_name")
        mirror.source_db.execute("INSERT INTO items VALUES (100, 'z', '')")
        assert_same(mirror)
        stored = mirror.sink.stored_position()
        assert stored is not None
        mirror.source_db.execute("INSERT INTO items VALUES (109, 'a', 'first')")
        mirror.source_db.execute("UPDATE items SET id = 110 WHERE name = 'a'")
        mirror.source_db.execute("INSERT INTO items VALUES (109, 'b', 'second')")
        assert_same(mirror)
        mirror.stop()
        mirror.sink.rewind(mirror.queue.rewind("mirror", stored.seq))
        mirror.delivery_stats.position = None
        mirror.start()
        assert_same(mirror)


def test_f89_what_was_parked_is_kept_when_it_is_parked_again_after_a_replay(life: Life) -> None:
    with life(triggers=False, keep_seconds=3600) as mirror:
        stored = mirror.sink.stored_position()
        assert stored is not None
        mirror.target_db.execute(POISON)
        mirror.source_db.execute("INSERT INTO items VALUES (107, 'a', 'b')")
        mirror.sync()
        mirror.target_db.execute(CURE)
        assert_same(mirror)
        mirror.stop()
        mirror.sink.rewind(mirror.queue.rewind("mirror", stored.seq))
        mirror.target_db.execute("DELETE FROM items WHERE id = 107")
        mirror.target_db.execute(POISON)
        mirror.delivery_stats.position = None
        mirror.start()
        wait_for(lambda: mirror.error or mirror.delivery_stats.parked, "it to be parked again")
        mirror.stop()
        mirror.target_db.execute(CURE)
        mirror.start()
        assert_same(mirror)
