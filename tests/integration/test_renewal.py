"""Tables are altered, renamed and dropped at the source before their mirror has its indexes and constraints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from cdc.errors import FatalError
from cdc.position import Position
from tests.integration.test_schema_changes import install
from tests.mirror import Mirror, filled_mirror, wait_for
from tests.servers import Database

pytestmark = pytest.mark.usefixtures("quick_looks")

Later = Callable[..., AbstractContextManager[Mirror]]

REGIONS = "CREATE TABLE regions (id int PRIMARY KEY, code text UNIQUE); INSERT INTO regions VALUES (1, 'n'), (2, 's')"

ITEMS = """
CREATE TABLE items (id int PRIMARY KEY, u text UNIQUE, w text, v int, region text REFERENCES regions (code));
CREATE INDEX items_v ON items (v) INCLUDE (w);
CREATE INDEX items_lower ON items (lower(u)) WHERE v > 2;
CREATE TABLE lines (id int PRIMARY KEY, item text REFERENCES items (u));
CREATE TABLE parts (id int, day int, u text, PRIMARY KEY (id, day)) PARTITION BY RANGE (day);
CREATE TABLE parts_1 PARTITION OF parts FOR VALUES FROM (0) TO (10);
CREATE INDEX parts_u ON parts (u);
CREATE INDEX parts_1_id ON parts_1 (id, u);
INSERT INTO items SELECT n, 'u' || n, 'w', n, 'n' FROM generate_series(1, 5) n;
INSERT INTO lines SELECT n, 'u' || n FROM generate_series(1, 5) n;
INSERT INTO parts SELECT n, n, 'u' || n FROM generate_series(1, 5) n
"""

BUILT = """
SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) FROM pg_constraint
 WHERE connamespace = 'public'::regnamespace AND contype <> 'n'
UNION SELECT indrelid::regclass::text, indexrelid::regclass::text, pg_get_indexdef(indexrelid) FROM pg_index
       JOIN pg_class ON pg_class.oid = indexrelid WHERE relnamespace = 'public'::regnamespace
 ORDER BY 1, 2, 3
