"""What happens to a source while it is mirrored: its slot, its cluster, its transactions, its clock."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import closing
from itertools import cycle
from pathlib import Path
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from cdc import capture
from cdc.errors import ResyncRequired
from cdc.position import as_lsn
from cdc.postgres import replication
from cdc.postgres import source as source_module
from cdc.postgres.source import PostgresSource
from cdc.secret import Secret
from cdc.status import snapshot
from tests.conftest import NewDatabase
from tests.mirror import Mirror, running_mirror, wait_for
from tests.servers import Database, PostgresServer

ITEMS = "CREATE TABLE items (id int PRIMARY KEY, n int NOT NULL DEFAULT 0, name text)"
SLOT = "cdc_shop"
SLOT_OF = "FROM pg_replication_slots WHERE slot_name = 'cdc_shop'"

Start = Callable[..., Mirror]


@pytest.fixture
def start(target_db: Database, tmp_path: Path, pg_dump: Path, request: Any) -> Start:
    """Starts a mirror of a database."""

    def start(database: Database, *schema: str, **options: Any) -> Mirror:
        context = running_mirror(database, target_db, tmp_path, pg_dump, *schema, **options)
        mirror = context.__enter__()
        request.addfinalizer(lambda: context.__exit__(None, None, None))
        return mirror

    return start


def stop_and_wait_for_the_slot(mirror: Mirror) -> None:
    """Stop the daemon's halves; the server takes a moment to notice."""
    mirror.stop()
    wait_for(lambda: mirror.source_db.value(f"SELECT NOT active {SLOT_OF}"), "the slot to be free")


def confirmed(mirror: Mirror) -> int:
    return int(mirror.source_db.value(f"SELECT confirmed_flush_lsn - '0/0' {SLOT_OF}"))


def wal_end(mirror: Mirror) -> int:
    return int(mirror.source_db.value("SELECT pg_current_wal_lsn() - '0/0'"))


# the slot and the cluster are not what they were


def test_f6_a_slot_that_somebody_else_has_read_stops_the_source(start: Start, source_db: Database) -> None:
    mirror = start(source_db, ITEMS)
    mirror.sync()
    stop_and_wait_for_the_slot(mirror)
    source_db.execute("INSERT INTO items VALUES (1)")
    source_db.execute("SELECT pg_replication_slot_advance(%s, pg_current_wal_lsn())", [SLOT])
    mirror.restart()
    error = mirror.failure()
    assert isinstance(error, ResyncRequired)
    assert "ahead of the queue" in str(error)
    assert mirror.rows("items")[1] == []


def test_f8_a_recreated_slot_stops_the_source(start: Start, source_db: Database) -> None:
    mirror = start(source_db, ITEMS)
    mirror.sync()
    stop_and_wait_for_the_slot(mirror)
    source_db.execute("INSERT INTO items VALUES (1)")
    source_db.execute("SELECT pg_drop_replication_slot(%s)", [SLOT])
    source_db.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [SLOT])
    mirror.restart()
    assert isinstance(mirror.failure(), ResyncRequired)
    assert mirror.rows("items")[1] == []


def test_f9_a_slot_that_the_server_gives_up_is_announced_and_then_stops_the_source(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_module, "OBSERVE_SECONDS", 0.05)
    settings = {"max_slot_wal_keep_size": "96MB", "max_wal_size": "1GB", "min_wal_size": "32MB"}
    with PostgresServer(18, settings=settings) as server, capture_logs() as logs:
        database = server.create_database("shop")
        mirror = start(database, ITEMS)
        mirror.sync()
        with database.connect() as old:
            old.execute("BEGIN; INSERT INTO items VALUES (1)")  # what follows is kept until it ends
            wait_for(lambda: write_wal(mirror) and announced(logs), "a warning")
            assert mirror.error is None, "warned too late"
            wait_for(lambda: write_wal(mirror) and mirror.error, "the slot to be lost")
        assert_stopped_by_a_lost_slot(mirror)


