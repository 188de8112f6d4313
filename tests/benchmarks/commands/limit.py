"""What the walsender can send: a bare reader takes the backlog of `drain` out of its socket and forgets it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tests.benchmarks.benchmark import Result
from tests.benchmarks.lab import Lab, version_of
from tests.benchmarks.reader import Read, read
from tests.benchmarks.table import create_source
from tests.benchmarks.workloads import workload

HELP = "only read, with a bare reader"

_READERS = ("woken", "napping")


@dataclass(frozen=True)
class Limits(Result):
    """What a reader took that is woken for every packet, and one that naps whenever its socket is empty."""

    reads: Mapping[str, Read]
    server: str

    def title(self) -> str:
        return f"PostgreSQL {self.server}, bare readers of one backlog"

    def heading(self) -> tuple[str, ...]:
        return ("reader", "seconds", "CPU seconds", "messages", "MB")

    def rows(self) -> Iterator[tuple[str, ...]]:
        for name, found in self.reads.items():
            numbers = (f"{found.seconds:.2f}", f"{found.cpu_seconds:.2f}", f"{found.messages:,}")
            yield (name, *numbers, f"{found.size / 1e6:.0f}")

    def as_json(self) -> dict[str, Any]:
        return {
            name: {
                "seconds": round(found.seconds, 3),
                "cpu_seconds": round(found.cpu_seconds, 3),
                "messages": found.messages,
                "bytes": found.size,
            }
            for name, found in self.reads.items()
        }


def add_options(_: argparse.ArgumentParser) -> None:
    """None."""


def run(options: argparse.Namespace, lab: Lab) -> Limits:
    """Every reader has a slot of its own, made before the backlog."""
    source = lab.source.create_database("bench_limit")
    create_source(source)
    for name in _READERS:
        source.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [name])
    workload("backlog", small=options.small).write(source)
    found = {name: read(source, name, naps=name == "napping") for name in _READERS}
    source.drop()
    return Limits(found, version_of(lab.source))
