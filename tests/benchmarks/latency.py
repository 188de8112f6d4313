"""How long a commit takes to become visible in the target, while small transactions come at an even rate."""

from __future__ import annotations

import time
from bisect import bisect_left
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import datetime
from statistics import quantiles
from typing import Final

from tests.benchmarks.background import beside
from tests.benchmarks.contenders import Contender
from tests.benchmarks.table import INSERT, require_equal
from tests.processes import wait_until
from tests.servers import Database

WARM_UP: Final = 0.1
"""The first transactions do not count: connections and caches are cold."""

_WATCH: Final = """
CREATE FUNCTION watch(last_id bigint) RETURNS TABLE (newest bigint, seen_at timestamptz)
LANGUAGE plpgsql SET enable_seqscan = off AS $$
DECLARE
    found bigint;
BEGIN
    newest := 0;
    WHILE newest < last_id LOOP
        found := (SELECT max(id) FROM item);
        IF found > newest THEN
            newest := found;
            seen_at := clock_timestamp();
            RETURN NEXT;
        ELSE
            PERFORM pg_sleep(0.001);
        END IF;
    END LOOP;
END $$
"""
"""Looks every millisecond, from inside the server, so that looking costs next to nothing.

The commit timestamps that servers keep would cost less, but a subscription writes the source's into the target.
"""

_COMMITTED: Final = "SELECT id, pg_xact_commit_timestamp(xmin) FROM item WHERE id > %s ORDER BY id"


@dataclass(frozen=True)
class Latency:
    """Milliseconds from commit at the source to visibility in the target; transactions a second that were reached."""

    p50: float
    p99: float
    rate: float


def latency(contender: Contender, *, rate: int, seconds: float) -> Latency:
    """Watch a contender at work. Its table must be empty, and its source keep commit timestamps."""
    count = int(rate * seconds)
    contender.target.execute(_WATCH)
    contender.start()
    contender.wait_until_reading()
    with beside(contender.target, lambda: contender.target.execute("SELECT * FROM watch(%s)", [count])) as seen:
        wait_until(lambda: _watching(contender.target), what="the watcher to watch")
        reached = _write(contender.source, count, rate)
        sightings = _result(seen, contender)
    require_equal(contender.source, contender.target)
    commits = contender.source.execute(_COMMITTED, [count * WARM_UP])
    return _summary(commits, sightings, reached)


def _watching(target: Database) -> bool:
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = %s AND state = 'active' AND query ~ 'FROM watch'"
    return bool(target.value(query + " AND pid <> pg_backend_pid()", [target.name]))


def _write(source: Database, count: int, rate: int) -> float:
    """Commit one row after the other, each at its time; return how many a second it became."""
    with source.connect() as connection:
        started = time.perf_counter()
        for number in range(count):
            time.sleep(max(0.0, started + number / rate - time.perf_counter()))
            connection.execute(INSERT, [number + 1], prepare=True)
        return count / (time.perf_counter() - started)


def _result(seen: Future[list[tuple[int, datetime]]], contender: Contender) -> list[tuple[int, datetime]]:
    try:
        return seen.result(timeout=60)
    except TimeoutError:
        raise TimeoutError(f"{contender.name} does not deliver; it says:\n{contender.log_tail()}") from None


def _summary(commits: list[tuple[int, datetime]], sightings: list[tuple[int, datetime]], rate: float) -> Latency:
    newest = [number for number, _ in sightings]
    milliseconds = [
        (sightings[bisect_left(newest, number)][1] - committed_at).total_seconds() * 1000
        for number, committed_at in commits
    ]
    percentiles = quantiles(milliseconds, n=100, method="inclusive")
    return Latency(percentiles[49], percentiles[98], rate)
