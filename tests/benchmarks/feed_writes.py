"""How fast a daemon drains a backlog into the feed, in each of its stores."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from cdc.feed.store import SCAN_ROWS, Wanted
from tests.benchmarks.contenders import Usage, drop_slot, usage_of, wait_until_read
from tests.benchmarks.lab import Lab, console
from tests.benchmarks.table import PUBLICATION, Backlog, BenchFailed, create_source
from tests.feed import FeedDaemon
from tests.processes import wait_until
from tests.servers import Database

TIMEOUT_SECONDS: Final = 600

STORES: Final = ("sqlite", "postgres")


@dataclass(frozen=True)
class Written:
    """From the daemon's taking the slot until readers see the last change; what it used meanwhile."""

    seconds: float
    usage: Usage


def write_all(lab: Lab, backlog: Backlog, runs: int) -> Mapping[str, Sequence[Written]]:
    """Every run has a slot, a queue and a feed of its own, in both stores in turn; all drain the same log."""
    source = lab.source.create_database("bench_feed")
    create_source(source)
    daemons = {(store, number): _prepare(lab, source, store, number) for number in range(runs) for store in STORES}
    with console.status("writing the backlog"):
        backlog.write(source)
    found: dict[str, list[Written]] = {store: [] for store in STORES}
    for (store, number), daemon in daemons.items():
        name = _name(store, number)
        with console.status(f"{name} drains it"):
            found[store].append(_drain(source, name, daemon, backlog.rows + 1))  # and the last row
        drop_slot(source, name)
        console.print(f"{name}: {found[store][-1].seconds:.2f} s, every change is there")
    source.drop()
    return found


def _name(store: str, number: int) -> str:
    return f"feed_{store}_{number + 1}"


def _prepare(lab: Lab, source: Database, store: str, number: int) -> FeedDaemon:
    """A daemon that has begun to follow, and was ended."""
    name = _name(store, number)
    url = lab.target.create_database(name).url if store == "postgres" else None
    daemon = FeedDaemon(lab.new_folder(name), source.url, url)
    daemon.write(source=f'slot = "{name}"\npublication = "{PUBLICATION}"')
    with daemon.following():
        return daemon


def _drain(source: Database, slot: str, daemon: FeedDaemon, changes: int) -> Written:
    daemon.reader.open()
    begins = daemon.reader.head()
    with daemon.running() as process:
        wait_until_read(source, slot, lambda: daemon.log[-3000:])
        started, before = time.monotonic(), usage_of(process.pid)
        wait_until(
            lambda: daemon.reader.head() - begins >= changes,
            timeout_seconds=TIMEOUT_SECONDS,
            what=lambda: f"the feed to hold {changes} changes; the daemon says:\n{daemon.log[-3000:]}",
        )
        seconds, after = time.monotonic() - started, usage_of(process.pid)
    _require_all(daemon, changes)
    return Written(seconds, Usage(after.cpu_seconds - before.cpu_seconds, after.peak_rss_mb))


def _require_all(daemon: FeedDaemon, changes: int) -> None:
    """Raise `BenchFailed` unless readers find every change once."""
    positions: set[str] = set()
    records, cursor, more = 0, 0, True
    while more:
        scan = daemon.reader.scan(cursor, Wanted(), SCAN_ROWS)
        positions.update(record.position for record in scan.records)
        records, more = records + len(scan.records), scan.more
        cursor = scan.records[-1].id if scan.records else cursor
    if not records == len(positions) == changes:
        raise BenchFailed(f"{records} changes are in the feed, {len(positions)} of them different, not {changes}")
