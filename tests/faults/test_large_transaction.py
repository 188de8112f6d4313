"""A transaction that is larger than the daemon's memory: all of it becomes visible at once, or nothing."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Final

from tests.beside import Threads
from tests.faults.daemon import Daemon
from tests.processes import wait_until
from tests.servers import Database

ROWS: Final = 2_000_000
MEMORY_BYTES: Final = 200 * 1024**2
SAMPLE: Final = [1, ROWS // 3, ROWS // 2, ROWS - 1, ROWS]

_TABLE: Final = "CREATE TABLE lines (id int PRIMARY KEY, quantity int NOT NULL, note text)"
_FILL: Final = "INSERT INTO lines SELECT n, mod(n, 100), 'line ' || n FROM generate_series(1, %s) AS n"


class Watcher(Threads):
    """Looks for some rows from all over the transaction, all the time.

    seen: the different numbers of them that were there at the same time.
    """

    def __init__(self, database: Database) -> None:
        super().__init__("watcher", self._watch)
        self.seen: set[int] = set()
        self.looks = 0
        self._connection = database.connect()

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._connection.close()

    def _watch(self, stopping: threading.Event) -> None:
        while not stopping.wait(0.005):
            query = "SELECT count(*) FROM lines WHERE id = ANY (%s)"
            ((count,),) = self._connection.execute(query, [SAMPLE]).fetchall()
            self.seen.add(count)
            self.looks += 1


def test_f40_two_million_rows_in_bounded_memory_and_visible_at_once(
    source_db: Database, target_db: Database, tmp_path: Path, pg_dump: Path
) -> None:
    source_db.execute(_TABLE)
    with Daemon(tmp_path, source=source_db.url, target=target_db.url, pg_dump=pg_dump) as daemon:
        wait_for_delivery(daemon)
        before_bytes = daemon.peak_memory_bytes
        with Watcher(target_db) as watcher:
            source_db.execute(_FILL, [ROWS])
            wait_until(lambda: len(SAMPLE) in watcher.seen, timeout_seconds=240, what=daemon.log_tail)
            assert target_db.value("SELECT count(*) FROM lines") == ROWS
        assert watcher.seen == {0, len(SAMPLE)}
        assert watcher.looks > 20
        assert before_bytes < daemon.peak_memory_bytes < MEMORY_BYTES


def wait_for_delivery(daemon: Daemon) -> None:
    """Wait until the (empty) table is copied, and everything else comes by the stream."""

    def delivering() -> bool:
        return daemon.running and daemon.status()["sinks"]["mirror"]["state"] == "running"

    wait_until(delivering, timeout_seconds=60, what=daemon.log_tail)
