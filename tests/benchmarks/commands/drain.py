"""This daemon and PostgreSQL's own subscription drain one backlog in turn, between the same two servers.

A bare reader takes the same backlog out of its socket, in turn with them, which is as fast as any reader can be. Then
both follow small transactions.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, Final

from tests.benchmarks.benchmark import Result, add_runs
from tests.benchmarks.contenders import Cdc, Contender, Native, drop_slot
from tests.benchmarks.drain import Drain, drain
from tests.benchmarks.lab import Lab, console, version_of
from tests.benchmarks.latency import Latency, latency
from tests.benchmarks.reader import Read, read
from tests.benchmarks.table import TRANSACTION_UPDATES, Backlog, create_source
from tests.benchmarks.workloads import WORKLOADS, workload
from tests.servers import Database

HELP = "compare with PostgreSQL's own subscription"

_RATE: Final = 500
"""Transactions a second."""

_NAMES: Final = ("native", "cdc")

Make = Callable[[str, Database], Contender]


@dataclass(frozen=True)
class Comparison(Result):
    """What was measured, by contender. latencies: of the workload `backlog` only."""

    workload: str
    backlog: Backlog
    server: str
    drains: Mapping[str, Sequence[Drain]]
    reads: Sequence[Read]
    latencies: Mapping[str, Sequence[Latency]]

    def title(self) -> str:
        runs = len(self.reads)
        return f"PostgreSQL {self.server}, {self.backlog.rows:,} changes ({self.workload}), medians of {runs} runs each"

    def heading(self) -> tuple[str, ...]:
        return ("", *_NAMES, "limit")

    def rows(self) -> Iterator[tuple[str, ...]]:
        found = self.as_json()
        seconds = {name: self._seconds(name) for name in (*_NAMES, "limit")}
        yield ("seconds (median)", *(f"{median(each):.2f}" for each in seconds.values()))
        yield ("seconds (each run)", *(" ".join(f"{one:.2f}" for one in each) for each in seconds.values()))
        yield ("rows/s", *(f"{self.backlog.rows / median(each):,.0f}" for each in seconds.values()))
        yield ("times native", "", f"{found['ratio']:.2f}", f"{found['limit_ratio']:.2f}")
        for part, ratio in found.get("ratio_by_transaction", {}).items():
            yield (f"  {part.replace('_', ' ')}", "", f"{ratio:.2f}", "")
        yield ("CPU seconds", "", f"{found['cdc_cpu_seconds']:.2f}", "")
        yield ("peak memory (MiB)", "", f"{found['cdc_peak_rss_mb']:.0f}", "")
        for point in ("p50", "p99") if self.latencies else ():
            yield (f"latency {point} (ms)", *(f"{found['latency_ms'][name][point]:.2f}" for name in _NAMES), "")
        if self.latencies:
            reached = (f"{median(each.rate for each in self.latencies[name]):.0f}" for name in _NAMES)
            yield ("  at transactions/s", *reached, "")

    def as_json(self) -> dict[str, Any]:
        """Medians over all runs, and the highest peak of memory."""
        usages = [drain.usage for drain in self.drains["cdc"] if drain.usage is not None]
        native, cdc, limit = (median(self._seconds(name)) for name in (*_NAMES, "limit"))
        found = {
            "workload": self.workload,
            "rows": self.backlog.rows,
            "native_seconds": round(native, 3),
            "cdc_seconds": round(cdc, 3),
            "ratio": round(native / cdc, 3),
            "limit_seconds": round(limit, 3),
            "limit_ratio": round(native / limit, 3),
            "cdc_cpu_seconds": round(median(usage.cpu_seconds for usage in usages), 3),
            "cdc_peak_rss_mb": round(max(usage.peak_rss_mb for usage in usages), 1),
            "each_seconds": {name: [round(one, 3) for one in self._seconds(name)] for name in (*_NAMES, "limit")},
        }
        if self.backlog.mark:
            found["ratio_by_transaction"] = self._parts()
        if self.latencies:
            found |= self._latencies()
        return found

    def _seconds(self, name: str) -> list[float]:
        return [each.seconds for each in (self.reads if name == "limit" else self.drains[name])]

    def _parts(self) -> dict[str, float]:
        """What lies before the backlog's mark, and what behind it."""
        single = {name: median(_steady(each) for each in self.drains[name]) for name in _NAMES}
        together = {name: median(each.seconds - _steady(each) for each in self.drains[name]) for name in _NAMES}
        return {
            f"{TRANSACTION_UPDATES}_rows": round(together["native"] / together["cdc"], 3),
            "single_rows": round(single["native"] / single["cdc"], 3),
        }

    def _latencies(self) -> dict[str, Any]:
        p50, p99 = (
            {name: median(getattr(each, point) for each in self.latencies[name]) for name in _NAMES}
            for point in ("p50", "p99")
        )
        return {
            "latency_ms": {name: {"p50": round(p50[name], 3), "p99": round(p99[name], 3)} for name in _NAMES},
            "latency_ratio": {
                "p50": round(p50["cdc"] / p50["native"], 2),
                "p99": round(p99["cdc"] / p99["native"], 2),
            },
        }


