"""What the target refuses waits, with what depends on it; everything else flows on, and nothing overtakes."""

from __future__ import annotations

import random
import sqlite3
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import closing, contextmanager
from pathlib import Path

import msgspec
import pytest

from cdc.change import DDL, UPDATE, Batch, Change, Ddl, Table, TableName, Transaction
from cdc.config import BatchBounds, RetryOptions
from cdc.delivery import Delivery
from cdc.errors import FatalError, QueueCorrupt, TransientError
from cdc.parking import Parker, ParkingBounds
from cdc.parking_schedule import Clock
from cdc.parts import Subjects
from cdc.position import Position
from cdc.queue import Queue, read_status
from cdc.queue.parked import ParkedChange, ParkedCount, payload_of
from cdc.retry import Backoff
from cdc.sink import Ahead, QuickLook, Subject
from cdc.stats import DeliveryStats, State
from cdc.testing import MemorySink
from tests.beside import running
from tests.processes import wait_until

ORDERS = Table("shop", "orders", (), "")
OTHER = Table("shop", "other", (), "")
TABLES = (ORDERS, OTHER)
RETRY = RetryOptions()


def change(key: int, value: int, table: int = 0) -> Change:
    return Change(UPDATE, table, b"%d" % key, None, b"%d:%d" % (key, value))


def drop(table: int = 0) -> Change:
    return Change(DDL, table, None, None, b"drop", Ddl("drop", b""))


class Sink(MemorySink):
    """Refuses keys for as long as it is told to, and fails now and then."""

    def __init__(self) -> None:
        super().__init__("mirror")
        self.bad: set[bytes] = set()
        self.calls = 0
        self.fail_at = -1
        self.given_ahead: Ahead | None = None

    def ahead(self) -> Ahead | None:
        return self.given_ahead

    def _check(self, batches: Sequence[Batch]) -> None:
        self.calls += 1
        if self.calls == self.fail_at:
            self._pending = None
            raise TransientError("deadlock")
        images = {each.after for batch in batches for one in batch.transactions for each in one.changes}
        keys = {each.key for batch in batches for one in batch.transactions for each in one.changes}
        self.refuse(*(image for image in (images | keys) if image in self.bad))
        super()._check(batches)

    def values(self, key: int, table: Table = ORDERS) -> list[int]:
        prefix = b"%d:" % key
        images = [image for name, _, image in self.rows if name == table.qualified and image is not None]
        return [int(image[len(prefix) :]) for image in images if image.startswith(prefix)]


class World:
    """A queue, a sink that parks, and a clock that the test turns."""

    retry = RETRY

    def __init__(self, folder: Path, **bounds: int) -> None:
        self.path = folder / "shop.queue"
        self.now = 1000.0
        self.sink = Sink()
        self.bounds = ParkingBounds(**({"max_changes": 1000, "max_bytes": 10**6} | bounds))
        self._number = 0
        self.open()
        self.queue.begin(b"begin")
        self.queue.register("mirror")
        self.sink.position = Position(self.queue.queue_id, 0, b"begin")

    def open(self) -> None:
        self.queue = Queue(self.path, max_bytes=10**9, min_free_bytes=0)
        self.stats = DeliveryStats("mirror", "shop")
        clock = Clock(lambda: self.now, lambda: self.now + 10**9)
        self.parker = Parker(self.sink, self.queue, self.stats, self.bounds, clock, retry=self.retry)

    def restart(self) -> None:
        self.queue.close()
        self.open()

    def commit(self, *transactions: Sequence[Change]) -> None:
        """One batch."""
        found = []
        for changes in transactions:
            self._number += 1
            token = b"%06d" % self._number
            found.append(Transaction(token, token, 0, 0, 0, True, list(changes)))
        self.queue.append(Batch(TABLES, found, found[-1].end, 100))
        assert self.queue.flush(10)

    @contextmanager
    def delivering(self) -> Iterator[None]:
        delivery = Delivery(self.sink, self.queue, self.stats, BatchBounds(), parker=self.parker)
        with running(delivery, wake=self.queue.wake):
            yield

    def deliver(self, done: Callable[[], bool] | None = None) -> None:
        """Until all batches are passed, and nothing is due."""
        last_seq = self.queue.stats().last_seq
        with self.delivering():
            wait_until(
                lambda: (
                    self.stats.state is State.FAILED
                    or (self.stats.seq >= last_seq and self.stats.caught_up_at is not None and (done is None or done()))
                ),
                what=lambda: f"delivery: {self.stats}",
            )

    def position(self, seq: int) -> Position:
        return Position(self.queue.queue_id, seq, b"%06d" % seq)

    def later(self, seconds: float = RETRY.max) -> None:
        self.now += seconds

    def assert_counted(self) -> None:
        """What is shown of what is parked is what the file holds."""
        stats = self.stats
        shown = ParkedCount(stats.parked, stats.dead, stats.parked_oldest_at, stats.waiting)
        assert shown == read_status(self.path).parked.get("mirror", ParkedCount())


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr("cdc.delivery.READ_SECONDS", 0.01)
    found = World(tmp_path)
    yield found
    found.queue.close()


