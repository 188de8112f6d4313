"""What else may be under way while a mirror is resynced: parked changes, a pause."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cdc.postgres import refresh_read, refresh_rounds
from tests.mirror import Mirror, running_mirror
from tests.processes import wait_until
from tests.servers import Database

SCHEMA = "CREATE TABLE items (id int PRIMARY KEY, n int, mail text UNIQUE)"
ROWS = 200


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refresh_read, "PART_ROWS", 40)
    monkeypatch.setattr(refresh_rounds, "AHEAD_ROWS", 80)


@pytest.fixture
def mirror(source_db: Database, target_db: Database, tmp_path: Path, pg_dump: Path) -> Iterator[Mirror]:
    """One that parks."""
    with running_mirror(source_db, target_db, tmp_path, pg_dump, SCHEMA, sink={"on_error": "park"}) as mirror:
        source_db.execute(f"INSERT INTO items SELECT g, g, 'm' || g FROM generate_series(1, {ROWS}) g")
        mirror.assert_equal("items")
        yield mirror


def resync(mirror: Mirror) -> None:
    mirror.stop()
    mirror.want_resync("items")
    mirror.refill()


def wait_until_right(mirror: Mirror) -> None:
    """Nothing is left to resync, nothing is parked, and all rows are right."""
    stats = mirror.delivery_stats
    wait_until(
        lambda: mirror.error or (stats.state == "running" and not stats.parked),
        what=lambda: f"all to settle: {stats} {mirror.queue.parked('mirror')}",
    )
    assert mirror.error is None, mirror.error
    mirror.assert_equal("items")


def park_moves(mirror: Mirror) -> None:
    """Keys that move, columns that follow, rows that go: all refused, or behind what is."""
    mirror.source_db.execute("UPDATE items SET id = -5, n = -1 WHERE id = 5")
    mirror.source_db.execute("UPDATE items SET id = 1000, n = -1 WHERE id = 6; UPDATE items SET n = 7 WHERE id = 1000")
    mirror.source_db.execute("UPDATE items SET n = -1 WHERE id = 8; DELETE FROM items WHERE id = 8")
    mirror.source_db.execute("INSERT INTO items VALUES (5, 5, 'new')")
    mirror.sync()
    wait_until(lambda: mirror.error or mirror.delivery_stats.parked >= 6, what=lambda: str(mirror.delivery_stats))


@pytest.mark.parametrize("parked_first", [True, False])
def test_f89_parked_changes_of_rows_that_were_put_right_meanwhile_settle(
    mirror: Mirror, target_db: Database, *, parked_first: bool
) -> None:
    """The mirror refuses the changes, and the row that a resync brings: both come through when the cause is gone."""
    target_db.execute("ALTER TABLE items ADD CONSTRAINT poison CHECK (n >= 0)")
    if parked_first:
        park_moves(mirror)
        target_db.execute("UPDATE items SET mail = 'stale ' || id; DELETE FROM items WHERE id = 100")
        resync(mirror)
        wait_until(lambda: mirror.error or "poison" in told(mirror), what=lambda: str(mirror.delivery_stats))
        wait_until(
            lambda: mirror.error or target_db.value("SELECT count(*) FROM items WHERE id = 100"), what="the rest"
        )
    else:
        mirror.source_db.execute("UPDATE items SET n = -1 WHERE id = 9")
        resync(mirror)
        wait_until(lambda: mirror.error or "poison" in told(mirror), what=lambda: str(mirror.delivery_stats))
        park_moves(mirror)
    target_db.execute("ALTER TABLE items DROP CONSTRAINT poison")
    wait_until_right(mirror)
    assert mirror.delivery_stats.dead == 0


def test_f89_what_a_stale_row_has_refused_settles_by_a_resync_alone(mirror: Mirror, target_db: Database) -> None:
    """The resync removes the cause, and does what was parked: done again, that changes nothing."""
    target_db.execute("INSERT INTO items VALUES (5000, 0, 'taken'), (-5, 0, 'other')")
    mirror.source_db.execute("UPDATE items SET mail = 'taken' WHERE id = 3")
    mirror.source_db.execute("UPDATE items SET id = -5 WHERE id = 5")
    mirror.sync()
    wait_until(lambda: mirror.error or mirror.delivery_stats.parked == 2, what=lambda: str(mirror.delivery_stats))
    resync(mirror)
    wait_until_right(mirror)
    assert mirror.delivery_stats.dead == 0


def test_a_paused_sink_is_resynced_once_it_goes_on(mirror: Mirror, target_db: Database) -> None:
    target_db.execute("UPDATE items SET n = -1")
    mirror.delivery.pause()
    resync(mirror)
    mirror.source_db.execute("UPDATE items SET n = 77 WHERE id = 1")
    wait_until(lambda: mirror.delivery_stats.state == "paused", what=lambda: str(mirror.delivery_stats))
    assert target_db.execute("SELECT DISTINCT n FROM items") == [(-1,)]
    mirror.delivery.resume()
    wait_until(
        lambda: mirror.error or mirror.delivery_stats.state == "resyncing", what=lambda: str(mirror.delivery_stats)
    )
    wait_until_right(mirror)


def test_a_pause_interrupts_a_resync(mirror: Mirror, target_db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cdc.delivery.REFRESH_SECONDS", 0.0)
    target_db.execute("UPDATE items SET n = -1")
    resync(mirror)
    done = "SELECT done_key FROM cdc.resyncs WHERE done_key IS NOT NULL"
    wait_until(lambda: mirror.error or target_db.execute(done), what=lambda: str(mirror.delivery_stats))
    mirror.delivery.pause()
    wait_until(lambda: mirror.delivery_stats.state == "paused", what=lambda: str(mirror.delivery_stats))
    stale = target_db.value("SELECT count(*) FROM items WHERE n = -1")
    mirror.source_db.execute("DELETE FROM items WHERE id = 2")
    mirror.delivery.resume()
    wait_until_right(mirror)
    assert 0 <= stale < ROWS


def test_what_an_earlier_version_noted_on_the_mirror_is_completed(mirror: Mirror, target_db: Database) -> None:
    resync(mirror)
    wait_until_right(mirror)
    mirror.stop()
    target_db.execute("ALTER TABLE cdc.resyncs DROP COLUMN since; ALTER TABLE cdc.tables DROP COLUMN shape")
    target_db.execute("UPDATE items SET n = -1")
    resync(mirror)
    wait_until_right(mirror)


def told(mirror: Mirror) -> str:
    status = mirror.delivery_stats.resync
    return (status and status.error) or ""
