"""The initial copy of a database beside `pg_dump` with `pg_restore`, and pgcopydb, in turn and with as many jobs."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

from tests.benchmarks.benchmark import Result, add_runs
from tests.benchmarks.copiers import CdcCopy, Copier, DumpAndRestore, Pgcopydb, pgcopydb_version
from tests.benchmarks.copy_source import create, fingerprint, require_copied
from tests.benchmarks.lab import Lab, console, version_of
from tests.benchmarks.table import BenchFailed
from tests.servers import Database

HELP = "compare the initial copy with pg_dump and pg_restore, and with pgcopydb"

_UNITS: Final = {"MB": 10**6, "GB": 10**9}

_COPIERS: Final[Mapping[str, type[Copier]]] = {"cdc": CdcCopy, "pg_dump": DumpAndRestore, "pgcopydb": Pgcopydb}


@dataclass(frozen=True)
class CopyResult(Result):
    """Seconds of each run, by copier. size: bytes of the source. notes: what must be known of a copier, or lacks."""

    server: str
    size: int
    rows_copied: int
    jobs: int
    seconds: Mapping[str, Sequence[float]]
    notes: Mapping[str, str]

    def title(self) -> str:
        runs = len(self.seconds["cdc"])
        what = f"{self.size / 1e6:,.0f} MB, {self.rows_copied:,} rows in ten tables, {self.jobs} jobs"
        notes = "".join(f"\n{name}: {note}" for name, note in self.notes.items())
        return f"PostgreSQL {self.server}, {what}, medians of {runs} runs each{notes}"

    def heading(self) -> tuple[str, ...]:
        return ("", *self.seconds)

    def rows(self) -> Iterator[tuple[str, ...]]:
        ratios = self._ratios()
        yield ("seconds (median)", *(f"{median(each):.1f}" for each in self.seconds.values()))
        yield ("seconds (each run)", *(" ".join(f"{one:.1f}" for one in each) for each in self.seconds.values()))
        yield ("MB/s", *(f"{self.size / median(each) / 1e6:.0f}" for each in self.seconds.values()))
        yield ("cdc's rate, times that", *(f"{ratios[name]:.2f}" if name in ratios else "" for name in self.seconds))

    def as_json(self) -> dict[str, Any]:
        """ratio: how much longer than cdc each of the others takes."""
        return {
            "server": self.server,
            "bytes": self.size,
            "rows": self.rows_copied,
            "jobs": self.jobs,
            "seconds": {name: round(median(each), 3) for name, each in self.seconds.items()},
            "each_seconds": {name: [round(one, 3) for one in each] for name, each in self.seconds.items()},
            "ratio": self._ratios(),
            "notes": dict(self.notes),
        }

    def _ratios(self) -> dict[str, float]:
        cdc = median(self.seconds["cdc"])
        return {name: round(median(each) / cdc, 3) for name, each in self.seconds.items() if name != "cdc"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """How often, of how much, with how many jobs."""
    add_runs(parser)
    add_size(parser)
    parser.add_argument("--jobs", type=int, default=2, help="of each copier (%(default)s)")


def add_size(parser: argparse.ArgumentParser) -> None:
    """Of how much."""
    parser.add_argument(
        "--size", type=size_of, default="5GB", help="of the database that is copied, with its indexes (%(default)s)"
    )


def size_of(text: str) -> int:
    """Bytes, of "200MB" or "5GB"."""
    found = re.fullmatch(r"(\d+)(MB|GB)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of MB or GB, as in 5GB")
    return int(found[1]) * _UNITS[found[2]]


def run(options: argparse.Namespace, lab: Lab) -> CopyResult:
    """Copy with all in turn; nobody is always the first. Each copy has to be equal, indexes included."""
    source = lab.source.create_database("bench_copy")
    with console.status("filling the source"):
        create(source, 2_000_000 if options.small else options.size)
        expected = fingerprint(source)
    size = int(source.value("SELECT pg_database_size(current_database())"))
    pgcopydb = pgcopydb_version()
    notes = {"pgcopydb": "skipped, it is not installed" if pgcopydb is None else str(pgcopydb)}
    seconds: dict[str, list[float]] = {name: [] for name in _COPIERS if name != "pgcopydb" or pgcopydb is not None}
    for number in range(1, options.runs + 1):
        for name in list(seconds) if number % 2 else list(reversed(seconds)):
            try:
                seconds[name].append(_copy(lab, source, name, number, options.jobs, expected))
            except BenchFailed as exc:
                if pgcopydb is None or name != "pgcopydb" or lab.source.version in pgcopydb.made_for:
                    raise
                del seconds[name]
                notes[name] += f"; skipped on {lab.source.version}, where it failed: {exc}"
    source.drop()
    rows = sum(found[0] for name, found in expected.items() if name != "definitions")
    return CopyResult(version_of(lab.source), size, rows, options.jobs, seconds, notes)


def _copy(lab: Lab, source: Database, name: str, number: int, jobs: int, expected: Mapping[str, Any]) -> float:
    """Seconds of one copy, which was found equal."""
    label = f"copy_{name}_{number}"
    for server in (lab.source, lab.target):
        with server.connect() as connection:
            connection.execute("CHECKPOINT")  # or a run would pay for what the one before has written
    with (
        console.status(f"{name} copies"),
        closing(_COPIERS[name](label, source, lab.target, lab.new_folder(label), jobs)) as copier,
    ):
        started = time.monotonic()
        copier.copy()
        seconds = time.monotonic() - started
        require_copied(copier.target, expected)
    console.print(f"{label}: {seconds:.1f} s, equal to its source")
    return seconds