def test_f89_only_the_key_of_a_refused_change_waits(world: World) -> None:
    world.sink.bad = {b"7:1"}
    world.commit(*[[change(key, 1)] for key in range(100)])
    world.commit([change(7, 2), change(8, 2)], [change(7, 3)])
    world.deliver()
    assert world.sink.values(7) == []
    assert world.sink.values(8) == [1, 2]
    assert all(world.sink.values(key) == [1] for key in range(100) if key not in {7, 8})
    assert (world.stats.parked, world.stats.dead, world.stats.parked_oldest_at) == (3, 0, world.now + 10**9)
    first, *behind = world.queue.parked("mirror")
    assert (first.attempts, first.error, first.state) == (1, "mirror: a row is refused", "retrying")
    assert [(row.attempts, row.error, row.keys) for row in behind] == [(0, "", (b"7",))] * 2
    assert world.stats.changes["update"] == 100, "parked ones are not applied"
    counted = read_status(world.path).parked["mirror"]
    assert (counted.parked, counted.dead) == (3, 0)


def test_f90_what_waits_follows_in_order_when_the_first_succeeds(world: World) -> None:
    world.sink.bad = {b"7:1"}
    world.commit([change(7, 1)], [change(7, 2)])
    world.deliver()
    world.commit([change(7, 3), change(8, 1)])
    world.deliver()
    assert world.sink.values(7) == []
    world.sink.bad = set()
    world.later()
    world.commit([change(7, 4)])
    world.deliver(lambda: not world.stats.parked)
    assert world.sink.values(7) == [1, 2, 3, 4]
    assert world.queue.parked("mirror") == []


def test_f90_a_retry_waits_for_its_time_and_tries_the_first_only(world: World) -> None:
    world.sink.bad = {b"7:1", b"7:2"}
    world.commit([change(7, 1)], [change(7, 2)])
    world.deliver()
    calls = world.sink.calls
    world.parker.retry()
    assert world.sink.calls == calls, "not due"
    world.later(1)
    world.parker.retry()
    assert world.sink.calls == calls + 1
    world.sink.bad = {b"7:2"}
    world.later()
    world.parker.retry()
    assert world.sink.values(7) == [1]
    (row,) = world.queue.parked("mirror")
    assert (row.attempts, row.error) == (1, "mirror: a row is refused"), "now it is the first, and has been tried"


def test_a_change_that_is_refused_for_ever_dies_and_stays(world: World) -> None:
    world.sink.bad = {b"7:1"}
    world.commit([change(7, 1)], [change(7, 2)], [change(8, 1)])
    world.deliver()
    for _ in range(RETRY.attempts + 5):
        world.later()
        world.parker.retry()
    assert (world.stats.parked, world.stats.dead) == (2, 1)
    assert [row.state for row in world.queue.parked("mirror")] == ["dead", "retrying"]
    world.sink.bad = set()
    world.restart()
    world.later()
    world.commit([change(7, 3)])
    world.deliver()
    assert (world.stats.parked, world.stats.dead) == (3, 1)
    assert world.sink.values(7) == []


