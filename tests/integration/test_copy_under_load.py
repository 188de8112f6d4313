"""The copy and the stream together: what is written while tables are copied arrives, once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import cast

import pytest

from cdc.change import TableName
from cdc.errors import FatalError
from cdc.filling import fill
from cdc.position import as_lsn
from cdc.postgres.loader import PostgresLoader
from cdc.postgres.source import PostgresSource
from cdc.sink import Mirror as MirrorSink
from tests.mirror import Mirror, wait_for
from tests.servers import Database, PostgresServer

ITEMS = "CREATE TABLE items (id int PRIMARY KEY, n int NOT NULL DEFAULT 0, document text)"
LOG = "CREATE TABLE log (n int, what text); ALTER TABLE log REPLICA IDENTITY FULL"
ITEMS_NAME, LOG_NAME = TableName("public", "items"), TableName("public", "log")
ROWS = "INSERT INTO {0} SELECT g, 0, repeat('x', 200) FROM generate_series(1, 2000) g"

CHANGES = """
    INSERT INTO items SELECT min(id) - 1, 1, 'new' FROM items;
    UPDATE items SET n = n + 1 WHERE id % 2 = 0;
    UPDATE items SET id = id + 2 * (SELECT max(id) FROM items) WHERE id % 5 = 0;
    DELETE FROM items WHERE id % 3 = 0;
    DELETE FROM log WHERE ctid IN (SELECT ctid FROM log WHERE n % 4 = 0);
    INSERT INTO log SELECT g % 7, 'later' FROM generate_series(1, 100) g;
    UPDATE log SET n = n + 1 WHERE n = 5;
"""


class Copying:
    """A mirror whose capture runs, and whose copy stops where the test wants it to."""

    def __init__(self, mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
        self.mirror = mirror
        self.before_chunk: Callable[[TableName], None] = lambda table: None
        load = PostgresLoader.load

        def load_when_allowed(
            loader: PostgresLoader, table: TableName, blocks: Iterable[bytes], **options: bool
        ) -> int:
            self.before_chunk(table)
            return load(loader, table, blocks, **options)

        monkeypatch.setattr(PostgresLoader, "load", load_when_allowed)
        mirror.queue.register("mirror")
        mirror.start(delivery=False)
        wait_for(lambda: mirror.error or mirror.queue.position, "the capture to begin")

    def fill(self) -> None:
        """Copy all tables, as the daemon does it: beside the capture, before the delivery."""
        mirror = self.mirror
        options = mirror.config.sinks["mirror"].copy
        reader = PostgresSource(mirror.config, mirror.config.sources["shop"], mirror.queue)
        sink = cast("MirrorSink", mirror.sink)
        fill(reader, sink, mirror.queue, stats=mirror.delivery_stats, options=options, stop=threading.Event())

    @contextmanager
    def stopped_in_the_middle(self) -> Iterator[None]:
        """The block runs while the snapshot is open, some chunks are loaded and others are not."""
        middle, go_on = threading.Event(), threading.Event()
        loaded: list[TableName] = []

        def wait_in_the_middle(table: TableName) -> None:
            loaded.append(table)
            if len(loaded) > 2:
                middle.set()
                assert go_on.wait(60)

        self.before_chunk = wait_in_the_middle
        filling = threading.Thread(target=self.fill)
        filling.start()
        try:
            assert middle.wait(60), "the copy has too few chunks"
            yield
        finally:
            go_on.set()
            filling.join(60)
        assert not filling.is_alive()

    def deliver(self) -> None:
        """Let the stream into the mirror."""
        capture = self.mirror._threads
        self.mirror.start(capture=False)
        self.mirror._threads += capture


@pytest.fixture
def copying(
    source_db: Database, target_db: Database, tmp_path: Path, pg_dump: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Copying]:
    source_db.execute(f"{ITEMS}; {LOG}; {ROWS.format('items')}")
    source_db.execute("INSERT INTO log SELECT g % 9, 'early' FROM generate_series(1, 400) g")
    sink = {"copy": {"chunk_bytes": 100_000, "workers": 2}}
    mirror = Mirror(source_db, target_db, tmp_path, pg_dump, sink=sink)
    try:
        yield Copying(mirror, monkeypatch)
    finally:
        mirror.close()


def test_f48_f49_f54_what_changes_while_tables_are_copied_waits_in_the_queue(
    copying: Copying, postgres: PostgresServer, source_db: Database
) -> None:
    """The source's server may forget what was written long before the copy is done."""
    mirror = copying.mirror
    with copying.stopped_in_the_middle():
        source_db.execute(CHANGES)
        written = int(source_db.value("SELECT pg_current_wal_lsn() - '0/0'"))
        kept = """SELECT min(least(confirmed_flush_lsn, restart_lsn)) - '0/0' FROM pg_replication_slots
                   WHERE database = current_database()"""
        wait_for(lambda: source_db.execute("CHECKPOINT") or source_db.value(kept) >= written, "no slot to keep it")
        assert mirror.queue.stats().batches > 0
        assert not mirror.sink.copied(), "the copy was over too early"
        source_db.execute(CHANGES)
    copying.deliver()
    mirror.assert_equal("items", "log")
    assert mirror.delivery_stats.missing_rows == 0


