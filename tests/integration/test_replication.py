"""The stream itself: keepalives, positions, reconnects, and what the target's position decides."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from cdc.change import Batch
from cdc.errors import ResyncRequired, TransientError
from cdc.position import as_lsn, format_lsn
from cdc.postgres.apply import Applier
from cdc.postgres.source import PostgresSource
from cdc.postgres.target_transaction import TargetTransaction
from tests.mirror import Mirror, running_mirror, wait_for
from tests.servers import Database, PostgresServer

ITEMS = "CREATE TABLE items (id int PRIMARY KEY, n int NOT NULL DEFAULT 0, name text)"
LOG = "CREATE TABLE log (n int, what text)"
LOG_IDENTITY = "ALTER TABLE log REPLICA IDENTITY FULL"


@pytest.fixture
def mirror(source_db: Database, target_db: Database, tmp_path: Path, pg_dump: Path) -> Iterator[Mirror]:
    with running_mirror(source_db, target_db, tmp_path, pg_dump, ITEMS, LOG, LOG_IDENTITY) as mirror:
        yield mirror


@pytest.fixture
def impatient(pg_dump: Path, target_db: Database, tmp_path: Path) -> Iterator[Mirror]:
    """A mirror of a server that drops a reader which is silent for two seconds."""
    with (
        PostgresServer(18, settings={"wal_sender_timeout": "2s"}) as server,
        running_mirror(
            server.create_database("shop"), target_db, tmp_path, pg_dump, ITEMS, LOG, LOG_IDENTITY, max_bytes=200_000
        ) as mirror,
    ):
        yield mirror


def walsender(mirror: Mirror) -> dict[str, Any] | None:
    """What the source's server says of our stream; positions as LSNs."""
    with mirror.source_db.connect(row_factory=psycopg.rows.dict_row) as connection:
        return connection.execute(
            """SELECT r.pid, r.backend_start, write_lsn - '0/0' AS write, flush_lsn - '0/0' AS flush,
                      replay_lsn - '0/0' AS apply
                 FROM pg_stat_replication r JOIN pg_replication_slots s ON s.active_pid = r.pid
                WHERE s.slot_name = 'cdc_shop' AND s.database = current_database()"""
        ).fetchone()


def test_f1_keepalives_are_answered_while_nothing_is_read(impatient: Mirror) -> None:
    impatient.delivery.pause()
    wait_for(lambda: impatient.delivery_stats.state == "paused", "the sink to pause")
    first = wait_for(lambda: walsender(impatient), "the stream")
    for start in range(0, 8000, 2000):
        impatient.source_db.execute(
            f"INSERT INTO items SELECT g, 0, repeat('x', 100) FROM generate_series({start}, {start + 1999}) g"
        )
    wait_for(lambda: impatient.capture_stats.state == "waiting", "the queue to be full")
    until = time.monotonic() + 5  # twice and a half the server's patience
    wait_for(lambda: time.monotonic() > until, "time to pass")
    assert impatient.queue.stats().bytes < 2_000_000, "F91: a full queue is bounded"
    still = walsender(impatient)
    assert still is not None
    assert still["pid"] == first["pid"], "the stream broke"
    impatient.delivery.resume()
    impatient.assert_equal("items")


def test_f1_keepalives_are_answered_in_the_middle_of_a_transaction(impatient: Mirror) -> None:
    first = wait_for(lambda: walsender(impatient), "the stream")
    take = impatient.source._intake.take  # type: ignore[union-attr]

    def slow_take() -> Batch | None:
        time.sleep(0.5)
        return take()

    impatient.source._intake.take = slow_take  # type: ignore[union-attr, method-assign]
    impatient.source_db.execute("INSERT INTO items SELECT g, 0, repeat('x', 300) FROM generate_series(1, 5000) g")
    impatient.assert_equal("items")
    still = walsender(impatient)
    assert still is not None
    assert still["pid"] == first["pid"]


def test_f2_f3_three_true_positions_are_reported(mirror: Mirror) -> None:
    mirror.delivery.pause()
    wait_for(lambda: mirror.delivery_stats.state == "paused", "the sink to pause")
    applied = mirror.delivery_stats.position or 0
    mirror.source_db.execute("INSERT INTO items SELECT g FROM generate_series(1, 5000) g")
    end = mirror.source_db.value("SELECT pg_current_wal_lsn() - '0/0'")

    def reported() -> dict[str, Any] | None:
        status = walsender(mirror)
        return status if status and status["flush"] and status["flush"] >= end else None

    status = wait_for(reported, "the flush position to be reported")
    assert status["write"] >= status["flush"]
    assert status["flush"] <= (mirror.queue.position or 0), "confirmed what is not durable"
    assert status["apply"] <= applied < status["flush"], "not applied yet, but reported as such"
    mirror.delivery.resume()
    mirror.sync()
    wait_for(lambda: (walsender(mirror) or {}).get("apply", 0) >= end, "the apply position")


