"""Every number that is wanted of this daemon, in one run: what it is, what it should be, and whether it holds."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tests.benchmarks.benchmark import Result, add_runs, show
from tests.benchmarks.commands import copy, drain, feed, mongodb, soak
from tests.benchmarks.lab import Lab, console
from tests.benchmarks.table import BenchFailed

HELP = "every number that is wanted, in one run"

Found = Mapping[str, Mapping[str, Any]]
"""What was measured, by part, each as its own benchmark writes it."""

_MB_PER_MIB: Final = 2**20 / 10**6


@dataclass(frozen=True)
class Judged:
    """A number as it was found."""

    found: str
    holds: bool


@dataclass(frozen=True)
class Number:
    """A number that is wanted, and the parts that tell of it."""

    what: str
    wanted: str
    parts: Sequence[str]
    judge: Callable[[Found], Judged]


def _drain(found: Found) -> Judged:
    ratio = found["drain"]["ratio"]
    return Judged(f"{ratio:.2f} (limit {found['drain']['limit_ratio']:.2f})", ratio >= 1.2)


def _hot(found: Found) -> Judged:
    ratio = found["hot"]["ratio"]
    return Judged(f"{ratio:.2f}", ratio >= 2)


def _latency(found: Found) -> Judged:
    ratio, cdc = found["drain"]["latency_ratio"], found["drain"]["latency_ms"]["cdc"]
    shown = ", ".join(f"{point} {ratio[point]:.1f} ({cdc[point]:.2f} ms)" for point in ("p50", "p99"))
    return Judged(shown, ratio["p50"] <= 5 and ratio["p99"] <= 10)


def _copy(found: Found) -> Judged:
    ratios = found["copy"]["ratio"]
    shown = ", ".join(f"{ratio:.2f} ({name})" for name, ratio in ratios.items())
    return Judged(shown, min(ratios.values()) >= 1)


def _memory(found: Found) -> Judged:
    peaks = {part: found[part].get("peak_rss_mb", found[part].get("cdc_peak_rss_mb")) for part in found}
    part, peak = max(peaks.items(), key=lambda each: each[1])
    return Judged(f"{peak * _MB_PER_MIB:.0f} ({part})", peak * _MB_PER_MIB < 150)


def _mongodb(found: Found) -> Judged:
    cpu = found["mongodb"]["cpu_us_per_change"]
    return Judged(f"{cpu:.1f}", cpu < 8)


def _feed(found: Found) -> Judged:
    rates = {store: found["feed"][store]["write"]["rows_per_second"] for store in ("sqlite", "postgres")}
    return Judged(", ".join(f"{rate:,} ({store})" for store, rate in rates.items()), min(rates.values()) >= 20_000)


def _soak(found: Found) -> Judged:
    soaked = found["soak"]
    grew = ", ".join(soaked["grew"]) or "nothing"
    return Judged(f"{grew} grew in {soaked['minutes']:g} minutes at {soaked['share']:.2f}", not soaked["grew"])


NUMBERS: Final = {
    "1": Number("drain, times native", ">= 1.2", ["drain"], _drain),
    "2": Number("hot rows, times native", ">= 2", ["hot"], _hot),
    "3": Number("latency, times native", "p50 <= 5, p99 <= 10", ["drain"], _latency),
    "4": Number("initial copy, times others", ">= 1.0", ["copy"], _copy),
    "5": Number("peak memory (MB)", "< 150", ["drain", "hot", "large", "mongodb", "soak"], _memory),
    "6": Number("MongoDB, us of CPU a change", "< 8", ["mongodb"], _mongodb),
    "7": Number("feed, rows/s", ">= 20,000", ["feed"], _feed),
    "8": Number("soak at half the maximum rate", "nothing grows", ["soak"], _soak),
}


@dataclass(frozen=True)
class Everything(Result):
    """Results by part, and what went wrong in those that have none."""

    results: Mapping[str, Result]
    failures: Mapping[str, str]

    def title(self) -> str:
        return (
            "\n".join(f"{part} failed: {failure}" for part, failure in self.failures.items()) or "All parts ended well"
        )

    def heading(self) -> tuple[str, ...]:
        return ("", "what", "wanted", "found", "holds")

    def rows(self) -> Iterator[tuple[str, ...]]:
        for key, (number, judged, _) in self._judged().items():
            yield (key, number.what, number.wanted, judged.found, "yes" if judged.holds else "no")

    def as_json(self) -> dict[str, Any]:
        """By number; details: all of the benchmarks that tell of it, by part."""
        return {
            key: {
                "what": number.what,
                "wanted": number.wanted,
                "found": judged.found,
                "holds": judged.holds,
                "details": details,
            }
            for key, (number, judged, details) in self._judged().items()
        }

    def _judged(self) -> Mapping[str, tuple[Number, Judged, Found]]:
        """A number of which a part failed does not hold."""
        measured = {part: result.as_json() for part, result in self.results.items()}
        judged = {}
        for key, number in NUMBERS.items():
            found = {part: measured[part] for part in number.parts if part in measured}
            whole = len(found) == len(number.parts)
            judged[key] = (number, number.judge(found) if whole else Judged("failed", holds=False), found)
        return judged


def add_options(parser: argparse.ArgumentParser) -> None:
    """What makes it long."""
    add_runs(parser)
    copy.add_size(parser)
    soak.add_options(parser)


def run(options: argparse.Namespace, lab: Lab) -> Everything:
    """Part after part, on the same servers. One that fails does not take the others with it."""
    if options.small:
        options.runs = 1
    parts: dict[str, Callable[[], Result]] = {
        "drain": lambda: drain.run(_with(options, workload="backlog"), lab),
        "hot": lambda: drain.run(_with(options, workload="hot"), lab),
        "large": lambda: drain.run(_with(options, workload="large", runs=1), lab),
        "copy": lambda: copy.run(_with(options, jobs=2), lab),
        "mongodb": lambda: mongodb.run(options, lab),
        "feed": lambda: feed.run(_with(options, only="writes"), lab),
        "soak": lambda: soak.run(options, lab),
    }
    results, failures = {}, {}
    for part, measure in parts.items():
        try:
            results[part] = measure()
        except (BenchFailed, TimeoutError) as exc:
            failures[part] = str(exc)
            console.print(f"{part} failed: {exc}", style="bold red", markup=False)
        else:
            show(results[part])
    return Everything(results, failures)


def _with(options: argparse.Namespace, **others: object) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(options), **others})