def test_f89_f90_parked_changes_survive_a_restart(world: World) -> None:
    world.sink.bad = {b"7:1"}
    world.commit([change(7, 1)], [change(7, 2)], [change(8, 1)])
    world.deliver()
    for _ in range(3):
        world.restart()
        world.commit([change(7, 3)])
        world.deliver()
    assert [row.ordinal for row in world.queue.parked("mirror")] == [0, 1, 0, 0, 0]
    assert world.queue.parked("mirror")[0].attempts == 4, "a start tries at once"
    wait_until(lambda: world.queue.stats().pruned_seq == 4, what="the batches to be gone")
    world.sink.bad = set()
    world.restart()
    world.deliver(lambda: not world.stats.parked)
    assert world.sink.values(7) == [1, 2, 3, 3, 3]


def test_f89_parked_changes_that_the_target_never_passed_come_again(world: World) -> None:
    """F90: a crash between parking and storing the position."""
    world.sink.bad = {b"7:1"}
    world.commit([change(7, 1)])
    world.commit([change(7, 2)])
    before = world.sink.position
    world.deliver()
    assert world.stats.parked == 2
    world.sink.position = before
    world.sink.bad = set()
    world.restart()
    world.queue.register("mirror")
    rows = [Position(world.queue.queue_id, 0, b"begin")]
    assert before == rows[0]
    world.parker.open(world.position(0))
    assert world.queue.parked("mirror") == []


def test_f90_what_was_parked_up_to_a_mark_does_not_come_again_and_is_kept(world: World) -> None:
    """The target is ahead of its position, by what stands before a DDL."""
    world.sink.bad = {b"7:1"}
    world.commit([change(7, 1)], [change(7, 2)])
    world.commit([change(7, 3)])
    world.deliver()
    world.sink.given_ahead = Ahead(b"000002", 1)
    world.restart()
    world.parker.open(world.position(0))
    assert [row.id for row in world.queue.parked("mirror")] == [(1, 0), (1, 1)]
    world.sink.bad = set()
    world.parker.retry()
    assert world.sink.values(7) == [], "not before the position has passed them"
    world.parker.passed(world.position(1))
    world.parker.retry()
    assert world.sink.values(7) == [1, 2]


def test_a_refused_change_of_a_table_holds_the_table(world: World) -> None:
    world.sink.bad = {b"drop"}
    world.commit([change(1, 1)], [drop()], [change(1, 2), change(1, 5, table=1)], [change(2, 1)])
    world.deliver()
    assert world.sink.values(1) == [1]
    assert world.sink.values(1, OTHER) == [5]
    assert world.stats.parked == 3
    world.sink.bad = set()
    world.later()
    world.deliver(lambda: not world.stats.parked)
    assert [row[2] for row in world.sink.rows] == [b"1:1", b"1:5", b"drop", b"1:2", b"2:1"]


def test_f90_a_drop_waits_for_the_parked_rows_of_its_table(world: World) -> None:
    world.sink.bad = {b"1:1"}
    world.commit([change(1, 1)], [change(2, 1)], [drop()], [change(2, 2)], [drop(1)], [change(1, 3)])
    world.deliver()
    assert [row[2] for row in world.sink.rows] == [b"2:1", b"drop"], "that of the other table does not wait"
    world.sink.bad = set()
    world.later()
    world.deliver(lambda: not world.stats.parked)
    assert [row[2] for row in world.sink.rows] == [b"2:1", b"drop", b"1:1", b"drop", b"2:2", b"1:3"]


def test_f90_what_waits_behind_a_change_that_waits_does_not_overtake_it(world: World) -> None:
    """Within one transaction, whose head is still refused."""
    world.sink.bad = {b"1:1"}
    world.commit([change(1, 1), drop(), change(2, 2)])
    world.deliver()
    assert world.stats.parked == 3
    world.later()
    world.parker.retry()
    assert (world.stats.parked, world.sink.rows) == (3, [])
    world.sink.bad = set()
    world.later()
    world.deliver(lambda: not world.stats.parked)
    assert [row[2] for row in world.sink.rows] == [b"1:1", b"drop", b"2:2"]