@pytest.mark.parametrize("truncate", [False, True], ids=["rows", "truncate"])
def test_f48_f49_f50_tables_of_two_snapshots_each_get_their_own_changes(
    copying: Copying, source_db: Database, truncate: bool
) -> None:
    """The first attempt dies after one table: what happens before the second is in the other's copy already.

    In that one, which has no key, whatever is applied although it was copied would show.
    """
    mirror = copying.mirror
    chunks = count()

    def die_after_one_table(table: TableName) -> None:
        if table == LOG_NAME and next(chunks) == 0:
            wait_for(mirror.sink.copied, "the other table")
            raise FatalError("the process dies")

    copying.before_chunk = die_after_one_table
    with pytest.raises(FatalError, match="the process dies"):
        copying.fill()
    assert set(mirror.sink.copied()) == {ITEMS_NAME}
    source_db.execute(CHANGES)
    if truncate:
        source_db.execute(f"TRUNCATE items, log; {ROWS.format('items')}; {CHANGES}")
    source_db.execute("BEGIN; UPDATE items SET n = 7; INSERT INTO log VALUES (7, 'seven'); COMMIT")
    copying.before_chunk = lambda table: None
    copying.fill()
    assert len(set(mirror.sink.copied().values())) == 2
    source_db.execute(CHANGES)
    copying.deliver()
    mirror.assert_equal("items", "log")
    assert mirror.delivery_stats.missing_rows == 0


def queued_commits(mirror: Mirror, count: int) -> list[int]:
    """Where the last `count` transactions commit, once the queue has them; the ones before are applied."""

    def commits() -> list[int]:
        stored = mirror.queue.read(mirror.delivery_stats.seq, max_bytes=10**8, timeout_seconds=0.1)
        return [as_lsn(transaction.position) for each in stored for transaction in each.batch.transactions]

    wait_for(lambda: len(commits()) == count, "all to be queued")
    return commits()


def test_f47_a_change_is_in_the_copy_if_and_only_if_it_commits_below_the_copys_position(
    copying: Copying, source_db: Database, target_db: Database
) -> None:
    """To the byte: a transaction whose commit record starts at the position is not in the copy."""
    mirror = copying.mirror
    source_db.execute("TRUNCATE items, log")
    copying.fill()
    copying.deliver()
    mirror.sync()
    mirror.delivery.pause()
    wait_for(lambda: mirror.delivery_stats.state == "paused", "the sink to pause")
    for n in range(5):
        source_db.execute("INSERT INTO log VALUES (%s, 'x')", [n])
    source_db.execute("INSERT INTO items VALUES (1)")
    _, _, _, position, *_ = queued_commits(mirror, 6)
    target_db.execute("UPDATE cdc.tables SET position = '0/0'::pg_lsn + %s WHERE source_table = 'log'", [position])
    mirror.delivery.resume()
    mirror.sync()
    assert target_db.execute("SELECT n FROM log ORDER BY n") == [(3,), (4,)]
    assert mirror.rows("items")[1] == ["(1,0,)"]


def test_f56_a_mirror_stands_still_exactly_below_a_commit(copying: Copying, source_db: Database) -> None:
    """To the byte: a transaction whose commit record starts at the position is not applied yet."""
    mirror = copying.mirror
    source_db.execute("TRUNCATE items, log")
    copying.fill()
    copying.deliver()
    mirror.sync()
    mirror.delivery.hold(None, 60)
    for n in range(5):
        source_db.execute("INSERT INTO log VALUES (%s, 'x')", [n])
    for n, commit in enumerate(queued_commits(mirror, 5)):
        assert mirror.delivery.hold(commit, 60) == commit
        assert len(mirror.rows("log")[1]) == n
    mirror.delivery.release()
    mirror.assert_equal("log")