def test_f3_nothing_is_confirmed_before_it_is_durable(mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror.sync()
    durable = as_lsn(mirror.queue.position or 0)
    monkeypatch.setattr(type(mirror.queue), "position", property(lambda queue: durable))  # the fsync takes for ever
    mirror.source_db.execute("INSERT INTO items SELECT g FROM generate_series(1, 100) g")
    wait_for(lambda: as_lsn(mirror.capture_stats.received or 0) > durable, "the changes to be received")
    until = time.monotonic() + 2.5  # status goes out every second
    while time.monotonic() < until:
        assert ((walsender(mirror) or {}).get("flush") or 0) <= durable


def test_f4_f5_what_the_server_sends_again_is_dropped(mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PostgresSource, "confirm", lambda self, **positions: None)  # so that it sends all again
    for n in range(5):
        mirror.source_db.execute(f"INSERT INTO log SELECT {n}, 'same LSN, several changes' FROM generate_series(1, 3)")
        mirror.sync()
        mirror.restart()
    mirror.assert_equal("log")
    assert len(mirror.rows("log")[1]) == 15


def test_f4_reconnect_in_the_middle_of_a_large_transaction(mirror: Mirror) -> None:
    """The part that is queued already is skipped by (commit LSN, ordinal)."""
    batches: list[Batch] = []
    read = mirror.source.read

    def read_and_break(timeout_seconds: float) -> Batch | None:
        batch = read(timeout_seconds)
        if batch is not None and not batch.complete:
            batches.append(batch)
            if len(batches) in (2, 4, 5):
                mirror.source.close()
        return batch

    mirror.source.read = read_and_break  # type: ignore[method-assign]
    mirror.source_db.execute("INSERT INTO log SELECT g, repeat('x', 60) FROM generate_series(1, 100000) g")
    mirror.assert_equal("log")
    assert mirror.capture_stats.retries == 3


def test_f4_the_walsender_is_terminated_under_load(mirror: Mirror) -> None:
    for n in range(8):
        mirror.source_db.execute(f"INSERT INTO log SELECT {n}, 'x' FROM generate_series(1, 2000)")
        mirror.source_db.execute(
            "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = 'cdc_shop'"
        )
    mirror.assert_equal("log")


def test_f7_the_slot_of_an_idle_table_advances(mirror: Mirror) -> None:
    mirror.source_db.execute("CREATE SCHEMA other; CREATE TABLE other.unrelated (x text)")
    mirror.source_db.execute("INSERT INTO other.unrelated SELECT repeat('x', 100) FROM generate_series(1, 20000)")
    end = mirror.source_db.value("SELECT pg_current_wal_lsn() - '0/0'")
    confirmed = "SELECT confirmed_flush_lsn - '0/0' FROM pg_replication_slots WHERE slot_name = 'cdc_shop'"
    wait_for(lambda: mirror.source_db.value(confirmed) >= end, "the slot to advance")
    assert mirror.source_db.value(confirmed) <= (mirror.queue.position or 0), "confirmed before it was durable"
    mirror.restart()
    mirror.source_db.execute("INSERT INTO items VALUES (1)")
    mirror.assert_equal("items")


def test_f46_the_source_shuts_down_while_we_are_connected(target_db: Database, tmp_path: Path, pg_dump: Path) -> None:
    with (
        PostgresServer(18) as server,
        running_mirror(server.create_database("shop"), target_db, tmp_path, pg_dump, ITEMS) as mirror,
    ):
        mirror.source_db.execute("INSERT INTO items SELECT g FROM generate_series(1, 1000) g")
        started = time.monotonic()
        server.stop("fast")
        assert time.monotonic() - started < 45, "the walsender waited for us"
        wait_for(lambda: mirror.capture_stats.state == "waiting", "the capture to notice")
        server.start()
        mirror.source_db.execute("INSERT INTO items VALUES (0)")
        mirror.assert_equal("items")


def test_f8_a_dropped_slot_stops_the_source(mirror: Mirror) -> None:
    mirror.sync()
    mirror.capture.pause()
    wait_for(lambda: mirror.capture_stats.state == "paused", "the source to pause")
    drop = """SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots
               WHERE slot_name = 'cdc_shop' AND NOT active"""
    wait_for(lambda: mirror.source_db.execute(drop), "the slot to be free")
    mirror.capture.resume()
    assert isinstance(mirror.failure(), ResyncRequired)
    assert mirror.source_db.execute("SELECT FROM pg_replication_slots WHERE slot_name = 'cdc_shop'") == []


def test_f10_a_slot_in_use_is_waited_for(mirror: Mirror) -> None:
    mirror.sync()
    other = PostgresSource(mirror.config, mirror.config.sources["shop"], mirror.queue)
    reader = wait_for(lambda: walsender(mirror), "the stream")
    with pytest.raises(TransientError, match=f"in use by process {reader['pid']}"):
        other.open(mirror.queue.position)
    other.close()


def test_f14_a_dropped_publication_stops_the_source(mirror: Mirror) -> None:
    mirror.sync()
    mirror.source_db.execute("DROP PUBLICATION cdc_shop")
    mirror.restart()
    assert "publication cdc_shop" in str(mirror.failure())


@pytest.mark.parametrize(
    ("rows", "owner", "way"), [(200, TargetTransaction, "commit"), (1, Applier, "few")], ids=["many", "few"]
)
@pytest.mark.parametrize("committed", [True, False])
def test_f94_the_target_decides_when_the_outcome_of_a_commit_is_unknown(
    mirror: Mirror, monkeypatch: pytest.MonkeyPatch, committed: bool, rows: int, owner: type, way: str
) -> None:
    commit = getattr(owner, way)
    cut: list[object] = []

    def break_around_commit(self: Any, what: object, **around: object) -> None:
        if len(cut) < 3:
            cut.append(what)
            if committed:
                commit(self, what, **around)
            self._connection.close()
            raise TransientError("connection lost")
        commit(self, what, **around)

    monkeypatch.setattr(owner, way, break_around_commit)
    for n in range(4):
        mirror.source_db.execute(f"INSERT INTO log SELECT {n}, 'x' FROM generate_series(1, {rows})")
        mirror.sync()
    assert len(cut) == 3
    mirror.assert_equal("log")
    assert len(cut) == 3


def test_f94_the_targets_backend_is_terminated_under_load(mirror: Mirror) -> None:
    for n in range(8):
        mirror.source_db.execute(f"INSERT INTO log SELECT {n}, 'x' FROM generate_series(1, 2000)")
        mirror.target_db.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name = 'cdc sink mirror'"
        )
    mirror.assert_equal("log")


