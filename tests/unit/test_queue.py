"""The queue as its callers see it: what is kept, in which order, how much of it, and where a sink goes on."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdc.change import Batch
from cdc.directory import lock_directory
from cdc.errors import CdcError, DirectoryInUse, FatalError, HistoryLost, QueueCorrupt, ResyncRequired
from cdc.position import Position, SourcePosition
from cdc.queue import Queue, Stored, read_status
from cdc.queue import file as queue_file
from cdc.queue import format as queue_format
from tests.batches import STRIDE, batch, end_of, idle, transaction
from tests.processes import wait_until

START = STRIDE
"""Where the tests' queues begin: before transaction 1."""

OpenQueue = Callable[..., Queue]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "shop.queue"


@pytest.fixture
def open_queue(path: Path) -> Iterator[OpenQueue]:
    """Opens the same file again and again; begun, and closed after the test."""
    queues: list[Queue] = []

    def open_again(**options: Any) -> Queue:
        for queue in queues:
            queue.close()
        queue = Queue(path, **({"max_bytes": 1 << 30, "min_free_bytes": 0} | options))
        queues.append(queue)
        if queue.position is None:
            queue.begin(START)
        return queue

    yield open_again
    for queue in queues:
        queue.close()


@pytest.fixture
def queue(open_queue: OpenQueue) -> Queue:
    """A fresh queue with one sink, so that nothing is pruned before the test says so."""
    queue = open_queue()
    queue.register("mirror")
    return queue


def fill(queue: Queue, batches: Iterable[Batch]) -> None:
    for each in batches:
        queue.append(each)
    assert queue.flush(10)


def read_all(queue: Queue, after_seq: int = 0, *, max_bytes: int = 1 << 30) -> list[Stored]:
    found: list[Stored] = []
    while stored := queue.read(after_seq, max_bytes=max_bytes, timeout_seconds=0):
        found += stored
        after_seq = stored[-1].seq
    return found


def batches_of(stored: Iterable[Stored]) -> list[Batch]:
    return [each.batch for each in stored]


def wait_pruned(queue: Queue, seq: int) -> None:
    wait_until(lambda: queue.stats().pruned_seq >= seq, what=f"batches up to {seq} to be pruned")


def rows_in(path: Path) -> int:
    with sqlite3.connect(path) as connection:
        return int(connection.execute("SELECT count(*) FROM batch").fetchone()[0])


