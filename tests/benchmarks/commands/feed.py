"""How fast a daemon writes the feed, and how long polls and histories of a large one take, asked over HTTP."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from http.client import HTTPConnection
from statistics import median, quantiles
from typing import Any, Final

import msgspec

from cdc.feed.place import Place, writer
from cdc.feed.record import ChangeType, Record
from cdc.position import Position
from cdc.secret import Secret
from tests.benchmarks.benchmark import Result, add_runs
from tests.benchmarks.children import line_of, process
from tests.benchmarks.feed_writes import STORES, Written, write_all
from tests.benchmarks.lab import Lab, console, version_of
from tests.benchmarks.table import BenchFailed
from tests.benchmarks.workloads import workload
from tests.feed_stores import numbered_from_one
from tests.processes import wait_until

HELP = "write a feed, and poll a large one"

_TRANSACTION: Final = 10_000
_TYPES: Final = 20
_LOCATIONS: Final = 10
_VERSIONS: Final = 20
"""Of each entity."""


@dataclass(frozen=True)
class Asked:
    """Milliseconds of one kind of request, over all that were made."""

    p50: float
    p99: float

    def as_json(self) -> dict[str, float]:
        return {"p50_ms": round(self.p50, 2), "p99_ms": round(self.p99, 2)}


@dataclass(frozen=True)
class Filled:
    """A feed that was filled without a daemon, and then polled."""

    rows_per_second: float
    asked: Mapping[str, Asked]


@dataclass(frozen=True)
class FeedResult(Result):
    """By store: what the daemon has written, each run; polls, unless they were not wanted."""

    server: str
    changes: int
    written: Mapping[str, Sequence[Written]]
    rows_polled: int
    filled: Mapping[str, Filled]

    def title(self) -> str:
        said = [f"PostgreSQL {self.server}"]
        if self.written:
            runs = len(self.written["sqlite"])
            said.append(f"the daemon wrote {self.changes:,} changes into the feed, medians of {runs} runs each")
        if self.filled:
            said.append(f"of {self.rows_polled:,} changes parts were asked for, in ms p50 and p99")
        return "; ".join(said)

    def heading(self) -> tuple[str, ...]:
        return ("", *STORES)

    def rows(self) -> Iterator[tuple[str, ...]]:
        if self.written:
            found = [self._writes(name) for name in STORES]
            yield ("rows/s, from source to feed", *(f"{each['rows_per_second']:,.0f}" for each in found))
            yield ("us of the daemon's CPU a change", *(f"{each['cpu_us_per_change']:.1f}" for each in found))
            yield ("peak memory (MiB)", *(f"{each['peak_rss_mb']:.0f}" for each in found))
        if self.filled:
            yield ("rows/s, store alone", *(f"{self.filled[name].rows_per_second:,.0f}" for name in STORES))
            for what in self.filled["sqlite"].asked:
                asked = [self.filled[name].asked[what] for name in STORES]
                yield (what, *(f"{each.p50:.2f} {each.p99:.2f}" for each in asked))

    def as_json(self) -> dict[str, Any]:
        """By store: `write` for what the daemon wrote, and each request by its name."""
        stores: dict[str, dict[str, Any]] = {name: {} for name in STORES}
        for name in self.written:
            stores[name]["write"] = self._writes(name)
        for name, filled in self.filled.items():
            stores[name]["store_rows_per_second"] = round(filled.rows_per_second)
            stores[name] |= {what: asked.as_json() for what, asked in filled.asked.items()}
        return {"changes": self.changes, "rows": self.rows_polled, **stores}

    def _writes(self, name: str) -> dict[str, Any]:
        runs = self.written[name]
        return {
            "rows_per_second": round(median(self.changes / run.seconds for run in runs)),
            "each_seconds": [round(run.seconds, 3) for run in runs],
            "cpu_us_per_change": round(median(run.usage.cpu_seconds for run in runs) / self.changes * 1e6, 2),
            "peak_rss_mb": round(max(run.usage.peak_rss_mb for run in runs), 1),
        }


def add_options(parser: argparse.ArgumentParser) -> None:
    """How often it is written; or only a part of it all."""
    add_runs(parser)
    parser.add_argument("--only", choices=("writes", "polls"), help="not the other")


def run(options: argparse.Namespace, lab: Lab) -> FeedResult:
    """Let the daemon drain a backlog into each store in turn; then fill larger ones, and poll those."""
    backlog = workload("backlog", small=options.small)
    written = {} if options.only == "polls" else write_all(lab, backlog, options.runs)
    rows, requests = (5_000, 20) if options.small else (1_000_000, 500)
    filled = {} if options.only == "writes" else _poll_all(lab, rows, requests)
    return FeedResult(version_of(lab.source), backlog.rows, written, rows, filled)


def _poll_all(lab: Lab, rows: int, requests: int) -> dict[str, Filled]:
    places = {
        "sqlite": numbered_from_one(Place(None, lab.new_folder("polled"))),
        "postgres": Place(Secret(lab.target.create_database("polled").url), lab.folder),
    }
    found = {}
    for name, place in places.items():
        with console.status(f"filling a feed in {name}, and asking for parts of it"):
            found[name] = measure(place, rows, requests)
    return found


def measure(place: Place, rows: int, requests: int) -> Filled:
    """Fill a new feed, and ask a gateway for various parts of it, each kind of request so many times."""
    started = time.monotonic()
    fill(place, rows)
    rows_per_second = rows / (time.monotonic() - started)
    where = str(place.directory) if place.url is None else place.url.reveal()
    with process("stream_gateway", where) as gateway:
        connection = HTTPConnection("127.0.0.1", int(line_of(gateway)))
        with closing(connection):
            wait_until(lambda: _get(connection, "/api/changes/poll?since=now")[0] == 200)
            asked = {name: _ask(connection, path, requests) for name, path in _paths(rows).items()}
    return Filled(rows_per_second, asked)


def fill(place: Place, rows: int) -> None:
    """As a source's sink writes: whole transactions, in order."""
    with closing(writer(place, "bench")) as feed:
        feed.open()
        feed.begin(Position("bench", 0, 0))
        for first in range(0, rows, _TRANSACTION):
            feed.append([_record(number) for number in range(first, min(first + _TRANSACTION, rows))], ())
            feed.commit(Position("bench", first + 1, first + 1))