@pytest.mark.parametrize("bounds", [{"max_changes": 4}, {"max_bytes": 250}])
def test_f89_the_sink_stops_where_too_much_would_be_parked(tmp_path: Path, bounds: dict[str, int]) -> None:
    world = World(tmp_path, **bounds)
    world.sink.bad = {b"7:1"}
    for value in range(1, 6):
        world.commit([change(7, value)], [change(8, value)])
    delivery = Delivery(world.sink, world.queue, world.stats, BatchBounds(max_changes=2), parker=world.parker)
    with pytest.raises(FatalError, match="would be parked") as caught:
        delivery.run(threading.Event())
    assert "max_parked" in caught.value.hint
    passed = len(world.sink.values(8))
    assert passed < 5
    world.sink.bad = set()
    world.bounds = ParkingBounds(10, 10**6)
    world.restart()
    world.deliver(lambda: not world.stats.parked)
    assert world.sink.values(7)[-5:] == [1, 2, 3, 4, 5]
    world.queue.close()


def test_without_parking_the_sink_stops(world: World) -> None:
    """F98: at the change that is refused, in the same words."""
    world.sink.bad = {b"7:1"}
    world.commit([change(7, 1)])
    with pytest.raises(FatalError, match="a row is refused"):
        Delivery(world.sink, world.queue, world.stats, BatchBounds()).run(threading.Event())


@pytest.mark.parametrize("seed", range(6))
def test_f89_f90_at_random(world: World, seed: int) -> None:
    """Poison, drops, transient errors, restarts, repairs: each key's last value is right, and none goes backwards."""
    choose = random.Random(seed)
    last: dict[int, int] = {}
    value = 0
    for _ in range(8):
        transactions = []
        for _ in range(choose.randrange(1, 30)):
            changes = []
            for _ in range(choose.randrange(1, 4)):
                value += 1
                key = choose.randrange(8)
                last[key] = value
                changes.append(change(key, value))
                if choose.random() < 0.05:
                    world.sink.bad.add(b"%d:%d" % (key, value))
            transactions.append(changes)
            if choose.random() < 0.01:
                transactions.append([drop()])
        world.commit(*transactions)
        world.sink.fail_at = world.sink.calls + choose.randrange(1, 60)
        world.deliver()
        world.assert_counted()
        world.later(choose.choice([0, 1, 400]))
        if world.sink.bad and choose.random() < 0.5:
            world.sink.bad.pop()
        if choose.random() < 0.5:
            world.restart()
    world.sink.bad = set()
    world.later()
    world.deliver(lambda: not world.stats.parked)
    for key, expected in last.items():
        seen = world.sink.values(key)
        assert seen[-1] == expected
        firsts = list(dict.fromkeys(seen))
        assert firsts == sorted(firsts), "what was seen first never overtook"


