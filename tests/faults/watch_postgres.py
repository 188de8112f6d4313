"""What a mirror of the load must show in every single snapshot, and who looks at it all the time."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final, NamedTuple

import psycopg
from psycopg import errors

from tests.beside import Threads
from tests.faults.load_postgres import BULK_ROWS, KEYS, OPENING_BALANCE

Connection = psycopg.Connection[Any]

LOOK_SECONDS: Final = 0.02
"""Between two looks: the mirror's server has other work to do."""


class Snapshot(NamedTuple):
    """What one statement sees of a mirror; counters and journal in the order of their keys."""

    position: int
    balance: int
    counters: list[int]
    journal: list[int]
    torn_keys: list[str]
    torn_orders: list[str]
    bulk_rows: int
    bulk_runs: int
    bulk_run: int

    def problems(self) -> list[str]:
        """What no snapshot shows if every transaction is applied whole and once."""
        found = {
            f"the sum of all balances is {self.balance}": self.balance != KEYS * OPENING_BALANCE,
            f"journal does not fit entries: {', '.join(self.torn_keys)}": self.torn_keys,
            f"orders do not fit their lines: {', '.join(self.torn_orders)}": self.torn_orders,
            f"bulk has {self.bulk_rows} rows of {self.bulk_runs} runs": (self.bulk_rows, self.bulk_runs)
            != (BULK_ROWS, 1),
        }
        return [what for what, is_so in found.items() if is_so]

    def problems_after(self, before: Snapshot) -> list[str]:
        """What a later snapshot never shows if transactions are applied in order."""
        found = {
            "the position went back": self.position < before.position,
            "a counter went back": _went_back(before.counters, self.counters),
            "a key of the journal went back": _went_back(before.journal, self.journal),
            "bulk went back": self.bulk_run < before.bulk_run,
        }
        return [what for what, is_so in found.items() if is_so]


def look(connection: Connection) -> Snapshot | None:
    """Take one snapshot of a mirror; `None` before its initial copy is consistent, and while it is resynced."""
    connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    with suppress(errors.UndefinedTable), connection.transaction():
        connection.execute(_LOCK)  # first: a TRUNCATE also empties what older snapshots see
        if _is_one(connection):
            return Snapshot(*connection.execute(_LOOK).fetchall()[0])
    return None


def _is_one(connection: Connection) -> bool:
    """Whether all of the mirror is of one moment."""
    ((filled, resyncs),) = connection.execute(_FILLED).fetchall()
    return bool(filled) and not (resyncs and connection.execute("SELECT FROM cdc.resyncs LIMIT 1").fetchall())


class Watcher(Threads):
    """Looks at a mirror all the time, also while its server comes and goes.

    looks: how many snapshots it took. problems: what it saw that cannot be; then it looks no more.
    """

    def __init__(self, url: str) -> None:
        super().__init__("watcher", self._watch)
        self.looks = 0
        self.problems: list[str] = []
        self._url = url
        self._latest: Snapshot | None = None

    @property
    def position(self) -> int:
        """Where the mirror stood at the last look; 0 before its initial copy is consistent."""
        return self._latest.position if self._latest else 0

    def _watch(self, stopping: threading.Event) -> None:
        while not stopping.is_set() and not self.problems:
            try:
                with psycopg.connect(self._url, autocommit=True) as connection:
                    self._watch_while_connected(connection)
            except errors.OperationalError:
                stopping.wait(0.05)
            except Exception as exc:  # noqa: BLE001 - a thread has no caller
                self.problems = [f"cannot look at the mirror: {exc}"]

    def _watch_while_connected(self, connection: Connection) -> None:
        while not self.stopping.wait(LOOK_SECONDS) and not self.problems:
            now = look(connection)
            if now is not None:
                self.problems = now.problems() + (now.problems_after(self._latest) if self._latest else [])
                self._latest = now
                self.looks += 1


def _went_back(before: Sequence[int], now: Sequence[int]) -> bool:
    return len(now) < len(before) or any(later < earlier for earlier, later in zip(before, now, strict=False))


_LOCK: Final = "LOCK TABLE accounts, counters, journal, entries, orders, order_lines, bulk IN ACCESS SHARE MODE"

_FILLED: Final = """
SELECT bool_and(tables.position IS NOT NULL AND tables.position <= positions.position),
       to_regclass('cdc.resyncs') IS NOT NULL
  FROM cdc.positions LEFT JOIN cdc.tables USING (sink)
"""

_LOOK: Final = """
WITH torn_keys AS (
    SELECT format('%s is at %s with %s up to %s', key, seq, entries, newest) AS text
      FROM journal FULL JOIN
           (SELECT key, count(*) AS entries, max(seq) AS newest FROM entries GROUP BY key) AS e USING (key)
     WHERE (seq, seq) IS DISTINCT FROM (coalesce(entries, 0), coalesce(newest, 0))
), torn_orders AS (
    SELECT format('%s has %s of %s lines', coalesce(id, order_id), written, lines) AS text
      FROM orders FULL JOIN
           (SELECT order_id, count(*) AS written FROM order_lines GROUP BY order_id) AS l ON id = order_id
     WHERE lines IS DISTINCT FROM written
)
SELECT (SELECT (position - '0/0')::bigint FROM cdc.positions),
       (SELECT sum(balance)::bigint FROM accounts),
       (SELECT array_agg(n ORDER BY id) FROM counters),
       (SELECT array_agg(seq ORDER BY key) FROM journal),
       ARRAY(SELECT text FROM torn_keys LIMIT 5),
       ARRAY(SELECT text FROM torn_orders LIMIT 5),
       bulk.*
  FROM (SELECT count(*), count(DISTINCT run), coalesce(max(run), 0) FROM bulk) AS bulk
"""