"""

LEFT = "SELECT kind, name, outdated FROM cdc.post_data WHERE NOT done ORDER BY ordinal"


@pytest.fixture
def later(source_db: Database, target_db: Database, tmp_path: Path, pg_dump: Path) -> Later:
    """A mirror of `regions` that has copied `ITEMS` since, and begins to stream: they wait for their constraints."""

    def life(*exclude: str, **options: Any) -> AbstractContextManager[Mirror]:
        source = {"tables": {"include": ["*"], "exclude": list(exclude)}}
        return filled_mirror(source_db, target_db, tmp_path, pg_dump, source=source, **options)

    @contextmanager
    def later(*, triggers: bool = True, **options: Any) -> Iterator[Mirror]:
        if triggers:
            install(source_db)
        source_db.execute(REGIONS)
        with life("public.items", "public.lines", "public.parts*", **options) as mirror:
            mirror.sync()
        source_db.execute(ITEMS)
        mirror = Mirror(source_db, target_db, tmp_path, pg_dump, source={"tables": {"include": ["*"]}}, **options)
        try:
            mirror.fill()
            assert "items items_u_key" in {name for _, name, _ in target_db.execute(LEFT)}
            yield mirror
        finally:
            mirror.close()

    return later


def captured(mirror: Mirror) -> None:
    """Wait until the queue has all that is committed now."""
    end = mirror.source_db.value("SELECT pg_current_wal_lsn() - '0/0'")
    mirror.source.nudge()
    wait_for(lambda: mirror.error or int(str(mirror.queue.position or 0)) >= end, "the queue to have all")


def assert_built(mirror: Mirror, *, but: str = "-") -> None:
    """Sooner or later. but: the mirror's own table of this name is left as it was."""
    wait_for(lambda: mirror.error or not mirror.target_db.execute(LEFT), "all to be built")
    mirror.sync()

    def kept(rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        return [row for row in rows if row[0] != but]

    assert kept(mirror.target_db.execute(BUILT)) == kept(mirror.source_db.execute(BUILT))


@pytest.mark.parametrize(
    "change",
    [
        "ALTER TABLE items RENAME u TO uu",
        "ALTER TABLE items RENAME u TO x; ALTER TABLE items RENAME w TO u; ALTER TABLE items RENAME x TO w",
        "ALTER TABLE items RENAME u TO uu; ALTER TABLE items RENAME CONSTRAINT items_u_key TO other; "
        "ALTER INDEX items_v RENAME TO items_other",
        "ALTER TABLE items DROP u CASCADE",
        "ALTER TABLE items DROP u CASCADE; ALTER TABLE items ADD u text UNIQUE DEFAULT NULL",
        "ALTER TABLE items RENAME region TO r",
        "ALTER TABLE regions RENAME code TO c",
        "ALTER TABLE items DROP region",
        "ALTER TABLE regions DROP code CASCADE",
        "ALTER TABLE parts RENAME u TO uu",
        "ALTER TABLE parts DROP u",
        "ALTER TABLE items ALTER u TYPE varchar",
    ],
)
def test_f29_a_column_changes_before_what_is_about_it_is_built(later: Later, source_db: Database, change: str) -> None:
    with later() as mirror:
        source_db.execute(change + "; UPDATE items SET v = v + 10")
        captured(mirror)
        mirror.deliver()
        assert_built(mirror)
        mirror.assert_equal("items", "lines", "parts", "regions")
        assert mirror.fillings == 0 or "TYPE" in change or "ADD" in change


def test_f29_without_event_triggers(later: Later, source_db: Database) -> None:
    with later(triggers=False) as mirror:
        source_db.execute("ALTER TABLE items RENAME u TO uu; UPDATE items SET v = 10 WHERE id = 1")
        captured(mirror)
        mirror.deliver()
        assert_built(mirror)
        mirror.assert_equal("items", "lines")


@pytest.mark.parametrize(
    ("change", "new"),
    [
        ("ALTER TABLE items RENAME TO things", "things"),
        ("ALTER TABLE items RENAME TO things; ALTER TABLE things RENAME u TO uu", "things"),
        ("ALTER TABLE regions RENAME TO areas; ALTER TABLE areas RENAME code TO c", "areas"),
    ],
)
def test_f32_a_table_is_renamed_before_all_is_built(later: Later, source_db: Database, change: str, new: str) -> None:
    with later() as mirror:
        source_db.execute(change + f"; DELETE FROM {'lines' if new == 'areas' else new} WHERE id = 9")
        captured(mirror)
        mirror.deliver()
        assert_built(mirror)
        mirror.assert_equal(new, "lines")
        assert mirror.fillings == 0


@pytest.mark.parametrize("table", ["items", "regions"])
def test_f32_a_table_is_dropped_before_all_is_built(later: Later, source_db: Database, table: str) -> None:
    with later() as mirror:
        source_db.execute(f"DROP TABLE {table} CASCADE; INSERT INTO lines VALUES (100)")
        captured(mirror)
        mirror.deliver()
        assert_built(mirror, but=table)
        mirror.assert_equal("lines")


def test_f29_what_waits_to_be_built_waits_for_the_stream_where_the_source_is_ahead(
    later: Later, source_db: Database, target_db: Database
) -> None:
    columns = "SELECT attname FROM pg_attribute WHERE attrelid = 'items'::regclass AND attnum = 2"
    with later() as mirror:
        source_db.execute("ALTER TABLE items RENAME u TO u2; UPDATE items SET v = 20")
        captured(mirror)
        mirror.stop()
        source_db.execute("ALTER TABLE items RENAME u2 TO u3; UPDATE items SET v = 30")
        mirror.start(capture=False)
        wait_for(lambda: mirror.error or target_db.value(columns) == "u2", "the first change")
        wait_for(lambda: mirror.error or ("CONSTRAINT", "items items_u_key", True) in target_db.execute(LEFT), "a look")
        mirror.stop()
        assert not mirror.sink.finish_copy(2**63)
        assert target_db.value("SELECT min(v) FROM items") == 20
        mirror.restart()
        assert_built(mirror)
        assert target_db.value(columns) == "u3"
        mirror.assert_equal("items", "lines")


def test_f29_what_the_source_no_longer_has_is_left_out_with_a_warning(
    later: Later, source_db: Database, target_db: Database
) -> None:
    with later() as mirror, capture_logs() as logs:
        source_db.execute("ALTER TABLE items DROP u CASCADE; UPDATE items SET v = v + 10")
        captured(mirror)
        mirror.deliver()
        assert_built(mirror)
    warned = {log["name"] for log in logs if log["log_level"] == "warning" and "left out" in log["event"]}
    assert warned == {"items items_u_key", "items_lower", "lines lines_item_fkey"}


def test_f29_a_mirror_altered_by_hand_before_the_stream_comes_to_it(
    later: Later, source_db: Database, target_db: Database
) -> None:
    with later(sink={"schema_changes": "stop"}) as mirror:
        source_db.execute("ALTER TABLE items RENAME u TO uu; UPDATE items SET v = v + 10")
        captured(mirror)
        target_db.execute("ALTER TABLE items RENAME u TO uu")
        assert not mirror.sink.finish_copy(2**63)
        mirror.deliver()
        assert_built(mirror)
        mirror.assert_equal("items", "lines")


def test_f29_what_cannot_be_built_says_what_to_do(later: Later, source_db: Database, target_db: Database) -> None:
    with later() as mirror:
        target_db.execute("ALTER TABLE items DROP u")
        mirror.deliver()
        error = mirror.failure()
        assert isinstance(error, FatalError)
        assert 'column "u"' in str(error)
        assert "`cdc resume mirror`" in error.hint
        assert "WHERE sink = 'mirror' AND ordinal = " in error.hint
        mirror.stop()
        target_db.execute("ALTER TABLE items ADD u text; UPDATE items SET u = 'u' || id")
        mirror.start()
        wait_for(lambda: mirror.error or not target_db.execute(LEFT), "all to be built")
        mirror.sync()


def test_f29_an_interrupted_copy_goes_on_with_what_the_source_has_by_now(
    source_db: Database, target_db: Database, tmp_path: Path, pg_dump: Path
) -> None:
    change = """
        ALTER TABLE items RENAME u TO uu; ALTER TABLE items RENAME id TO key;
        ALTER TABLE items RENAME CONSTRAINT items_u_key TO other; ALTER TABLE lines RENAME TO line
    """
    source_db.execute(REGIONS + ";" + ITEMS)
    mirror = Mirror(source_db, target_db, tmp_path, pg_dump)
    try:
        mirror.queue.register("mirror")
        begin = mirror.source.open(None)
        mirror.source.close()
        mirror.queue.begin(begin)
        start = Position(mirror.queue.queue_id, 0, begin)
        mirror.sink.prepare_copy(mirror.source.tables(), start, mirror.source.dump_schema())
        source_db.execute(change)
        mirror.fill()
        mirror.deliver()
        assert_built(mirror)
        mirror.assert_equal("items", "line")
    finally:
        mirror.close()
