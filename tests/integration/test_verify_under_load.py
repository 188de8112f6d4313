"""Verification while both sides go on: exact at the right position, and wrong by one transaction at any other."""

from __future__ import annotations

import random
import struct
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final, NamedTuple

import psycopg
import pytest

from cdc.barrier import Held, NoBarrier
from cdc.config import SinkConfig
from cdc.errors import CdcError, TransientError
from cdc.position import SourcePosition, parse_lsn
from cdc.postgres.connection import connect
from cdc.postgres.digest import Comparison, plan_comparison
from cdc.postgres.schema import read_tables
from cdc.verify import verify_at_barrier
from cdc.verify_report import VerifyReport
from tests.processes import wait_until
from tests.servers import Database

ACCOUNTS: Final = 40

SCHEMA: Final = f"""
CREATE TABLE accounts (id int PRIMARY KEY, balance int NOT NULL, note text);
CREATE TABLE counter (id int PRIMARY KEY, n int NOT NULL);
CREATE TABLE heap (v text);
INSERT INTO accounts SELECT x, 100, repeat('n', 200) FROM generate_series(1, {ACCOUNTS}) x;
INSERT INTO counter VALUES (1, 0)
"""


class Committed(NamedTuple):
    """A transaction of the source: where its commit record starts, and the statements that it ran."""

    position: int
    statements: list[str]


class Workload:
    """Writers whose every transaction changes something that the others see, and says in the log what it did."""

    def __init__(self, database: Database, writers: int = 3) -> None:
        self._database = database
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._write, args=(seed,)) for seed in range(writers)]

    def __enter__(self) -> None:
        for thread in self._threads:
            thread.start()

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def _write(self, seed: int) -> None:
        chance = random.Random(seed)
        with self._database.connect(autocommit=False) as connection:
            while not self._stopped.wait(0.005):  # a pace that one applier can keep
                try:
                    for statement in _transaction(chance):
                        connection.execute(statement)
                        connection.execute("SELECT pg_logical_emit_message(true, 'statement', %s)", [statement])
                    connection.commit()
                except psycopg.errors.DeadlockDetected:
                    connection.rollback()


def _transaction(chance: random.Random) -> Iterator[str]:
    one, other = chance.sample(range(1, ACCOUNTS + 1), 2)
    yield f"UPDATE accounts SET balance = balance - 1, note = note || 'x' WHERE id = {one}"
    yield f"UPDATE accounts SET balance = balance + 1 WHERE id = {other}"
    yield f"INSERT INTO heap VALUES ('row {chance.randrange(5)}')"
    yield "UPDATE counter SET n = n + 1"


class Applier:
    """A sink in small: reads the log, runs the statements in commit order on the mirror, and is its own barrier.

    slip: how many transactions it goes wrong when it is held at a position: -1 stands still one before it.
    """

    def __init__(self, source: Database, target: Database, slip: int = 0) -> None:
        self._source, self._target, self._slip = source, target, slip
        self._changed = threading.Condition()
        self._until: int | None = None
        self._held = self._standing = self._stopped = False
        self._slot = "applier"
        source.execute("SELECT pg_create_logical_replication_slot('applier', 'pgoutput'); CREATE PUBLICATION p")
        self._thread = threading.Thread(target=self._run)
        self.error: BaseException | None = None

    def __enter__(self) -> Applier:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()
        assert self.error is None, self.error

    def hold(self, until: SourcePosition | None, timeout_seconds: float) -> Held:
        assert not isinstance(until, bytes)
        with self._changed:
            self._held, self._until, self._standing = True, until, False
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._standing or self.error, timeout_seconds)
        return Held(exact=until is not None, lag_bytes=0)

    def release(self) -> None:
        with self._changed:
            self._held = False
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            with self._source.connect() as source, self._target.connect(autocommit=False) as target:
                waiting: list[Committed] = []
                while not self._stopped:
                    waiting += _read(source, self._slot)
                    self._apply(target, waiting)
        except BaseException as exc:
            self.error = exc
            raise

    def _apply(self, target: psycopg.Connection[Any], waiting: list[Committed]) -> None:
        with self._changed:
            held, until = self._held, self._until
        if not held:
            self._run_all(target, waiting, len(waiting))
        elif until is None:
            self._stand(held, until)
        elif any(committed.position >= until for committed in waiting):  # the stream has passed it
            below = sum(committed.position < until for committed in waiting)
            if 0 <= below + self._slip <= len(waiting):
                self._run_all(target, waiting, below + self._slip)
                self._stand(held, until)

    def _stand(self, held: bool, until: int | None) -> None:
        with self._changed:
            if self._held == held and self._until == until:
                self._standing = True
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._stopped or not self._held or self._until != until)

    def _run_all(self, target: psycopg.Connection[Any], waiting: list[Committed], count: int) -> None:
        for committed in waiting[:count]:
            for statement in committed.statements:
                target.execute(statement)
            target.commit()
        del waiting[:count]


