"""What the daemon confirms to the server is on the disk before: read from the system calls of the whole process.

`kill -9` cannot show this, since the page cache survives it. So at each status update that was sent, the queue's files
are put together as a power cut at that moment would have left them, and opened.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from cdc.position import as_lsn
from cdc.queue.file import QueueFile
from tests.faults.daemon import Daemon
from tests.faults.system_calls import STRACE, Call, Disk, calls_of
from tests.faults.test_queue_durability import needs_strace
from tests.processes import wait_until
from tests.servers import Database

TRANSACTIONS: Final = 12

IMPATIENT: Final = "?options=-c%20wal_sender_timeout%3D1s"
"""A source that wants four status updates a second."""


class StatusUpdate(NamedTuple):
    """The manual's "Standby status update", as it was sent."""

    written: int
    flushed: int
    applied: int


@needs_strace
def test_f2_f3_confirmed_positions_survive_a_power_cut(
    source_db: Database, target_db: Database, tmp_path: Path, pg_dump: Path
) -> None:
    source_db.execute("CREATE TABLE items (id int PRIMARY KEY, filling text)")
    trace = tmp_path / "trace"
    daemon = Daemon(
        tmp_path,
        source=source_db.url + IMPATIENT,
        target=target_db.url,
        pg_dump=pg_dump,
        tracer=[*STRACE, "-o", str(trace)],
    )
    with daemon:
        for number in range(TRANSACTIONS):
            write(source_db, first=number * 100_000, rows=30_000 if number == 5 else number)
            wait_until_confirmed(source_db, daemon)
        daemon.stop()
    assert check(trace, daemon.data_dir, tmp_path) >= TRANSACTIONS


def write(source: Database, *, first: int, rows: int) -> None:
    """One transaction; with 30,000 rows the queue takes it in several batches."""
    query = "INSERT INTO items SELECT %s + n, md5(n::text) FROM generate_series(0, %s) AS n"
    source.execute(query, [first, rows])


def wait_until_confirmed(source: Database, daemon: Daemon) -> None:
    """Wait until the slot knows that all which is committed now is durable."""
    end = source.value("SELECT pg_current_wal_insert_lsn()")
    query = """SELECT count(*) FROM pg_replication_slots
                WHERE database = current_database() AND NOT temporary AND confirmed_flush_lsn >= %s"""
    wait_until(
        lambda: source.value(query, [end]) == 1,
        timeout_seconds=60,
        what=lambda: f"a confirmation; the daemon's log ends:\n{daemon.log_tail()}",
    )


def check(trace: Path, data_dir: Path, scratch: Path) -> int:
    """Compare each status update with what was durable when it began to be sent; return how often they moved on."""
    disk = Disk(data_dir)
    confirmed: set[int] = set()
    for call in in_order_of_effect(trace):
        update = status_update(call)
        if update is None:
            disk.note(call)
        elif update.flushed not in confirmed:
            durable = position_after_power_cut(disk, scratch / f"cut-{len(confirmed)}")
            assert update.flushed <= durable, f"confirmed {update.flushed - durable} bytes beyond what is durable"
            assert update.applied <= update.flushed <= update.written
            confirmed.add(update.flushed)
    return len(confirmed)


def in_order_of_effect(trace: Path) -> Iterator[Call]:
    """What is sent counts from its first moment, what is written or synced only from its last."""
    return iter(sorted(calls_of(trace), key=lambda call: call.start if call.name == "sendto" else call.end))


def status_update(call: Call) -> StatusUpdate | None:
    """The update that a call sent, if it did."""
    if call.name != "sendto":
        return None
    data = call.data
    if len(data) != 39 or data[0:1] + data[5:6] != b"dr":
        return None
    return StatusUpdate(*struct.unpack_from(">QQQ", data, 6))


def position_after_power_cut(disk: Disk, folder: Path) -> int:
    """What a daemon that starts again finds in its queue."""
    folder.mkdir()
    disk.write_to(folder)
    queue = QueueFile(folder / "shop.queue")
    position = queue.contents.state.position
    queue.close(checkpoint=False)
    assert position is not None
    return as_lsn(position)