def test_f9_a_slot_that_was_idle_for_too_long_stops_the_source(start: Start) -> None:
    with PostgresServer(18, settings={"idle_replication_slot_timeout": "1s"}) as server:
        mirror = start(server.create_database("shop"), ITEMS)
        mirror.sync()
        mirror.capture.pause()
        wait_for(lambda: mirror.capture_stats.state == "paused", "the source to pause")
        lost = f"SELECT invalidation_reason IS NOT NULL {SLOT_OF}"
        wait_for(lambda: write_wal(mirror) and mirror.source_db.value(lost), "the slot to be lost")
        mirror.capture.resume()
        assert_stopped_by_a_lost_slot(mirror)


def assert_stopped_by_a_lost_slot(mirror: Mirror) -> None:
    error = mirror.failure()
    assert isinstance(error, ResyncRequired)
    assert f"slot {SLOT} is lost" in str(error)
    mirror.stop()  # while the server still runs


def write_wal(mirror: Mirror) -> bool:
    """Fill a segment of WAL, let the capture look at its slot, and let the server judge it."""
    observed = mirror.source._observed_at
    mirror.source_db.execute("SELECT pg_logical_emit_message(true, 'fill', 'x'), pg_switch_wal()")
    wait_for(lambda: mirror.error or mirror.source._observed_at != observed or mirror.source._stream is None, "a look")
    mirror.source_db.execute("CHECKPOINT")
    return True


def announced(logs: list[Any]) -> bool:
    return any(entry["event"].startswith(f"slot {SLOT} ") and "is lost" in entry["event"] for entry in list(logs))


def test_f12_another_cluster_behind_the_same_name_is_refused(
    start: Start, source_db: Database, target18: PostgresServer, new_database: NewDatabase
) -> None:
    mirror = start(source_db, ITEMS)
    mirror.sync()
    mirror.stop()
    other = new_database(target18)
    other.execute(f"{ITEMS}; CREATE PUBLICATION {SLOT} FOR TABLE items")
    other.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [SLOT])
    moved = msgspec.structs.replace(mirror.config.sources["shop"], url=Secret(other.url))
    with (
        closing(PostgresSource(mirror.config, moved, mirror.queue)) as source,
        pytest.raises(ResyncRequired, match="another cluster"),
    ):
        source.open(mirror.queue.position)


def test_f12_a_restored_backup_stops_the_source(start: Start) -> None:
    with PostgresServer(18) as server:
        database = server.create_database("shop")
        mirror = start(database, ITEMS)
        mirror.sync()
        mirror.stop()
        server.stop()
        backup = server.folder / "backup"
        subprocess.run(["cp", "-a", server.data_dir, backup], check=True)
        server.start()
        mirror.start()
        database.execute("INSERT INTO items SELECT g FROM generate_series(1, 1000) g")
        mirror.sync()
        mirror.stop()
        server.stop()
        shutil.rmtree(server.data_dir)
        backup.rename(server.data_dir)
        server.start()
        mirror.restart()
        error = mirror.failure()
        assert isinstance(error, ResyncRequired)
        assert "restored from a backup" in str(error)
        mirror.stop()


# nothing happens, or too much