def _read(source: psycopg.Connection[Any], slot: str) -> Iterator[Committed]:
    """Transactions of the workload, in commit order (pgoutput: Begin, Message..., Commit)."""
    query = """SELECT data FROM pg_logical_slot_get_binary_changes(%s, NULL, 500,
               'proto_version', '1', 'publication_names', 'p', 'messages', 'true')"""
    position, statements = 0, list[str]()
    for (data,) in source.execute(query, [slot]):
        if data[:1] == b"B":
            (position,), statements = struct.unpack_from(">Q", data, 1), []
        elif data[:1] == b"M" and data[10:20] == b"statement\0":
            statements.append(data[24:].decode())
        elif data[:1] == b"C" and statements:
            yield Committed(position, statements)


@pytest.fixture
def databases(source_db: Database, target_db: Database) -> tuple[Database, Database]:
    for database in (source_db, target_db):
        database.execute(SCHEMA)
    return source_db, target_db


def plan(source: Database, target: Database) -> Comparison:
    with connect(source.url) as one, connect(target.url) as other:
        return plan_comparison(one, other, SinkConfig(name="mirror", source="shop"), list(read_tables(one)))


def compare(source: Database, target: Database, barrier: Applier | NoBarrier, **options: Any) -> VerifyReport:
    comparison = plan(source, target)
    return verify_at_barrier(
        partial(comparison.source_view, source.url),
        partial(comparison.target_view, target.url),
        barrier,
        comparison.tables,
        **options,
    )


def moved_on(source: Database, transactions: int = 5) -> Callable[[], bool]:
    """A condition: so many more transactions have committed."""
    start = source.value("SELECT n FROM counter")
    return lambda: bool(source.value("SELECT n FROM counter") >= start + transactions)


def test_f47_f56_snapshots_at_one_position_are_equal_while_both_sides_go_on(
    databases: tuple[Database, Database],
) -> None:
    source, target = databases
    with Applier(source, target) as applier, Workload(source):
        for _ in range(6):
            wait_until(moved_on(source), what="the workload")
            report = compare(source, target, applier)
            assert report.equal, report
            assert report.exact
            assert report.position is not None
        counts = {table.table: table.source_rows for table in report.tables}
    assert counts["public.heap"] > 30, "there was load"
    assert counts["public.accounts"] == ACCOUNTS


@pytest.mark.parametrize("slip", [-1, 1])
def test_a_position_that_is_wrong_by_one_transaction_is_detected(
    databases: tuple[Database, Database], slip: int
) -> None:
    source, target = databases
    with Applier(source, target, slip) as applier, Workload(source):
        wait_until(moved_on(source, 50), what="the workload")
        report = compare(source, target, applier)
    tables = {table.table: table for table in report.tables}
    assert not report.equal
    assert tables["public.counter"].different.keys == ("(1)",)
    assert tables["public.accounts"].different.count == 2
    assert tables["public.heap"].missing.count == max(-slip, 0)
    assert tables["public.heap"].extra.count == max(slip, 0)


def test_the_mirror_goes_on_while_it_is_compared(databases: tuple[Database, Database]) -> None:
    """The hold ends before the comparison begins, which may take hours."""
    source, target = databases
    seen = []

    def progress(_table: object, _report: object) -> None:
        count = target.value("SELECT n FROM counter")
        wait_until(lambda: target.value("SELECT n FROM counter") > count, what="the mirror to go on")
        seen.append(count)

    with Applier(source, target) as applier, Workload(source):
        assert compare(source, target, applier, progress=progress).equal
    assert len(seen) == 6


def test_a_hold_that_ended_before_the_view_was_open_is_an_error(databases: tuple[Database, Database]) -> None:
    source, target = databases
    comparison = plan(source, target)

    def slowly() -> Any:
        time.sleep(1.1)  # the subject: longer than the hold
        return comparison.target_view(target.url)

    with Applier(source, target) as applier, Workload(source), pytest.raises(TransientError, match="hold ended"):
        verify_at_barrier(
            partial(comparison.source_view, source.url), slowly, applier, comparison.tables, hold_seconds=1.0
        )


def test_f56_without_a_barrier_the_report_says_how_far_the_mirror_is_behind(
    databases: tuple[Database, Database],
) -> None:
    source, target = databases
    here = parse_lsn(source.value("SELECT pg_current_wal_lsn()::text"))
    source.execute("INSERT INTO heap VALUES ('not applied')")
    report = compare(source, target, NoBarrier(lambda: here))
    assert not report.exact
    assert report.lag_bytes is not None
    assert report.lag_bytes > 50
    assert not report.equal
    assert compare(source, target, NoBarrier(lambda: None)).lag_bytes is None


def test_a_barrier_is_released_when_a_view_cannot_be_had(databases: tuple[Database, Database]) -> None:
    source, target = databases

    def fail() -> Any:
        raise TransientError("no such luck")

    comparison = plan(source, target)
    with Applier(source, target) as applier:
        with pytest.raises(CdcError, match="no such luck"):
            verify_at_barrier(fail, partial(comparison.target_view, target.url), applier, comparison.tables)
        with Workload(source):
            wait_until(lambda: target.value("SELECT n FROM counter") > 5, what="the mirror to go on")
