"""A writer that keeps a rate, inside the source's server: so that writing costs little, and is paced exactly."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final

from tests.benchmarks.table import INSERT
from tests.servers import Database

ROWS: Final = 100
"""In a transaction: an insert, a delete, and updates of all others."""

FLUSHED: Final = 10
"""Every so many transactions the writer waits for its disk, and they may be sent: one writer stands for many."""

_KEPT: Final = 1_000
"""How many of the inserted rows are there at a time: the table does not grow."""

_WRITE: Final = f"""
CREATE PROCEDURE write_load(keys bigint, rate float8, seconds float8, INOUT done bigint) LANGUAGE plpgsql AS $$
DECLARE
    started timestamptz := clock_timestamp();
    first bigint := done;
    elapsed float8 := 0;
BEGIN
    WHILE elapsed < seconds LOOP
        done := done + 1;
        PERFORM set_config('synchronous_commit', CASE WHEN done % {FLUSHED} = 0 THEN 'on' ELSE 'off' END, true);
        UPDATE item SET quantity = quantity + 1, price = price + 1, changed_at = now()
         WHERE id IN (SELECT 1 + (done * {ROWS} + n) * 7919 % keys FROM generate_series(1, {ROWS - 2}) AS n);
        INSERT INTO item VALUES (keys + done, 1, 'a new item', 1.25, now(), md5(done::text), true);
        DELETE FROM item WHERE id = keys + done - {_KEPT};
        COMMIT;
        elapsed := extract(epoch FROM clock_timestamp() - started);
        PERFORM pg_sleep(greatest(0, (done - first) * {ROWS} / rate - elapsed));
    END LOOP;
END $$
"""


@dataclass(frozen=True)
class Wrote:
    """rows, and the seconds from the first on, without those that followed the last."""

    rows: int
    seconds: float


class Load:
    """Keeps changing a table of so many keys."""

    def __init__(self, source: Database, keys: int) -> None:
        self._source, self._keys = source, keys
        self._transactions = self._marks = 0

    def prepare(self) -> None:
        """Fill the table. What follows is the load."""
        self._source.execute(_WRITE)
        self._source.execute(
            "INSERT INTO item SELECT id, 1, 'item ' || id, id * 1.25, now(), md5(id::text), true"
            " FROM generate_series(1, %s) AS id",
            [self._keys],
        )
        self._source.execute("VACUUM ANALYZE item")

    def write(self, *, seconds: float, rate: float = float("inf")) -> Wrote:
        """Write that long, so many rows a second, or as fast as one writer can."""
        started, before = time.monotonic(), self._transactions
        call = "CALL write_load(%s, %s, %s, %s)"
        self._transactions = self._source.value(call, [self._keys, rate, seconds, before])
        return Wrote((self._transactions - before) * ROWS, time.monotonic() - started)

    def mark(self) -> int:
        """Commit a new row, and return its id: where that is visible, everything is."""
        self._marks += 1
        self._source.execute(INSERT, [-self._marks])
        return -self._marks
