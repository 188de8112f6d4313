"""How long a commit takes to become visible in the target, while small transactions come at an even rate."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC, datetime
from statistics import quantiles
from typing import Final

from tests.benchmarks.background import beside
from tests.benchmarks.contenders import Contender
from tests.benchmarks.table import INSERT, require_equal
from tests.processes import wait_until
from tests.servers import Database

WARM_UP: Final = 0.1
"""The first transactions do not count: connections and caches are cold."""

_TELL: Final = """
CREATE FUNCTION tell() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_notify('seen', NEW.id::text);
    RETURN NULL;
END $$;
CREATE TRIGGER tell AFTER INSERT ON item FOR EACH ROW EXECUTE FUNCTION tell();
ALTER TABLE item ENABLE ALWAYS TRIGGER tell;
"""
"""A notification leaves when its transaction is visible. It costs each contender the same, and 0.1 to 0.2 ms.

Looking every millisecond would hide how fast they are; the commit timestamps that servers keep would cost less, but a
subscription writes the source's into the target.
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
    contender.target.execute(_TELL)
    contender.start()
    contender.wait_until_reading()
    listening = threading.Event()
    with beside(contender.target, lambda: _listen(contender.target, count, listening)) as seen:
        wait_until(listening.is_set, what="the listener to listen")
        reached = _write(contender.source, count, rate)
        sightings = _result(seen, contender)
    require_equal(contender.source, contender.target)
    commits = contender.source.execute(_COMMITTED, [count * WARM_UP])
    return _summary(commits, sightings, reached)


def _listen(target: Database, last_id: int, listening: threading.Event) -> list[tuple[int, datetime]]:
    """Note when each row is seen, in the order in which they are."""
    sightings: list[tuple[int, datetime]] = []
    with target.connect() as connection:
        connection.execute("LISTEN seen")
        listening.set()
        for notification in connection.notifies():
            sightings.append((int(notification.payload), datetime.now(UTC)))
            if sightings[-1][0] >= last_id:
                break
    return sightings


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