@pytest.mark.parametrize("seed", range(2))
def test_f89_counts_stay_right_whatever_becomes_of_what_is_parked(world: World, seed: int) -> None:
    """Tried again, dead, brought back, discarded by a person, settled on the target by others, or begun anew."""
    choose = random.Random(seed)
    poison = {b"%d:%d" % (key, value) for key in range(6) for value in range(100) if not (key + value) % 3}
    for value in range(20):
        world.sink.bad = set(choose.sample(sorted(poison), len(poison) // choose.choice([1, 2, 3])))
        world.commit(*[[change(choose.randrange(6), value)] for _ in range(5)])
        world.deliver()
        world.assert_counted()
        for _ in range(choose.choice([0, 1, RETRY.attempts])):
            world.later()
            world.parker.retry()
            world.assert_counted()
        chosen = [row.id for row in world.queue.parked("mirror") if not choose.randrange(4)]
        act = choose.choice([world.queue.unpark, world.queue.revive])
        world.parker.alter(lambda: act("mirror", chosen))  # noqa: B023 - used at once
        world.assert_counted()
        if choose.random() < 0.3:
            world.restart()
            world.assert_counted()
    assert world.stats.parked, "or there was nothing to count"
    settled = [(row.position, row.ordinal) for row in world.queue.parked("mirror")[::2]]
    world.sink._settled = settled
    world.parker.open(world.position(world.stats.seq))
    world.assert_counted()


def test_subjects() -> None:
    subjects = Subjects()
    a, b, database = TableName("s", "a"), TableName("s", "b"), TableName("s", "")
    subjects.add(Subject((a,), (b"1",)))
    assert subjects.block(Subject((a,), (b"1",)))
    assert not subjects.block(Subject((a,), (b"2",)))
    assert not subjects.block(Subject((b,), None))
    assert subjects.block(Subject((b, a), None))
    assert subjects.block(Subject((database,), None))
    subjects.add(Subject((database,), None))
    assert subjects.block(Subject((b,), (b"9",)))
    subjects.add(Subject((database,), None), -1)
    subjects.add(Subject((a,), (b"1",)), -1)
    assert not subjects.block(Subject((a, b, database), None))


def test_f89_a_quick_look_lets_nothing_pass_that_has_to_wait() -> None:
    def free_of(_table: Table, keys: Set[bytes]) -> QuickLook:
        return QuickLook(lambda change: change.key is not None and keys.isdisjoint(change.key.split()))

    batch = Batch(TABLES, [], b"", 0)
    name = ORDERS.qualified
    subjects, more = Subjects(), Subjects()
    subjects.add(Subject((name,), (b"1", b"2")))
    is_free = subjects.quick_look(batch, free_of, more).is_free
    row = Change(UPDATE, 0, b"3", None, b"")
    assert is_free(row)
    assert is_free(Change(UPDATE, 1, b"1", None, b""))
    assert not is_free(Change(UPDATE, 0, b"3 2", None, b""))
    assert not is_free(Change(UPDATE, 0, None, None, b""))
    assert not is_free(drop(1))
    assert subjects.covers(Subject((name,), (b"2",)))
    assert not subjects.covers(Subject((name,), (b"2", b"3")))
    assert not subjects.covers(Subject((name,), None))
    more.add(Subject((OTHER.qualified,), (b"1",)))
    assert not is_free(row)
    subjects.add(Subject((name,), None))
    assert not subjects.quick_look(batch, free_of, Subjects()).is_free(row)
    assert subjects.covers(Subject((name,), (b"3",)))
    schema = Subjects()
    schema.add(Subject((TableName("shop", ""),), None))
    assert not schema.quick_look(batch, free_of, Subjects()).is_free(row)


def test_waits_grow_and_end() -> None:
    backoff = Backoff(RetryOptions(initial=2, max=300, attempts=20))
    waits = [backoff.seconds(attempts) for attempts in (*range(1, 20), 10_000)]
    assert 1.6 <= waits[0] <= 2.0
    assert 3.2 <= waits[1] <= 4.0
    assert all(240 <= wait <= 300 for wait in waits[8:])
    assert len(set(waits)) == len(waits), "many that were parked together do not come back together"
    assert [backoff.is_over(attempts) for attempts in (1, 19, 20, 21)] == [False, False, True, True]


class TestFile:
    """The rows in the queue's file."""

    def row(self, seq: int, ordinal: int = 0) -> tuple[ParkedChange, bytes]:
        token = b"%d" % seq
        batch = Batch((ORDERS,), [Transaction(token, token, 0, 0, 0, True, [change(seq, 1)])], token, 0)
        payload = payload_of(batch)
        found = ParkedChange(
            place=seq, ordinal=ordinal, position=token, tables=(ORDERS.qualified,), keys=(b"%d" % seq, b"b"),
            size=len(payload), created_at=5.0,
        )  # fmt: skip
        return found, payload

    def test_f89_rows_are_there_after_opening_again(self, world: World) -> None:
        rows = [self.row(3), self.row(3, 1), self.row(5)]
        world.queue.park("mirror", rows)
        world.queue.park("mirror", rows)
        world.restart()
        assert world.queue.parked("mirror") == [row for row, _ in rows]
        batches = world.queue.parked_batches("mirror", [(5, 0), (3, 1)])
        assert [batch.transactions[0].changes[0].key for batch in batches] == [b"5", b"3"]
        world.queue.unpark("mirror", [(3, 0), (5, 0)])
        assert [row.id for row in world.queue.parked("mirror")] == [(3, 1)]
        assert world.queue.parked("other") == []

    def test_f89_rows_of_a_sink_that_is_gone_are_forgotten(self, world: World) -> None:
        world.queue.register("other")
        world.queue.park("mirror", [self.row(1)])
        world.queue.park("other", [self.row(1)])
        world.queue.retain(["other"])
        wait_until(lambda: not world.queue.parked("mirror"), what="its rows to be gone")
        assert len(world.queue.parked("other")) == 1

    def test_a_damaged_row_is_noticed(self, world: World) -> None:
        row, payload = self.row(1)
        world.queue.park("mirror", [(row, payload)])
        world.queue._file._writer.execute("UPDATE parked SET payload = ?", (payload[:-1] + b"\1",))
        with pytest.raises(QueueCorrupt, match="fails its checksum"):
            world.queue.parked_batches("mirror", [row.id])

    def test_f92_a_file_of_format_1_is_brought_to_the_newest(self, world: World) -> None:
        """Read as it is, upgraded where it is written to; what was damaged in it is noticed still."""
        rows = [self.row(seq) for seq in (3, 4, 5)]
        whole = (msgspec.structs.replace(rows[1][0], keys=None), rows[1][1])
        world.queue.park("mirror", [rows[0], whole, rows[2]])
        world.queue.close()
        with closing(sqlite3.connect(world.path)) as connection, connection:
            as_format_1(connection)
            connection.execute("UPDATE parked SET error = '' WHERE seq = 3")
            connection.execute("UPDATE parked SET payload = zeroblob(9) WHERE seq = 5")
        before = world.path.read_bytes()
        assert read_status(world.path).parked["mirror"].parked == 3
        assert world.path.read_bytes() == before
        for _ in range(2):
            world.open()
            assert [row.keys for row in world.queue.parked("mirror")] == [(b"3",), None, (b"5",)]
            assert [row.id for row in world.queue.parked("mirror")] == [(3, 0), (4, 0), (5, 0)]
            assert world.queue.parked_batches("mirror", [(3, 0)])[0].transactions[0].changes == [change(3, 1)]
            with pytest.raises(QueueCorrupt, match="fails its checksum"):
                world.queue.parked_batches("mirror", [(5, 0)])
            world.queue.close()
        world.open()


def as_format_1(connection: sqlite3.Connection) -> None:
    """What that version would have written: `seq` for the place, and a single key."""
    rows = connection.execute("SELECT * FROM parked").fetchall()
    connection.executescript(
        """DROP TABLE parked;
           CREATE TABLE parked (
               sink TEXT NOT NULL, seq INTEGER NOT NULL, ordinal INTEGER NOT NULL, position NOT NULL,
               tables TEXT NOT NULL, key BLOB, size INTEGER NOT NULL, created_at REAL NOT NULL, crc INTEGER NOT NULL,
               state TEXT NOT NULL CHECK (state IN ('retrying', 'dead')), attempts INTEGER NOT NULL,
               next_attempt_at REAL NOT NULL, error TEXT NOT NULL, payload BLOB NOT NULL, UNIQUE (sink, seq, ordinal));
           PRAGMA user_version = 1"""
    )
    for sink, seq, ordinal, position, tables, keys, size, at, _, *rest in rows:
        key = None if keys is None else msgspec.msgpack.decode(keys)[0]
        facts = (seq, ordinal, position, tables, key, size, at)
        crc = zlib.crc32(rest[-1], zlib.crc32(msgspec.msgpack.encode((sink, *facts))))
        connection.execute(f"INSERT INTO parked VALUES ({', '.join('?' * 14)})", (sink, *facts, crc, *rest))
