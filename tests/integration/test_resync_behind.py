"""A resync beside a stream that the mirror has not caught up with."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from cdc.change import TableName
from cdc.postgres import refresh_rounds
from cdc.postgres.schema import SchemaTable
from cdc.postgres.snapshot import PostgresSnapshot, open_snapshot
from sinks.postgres import PostgresSink
from tests.mirror import Mirror, running_mirror
from tests.processes import wait_until
from tests.servers import Database

TABLES = [f"small_{n:02}" for n in range(12)]
SCHEMA = "; ".join(f"CREATE TABLE {table} (id int PRIMARY KEY, n int)" for table in ["written", *TABLES])
BIG = "CREATE TABLE moved (id int PRIMARY KEY, big text); ALTER TABLE moved ALTER big SET STORAGE EXTERNAL"
SPOIL = "DELETE FROM {0} WHERE id = 7; UPDATE {0} SET n = -1 WHERE id < 5; INSERT INTO {0} VALUES (1000, 0)"


@pytest.fixture
def mirror(source_db: Database, target_db: Database, tmp_path: Path, pg_dump: Path) -> Iterator[Mirror]:
    with running_mirror(source_db, target_db, tmp_path, pg_dump, SCHEMA, BIG) as mirror:
        for table in TABLES:
            source_db.execute(f"INSERT INTO {table} SELECT g, g FROM generate_series(1, 20) g")
        mirror.assert_equal("written", *TABLES)
        yield mirror


class Snapshots:
    """What a refresh opens. Before each of them the source writes something that the mirror cannot apply yet."""

    def __init__(self, source: Database, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened = 0
        self.closed = threading.Event()

        def opening(url: str, tables: Mapping[TableName, SchemaTable]) -> PostgresSnapshot:
            self.opened += 1
            source.execute("INSERT INTO written VALUES ((SELECT count(*) FROM written))")
            snapshot = open_snapshot(url, tables)
            close = snapshot.close

            def closing() -> None:
                close()
                self.closed.set()

            monkeypatch.setattr(snapshot, "close", closing)
            return snapshot

        monkeypatch.setattr(refresh_rounds, "open_snapshot", opening)


def resync(mirror: Mirror) -> None:
    mirror.stop()
    mirror.want_resync()
    mirror.refill()


def wait_until_right(mirror: Mirror) -> None:
    stats = mirror.delivery_stats
    wait_until(lambda: mirror.error or stats.state == "running", what=lambda: f"the end of the resync: {stats}")
    mirror.assert_equal("written", *TABLES)


def test_small_tables_wait_together_for_a_mirror_that_is_behind(
    mirror: Mirror, source_db: Database, target_db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are read from one snapshot, before the mirror comes to it: the next would have to be waited for anew."""
    snapshots = Snapshots(source_db, monkeypatch)
    monkeypatch.setattr(refresh_rounds, "ROUND_SECONDS", 0.0)
    for table in TABLES:
        target_db.execute(SPOIL.format(table))
    with target_db.connect() as connection, connection.transaction():
        connection.execute("LOCK TABLE written IN SHARE MODE")
        resync(mirror)
        wait_until(lambda: mirror.error or snapshots.closed.is_set(), what="all to be read")
        source_db.execute(f"UPDATE {TABLES[3]} SET n = 0; DELETE FROM {TABLES[5]} WHERE id = 1")
        source_db.execute(f"INSERT INTO {TABLES[7]} VALUES (1000, 1); UPDATE {TABLES[8]} SET id = -id WHERE id = 7")
    wait_until_right(mirror)
    assert snapshots.opened == 1


def test_a_table_that_is_emptied_does_not_keep_others_from_being_put_right(
    mirror: Mirror, source_db: Database, target_db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshots = Snapshots(source_db, monkeypatch)
    for table in TABLES:
        target_db.execute(SPOIL.format(table))
    with capture_logs() as logs:
        with target_db.connect() as connection, connection.transaction():
            connection.execute("LOCK TABLE written IN SHARE MODE")
            resync(mirror)
            wait_until(lambda: mirror.error or snapshots.closed.is_set(), what="all to be read")
            source_db.execute(f"TRUNCATE {TABLES[2]}; INSERT INTO {TABLES[2]} VALUES (1, 2)")
        wait_until_right(mirror)
    resynced = [entry["table"] for entry in logs if entry["event"] == "table resynced"]
    assert resynced[-1] == f"public.{TABLES[2]}"
    assert snapshots.opened == 2


def test_what_comes_beside_transactions_that_need_care_is_applied_together(
    mirror: Mirror, source_db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each by itself, many small ones would take longer than the source takes to write as many."""
    source_db.execute("INSERT INTO moved SELECT g, repeat('x', 3000) FROM generate_series(1, 5) g")
    mirror.sync()
    mirror.stop()
    update = f"UPDATE {TABLES[0]} SET n = n + 1 WHERE id = i % 20"
    many = f"DO $$ BEGIN FOR i IN 1..200 LOOP {update}; COMMIT; END LOOP; END $$"
    for statement in (many, "UPDATE moved SET id = -id WHERE id = 1", many):
        source_db.execute(statement)
    end = source_db.value("SELECT pg_current_wal_lsn() - '0/0'")
    mirror.start(delivery=False)
    wait_until(lambda: mirror.error or (mirror.queue.position or 0) >= end, what="all to be captured")
    attempts: list[object] = []
    apply_fast = PostgresSink._apply_fast

    def noted(sink: PostgresSink, *args: Any) -> Any:
        attempts.append(args)
        return apply_fast(sink, *args)

    monkeypatch.setattr(PostgresSink, "_apply_fast", noted)
    resync(mirror)
    wait_until_right(mirror)
    mirror.assert_equal("moved")
    assert len(attempts) < 40
