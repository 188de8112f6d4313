"""`cdc` drains a backlog of a MongoDB server: what it costs the daemon, the server's own work left out.

The server is `CDC_TEST_MONGODB_URL`, a `mongod` from PATH, or a stand-in for tests.
"""

from __future__ import annotations

import argparse
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

import pymongo
from bson.raw_bson import RawBSONDocument
from pymongo import InsertOne, UpdateOne

from cdc.mongodb.client import RAW
from tests.benchmarks.benchmark import Result, add_runs
from tests.benchmarks.contenders import CDC, Usage, usage_of, write_config
from tests.benchmarks.lab import Lab, console
from tests.benchmarks.table import BenchFailed
from tests.mongo import at
from tests.mongod.process import mongodb_url
from tests.processes import kill_tree, wait_until

HELP = "drain a backlog of a MongoDB server"

TIMEOUT_SECONDS: Final = 600

_PIPELINE: Final = """\
[sources.bench]
url = {source}

[sinks.mirror]
from = "bench"
url = {target}
"""


@dataclass(frozen=True)
class MongoDrain:
    """One drain, proven to have made an equal mirror."""

    seconds: float
    usage: Usage


@dataclass(frozen=True)
class MongoResult(Result):
    """Drains of as many backlogs, all of `changes` each."""

    server: str
    changes: int
    drains: Sequence[MongoDrain]

    def title(self) -> str:
        return f"{self.server}; {self.changes:,} changes, medians of {len(self.drains)} runs"

    def heading(self) -> tuple[str, ...]:
        return ("", "cdc")

    def rows(self) -> Iterator[tuple[str, ...]]:
        found = self.as_json()
        yield ("us of the daemon's CPU a change", f"{found['cpu_us_per_change']:.1f}")
        yield ("  each run", " ".join(f"{each:.1f}" for each in found["each_cpu_us_per_change"]))
        yield ("seconds", f"{found['seconds']:.2f}")
        yield ("peak memory (MiB)", f"{found['peak_rss_mb']:.0f}")

    def as_json(self) -> dict[str, Any]:
        """Medians, and the highest peak of memory."""
        each = [drain.usage.cpu_seconds / self.changes * 1e6 for drain in self.drains]
        return {
            "server": self.server,
            "cpu_us_per_change": round(median(each), 2),
            "each_cpu_us_per_change": [round(one, 2) for one in each],
            "seconds": round(median(drain.seconds for drain in self.drains), 3),
            "rows": self.changes,
            "peak_rss_mb": round(max(drain.usage.peak_rss_mb for drain in self.drains), 1),
        }


def add_options(parser: argparse.ArgumentParser) -> None:
    """How often."""
    add_runs(parser)


def run(options: argparse.Namespace, lab: Lab) -> MongoResult:
    """Each run has a backlog, a mirror and a queue of its own."""
    inserts, updates = (2_000, 1_000) if options.small else (200_000, 100_000)
    with mongodb_url() as (url, what):
        drains = []
        for number in range(1, options.runs + 1):
            with console.status("filling, copying, draining"):
                folder = lab.new_folder(f"mongodb_{number}")
                drains.append(drain_mongodb(url, folder, inserts=inserts, updates=updates))
            console.print(f"mongodb_{number}: {drains[-1].seconds:.2f} s, equal to its source")
    return MongoResult(what, inserts + updates, drains)


def drain_mongodb(url: str, folder: Path, *, inserts: int, updates: int) -> MongoDrain:
    """Fill an empty mirror, write the backlog while the daemon is away, and let it drain that.

    Time and CPU count from the daemon's log line `started` (the interpreter and its imports come before) until the
    mirror has the last change.
    """
    with pymongo.MongoClient[dict[str, Any]](url) as client:
        for name in ("bench", "bench_backup"):
            client.drop_database(name)
        client.bench.create_collection("items")
        values = {
            "data_dir": str(folder / "data"),
            "source": at(url, "bench"),
            "target": at(url, "bench_backup"),
        }
        config = write_config(folder / "mongodb.toml", _PIPELINE, values)
        _cdc(config, "copy")
        _write(client, inserts, updates)
        seconds, usage = _drain(client, config, folder / "mongodb.log")
        _require_equal(client)
        for name in ("bench", "bench_backup"):
            client.drop_database(name)
    return MongoDrain(seconds, usage)


def _write(client: pymongo.MongoClient[dict[str, Any]], inserts: int, updates: int) -> None:
    items = client.bench.items
    for numbers in _batches(inserts):
        items.bulk_write([InsertOne(_item(number)) for number in numbers], ordered=False)
    for numbers in _batches(updates):
        items.bulk_write(
            [UpdateOne({"_id": number * 7919 % inserts}, {"$set": {"price": number}}) for number in numbers]
        )
    items.insert_one({"_id": "last"})


def _batches(count: int, size: int = 5_000) -> Iterator[range]:
    for first in range(0, count, size):
        yield range(first, min(first + size, count))


def _item(number: int) -> dict[str, Any]:
    return {
        "_id": number,
        "name": f"item {number}",
        "price": number / 100,
        "tags": ["a", "b"],
        "stock": {"here": number % 100, "there": 7},
        "note": "x" * 60,
        "active": number % 2 == 0,
    }


def _drain(client: pymongo.MongoClient[dict[str, Any]], config: Path, log: Path) -> tuple[float, Usage]:
    mirror = client.bench_backup.items
    with log.open("ab") as output:
        process = subprocess.Popen(_command(config, "run"), stdout=output, stderr=output, stdin=subprocess.DEVNULL)
    try:
        wait_until(
            lambda: process.poll() is not None or b'"started"' in log.read_bytes(),
            timeout_seconds=60,
            what=lambda: f"the daemon to start; it says: {log.read_text()[-2000:]}",
        )
        if process.poll() is not None:
            raise BenchFailed(f"the daemon ended: {log.read_text()[-2000:]}")
        started, before = time.monotonic(), usage_of(process.pid)
        wait_until(
            lambda: mirror.find_one({"_id": "last"}) is not None,
            timeout_seconds=TIMEOUT_SECONDS,
            what=lambda: f"the backlog to be drained; it says: {log.read_text()[-2000:]}",
        )
        after = usage_of(process.pid)
        return time.monotonic() - started, Usage(after.cpu_seconds - before.cpu_seconds, after.peak_rss_mb)
    finally:
        kill_tree(process.pid)
        process.wait()


def _require_equal(client: pymongo.MongoClient[dict[str, Any]]) -> None:
    source, mirror = (
        client[name].get_collection("items", codec_options=RAW).find(hint=[("_id", 1)]).sort("_id", 1)
        for name in ("bench", "bench_backup")
    )
    for number, (one, other) in enumerate(zip(source, mirror, strict=True)):
        assert isinstance(one, RawBSONDocument)
        assert isinstance(other, RawBSONDocument)
        if one.raw != other.raw:
            raise BenchFailed(f"document {number} differs")


def _cdc(config: Path, name: str) -> None:
    done = subprocess.run(_command(config, name), capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchFailed(f"cdc {name}: {done.stderr}")


def _command(config: Path, name: str) -> list[str]:
    return [*CDC, "--config", str(config), name]
