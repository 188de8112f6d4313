"""How long polls and histories of a large feed take, asked over HTTP one after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from http.client import HTTPConnection
from statistics import quantiles
from typing import Final

import msgspec

from cdc.feed.place import Place, writer
from cdc.feed.record import ChangeType, Record
from cdc.position import Position
from tests.benchmarks.realtime import line_of, process
from tests.benchmarks.table import BenchFailed
from tests.processes import wait_until

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


def measure(place: Place, rows: int, requests: int) -> Mapping[str, Asked]:
    """Fill a new feed, and ask a gateway for various parts of it, each kind of request so many times."""
    fill(place, rows)
    where = str(place.directory) if place.url is None else place.url.reveal()
    with process("stream_gateway", where) as gateway:
        connection = HTTPConnection("127.0.0.1", int(line_of(gateway)))
        with closing(connection):
            wait_until(lambda: _get(connection, "/api/changes/poll?since=now")[0] == 200)
            return {name: _ask(connection, path, requests) for name, path in _paths(rows).items()}


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
