"""How long a change takes from its commit to the feed until a thousand WebSocket clients have it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from cdc.feed.place import Place, writer
from cdc.feed.record import ChangeType, Record
from cdc.feed.store import FeedWriter
from cdc.position import Position
from cdc.secret import Secret
from tests.benchmarks.contenders import Usage, usage_of
from tests.benchmarks.stream_clients import Received
from tests.benchmarks.table import BenchFailed
from tests.processes import kill_tree
from tests.servers import Database

_CHECKOUT: Final = Path(__file__).parents[2]

_COMMITS: Final = 100
"""A second."""


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
class StreamResult:
    """What the clients got, and what it cost the gateway. rate: changes a second that were reached."""

    load: Load
    received: Received
    usage: Usage
    rate: float

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
            "gateway_cpu_seconds": round(self.usage.cpu_seconds, 2),
            "clients_cpu_seconds": round(self.received.cpu_seconds, 2),
        }


def stream(database: Database, load: Load) -> StreamResult:
    """Serve a feed in that database, connect the clients, and commit changes at an even rate."""
    place = Place(Secret(database.url), Path.cwd())
    with closing(writer(place, "bench")) as feed:
        feed.open()
        feed.begin(Position("bench", 0, 0))
        with process("stream_gateway", database.url) as gateway:
            port = line_of(gateway)
            numbers = (port, load.clients, load.channels, load.expected)
            with process("stream_clients", *map(str, numbers)) as clients:
                if line_of(clients) != "ready":
                    raise BenchFailed("the clients did not connect")
                rate = _commit(feed, load)
                received = msgspec.json.decode(line_of(clients), type=Received)
            return StreamResult(load, received, usage_of(gateway.pid), rate)


def _commit(feed: FeedWriter, load: Load) -> float:
    """Each transaction at its time; each change tells when it was handed over for commit."""
    each = max(1, load.rate // _COMMITS)
    started = time.perf_counter()
    for first in range(0, load.changes, each):
        time.sleep(max(0.0, started + first / load.rate - time.perf_counter()))
        at = time.time_ns()
        feed.append(
            [_record(number, at, load.channels) for number in range(first, min(first + each, load.changes))], ()
        )
        feed.commit(Position("bench", first + 1, first + 1))
    return load.changes / (time.perf_counter() - started)


def _record(number: int, at: int, channels: int) -> Record:
    after = {"at": at, "id": number, "status": "confirmed", "customer": "A. Customer", "total": "1234.50", "lines": 3}
    return Record(
        source="bench",
        position=str(number),
        entity_type=f"Type{number % channels}",
        entity_id=str(number),
        channel=f"channel{number % channels}",
        change_type=ChangeType.UPDATE,
        version=1,
        changed_at=at // 1_000,
        after=msgspec.json.encode(after),
        changed=("status", "total"),
    )


@contextmanager
def process(module: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A module of this folder, until the block ends."""
    command = [sys.executable, "-m", f"tests.benchmarks.{module}", *arguments]
    with subprocess.Popen(command, cwd=_CHECKOUT, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            kill_tree(process.pid)


def line_of(process: subprocess.Popen[str]) -> str:
    """The next line that it prints."""
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    if not line:
        raise BenchFailed(f"{process.args!r} ended")
    return line
