"""How long a change takes from its commit at the source until a thousand WebSocket clients have it.

One daemon does it all: it captures the source, keeps a mirror, writes the feed, and serves the clients. The mirror's
latency is measured twice, with the clients and before there are any: they must not slow replication down.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx
import msgspec
import psycopg

from tests.benchmarks.benchmark import Result
from tests.benchmarks.children import line_of, process
from tests.benchmarks.contenders import Usage, usage_of
from tests.benchmarks.lab import Lab, console
from tests.benchmarks.stream_clients import Received
from tests.benchmarks.table import BenchFailed
from tests.feed import FeedDaemon
from tests.servers import PostgresServer

HELP = "stream changes to a thousand WebSocket clients"

_COMMITS: Final = 100
"""A second."""

_ROWS: Final = 100
"""In each table; updated in turn."""

_LATENCY: Final = re.compile(r'^cdc_latency_seconds_(sum|count)\{sink="mirror"\} (\S+)$', re.MULTILINE)


@dataclass(frozen=True)
class Load:
    """Clients share the channels evenly, each is on one; changes a second go to the channels in turn."""

    clients: int = 1_000
    channels: int = 10
    rate: int = 1_000
    seconds: float = 20

    @property
    def changes(self) -> int:
        return int(self.rate * self.seconds)

    @property
    def expected(self) -> int:
        """Events that all clients together get."""
        return self.changes * self.clients // self.channels


@dataclass(frozen=True)
class StreamResult(Result):
    """What the clients got, and what it cost the daemon.

    rate: changes a second that were reached. mirror_ms, mirror_alone_ms: mean latency of the mirror, with the clients
    and without any.
    """

    load: Load
    received: Received
    usage: Usage
    rate: float
    mirror_ms: float
    mirror_alone_ms: float

    def title(self) -> str:
        load = self.load
        return (
            f"{load.clients:,} clients, {load.channels} channels, {load.changes:,} changes at {self.rate:,.0f} a second"
        )

    def heading(self) -> tuple[str, ...]:
        return ("", "cdc")

    def rows(self) -> Iterator[tuple[str, ...]]:
        yield ("events delivered", f"{self.received.delivered:,} of {self.load.expected:,}")
        yield ("from commit to client, p50 (ms)", f"{self.received.p50_ms:.0f}")
        yield ("from commit to client, p99 (ms)", f"{self.received.p99_ms:.0f}")
        yield ("mirror behind (ms)", f"{self.mirror_ms:.1f}")
        yield ("mirror behind, without clients (ms)", f"{self.mirror_alone_ms:.1f}")
        yield ("CPU seconds of the daemon", f"{self.usage.cpu_seconds:.1f}")
        yield ("peak memory (MiB)", f"{self.usage.peak_rss_mb:.0f}")

    def as_json(self) -> dict[str, Any]:
        """With the keys that others look for."""
        return {
            "p50_ms": round(self.received.p50_ms, 1),
            "p99_ms": round(self.received.p99_ms, 1),
            "max_ms": round(self.received.max_ms, 1),
            "peak_rss_mb": round(self.usage.peak_rss_mb, 1),
            "delivered": self.received.delivered,
            "expected": self.load.expected,
            "frames": self.received.frames,
            "rate": round(self.rate),
            "mirror_ms": round(self.mirror_ms, 1),
            "mirror_alone_ms": round(self.mirror_alone_ms, 1),
            "daemon_cpu_seconds": round(self.usage.cpu_seconds, 2),
            "clients_cpu_seconds": round(self.received.cpu_seconds, 2),
        }


def add_options(_: argparse.ArgumentParser) -> None:
    """None."""


def run(options: argparse.Namespace, lab: Lab) -> StreamResult:
    """Measure once."""
    load = Load(clients=20, channels=2, rate=100, seconds=1) if options.small else Load()
    with console.status("connecting, committing, listening"):
        return stream(lab.source, lab.folder, load)


def stream(server: PostgresServer, folder: Path, load: Load) -> StreamResult:
    """Run a daemon whose source, mirror and feed are databases of that server; connect the clients, and commit."""
    source, mirror, feed = (server.create_database(name) for name in ("source", "mirror", "feed"))
    with source.connect() as connection:
        _create(connection, load)
        daemon = FeedDaemon(folder, source.url, feed.url)
        daemon.write(
            source=f'pg_dump = "{server.bin_dir / "pg_dump"}"',
            more=f'[sinks.mirror]\nfrom = "shop"\nurl = "{mirror.url}"',
        )
        with daemon.running() as process_of_daemon:
            daemon.wait_running()
            daemon.wait_for_sink("running")
            url = (daemon.data_dir / "http").read_text()
            before = _latency(url)
            _commit(connection, load, load.changes // 4)
            alone = _latency(url)
            numbers = (url.rpartition(":")[2], load.clients, load.channels, load.expected)
            with process("stream_clients", *map(str, numbers)) as clients:
                if line_of(clients) != "ready":
                    raise BenchFailed("the clients did not connect")
                begun = _latency(url)
                rate = _commit(connection, load, load.changes)
                received = msgspec.json.decode(line_of(clients), type=Received)
            done = _latency(url)
            return StreamResult(
                load, received, usage_of(process_of_daemon.pid), rate, _mean_ms(begun, done), _mean_ms(before, alone)
            )


def _create(connection: psycopg.Connection[Any], load: Load) -> None:
    for channel in range(load.channels):
        connection.execute(
            f"CREATE TABLE channel{channel} (id int PRIMARY KEY, at bigint, status text, customer text, total numeric)"
        )
        connection.execute(
            f"INSERT INTO channel{channel} SELECT i, 0, 'confirmed', 'A. Customer', 1234.50"
            " FROM generate_series(0, %s) i",
            [_ROWS - 1],
        )


def _commit(connection: psycopg.Connection[Any], load: Load, changes: int) -> float:
    """Each transaction at its time; each row tells when it was sent to be committed."""
    each = max(1, load.rate // _COMMITS)
    started = time.perf_counter()
    for first in range(0, changes, each):
        time.sleep(max(0.0, started + first / load.rate - time.perf_counter()))
        with connection.pipeline(), connection.transaction():
            for number in range(first, min(first + each, changes)):
                query = f"UPDATE channel{number % load.channels} SET at = %s WHERE id = %s"
                connection.execute(query, [time.time_ns(), number // load.channels % _ROWS])
    return changes / (time.perf_counter() - started)


def _latency(url: str) -> tuple[float, float]:
    """Seconds from commit at the source to commit in the mirror, in all, and of how many batches."""
    found = dict(_LATENCY.findall(httpx.get(f"{url}/metrics").text))
    return float(found.get("sum", 0)), float(found.get("count", 0))


def _mean_ms(before: tuple[float, float], after: tuple[float, float]) -> float:
    seconds, batches = (late - early for early, late in zip(before, after, strict=True))
    return 1000 * seconds / max(batches, 1)