def test_f93_f97_the_target_is_away_and_comes_back(mirror: Mirror) -> None:
    mirror.target_db.execute(f"ALTER DATABASE {mirror.target_db.name} SET default_transaction_read_only = on")
    mirror.target_db.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    mirror.source_db.execute("INSERT INTO items SELECT g FROM generate_series(1, 100) g")
    wait_for(lambda: mirror.delivery_stats.state == "waiting", "the sink to wait")
    with mirror.target_db.connect() as connection:
        connection.execute("SET default_transaction_read_only = off")
        connection.execute(f"ALTER DATABASE {mirror.target_db.name} RESET default_transaction_read_only")
    mirror.assert_equal("items")


def test_f115_a_target_older_than_the_queue_keeps_stops(mirror: Mirror) -> None:
    mirror.source_db.execute("INSERT INTO items VALUES (1)")
    mirror.sync()
    old = mirror.target_db.value("SELECT position::text FROM cdc.positions")
    for n in range(2, 5):
        mirror.source_db.execute(f"INSERT INTO items VALUES ({n})")
        mirror.sync()
    wait_for(lambda: mirror.queue.stats().batches == 0, "the queue to be pruned")
    mirror.stop()
    mirror.target_db.execute("UPDATE cdc.positions SET position = %s", [old])
    mirror.restart()
    assert isinstance(mirror.failure(), ResyncRequired)


def test_f115_a_target_that_lost_its_position_stops(mirror: Mirror) -> None:
    mirror.sync()
    mirror.stop()
    mirror.target_db.execute("DELETE FROM cdc.positions")
    mirror.restart()
    assert isinstance(mirror.failure(), ResyncRequired)


def test_f116_a_late_commit_of_an_old_connection_is_noticed(mirror: Mirror) -> None:
    """Another connection of ours moves the position after we have read it: we must not apply on top."""
    mirror.source_db.execute("INSERT INTO log VALUES (1, 'first')")
    mirror.sync()
    mirror.delivery.hold(None, 60)
    mirror.source_db.execute("INSERT INTO log VALUES (2, 'second')")
    end = mirror.source_db.value("SELECT pg_current_wal_lsn() - '0/0'")
    mirror.source.nudge()
    wait_for(lambda: (mirror.queue.position or 0) >= end, "the change to be queued")
    with mirror.target_db.connect() as late:
        late.execute("INSERT INTO log VALUES (2, 'second')")
        late.execute("UPDATE cdc.positions SET position = %s", [format_lsn(int(end))])
    mirror.delivery.release()
    mirror.assert_equal("log")
    assert mirror.delivery_stats.retries == 1


def test_f15_f16_no_reconnect_fails_because_of_a_table_that_is_not_published_yet(mirror: Mirror) -> None:
    mirror.source_db.execute("CREATE TABLE later (id int PRIMARY KEY)")
    mirror.source_db.execute(
        "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = 'cdc_shop'"
    )
    mirror.assert_equal("items")
    mirror.restart()
    mirror.assert_equal("items")
    published = "SELECT count(*) FROM pg_publication_tables WHERE tablename = 'later'"
    assert mirror.source_db.value(published) == 1
