"""Tables that are published but not mirrored, or not yet: they stop nothing, and nothing of them is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cdc.config_file import parse
from cdc.postgres.preflight import check_sink
from tests.mirror import Mirror, filled_mirror, wait_for
from tests.servers import Database

ALL: dict[str, Any] = {"tables": {"include": ["*"]}}


def test_f14_a_publication_wider_than_the_globs_stops_nothing(
    source_db: Database, target_db: Database, tmp_path: Path, pg_dump: Path
) -> None:
    source_db.execute("CREATE TABLE a (id int PRIMARY KEY); CREATE TABLE b (id int PRIMARY KEY)")
    source_db.execute("CREATE PUBLICATION everything FOR ALL TABLES")
    source = {"tables": {"include": ["public.a"]}, "publication": "everything"}
    with filled_mirror(source_db, target_db, tmp_path, pg_dump, source=source) as mirror:
        source_db.execute("INSERT INTO b VALUES (1); INSERT INTO a VALUES (1)")
        mirror.assert_equal("a")


def test_f15_a_table_published_before_it_is_copied_waits_for_its_copy(
    source_db: Database, target_db: Database, tmp_path: Path, pg_dump: Path
) -> None:
    """The source publishes what was created since, after the copy has looked for new tables."""
    source_db.execute("CREATE TABLE a (id int PRIMARY KEY)")
    with filled_mirror(source_db, target_db, tmp_path, pg_dump, source=ALL) as mirror:
        mirror.sync()
    mirror = Mirror(source_db, target_db, tmp_path, pg_dump, source=ALL)
    try:
        mirror.capture.pause()  # as `cdc pause shop` before a restart, or a server that is away for a moment
        mirror.fill()
        mirror.deliver()
        source_db.execute("CREATE TABLE late (id int PRIMARY KEY)")
        mirror.capture.resume()
        wait_for(lambda: mirror.capture_stats.state == "running", "the capture")
        source_db.execute("INSERT INTO late VALUES (1); INSERT INTO a VALUES (1)")
        mirror.assert_equal("a")
        mirror.stop()
        mirror.fill()
        mirror.restart()
        source_db.execute("UPDATE late SET id = 2; INSERT INTO late VALUES (3)")
        mirror.assert_equal("a", "late")
    finally:
        mirror.close()


def test_the_preflight_accepts_a_table_that_the_copy_will_make(
    source_db: Database, target_db: Database, tmp_path: Path, pg_dump: Path
) -> None:
    source_db.execute("CREATE TABLE a (id int PRIMARY KEY)")
    with filled_mirror(source_db, target_db, tmp_path, pg_dump, source=ALL) as mirror:
        mirror.sync()
    source_db.execute("CREATE TABLE late (id int PRIMARY KEY)")
    config = parse(
        {
            "sources": {"shop": {"url": source_db.url, **ALL}},
            "sinks": {"mirror": {"from": "shop", "url": target_db.url}},
        },
        {},
    )
    assert [f for f in check_sink(config, config.sinks["mirror"]) if f.level == "error"] == []
