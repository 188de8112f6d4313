"""This daemon and PostgreSQL's own subscription do the same work in turn, between the same two servers.

drain: both drain one backlog, then both follow small transactions; every run ends with proof that target and source are
equal. limit: a bare reader takes the same backlog out of its socket, which is as fast as any reader can be. mongodb:
the daemon drains a backlog of a MongoDB server: `CDC_TEST_MONGODB_URL`, a `mongod` from PATH, or a stand-in for tests.
poison: drains of a parking mirror, with and without keys that it refuses.
feed: polls and histories of a large feed, in SQLite and in PostgreSQL.
realtime: a thousand WebSocket clients follow a daemon that also keeps a mirror.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from cdc.feed.place import Place
from cdc.postgres.copy_text import COMPILED
from cdc.secret import Secret
from tests.benchmarks.contenders import Cdc, Contender, Native
from tests.benchmarks.drain import Drain, drain
from tests.benchmarks.feed import Asked, measure
from tests.benchmarks.latency import Latency, latency
from tests.benchmarks.mongodb import drain_mongodb
from tests.benchmarks.poison import Poison
from tests.benchmarks.poison import compare as compare_poison
from tests.benchmarks.reader import read
from tests.benchmarks.realtime import Load, stream
from tests.benchmarks.table import Backlog, BenchFailed, create_source
from tests.mongod.process import mongodb_url
from tests.servers import Database, PostgresServer, ServerUnavailable

SETTINGS: Final = {"shared_buffers": "128MB", "track_commit_timestamp": "on"}
"""Of both servers, besides fsync: what is confirmed must survive, and that has its price."""

console = Console(highlight=False)


@dataclass(frozen=True)
class Sizes:
    """The backlog; then how many transactions a second follow, for how long."""

    backlog: Backlog
    rate: int
    seconds: float


FULL: Final = Sizes(Backlog(inserts=300_000, updates=160_000), rate=500, seconds=10)
SMALL: Final = Sizes(Backlog(inserts=3_000, updates=1_000), rate=200, seconds=1)


@dataclass(frozen=True)
class Results:
    """What was measured, by contender."""

    rows: int
    drains: Mapping[str, Sequence[Drain]]
    latencies: Mapping[str, Latency]

    def seconds(self, name: str) -> float:
        """The median of its drains."""
        return median(drain.seconds for drain in self.drains[name])

    def as_json(self) -> dict[str, Any]:
        """Medians over all runs, and the highest peak of memory."""
        usages = [drain.usage for drain in self.drains["cdc"] if drain.usage is not None]
        return {
            "native_seconds": round(self.seconds("native"), 3),
            "cdc_seconds": round(self.seconds("cdc"), 3),
            "ratio": round(self.seconds("native") / self.seconds("cdc"), 3),
            "rows": self.rows,
            "cdc_cpu_seconds": round(median(usage.cpu_seconds for usage in usages), 3),
            "cdc_peak_rss_mb": round(max(usage.peak_rss_mb for usage in usages), 1),
            "latency_ms": {
                name: {"p50": round(found.p50, 2), "p99": round(found.p99, 2)} for name, found in self.latencies.items()
            },
        }


class Bench:
    """Two servers, and those who replicate between them."""

    def __init__(self, source: PostgresServer, target: PostgresServer, folder: Path, sizes: Sizes) -> None:
        self._source = source
        self._target = target
        self._folder = folder
        self._sizes = sizes
        self._kinds: dict[str, Callable[[str, Database], Contender]] = {
            "native": lambda name, source: Native(name, source, self._target),
            "cdc": lambda name, source: Cdc(name, source, self._target, self._folder),
        }

    def compare(self, runs: int) -> Results:
        """Drain with both in turn, then measure their latencies."""
        drains = self._drains(runs)
        latencies = {kind: self._latency(kind) for kind in self._kinds}
        return Results(self._sizes.backlog.rows, drains, latencies)

    def limit(self) -> Table:
        """Read the backlog twice: woken for every packet, and in naps."""
        source = self._new_source("limit")
        names = ("woken", "napping")
        for name in names:
            source.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [name])
        self._sizes.backlog.write(source)
        table = Table("bare reader", "seconds", "CPU seconds", "messages", "MB", box=None, pad_edge=False)
        for name in names:
            found = read(source, name, naps=name == "napping")
            numbers = (f"{found.seconds:.2f}", f"{found.cpu_seconds:.2f}", f"{found.messages:,}")
            table.add_row(name, *numbers, f"{found.size / 1e6:.0f}")
        return table

    def _drains(self, runs: int) -> dict[str, list[Drain]]:
        """Every run has a slot of its own, and all slots begin before the backlog: all drain the same log."""
        source = self._new_source("bench")
        contenders = [
            (kind, make(f"{kind}_{run}", source)) for run in range(1, runs + 1) for kind, make in self._kinds.items()
        ]
        for _, contender in contenders:
            contender.prepare()
        with console.status("writing the backlog"):
            self._sizes.backlog.write(source)
        drains: dict[str, list[Drain]] = {kind: [] for kind in self._kinds}
        for kind, contender in contenders:
            with console.status(f"{contender.name} drains it"), closing(contender):
                drains[kind].append(drain(contender))
            console.print(f"{contender.name}: {drains[kind][-1].seconds:.2f} s, equal to its source")
        return drains

    def _latency(self, kind: str) -> Latency:
        source = self._new_source(f"latency_{kind}")
        with closing(self._kinds[kind](f"{kind}_latency", source)) as contender, console.status(contender.name):
            contender.prepare()
            return latency(contender, rate=self._sizes.rate, seconds=self._sizes.seconds)

    def _new_source(self, name: str) -> Database:
        database = self._source.create_database(name)
        create_source(database)
        return database


def main() -> int:
    """Run what was asked for and return the exit code."""
    options = _parser().parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything below is ended
    folder = Path(tempfile.mkdtemp(prefix="cdc-bench-"))
    try:
        if options.command == "mongodb":
            return _mongodb(options, folder)
        if options.command == "feed":
            return _feed(options, folder)
        if options.command == "realtime":
            return _realtime(options, folder)
        with (
            PostgresServer(fsync=True, settings=SETTINGS) as source,
            PostgresServer(fsync=True, settings=SETTINGS) as target,
        ):
            _describe_surroundings(source)
            if options.command == "poison":
                return _poison(options, source, target, folder)
            _perform(Bench(source, target, folder, SMALL if options.small else FULL), options)
    except (BenchFailed, TimeoutError, ServerUnavailable) as exc:
        console.print(f"The benchmark failed: {exc}", style="bold red", markup=False)
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


def _poison(options: argparse.Namespace, source: PostgresServer, target: PostgresServer, folder: Path) -> int:
    full = Backlog(inserts=10_000, updates=400_000, mark=100_000)
    backlog = Backlog(inserts=2_000, updates=4_000, mark=2_000) if options.small else full
    with console.status("draining"):
        drained = compare_poison(source, target, folder, Poison(backlog, options.refused), options.runs)
    found = drained.as_json()
    for line in drained.lines():
        console.print(line)
    console.print(
        f"{found['rows']:,} changes of {found['keys']:,} keys, without and with {found['refused']} refused:"
        f" {_shares(found)}; steady {_shares(found['steady'])}"
    )
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


def _shares(found: Mapping[str, Any]) -> str:
    return (
        f"{found['seconds']:.2f} and {found['poison_seconds']:.2f} s, ratio {found['ratio']:.2f};"
        f" {found['cpu_us_per_change']:.1f} and {found['poison_cpu_us_per_change']:.1f} us of the"
        f" daemon's CPU a change, ratio {found['cpu_ratio']:.2f}; of the target's CPU {found['target_cpu_ratio']:.2f}"
    )


def _mongodb(options: argparse.Namespace, folder: Path) -> int:
    inserts, updates = (2_000, 1_000) if options.small else (200_000, 100_000)
    with mongodb_url() as (url, what):
        console.print(
            f"Python {platform.python_version()}, {what}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}"
        )
        with console.status("filling, copying, draining"):
            found = drain_mongodb(url, folder, inserts=inserts, updates=updates).as_json()
    console.print(
        f"{found['rows']:,} changes in {found['seconds']:.2f} s, equal to its source; the daemon took"
        f" {found['cpu_us_per_change']:.1f} us of CPU a change, {found['peak_rss_mb']:.0f} MiB at most"
    )
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


def _feed(options: argparse.Namespace, folder: Path) -> int:
    rows, requests = (5_000, 20) if options.small else (1_000_000, 500)
    with PostgresServer(fsync=True, settings=SETTINGS) as server:
        _describe_surroundings(server)
        places = {
            "sqlite": Place(None, folder),
            "postgres": Place(Secret(server.create_database("feed").url), folder),
        }
        found = {}
        for name, place in places.items():
            with console.status(f"filling a feed in {name}, and asking for parts of it"):
                found[name] = measure(place, rows, requests)
    console.print(f"{rows:,} changes; {requests} requests of each kind, one after the other; milliseconds p50 and p99")
    console.print(_asked(found))
    if options.json is not None:
        as_json = {name: {what: asked.as_json() for what, asked in each.items()} for name, each in found.items()}
        options.json.write_text(json.dumps({"rows": rows, **as_json}, indent=2) + "\n")
    return 0


def _asked(found: Mapping[str, Mapping[str, Asked]]) -> Table:
    table = Table("", *found, box=None, pad_edge=False)
    for what in next(iter(found.values())):
        table.add_row(what, *(f"{each[what].p50:.2f} {each[what].p99:.2f}" for each in found.values()))
    return table


def _realtime(options: argparse.Namespace, folder: Path) -> int:
    load = Load(clients=20, channels=2, rate=100, seconds=1) if options.small else Load()
    with PostgresServer(fsync=True, settings=SETTINGS) as server:
        _describe_surroundings(server)
        with console.status("connecting, committing, listening"):
            found = stream(server, folder, load).as_json()
    console.print(
        f"{load.clients:,} clients, {found['rate']:,} changes/s on {load.channels} channels: {found['delivered']:,} of"
        f" {found['expected']:,} events delivered; from commit to client {found['p50_ms']:.0f} ms (p50),"
        f" {found['p99_ms']:.0f} ms (p99); a mirror meanwhile {found['mirror_ms']:.1f} ms behind, without clients"
        f" {found['mirror_alone_ms']:.1f} ms; the daemon took {found['daemon_cpu_seconds']:.1f} s of CPU and"
        f" {found['peak_rss_mb']:.0f} MiB at most"
    )
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


def _perform(bench: Bench, options: argparse.Namespace) -> None:
    if options.command == "limit":
        console.print(bench.limit())
        return
    results = bench.compare(options.runs)
    console.print(_table(results))
    if options.json is not None:
        options.json.write_text(json.dumps(results.as_json(), indent=2) + "\n")


def _describe_surroundings(server: PostgresServer) -> None:
    load = ", ".join(f"{load:.1f}" for load in os.getloadavg())
    with server.connect() as connection:
        version = connection.info.parameter_status("server_version")
    compiled = "compiled" if COMPILED else "not compiled"
    console.print(
        f"Python {platform.python_version()}, cdc {compiled}, PostgreSQL {version}, {os.cpu_count()} CPUs, load {load}"
    )


def _table(results: Results) -> Table:
    found = results.as_json()
    table = Table("", "native", "cdc", box=None, pad_edge=False)

    def add(what: str, show: Callable[[str], str]) -> None:
        table.add_row(what, show("native"), show("cdc"))

    add("seconds (median)", lambda name: f"{results.seconds(name):.2f}")
    add("seconds (each run)", lambda name: " ".join(f"{drain.seconds:.2f}" for drain in results.drains[name]))
    add("rows/s", lambda name: f"{results.rows / results.seconds(name):,.0f}")
    table.add_row("ratio", "", f"{found['ratio']:.2f}")
    table.add_row("CPU seconds", "", f"{found['cdc_cpu_seconds']:.2f}")
    table.add_row("peak memory (MiB)", "", f"{found['cdc_peak_rss_mb']:.0f}")
    add("latency p50 (ms)", lambda name: f"{results.latencies[name].p50:.1f}")
    add("latency p99 (ms)", lambda name: f"{results.latencies[name].p99:.1f}")
    add("  at transactions/s", lambda name: f"{results.latencies[name].rate:.0f}")
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    small = argparse.ArgumentParser(add_help=False)
    small.add_argument("--small", action="store_true", help="a few thousand rows: shows only that it works")
    commands = parser.add_subparsers(dest="command", required=True)
    comparing = commands.add_parser("drain", parents=[small], help="compare with PostgreSQL's own subscription")
    comparing.add_argument("--runs", type=int, default=3, help="drains of each (%(default)s)")
    comparing.add_argument("--json", type=Path, metavar="FILE", help="write the medians there")
    poison = commands.add_parser("poison", parents=[small], help="what refused keys cost all others")
    poison.add_argument("--refused", type=int, default=1, help="keys that the mirror refuses (%(default)s)")
    poison.add_argument("--runs", type=int, default=3, help="drains of each (%(default)s)")
    poison.add_argument("--json", type=Path, metavar="FILE", help="write the medians there")
    mongodb = commands.add_parser("mongodb", parents=[small], help="drain a backlog of a MongoDB server")
    mongodb.add_argument("--json", type=Path, metavar="FILE", help="write what was measured there")
    feed = commands.add_parser("feed", parents=[small], help="poll a large feed")
    feed.add_argument("--json", type=Path, metavar="FILE", help="write what was measured there")
    realtime = commands.add_parser("realtime", parents=[small], help="stream changes to a thousand WebSocket clients")
    realtime.add_argument("--json", type=Path, metavar="FILE", help="write what was measured there")
    commands.add_parser("limit", parents=[small], help="only read, with a bare reader")
    return parser


if __name__ == "__main__":
    sys.exit(main())