def _steady(drain: Drain) -> float:
    assert drain.steady is not None
    return drain.steady.seconds


def add_options(parser: argparse.ArgumentParser) -> None:
    """How often, and of what."""
    add_runs(parser)
    parser.add_argument("--workload", choices=WORKLOADS, default="backlog", help="what is drained (%(default)s)")


def run(options: argparse.Namespace, lab: Lab) -> Comparison:
    """Drain with all in turn, then measure latencies in turn."""
    backlog = workload(options.workload, small=options.small)
    kinds: dict[str, Make] = {
        "native": lambda name, source: Native(name, source, lab.target),
        "cdc": lambda name, source: Cdc(name, source, lab.target, lab.folder),
    }
    drains, reads = _drain_all(lab, backlog, kinds, options)
    latencies: dict[str, list[Latency]] = {name: [] for name in kinds} if options.workload == "backlog" else {}
    for number in range(1, options.runs + 1):
        for name, found in latencies.items():
            found.append(_latency(lab, kinds[name], f"{name}_latency_{number}", small=options.small))
    return Comparison(options.workload, backlog, version_of(lab.source), drains, reads, latencies)


def _drain_all(
    lab: Lab, backlog: Backlog, kinds: Mapping[str, Make], options: argparse.Namespace
) -> tuple[dict[str, list[Drain]], list[Read]]:
    """Every run has a slot of its own, and all slots begin before the backlog: all drain the same log."""
    source = _new_source(lab, f"bench_{options.workload}")
    numbers = range(1, options.runs + 1)
    contenders = {
        (name, number): make(f"{name}_{options.workload}_{number}", source)
        for number in numbers
        for name, make in kinds.items()
    }
    for contender in contenders.values():
        contender.prepare()
    for number in numbers:
        source.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [f"limit_{number}"])
    with console.status("writing the backlog"):
        backlog.write(source)
    drains: dict[str, list[Drain]] = {name: [] for name in kinds}
    reads = []
    for number in numbers:
        for name in kinds:
            drains[name].append(_drain(contenders[name, number], marked=backlog.mark > 0))
        reads.append(read(source, f"limit_{number}", naps=True))
        drop_slot(source, f"limit_{number}")
    source.drop()
    return drains, reads


def _drain(contender: Contender, *, marked: bool) -> Drain:
    with console.status(f"{contender.name} drains it"), closing(contender):
        found = drain(contender, marked=marked)
    console.print(f"{contender.name}: {found.seconds:.2f} s, equal to its source")
    return found


def _latency(lab: Lab, make: Make, name: str, *, small: bool) -> Latency:
    source = _new_source(lab, name)
    measure = partial(latency, rate=200, seconds=1) if small else partial(latency, rate=_RATE, seconds=10)
    with closing(make(name, source)) as contender, console.status(contender.name):
        contender.prepare()
        found = measure(contender)
    source.drop()
    return found


def _new_source(lab: Lab, name: str) -> Database:
    database = lab.source.create_database(name)
    create_source(database)
    return database