@contextmanager
def writer_held_up(queue: Queue) -> Iterator[None]:
    """Its next commit waits until the block has ended."""
    with closing(sqlite3.connect(queue._path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


class TestOrder:
    def test_what_is_appended_is_read_in_order_and_survives(self, queue: Queue, open_queue: OpenQueue) -> None:
        appended = [batch(number) for number in range(1, 50)]
        fill(queue, appended)
        assert batches_of(read_all(queue)) == appended
        again = open_queue()
        assert batches_of(read_all(again)) == appended
        assert again.position == end_of(49)

    @pytest.mark.parametrize("tail_bytes", [0, 1 << 20], ids=["from the file", "from memory"])
    def test_read_is_bounded_by_bytes_and_gives_at_least_one(self, open_queue: OpenQueue, tail_bytes: int) -> None:
        queue = open_queue(tail_bytes=tail_bytes)
        queue.register("mirror")
        fill(queue, [batch(number, size=1000) for number in range(1, 11)])
        assert len(queue.read(0, max_bytes=3500, timeout_seconds=0)) == 3
        assert [stored.seq for stored in queue.read(3, max_bytes=3000, timeout_seconds=0)] == [4, 5, 6]
        assert [stored.seq for stored in queue.read(9, max_bytes=1, timeout_seconds=0)] == [10]
        assert queue.read(10, max_bytes=1000, timeout_seconds=0) == []

    def test_every_reader_sees_the_same_order_while_it_is_appended_to(self, queue: Queue) -> None:
        count = 400
        seen: dict[int, list[Stored]] = {}

        def read_along(max_bytes: int) -> None:
            found: list[Stored] = []
            while len(found) < count:
                after_seq = found[-1].seq if found else 0
                found += queue.read(after_seq, max_bytes=max_bytes, timeout_seconds=10)
            seen[max_bytes] = found

        readers = [threading.Thread(target=read_along, args=(size,)) for size in (1, 700, 100_000)]
        for reader in readers:
            reader.start()
        appended = [batch(number) for number in range(1, count + 1)]
        fill(queue, appended)
        for reader in readers:
            reader.join(60)
        assert [batches_of(seen[size]) for size in (1, 700, 100_000)] == [appended] * 3
        assert [stored.seq for stored in seen[1]] == list(range(1, count + 1))

    def test_a_waiting_reader_wakes_on_commit_and_on_wake(self, queue: Queue) -> None:
        results: list[list[Stored]] = []

        def waiting() -> bool:
            return bool(vars(queue._handover._done)["_waiters"])

        acts: list[Callable[[], None]] = [lambda: queue.append(batch(1)), queue.wake]
        for act in acts:
            after_seq = len(results)
            reader = threading.Thread(
                target=lambda seq=after_seq: results.append(queue.read(seq, max_bytes=100, timeout_seconds=60)),
            )
            reader.start()
            wait_until(waiting, what="the reader to wait")
            act()
            reader.join(60)
            assert not reader.is_alive()
        assert [batches_of(stored) for stored in results] == [[batch(1)], []]

    def test_batches_that_come_during_a_commit_share_the_next_one(
        self, queue: Queue, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        commits: list[int] = []
        write = queue._file.write

        def counted(items: list[Any], upkeep: Any) -> list[Stored]:
            commits.append(len(items))
            return write(items, upkeep)

        monkeypatch.setattr(queue._file, "write", counted)
        with writer_held_up(queue):
            for number in range(1, 101):
                queue.append(batch(number))
            assert queue.read(0, max_bytes=1, timeout_seconds=0) == []
        assert queue.flush(10)
        assert sum(commits) == 100
        assert len([size for size in commits if size]) <= 3

    def test_flush_says_when_time_is_over(self, queue: Queue) -> None:
        with writer_held_up(queue):
            queue.append(batch(1))
            assert not queue.flush(0.01)
            assert queue.position == START
        assert queue.flush(10)


class TestPosition:
    def test_it_begins_once(self, path: Path) -> None:
        queue = Queue(path, max_bytes=1, min_free_bytes=0)
        try:
            assert queue.position is None
            with pytest.raises(RuntimeError):
                queue.append(batch(1))
            queue.begin(START)
            assert [queue.position, queue.pruned_position] == [START, START]
            with pytest.raises(RuntimeError):
                queue.begin(START)
        finally:
            queue.close()

    def test_f7_an_idle_position_is_durable_and_stores_no_batch(self, queue: Queue, open_queue: OpenQueue) -> None:
        fill(queue, [batch(1), idle(1000)])
        assert (queue.position, queue.stats().batches) == (1000, 1)
        assert open_queue().position == 1000

    def test_f83_an_unfinished_transaction_moves_nothing_and_is_dropped_at_start(
        self, queue: Queue, open_queue: OpenQueue
    ) -> None:
        mixed = batch(3, complete=False)
        mixed = msgspec.structs.replace(mixed, transactions=[*batch(2).transactions, *mixed.transactions])
        fill(queue, [batch(1), mixed, idle(end_of(2)), batch(3, part=1, complete=False)])
        assert queue.position == end_of(1)
        assert [stored.seq for stored in read_all(queue)] == [1, 2, 3]
        again = open_queue()
        assert again.position == end_of(1)
        assert [stored.seq for stored in read_all(again)] == [1]
        fill(again, [batch(2)])
        assert [stored.seq for stored in read_all(again)] == [1, 4]
        assert [stored.seq for stored in read_all(open_queue())] == [1, 4]

    @pytest.mark.parametrize("position", [0, 2**63 - 1, b"", b"\x82\x00\xfftoken"])
    def test_positions_come_back_as_they_were(self, path: Path, position: int | bytes) -> None:
        queue = Queue(path, max_bytes=1, min_free_bytes=0)
        queue.begin(position)
        queue.register("mirror")
        fill(queue, [msgspec.structs.replace(batch(1), position=position)])
        queue.advance("mirror", 0, position)
        queue.close()
        again = Queue(path, max_bytes=1, min_free_bytes=0)
        assert (again.position, again.pruned_position, again.cursor("mirror")) == (position, position, (0, position))
        assert read_all(again)[0].batch.position == position
        again.close()


class TestPruning:
    def test_only_what_every_registered_sink_has_passed(self, queue: Queue) -> None:
        queue.register("audit")
        fill(queue, [batch(number) for number in range(1, 11)])
        queue.advance("mirror", 8, end_of(8))
        queue.advance("audit", 5, end_of(5))
        wait_pruned(queue, 5)
        assert (queue.stats().pruned_seq, queue.pruned_position) == (5, end_of(5))
        assert [stored.seq for stored in read_all(queue, 5)] == [6, 7, 8, 9, 10]
        with pytest.raises(ResyncRequired):
            queue.read(4, max_bytes=1, timeout_seconds=0)
        queue.retain(["mirror"])
        wait_pruned(queue, 8)
        assert queue.cursor("audit") is None
        assert queue.stats().pruned_seq == 8

    def test_without_sinks_nothing_is_kept(self, open_queue: OpenQueue) -> None:
        queue = open_queue()
        fill(queue, [batch(number) for number in range(1, 101)])
        wait_pruned(queue, 100)
        assert queue.stats().batches == queue.stats().bytes == 0
        assert queue.stats().oldest_seconds is None

    def test_a_sink_holds_back_from_its_registration_on_also_after_a_restart(self, open_queue: OpenQueue) -> None:
        queue = open_queue()
        fill(queue, [batch(1)])
        wait_pruned(queue, 1)
        queue.register("mirror")
        fill(queue, [batch(2)])
        queue = open_queue()
        assert queue.cursor("mirror") == (1, None)
        fill(queue, [batch(3)])
        queue.close()
        assert [stored.seq for stored in read_all(open_queue(), 1)] == [2, 3]

    def test_f40_a_transaction_of_many_batches_goes_in_steps_and_never_in_parts(self, queue: Queue, path: Path) -> None:
        parts = 3 * queue_file._STEP_ROWS
        fill(queue, [*transaction(1, parts=parts), batch(2)])
        queue.advance("mirror", parts // 2, START)
        queue.advance("mirror", parts, end_of(1))
        wait_until(lambda: rows_in(path) == 1, what="the rows to be deleted")
        assert (queue.stats().pruned_seq, queue.pruned_position) == (parts, end_of(1))
        assert [stored.seq for stored in read_all(queue, parts)] == [parts + 1]

    def test_a_sink_inside_a_transaction_keeps_all_of_it(self, queue: Queue, open_queue: OpenQueue) -> None:
        fill(queue, [batch(1), *transaction(2, parts=3)])
        queue.advance("mirror", 3, end_of(1))
        again = open_queue()
        assert again.stats().pruned_seq == 1
        assert [stored.seq for stored in read_all(again, 1)] == [2, 3, 4]

    def test_seqs_are_never_used_again(self, queue: Queue, open_queue: OpenQueue) -> None:
        fill(queue, [batch(1), batch(2), batch(3, complete=False)])
        queue.advance("mirror", 2, end_of(2))
        wait_pruned(queue, 2)
        again = open_queue()
        assert again.stats().batches == 0
        fill(again, [batch(3)])
        assert [stored.seq for stored in read_all(again, 2)] == [4]

    def test_keep_seconds_holds_back_what_sinks_have_passed(self, open_queue: OpenQueue) -> None:
        queue = open_queue(keep_seconds=3600)
        queue.register("mirror")
        fill(queue, [batch(number) for number in range(1, 4)])
        queue.advance("mirror", 3, end_of(3))
        again = open_queue(keep_seconds=3600)
        assert len(read_all(again)) == 3
        assert 0 <= (again.stats().oldest_seconds or -1) < 3600
        wait_pruned(open_queue(keep_seconds=1e-6), 3)

    def test_they_go_when_they_are_old_enough(self, open_queue: OpenQueue, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("cdc.queue.queue._AGING_SECONDS", 0.02)
        queue = open_queue(keep_seconds=0.4)
        queue.register("mirror")
        fill(queue, [batch(1)])
        queue.advance("mirror", 1, end_of(1))
        wait_pruned(queue, 1)

    @pytest.mark.parametrize("now", [0.0, 4e9])
    def test_f88_a_clock_that_jumps_changes_nothing(
        self, queue: Queue, monkeypatch: pytest.MonkeyPatch, now: float
    ) -> None:
        fill(queue, [batch(1)])
        monkeypatch.setattr("time.time", lambda: now)
        assert (queue.stats().oldest_seconds or 0.0) >= 0
        fill(queue, [batch(2)])
        queue.advance("mirror", 1, end_of(1))
        wait_pruned(queue, 1)
        assert batches_of(read_all(queue, 1)) == [batch(2)]

    def test_the_file_gives_back_what_a_backlog_took(
        self, queue: Queue, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(queue_file, "_KEPT_FREE_BYTES", 1 << 20)
        fill(queue, [batch(number, size=1 << 20) for number in range(1, 25)])
        wait_until(lambda: path.stat().st_size > 16 << 20, what="a checkpoint")
        queue.advance("mirror", 24, end_of(24))
        queue.close()
        assert path.stat().st_size > 16 << 20
        with Reopened(path) as again:
            wait_until(lambda: path.stat().st_size < 4 << 20, what="the file to shrink")
            assert again.position == end_of(24)


class Reopened:
    """A queue for a `with` statement."""

    def __init__(self, path: Path, **options: Any) -> None:
        self._queue = Queue(path, **({"max_bytes": 1 << 30, "min_free_bytes": 0} | options))

    def __enter__(self) -> Queue:
        return self._queue

    def __exit__(self, *exc: object) -> None:
        self._queue.close()


class TestBounds:
    def test_f91_a_full_queue_says_so_until_sinks_have_passed(self, open_queue: OpenQueue) -> None:
        queue = open_queue(max_bytes=10_000)
        queue.register("mirror")
        assert queue.has_room
        assert not queue.stats().full
        fill(queue, [batch(number, size=1000) for number in range(1, 11)])
        assert not queue.has_room
        assert queue.stats().full
        assert 10_000 <= queue.stats().bytes < 12_000
        queue.advance("mirror", 5, end_of(5))
        wait_until(lambda: queue.has_room, what="room")
        assert len(read_all(queue, 5)) == 5

    def test_f91_an_unfinished_transaction_may_pass_the_bound_but_not_the_disk_floor(
        self, open_queue: OpenQueue
    ) -> None:
        queue = open_queue(max_bytes=1000)
        queue.register("mirror")
        fill(queue, [batch(1, size=2000, complete=False)])
        assert queue.has_room
        fill(queue, [batch(1, size=100, part=1)])
        assert not queue.has_room
        queue = open_queue(max_bytes=1000, min_free_bytes=1 << 60)
        fill(queue, [batch(2, complete=False)])
        assert not queue.has_room

    def test_f86_free_disk_counts_pages_that_the_file_will_use_again(self, queue: Queue, open_queue: OpenQueue) -> None:
        fill(queue, [batch(number, size=1 << 20) for number in range(1, 9)])
        queue.advance("mirror", 8, end_of(8))
        again = open_queue()
        disk = os.statvfs(again._path)
        assert again._contents.free_bytes > 7 << 20
        assert again.stats().free_disk_bytes > disk.f_bavail * disk.f_frsize + (4 << 20)

    def test_f86_nothing_more_is_captured_into_a_file_that_was_removed(self, queue: Queue) -> None:
        fill(queue, [batch(1)])
        assert not queue.stats().removed
        queue._path.unlink()
        with pytest.raises(FatalError, match="was removed while the daemon runs"):
            _ = queue.has_room
        stats = queue.stats()
        assert (stats.removed, stats.full, stats.free_disk_bytes) == (True, True, 0)

    def test_f91_what_is_handed_over_but_not_written_is_bounded(self, queue: Queue) -> None:
        count = 0
        with writer_held_up(queue):
            while queue.has_room:
                count += 1
                queue.append(batch(count, size=1 << 20))
            assert count == 8
        wait_until(lambda: queue.has_room, what="the writer to catch up")
        assert queue.flush(10)
        assert len(read_all(queue)) == count

    def test_f91_only_the_newest_stay_in_memory(self, open_queue: OpenQueue) -> None:
        queue = open_queue(tail_bytes=10_000)
        queue.register("mirror")
        appended = [batch(number, size=1000) for number in range(1, 51)]
        fill(queue, appended)
        stored = [*read_all(queue, max_bytes=1)]
        in_memory = [each.batch is one for each, one in zip(stored, appended, strict=True)]
        assert batches_of(stored) == appended
        assert in_memory == [False] * in_memory.count(False) + [True] * in_memory.count(True)
        assert 3 <= in_memory.count(True) <= 10

    def test_many_tiny_batches_count_for_more_than_their_bytes(self, open_queue: OpenQueue) -> None:
        queue = open_queue(tail_bytes=10_000)
        queue.register("mirror")
        appended = [batch(number, size=1) for number in range(1, 101)]
        fill(queue, appended)
        in_memory = [each.batch is one for each, one in zip(read_all(queue, max_bytes=1), appended, strict=True)]
        assert 3 <= in_memory.count(True) <= 20

    def test_a_batch_larger_than_a_row_can_be_is_refused_at_once(self, queue: Queue) -> None:
        with pytest.raises(FatalError, match="too large"):
            queue.append(msgspec.structs.replace(batch(1), size=1_000_000_000))
        fill(queue, [batch(1)])


class TestSeek:
    def at(self, queue: Queue, source: int | bytes, *, seq: int = 0, queue_id: str | None = None) -> int:
        return queue.seek(Position(queue_id or queue.queue_id, seq, source))

    def test_an_lsn_decides_whatever_the_seq_and_the_queue_say(self, queue: Queue) -> None:
        fill(queue, [batch(1), batch(2), *transaction(3, parts=3), batch(4), idle(1000)])
        assert self.at(queue, START) == 0
        assert self.at(queue, end_of(1) - 1, seq=5) == 0
        assert self.at(queue, end_of(1), queue_id="another") == 1
        assert self.at(queue, end_of(3) - 1) == 2
        assert self.at(queue, end_of(3)) == 5
        assert self.at(queue, 1000) == 6

    def test_f115_a_target_older_than_what_is_kept_needs_a_resync(self, queue: Queue) -> None:
        fill(queue, [batch(number) for number in range(1, 5)])
        queue.advance("mirror", 2, end_of(2))
        wait_pruned(queue, 2)
        assert self.at(queue, end_of(2)) == 2
        assert self.at(queue, end_of(3)) == 3
        for older in (START - 1, end_of(1), end_of(2) - 1):
            with pytest.raises(HistoryLost):
                self.at(queue, older)

    def test_a_target_ahead_of_the_queue_needs_a_resync(self, queue: Queue) -> None:
        fill(queue, [batch(1)])
        with pytest.raises(ResyncRequired):
            self.at(queue, end_of(1) + 1)

    def test_a_token_counts_only_by_the_seq_of_the_queue_that_gave_it(self, path: Path) -> None:
        with Reopened(path) as queue:
            queue.begin(b"zz")
            queue.register("mirror")
            tokens = [b"b", b"c", b"a"]  # no order
            fill(queue, [msgspec.structs.replace(batch(n), position=token) for n, token in enumerate(tokens, 1)])
            assert self.at(queue, b"c", seq=2) == 2
            assert self.at(queue, b"zz", seq=0) == 0
            queue.advance("mirror", 2, b"c")
            wait_pruned(queue, 2)
            assert self.at(queue, b"c", seq=2) == 2
            for seq, queue_id in ((1, None), (4, None), (2, "another")):
                with pytest.raises(ResyncRequired):
                    self.at(queue, b"c", seq=seq, queue_id=queue_id)

    def test_an_lsn_means_nothing_to_a_queue_of_tokens(self, path: Path) -> None:
        with Reopened(path) as queue:
            queue.begin(b"token")
            with pytest.raises(ResyncRequired):
                self.at(queue, 1)


class TestFacts:
    def test_they_are_durable_on_return(self, queue: Queue, tmp_path: Path) -> None:
        queue.set("system_identifier", "7000000000000000001")
        queue.set("paused", "yes")
        queue.set("paused", None)
        with Reopened(crash_image(queue, tmp_path)) as found:
            assert (found.get("system_identifier"), found.get("paused")) == ("7000000000000000001", None)
            assert found.queue_id == queue.queue_id

    def test_a_registration_is_durable_on_return(self, queue: Queue, tmp_path: Path) -> None:
        queue.register("audit")
        with Reopened(crash_image(queue, tmp_path)) as found:
            assert found.cursor("audit") == (0, None)

    def test_cursors_are_stored_while_nothing_else_happens(self, queue: Queue, tmp_path: Path) -> None:
        fill(queue, [batch(1), batch(2)])
        queue.advance("mirror", 1, end_of(1))
        wait_pruned(queue, 1)
        with Reopened(crash_image(queue, tmp_path)) as found:
            assert found.cursor("mirror") == (1, end_of(1))


def crash_image(queue: Queue, tmp_path: Path) -> Path:
    """What a kill would leave now: the files as they are, without their owner."""
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    for file in queue._path.parent.glob(f"{queue._path.name}*"):
        shutil.copyfile(file, folder / file.name)
    return folder / queue._path.name


class TestDamage:
    def flip(self, path: Path, marker: bytes) -> None:
        data = bytearray(path.read_bytes())
        assert data.count(marker) == 1
        data[data.index(marker)] ^= 1
        path.write_bytes(data)

    def filled(self, queue: Queue, count: int = 20) -> None:
        fill(queue, [batch(number) for number in range(1, count + 1)])
        queue.close()

    def test_f84_a_flipped_byte_is_refused_when_read_and_names_file_and_batch(self, queue: Queue, path: Path) -> None:
        self.filled(queue)
        self.flip(path, b"row-7-0.")
        with Reopened(path) as damaged:
            assert len(damaged.read(0, max_bytes=600, timeout_seconds=0)) == 6
            for _ in range(2):
                with pytest.raises(QueueCorrupt, match=re.escape(f"{path} is damaged: batch 7 ")) as caught:
                    damaged.read(6, max_bytes=1000, timeout_seconds=0)
                assert caught.value.hint
                assert "row-7" not in str(caught.value)

    def test_f84_a_flipped_byte_in_the_newest_is_refused_at_start(self, queue: Queue, path: Path) -> None:
        self.filled(queue)
        self.flip(path, b"row-19-0.")
        with pytest.raises(QueueCorrupt, match="batch 19 "):
            Queue(path, max_bytes=1, min_free_bytes=0)
        assert [file.name for file in path.parent.iterdir()] == [path.name], "nothing stays open"

    @pytest.mark.parametrize(
        "damage",
        [
            "DELETE FROM batch WHERE seq = 1",
            "DELETE FROM batch WHERE seq = 9",
            "DELETE FROM batch WHERE seq = 20",
            "DELETE FROM batch",
            "UPDATE batch SET prior = 7 WHERE seq = 9",
            "UPDATE batch SET position = position + 1 WHERE seq = 20",
            "UPDATE batch SET complete = 0 WHERE seq = 20",
            "UPDATE state SET position = position + 1",
            "UPDATE state SET pruned_seq = 3",
            "DELETE FROM state",
        ],
    )
    def test_f84_missing_or_changed_rows_are_refused_at_start(self, queue: Queue, path: Path, damage: str) -> None:
        self.filled(queue)
        with sqlite3.connect(path) as connection:
            connection.execute(damage)
        with pytest.raises(QueueCorrupt, match=re.escape(str(path))):
            Queue(path, max_bytes=1, min_free_bytes=0)

    def test_f84_a_row_that_vanishes_meanwhile_is_noticed_when_read(self, open_queue: OpenQueue, path: Path) -> None:
        queue = open_queue(tail_bytes=0)
        queue.register("mirror")
        fill(queue, [batch(number) for number in range(1, 6)])
        with sqlite3.connect(path) as connection:
            connection.execute("DELETE FROM batch WHERE seq IN (3, 5)")
        for after_seq in (0, 2, 4):
            with pytest.raises(QueueCorrupt):
                queue.read(after_seq, max_bytes=1000, timeout_seconds=0)

    def test_f84_a_damaged_page_is_refused(self, queue: Queue, path: Path) -> None:
        self.filled(queue)
        data = bytearray(path.read_bytes())
        data[queue_format.PAGE_BYTES :] = b"\xa5" * (len(data) - queue_format.PAGE_BYTES)
        path.write_bytes(data)
        with pytest.raises(QueueCorrupt):
            Queue(path, max_bytes=1, min_free_bytes=0)

    @pytest.mark.parametrize("keep", [0.2, 0.5, 0.9])
    def test_f84_a_torn_tail_is_dropped(self, queue: Queue, tmp_path: Path, keep: float) -> None:
        for number in range(1, 21):
            fill(queue, [batch(number)])  # a commit each
        image = crash_image(queue, tmp_path)
        log = image.with_name(image.name + "-wal")
        os.truncate(log, int(log.stat().st_size * keep))
        with Reopened(image) as found:
            kept = read_all(found)
            assert [stored.batch for stored in kept] == [batch(number) for number in range(1, len(kept) + 1)]
            assert found.position == end_of(len(kept)) if kept else START
            assert len(kept) < 20

    @pytest.mark.parametrize("version", [0, queue_format.FORMAT + 1])
    def test_f92_another_format_is_refused_and_left_alone(self, queue: Queue, path: Path, version: int) -> None:
        self.filled(queue)
        with sqlite3.connect(path) as connection:
            connection.execute(f"PRAGMA user_version = {version}")
        connection.close()
        before = path.read_bytes()
        for opened in (lambda: Queue(path, max_bytes=1, min_free_bytes=0), lambda: read_status(path)):
            with pytest.raises(QueueCorrupt, match=f"format {version}") as caught:
                opened()
            assert caught.value.hint
        assert path.read_bytes() == before
        assert [file.name for file in path.parent.iterdir()] == [path.name]

    def test_f92_a_file_of_something_else_is_refused_and_left_alone(self, path: Path) -> None:
        with sqlite3.connect(path) as connection:
            connection.execute("CREATE TABLE mine (x)")
        connection.close()
        for content in (path.read_bytes(), b"# a text file, longer than SQLite's header\n" * 10):
            path.write_bytes(content)
            with pytest.raises(QueueCorrupt):
                Queue(path, max_bytes=1, min_free_bytes=0)
            assert path.read_bytes() == content

    def test_a_crash_while_the_file_was_made_does_no_harm(self, path: Path) -> None:
        path.touch()
        with Reopened(path) as queue:
            assert queue.position is None

    def test_a_directory_that_is_not_there_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(FatalError, match="missing"):
            Queue(tmp_path / "missing" / "shop.queue", max_bytes=1, min_free_bytes=0)


class TestFailure:
    def test_f85_a_failed_commit_is_final_and_publishes_nothing(self, queue: Queue, open_queue: OpenQueue) -> None:
        fill(queue, [batch(1)])
        queue._file._writer.execute("PRAGMA max_page_count = 1")  # as many as there are: the disk is full
        with writer_held_up(queue):
            for number in range(2, 12):
                queue.append(batch(number, size=1 << 20))
            assert not queue.has_room
        with pytest.raises(FatalError, match="full") as caught:
            queue.flush(10)
        assert caught.value.hint
        queue._file._writer.execute("PRAGMA max_page_count = 1000000")  # too late: never tried again
        for refused in (lambda: queue.append(batch(12)), lambda: queue.set("key", "value"), lambda: queue.flush(0)):
            with pytest.raises(FatalError, match="full"):
                refused()
        assert queue.has_room, "or nobody would append and learn of it"
        assert (queue.position, queue.stats().last_seq) == (end_of(1), 1)
        assert len(queue.read(0, max_bytes=1 << 30, timeout_seconds=0)) == 1
        with pytest.raises(FatalError, match="full"):
            queue.read(1, max_bytes=1, timeout_seconds=60)
        again = open_queue()
        assert batches_of(read_all(again)) == [batch(1)]
        fill(again, [batch(2)])

    def test_an_unexpected_error_of_the_writer_is_not_swallowed(self, queue: Queue) -> None:
        queue.append(msgspec.structs.replace(batch(1), position=2**64))
        with pytest.raises(FatalError) as caught:
            queue.flush(10)
        assert isinstance(caught.value.__cause__, CdcError)
        assert isinstance(caught.value.__cause__.__cause__, OverflowError)

    def test_closed_is_closed(self, queue: Queue) -> None:
        queue.close()
        queue.close()
        with pytest.raises(FatalError, match="closed"):
            queue.append(batch(1))
        assert queue.read(0, max_bytes=1, timeout_seconds=60) == []


class TestStatusFromFile:
    def check(self, path: Path, queue: Queue) -> None:
        before = snapshot(path.parent)
        found = read_status(path)
        assert snapshot(path.parent) == before
        assert (found.queue_id, found.position) == (queue.queue_id, end_of(3))
        assert (found.facts, found.cursors) == ({"paused": "mirror"}, {"mirror": (1, end_of(1))})
        assert (found.stats.batches, found.stats.last_seq, found.stats.pruned_seq) == (2, 3, 1)
        assert found.stats.bytes == queue.stats().bytes
        assert found.stats.oldest_seconds is not None

    def test_it_is_read_without_a_trace_alive_killed_and_closed(self, queue: Queue, path: Path, tmp_path: Path) -> None:
        queue.set("paused", "mirror")
        fill(queue, [batch(1), batch(2), batch(3)])
        queue.advance("mirror", 1, end_of(1))
        wait_pruned(queue, 1)
        self.check(path, queue)
        self.check(crash_image(queue, tmp_path), queue)
        queue.close()
        self.check(path, queue)

    def test_bounds_are_the_callers(self, queue: Queue, path: Path) -> None:
        fill(queue, [batch(1)])
        assert not read_status(path).stats.full
        assert read_status(path, max_bytes=10).stats.full

    def test_a_missing_file_is_named_and_not_made(self, path: Path) -> None:
        with pytest.raises(FatalError, match=re.escape(str(path))) as caught:
            read_status(path)
        assert caught.value.hint
        assert not list(path.parent.iterdir())


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in folder.iterdir() if file.is_file()}


class TestDirectoryLock:
    def test_f87_a_second_process_is_refused_and_told_by_whom(self, tmp_path: Path) -> None:
        script = (
            "import sys, pathlib; from cdc.directory import lock_directory\n"
            "lock = lock_directory(pathlib.Path(sys.argv[1])); print('locked', flush=True); sys.stdin.read()"
        )
        folder = tmp_path / "new" / "data"
        with subprocess.Popen(
            [sys.executable, "-c", script, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as owner:
            assert owner.stdout is not None
            assert owner.stdout.readline() == b"locked\n"
            with pytest.raises(DirectoryInUse, match=f"process {owner.pid}$"):
                lock_directory(folder)
            owner.kill()
            owner.wait()
        assert folder.stat().st_mode & 0o777 == 0o700
        with lock_directory(folder), pytest.raises(DirectoryInUse, match=str(os.getpid())):
            lock_directory(folder)
        lock = lock_directory(folder)
        lock.release()
        lock.release()

    def test_a_directory_that_cannot_be_made_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(FatalError, match="file/data"):
            lock_directory(tmp_path / "file" / "data")


def test_rows_are_readable_by_the_owner_alone(queue: Queue, path: Path) -> None:
    fill(queue, [batch(1)])
    modes = {file.name: file.stat().st_mode & 0o777 for file in path.parent.glob("shop.queue*")}
    assert modes == {"shop.queue": 0o600, "shop.queue-wal": 0o600, "shop.queue-shm": 0o600}


def test_the_log_is_used_again(queue: Queue, path: Path) -> None:
    """It neither grows without bound nor is cut and made again, which would cost a slow fsync each time."""
    log = path.with_name("shop.queue-wal")
    sizes = []
    for number in range(1, 61):
        fill(queue, [batch(number, size=1 << 20)])
        queue.advance("mirror", number, end_of(number))
        sizes.append(log.stat().st_size)
    assert sizes == sorted(sizes)
    assert sizes[-1] < 2 * queue_format.CHECKPOINT_BYTES


def test_what_is_read_is_not_in_memory_as_it_is_stored_and_decoded_as_well(open_queue: OpenQueue) -> None:
    queue, size = open_queue(tail_bytes=0), 1 << 17
    queue.register("mirror")
    fill(queue, (batch(number, size=size) for number in range(1, 33)))
    tracemalloc.start()
    try:
        found = read_all(queue)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(found) == 32
    assert peak < 1.5 * 32 * size


Step = tuple[str, int]
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("transaction"), st.integers(1, 4)),
        st.tuples(st.just("unfinished"), st.integers(1, 2)),
        st.tuples(st.just("idle"), st.just(0)),
        st.tuples(st.just("advance"), st.integers(0, 10)),
        st.tuples(st.just("reopen"), st.just(0)),
    ),
    max_size=25,
)


class Model:
    """A queue that is a list."""

    def __init__(self) -> None:
        self.kept: list[Stored] = []
        self.seq = self.passed = 0
        self.position: SourcePosition = START
        self.number = 0

    def append(self, each: Batch) -> None:
        self.seq += 1
        self.kept.append(Stored(self.seq, each))
        if each.complete:
            self.position = each.position

    def reopen(self) -> None:
        while self.kept and not self.kept[-1].batch.complete:
            self.kept.pop()


@settings(max_examples=60)
@given(STEPS)
def test_any_sequence_of_steps_equals_a_list(steps: list[Step]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shop.queue"
        model = Model()
        queue = Queue(path, max_bytes=1 << 30, min_free_bytes=0, tail_bytes=2000)
        try:
            queue.begin(START)
            queue.register("mirror")
            for step in [*steps, ("reopen", 0)]:
                queue = take(step, queue, model, path)
                compare(queue, model)
            ends = [stored.seq for stored in model.kept if stored.batch.complete and stored.seq <= model.passed]
            assert queue.stats().pruned_seq == max(ends, default=0)
        finally:
            queue.close()


def take(step: Step, queue: Queue, model: Model, path: Path) -> Queue:
    kind, count = step
    if kind in {"transaction", "unfinished"}:
        unfinished = model.kept and not model.kept[-1].batch.complete
        model.number += not unfinished
        offset = 10 if unfinished else 0
        for part in range(count):
            each = batch(model.number, part=offset + part, complete=kind == "transaction" and part == count - 1)
            queue.append(each)
            model.append(each)
    elif kind == "idle":
        position = end_of(model.number) + 4
        queue.append(idle(position))
        if not model.kept or model.kept[-1].batch.complete:
            model.position = position
    elif kind == "advance":
        assert queue.flush(10)
        ends = [stored for stored in model.kept if stored.batch.complete and stored.seq > model.passed][:count]
        if ends:
            model.passed = ends[-1].seq
            queue.advance("mirror", model.passed, ends[-1].batch.position)
    else:
        queue.close()
        model.reopen()
        return Queue(path, max_bytes=1 << 30, min_free_bytes=0, tail_bytes=2000)
    return queue


def compare(queue: Queue, model: Model) -> None:
    assert queue.flush(10)
    assert queue.position == model.position
    assert queue.stats().pruned_seq <= model.passed
    assert read_all(queue, model.passed) == [stored for stored in model.kept if stored.seq > model.passed]
    assert queue.stats().last_seq == max([stored.seq for stored in model.kept], default=0)