def _record(number: int) -> Record:
    entity, kind = number // _TYPES, number % _TYPES
    after = {"id": number, "status": "confirmed", "customer": "A. Customer", "total": "1234.50", "lines": 3}
    return Record(
        source="bench",
        position=f"0/{number:X}:0",
        entity_type=f"Type{kind}",
        entity_id=str(entity // _VERSIONS),
        channel=f"channel{kind}",
        change_type=ChangeType.UPDATE,
        version=entity % _VERSIONS + 1,
        changed_at=1_763_759_000_000_000 + number,
        location_id=f"location{number % _LOCATIONS}",
        after=msgspec.json.encode(after),
        changed=("status", "total"),
    )


def _paths(rows: int) -> dict[str, Callable[[int], str]]:
    """What is asked for, by the request's number: all over the feed."""

    def since(number: int) -> int:
        return number * 7_919 % max(1, rows - _TRANSACTION)

    poll = "/api/changes/poll?limit=100"
    return {
        "poll": lambda number: f"{poll}&since={since(number)}",
        "poll from the beginning": lambda _: poll,
        "poll, nothing new": lambda _: f"{poll}&since={rows}",
        "poll, one type": lambda number: f"{poll}&since={since(number)}&entityTypes=Type{number % _TYPES}",
        "poll, one channel": lambda number: f"{poll}&since={since(number)}&channels=channel{number % _TYPES}",
        "poll, one location": lambda number: f"{poll}&since={since(number)}&locationId=location{number % _LOCATIONS}",
        "poll, nothing fits": lambda number: f"{poll}&since={since(number)}&channels=none",
        "poll, a time": lambda _: f"{poll}&since=2020-01-01T00:00:00Z",
        "history": lambda number: f"/api/changes/Type{number % _TYPES}/{since(number) // _TYPES // _VERSIONS}",
        "history, unknown": lambda number: f"/api/changes/Type1/unknown{number}",
    }


def _ask(connection: HTTPConnection, path: Callable[[int], str], requests: int) -> Asked:
    milliseconds = []
    for number in range(requests):
        started = time.perf_counter()
        status, body = _get(connection, path(number))
        milliseconds.append((time.perf_counter() - started) * 1000)
        if status != 200:
            raise BenchFailed(f"{path(number)}: {status} {body[:200]!r}")
    steps = quantiles(milliseconds, n=100)
    return Asked(steps[49], steps[98])


def _get(connection: HTTPConnection, path: str) -> tuple[int, bytes]:
    connection.request("GET", path)
    answer = connection.getresponse()
    return answer.status, answer.read()