def test_f1_what_the_server_asks_is_answered_without_any_timer(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks when half of its time-out is over, and hangs up at the end; nothing is sent unasked here."""
    monkeypatch.setattr(replication, "STATUS_SECONDS", 3600.0)
    monkeypatch.setattr(replication, "STATUS_SECONDS_MOVING", 3600.0)
    monkeypatch.setattr(source_module, "_sender_timeout_seconds", lambda control: 0.0)
    pid = f"SELECT active_pid {SLOT_OF}"
    with PostgresServer(18, settings={"wal_sender_timeout": "1s"}) as server:
        mirror = start(server.create_database("shop"), ITEMS, source={"heartbeat_seconds": 0})
        walsender = wait_for(lambda: mirror.source_db.value(pid), "the stream")
        until = time.monotonic() + 2.5
        wait_for(lambda: time.monotonic() > until, "the server's patience to end twice")
        mirror.assert_equal("items")
        assert mirror.source_db.value(pid) == walsender, "the server hung up"
        mirror.stop()


@pytest.mark.parametrize("busy", ["another database", "another table"])
def test_f7_keepalives_alone_move_the_slot_of_an_idle_table(
    start: Start, source_db: Database, new_database: NewDatabase, busy: str
) -> None:
    mirror = start(source_db, ITEMS, "CREATE SCHEMA other", source={"heartbeat_seconds": 0})
    database = source_db if busy == "another table" else new_database(source_db.server)
    schema = "other" if busy == "another table" else "public"
    database.execute(f"CREATE TABLE {schema}.unrelated AS SELECT repeat('x', 100) FROM generate_series(1, 20000)")
    end = wal_end(mirror)
    wait_for(lambda: confirmed(mirror) >= end, "the slot to advance")
    assert confirmed(mirror) <= as_lsn(mirror.queue.position or 0), "confirmed before it was durable"


def test_f7_a_heartbeat_moves_the_slot_where_nothing_else_does(start: Start, source_db: Database) -> None:
    mirror = start(source_db, ITEMS, source={"heartbeat_seconds": 0.1})
    for _ in range(3):
        before = wal_end(mirror)
        wait_for(lambda before=before: confirmed(mirror) > before, "a heartbeat to come round")  # type: ignore[misc]
    assert mirror.delivery_stats.changes["message"] == 0, "heartbeats are no business of the mirror"


def test_f91_a_queue_that_stays_full_lets_go_of_the_connection_and_loses_nothing(
    start: Start, source_db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capture, "FULL_SECONDS", 0.2)
    mirror = start(source_db, ITEMS, max_bytes=200_000)
    mirror.delivery.pause()
    wait_for(lambda: mirror.delivery_stats.state == "paused", "the sink to pause")
    for first in range(0, 20_000, 1000):
        source_db.execute(
            f"INSERT INTO items SELECT g, 0, repeat('x', 90) FROM generate_series({first}, {first + 999}) g"
        )
    wait_for(lambda: source_db.value(f"SELECT NOT active {SLOT_OF}"), "the connection to be closed")
    assert mirror.capture_stats.error == capture.QUEUE_FULL
    assert mirror.queue.stats().bytes < 2_000_000
    assert mirror.error is None
    mirror.delivery.resume()
    mirror.assert_equal("items")


# transactions


def test_f42_a_prepared_transaction_arrives_with_its_commit(
    start: Start, postgres: PostgresServer, source_db: Database
) -> None:
    mirror = start(source_db, ITEMS)
    for name in ("kept", "dropped"):
        with source_db.connect(autocommit=False) as connection:
            connection.execute("INSERT INTO items VALUES (%s)", [len(name)])
            connection.execute(f"PREPARE TRANSACTION 'f42 {name}'")
    mirror.sync()
    mirror.restart()
    source_db.execute("INSERT INTO items VALUES (1)")
    mirror.sync()
    assert mirror.rows("items")[1] == ["(1,0,)"]
    source_db.execute("COMMIT PREPARED 'f42 kept'")
    source_db.execute("ROLLBACK PREPARED 'f42 dropped'")
    mirror.assert_equal("items")
    assert len(mirror.rows("items")[1]) == 2


PARTITIONED = (
    "CREATE TABLE sales (id int, region text, n int, PRIMARY KEY (id, region)) PARTITION BY LIST (region)",
    "CREATE TABLE sales_north PARTITION OF sales FOR VALUES IN ('north')",
    "CREATE TABLE sales_south PARTITION OF sales FOR VALUES IN ('south')",
    "CREATE TABLE sales_other PARTITION OF sales DEFAULT",
)


def test_f26_rows_move_between_partitions_that_come_and_go(
    start: Start, postgres: PostgresServer, source_db: Database
) -> None:
    mirror = start(source_db, *PARTITIONED)
    assert mirror.target_db.value("SELECT count(*) FROM pg_partition_tree('sales') WHERE isleaf") == 3
    source_db.execute(
        "INSERT INTO sales SELECT g, (ARRAY['north', 'south'])[g % 2 + 1], g FROM generate_series(1, 300) g"
    )
    source_db.execute("UPDATE sales SET region = 'south', n = 0 WHERE id % 10 = 1")
    source_db.execute("UPDATE sales SET region = CASE region WHEN 'north' THEN 'south' ELSE 'north' END WHERE id < 250")
    mirror.assert_equal("sales", "sales_north", "sales_south")
    source_db.execute(
        "CREATE TABLE sales_east (LIKE sales INCLUDING ALL); ALTER TABLE sales ATTACH PARTITION sales_east"
        " FOR VALUES IN ('east')"
    )
    source_db.execute("UPDATE sales SET region = 'east' WHERE id < 20; DELETE FROM sales WHERE id = 3")
    mirror.assert_equal("sales")  # on the mirror they are in the default partition
    assert mirror.target_db.value("SELECT count(*) FROM sales_other") == 18
    source_db.execute("ALTER TABLE sales DETACH PARTITION sales_east; INSERT INTO sales_east VALUES (1000, 'east', 1)")
    source_db.execute("UPDATE sales SET n = n + 1; TRUNCATE sales_south")
    mirror.sync()
    kept = mirror.target_db.value("SELECT count(*) FROM sales WHERE region IN ('east', 'south')")
    assert kept > 100, "what is detached, or truncated by partition, is not sent: it stays"
    source_db.execute("TRUNCATE sales; INSERT INTO sales VALUES (1, 'north', 1)")
    mirror.assert_equal("sales")


# the clock


JUMPS = {"back": [-86_400.0], "forth": [86_400.0], "back and forth": [0, -86_400, 3600, -5, 86_400, -60, 0.5]}


@pytest.mark.parametrize("jump", JUMPS)
def test_f88_a_clock_that_jumps_stalls_nothing_and_no_lag_is_negative(
    start: Start, source_db: Database, monkeypatch: pytest.MonkeyPatch, jump: str
) -> None:
    mirror = start(source_db, ITEMS, source={"heartbeat_seconds": 0.5})
    mirror.sync()
    true_time, offsets = time.time, cycle(JUMPS[jump])
    monkeypatch.setattr(time, "time", lambda: true_time() + next(offsets))
    for n in range(5):
        source_db.execute(f"INSERT INTO items SELECT g FROM generate_series({n * 1000}, {n * 1000 + 999}) g")
        mirror.sync()
        assert_no_negative_lag(mirror)
    end = wal_end(mirror)
    wait_for(lambda: confirmed(mirror) > end, "status updates and heartbeats")
    mirror.restart()
    source_db.execute("UPDATE items SET n = 1")
    mirror.assert_equal("items")
    wait_for(lambda: mirror.queue.stats().batches == 0, "the queue to be pruned")
    assert mirror.capture_stats.retries == mirror.delivery_stats.retries == 0


def assert_no_negative_lag(mirror: Mirror) -> None:
    for _ in range(20):
        status = snapshot(
            version="",
            started_at=0.0,
            sources=[(mirror.capture_stats, mirror.queue.stats())],
            sinks=[mirror.delivery_stats],
        )
        source, sink = status.sources["shop"], status.sinks["mirror"]
        assert source.queue is not None
        lags = [source.lag_seconds, source.lag_bytes, sink.lag_seconds, sink.lag_bytes, source.queue.oldest_seconds]
        assert all(lag is None or lag >= 0 for lag in lags), lags
