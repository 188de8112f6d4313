"""What the queue calls durable is on the disk: shown by kills, by the system calls, and by an fsync that fails."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from cdc.change import Batch
from cdc.postgres.row import decode_row
from cdc.queue import Queue, Stored
from tests.batches import STRIDE, end_of
from tests.faults.queue_writer import MAX_BYTES

WRITER = [sys.executable, "-m", "tests.faults.queue_writer"]
ROOT = Path(__file__).parents[2]

needs_strace = pytest.mark.skipif(
    shutil.which("strace") is None, reason="strace is not installed: system calls can be neither seen nor made to fail"
)


@pytest.mark.parametrize("seed", range(3))
def test_f83_killed_at_any_moment_nothing_acknowledged_is_lost(tmp_path: Path, seed: int) -> None:
    moments = random.Random(seed)
    path = tmp_path / "shop.queue"
    acknowledged = end_of(0)
    for _ in range(5):
        acknowledged = kill_writer(path, after_lines=moments.choice([1, 10, 50]))
        check(path, acknowledged)
    assert acknowledged > end_of(100)


def kill_writer(path: Path, *, after_lines: int) -> int:
    """Run the writer until it has said that much, kill it, return the last position that it called durable."""
    with subprocess.Popen([*WRITER, str(path), "stream"], stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(after_lines)]
        process.kill()
        lines += process.stdout.readlines()
    return int(lines[-1].removeprefix(b"durable "))


def check(path: Path, acknowledged: int) -> None:
    """All from the pruned position to the acknowledged one and beyond is there, whole and once."""
    queue = Queue(path, max_bytes=1 << 30, min_free_bytes=0, keep_seconds=3600)  # prunes nothing meanwhile
    try:
        assert isinstance(queue.position, int)
        assert isinstance(queue.pruned_position, int)
        assert queue.position >= acknowledged
        batches = [stored.batch for stored in read_all(queue)]
        assert batches[-1].complete
        assert batches[-1].position == queue.position
        first, last = (queue.pruned_position - 8) // STRIDE + 1, (queue.position - 8) // STRIDE
        assert [notes(batch) for batch in batches] == expected_notes(first, last)
        assert queue.stats().bytes < 2 * MAX_BYTES
    finally:
        queue.close()


def read_all(queue: Queue) -> Iterator[Stored]:
    seq = queue.stats().pruned_seq
    while stored := queue.read(seq, max_bytes=1 << 20, timeout_seconds=0):
        yield from stored
        seq = stored[-1].seq


def notes(batch: Batch) -> list[bytes]:
    changes = [change for transaction in batch.transactions for change in transaction.changes]
    return [bytes(decode_row(change.after)[1] or b"").partition(b".")[0] for change in changes if change.after]


def expected_notes(first: int, last: int) -> list[list[bytes]]:
    return [
        [f"row-{number}-{part}".encode()]
        for number in range(first, last + 1)
        for part in range(3 if number % 5 == 0 else 1)
    ]


def traced(options: Sequence[str], path: Path, count: int) -> tuple[list[str], list[str]]:
    """Run the writer's `steps` under strace; return the trace's lines and the writer's."""
    trace = path.with_suffix(".trace")
    strace = ["strace", "-f", "-qq", "-y", "-s", "40000", "-o", str(trace), *options]
    writer = [*WRITER, str(path), "steps", str(count)]
    done = subprocess.run([*strace, *writer], cwd=ROOT, stdout=subprocess.PIPE, check=False, text=True, timeout=60)
    return trace.read_text(errors="replace").splitlines(), done.stdout.splitlines()


@needs_strace
def test_f3_f83_nothing_is_called_durable_before_its_fsync_is_done(tmp_path: Path) -> None:
    """Kills alone cannot show this: the page cache survives them."""
    path = tmp_path / "shop.queue"
    lines, said = traced(["-e", "trace=write,pwrite64,fsync,fdatasync"], path, 20)
    assert said == [f"durable {end_of(number)}" for number in range(1, 21)]
    for number in range(1, 21):
        written = first(lines, rf"pwrite64\(\d+<{re.escape(str(path))}-wal>.*row-{number}-0\.")
        called = first(lines, rf'write\(1<.*"durable {end_of(number)}\\n"')
        synced = [line for line in sync_ends(lines, f"{path}-wal") if written < line < called]
        assert synced, f"batch {number} was written in line {written}, called durable in {called}, not synced between"


def first(lines: Sequence[str], pattern: str) -> int:
    found = re.compile(pattern)
    return next(at for at, line in enumerate(lines) if found.search(line))


def sync_ends(lines: Sequence[str], file: str) -> Iterator[int]:
    """The lines in which an fsync of the file has ended well; strace splits a call when threads interleave."""
    waiting: set[str] = set()
    for at, line in enumerate(lines):
        thread = line.split()[0]
        if re.search(rf"f(data)?sync\(\d+<{re.escape(file)}>", line):
            if line.endswith("<unfinished ...>"):
                waiting.add(thread)
            elif re.search(r"= 0$", line):
                yield at
        elif thread in waiting and "sync resumed>" in line:
            waiting.remove(thread)
            if re.search(r"= 0$", line):
                yield at


@needs_strace
def test_f85_a_failed_fsync_is_fatal_and_not_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "shop.queue"
    # once, in the writer's thread: strace counts in each thread, and the others have fewer
    options = ["-e", "trace=fsync,fdatasync", "-e", "inject=fsync,fdatasync:error=EIO:when=30"]
    lines, said = traced(options, path, 1000)
    injected = first(lines, "INJECTED")
    assert f"{path}-wal" in lines[injected], "the test must fail an fsync of the log"
    *durable, failed, refused = said
    position, last_seq = end_of(len(durable)), len(durable)
    assert durable == [f"durable {end_of(number)}" for number in range(1, last_seq + 1)]
    assert failed == f"failed FatalError {position} {last_seq}"
    assert refused == "refused FatalError"
    assert not [line for line in lines[injected + 1 :] if "sync(" in line]
    queue = Queue(path, max_bytes=1 << 30, min_free_bytes=0)
    assert isinstance(queue.position, int)
    assert queue.position >= position
    queue.close()
