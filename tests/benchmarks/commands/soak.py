"""Whether anything grows while a daemon follows half of what it can follow, for a long time."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from statistics import median
from typing import Any, Final, NamedTuple

import httpx

from tests.benchmarks.background import beside
from tests.benchmarks.benchmark import Result
from tests.benchmarks.contenders import Cdc
from tests.benchmarks.lab import Lab, console, version_of
from tests.benchmarks.load import Load, Wrote
from tests.benchmarks.table import BenchFailed, create_source, has_row, require_equal
from tests.processes import wait_until

HELP = "whether anything grows at half the maximum rate"

LABELS: Final = {
    "memory_mb": "memory (MiB)",
    "queue_file_mb": "queue file (MB)",
    "lag_ms": "lag (ms)",
    "batch_ms": "a batch (ms)",
}

TOLERANCE: Final = {"memory_mb": 1.1, "queue_file_mb": 1.1, "lag_ms": 1.5, "batch_ms": 1.5}
"""What the last quarter's median may be, times the first's. Time scatters on any machine, sizes hardly do."""

_TIMEOUT_SECONDS: Final = 600

_SAMPLE: Final = re.compile(r"^(\w+)(?:\{sink=\"mirror\"\})? (\S+)$", re.MULTILINE)


class Sample(NamedTuple):
    """At one moment; lag and time of a batch are means since the sample before."""

    memory_mb: float
    queue_file_mb: float
    lag_ms: float
    batch_ms: float


@dataclass(frozen=True)
class Soak(Result):
    """Samples at even intervals, while so many rows a second were written; max_rate: as found before."""

    server: str
    minutes: float
    max_rate: float
    rate: float
    peak_rss_mb: float
    samples: Sequence[Sample]

    def title(self) -> str:
        rates = f"{self.rate:,.0f} rows/s, {self.rate / self.max_rate:.2f} of the most"
        return f"PostgreSQL {self.server}, {self.minutes:g} minutes of {rates}; medians of {len(self.samples)} samples"

    def heading(self) -> tuple[str, ...]:
        return ("", "first quarter", "last quarter", "ratio", "at most")

    def rows(self) -> Iterator[tuple[str, ...]]:
        for name, (first, last, ratio) in self._quarters().items():
            numbers = (f"{first:.1f}", f"{last:.1f}", f"{ratio:.2f}", f"{TOLERANCE[name]:.1f}")
            yield (LABELS[name], *numbers)
        yield ("peak memory (MiB)", "", f"{self.peak_rss_mb:.0f}", "", "")

    def as_json(self) -> dict[str, Any]:
        """By what was sampled, its medians; grew: what is past its tolerance."""
        quarters = self._quarters()
        return {
            "minutes": self.minutes,
            "max_rows_per_second": round(self.max_rate),
            "rows_per_second": round(self.rate),
            "share": round(self.rate / self.max_rate, 3),
            "samples": len(self.samples),
            "peak_rss_mb": round(self.peak_rss_mb, 1),
            **{
                name: {"first": round(first, 3), "last": round(last, 3), "ratio": round(ratio, 3)}
                for name, (first, last, ratio) in quarters.items()
            },
            "grew": [name for name, (*_, ratio) in quarters.items() if ratio > TOLERANCE[name]],
        }

    def _quarters(self) -> Mapping[str, tuple[float, float, float]]:
        """Medians of the first and of the last quarter of the time, and the second by the first."""
        quarter = max(1, len(self.samples) // 4)
        found = {}
        for name in Sample._fields:
            values = [getattr(sample, name) for sample in self.samples]
            first, last = median(values[:quarter]), median(values[-quarter:])
            found[name] = (first, last, last / first)
        return found


def add_options(parser: argparse.ArgumentParser) -> None:
    """How long."""
    parser.add_argument("--minutes", type=float, default=30, help="of the soak (%(default)s)")


def run(options: argparse.Namespace, lab: Lab) -> Soak:
    """Find how fast it drains, then write half as fast for a long time; the mirror is equal in the end."""
    minutes, keys, burst = (0.05, 1_000, 1.0) if options.small else (options.minutes, 100_000, 20.0)
    source = lab.source.create_database("bench_soak")
    create_source(source)
    load = Load(source, keys)
    with closing(Cdc("soak", source, lab.target, lab.folder)) as daemon:
        daemon.prepare()
        load.prepare()
        daemon.start()
        _wait_for(daemon, load.mark())  # or the rows that are there from the start would be drained, but not counted
        with console.status("looking for the maximum rate"):
            max_rate = _max_rate(daemon, load, burst)
        rate, seconds = max_rate / 2, minutes * 60
        with (
            console.status(f"soaking for {minutes:g} minutes at {rate:,.0f} rows/s"),
            beside(source, lambda: load.write(seconds=seconds, rate=rate)) as writing,
        ):
            samples = list(_samples(daemon, writing, interval=min(1.0, seconds / 40)))
            wrote = writing.result()
            _wait_for(daemon, load.mark())
        require_equal(source, daemon.target)
        usage = daemon.usage()
    if not samples:
        raise BenchFailed("no batch was applied while it was looked")
    server = version_of(lab.source)
    source.drop()
    return Soak(server, minutes, max_rate, wrote.rows / wrote.seconds, usage.peak_rss_mb, samples)


def _max_rate(daemon: Cdc, load: Load, seconds: float) -> float:
    """Rows a second at which it drains what was written in so many seconds while it was away; it runs then."""
    daemon.stop()
    wrote = load.write(seconds=seconds)
    mark = load.mark()
    daemon.start()
    daemon.wait_until_reading()
    started = time.monotonic()
    _wait_for(daemon, mark)
    return wrote.rows / (time.monotonic() - started)


def _wait_for(daemon: Cdc, mark: int) -> None:
    with daemon.target.connect() as connection:
        wait_until(
            lambda: has_row(connection, mark),
            timeout_seconds=_TIMEOUT_SECONDS,
            what=lambda: f"the daemon to catch up; it says:\n{daemon.log_tail()}",
        )


def _samples(daemon: Cdc, writing: Future[Wrote], *, interval: float) -> Iterator[Sample]:
    """As long as it is written. Of an interval without any batch there is none."""
    url = (daemon.data_dir / "http").read_text()
    with httpx.Client(base_url=url) as client:
        before = _metrics(client, daemon)
        while not writing.done():
            time.sleep(interval)
            now = _metrics(client, daemon)
            if now["cdc_apply_seconds_count"] > before["cdc_apply_seconds_count"]:
                yield _sample(daemon, before, now)
                before = now


def _metrics(client: httpx.Client, daemon: Cdc) -> Mapping[str, float]:
    try:
        answer = client.get("/metrics")
    except httpx.TransportError as exc:
        raise BenchFailed(f"/metrics: {exc}; the daemon says:\n{daemon.log_tail()}") from exc
    if answer.status_code != 200:
        raise BenchFailed(f"/metrics: {answer.status_code} {answer.text[:200]}")
    return {"cdc_apply_seconds_count": 0.0} | {name: float(value) for name, value in _SAMPLE.findall(answer.text)}


def _sample(daemon: Cdc, before: Mapping[str, float], now: Mapping[str, float]) -> Sample:
    def mean_ms(name: str) -> float:
        seconds, batches = (now[f"{name}_{part}"] - before.get(f"{name}_{part}", 0) for part in ("sum", "count"))
        return 1000 * seconds / max(1, batches)

    files = daemon.data_dir.glob("*.queue*")
    return Sample(
        memory_mb=now["process_resident_memory_bytes"] / 2**20,
        queue_file_mb=sum(file.stat().st_size for file in files) / 1e6,
        lag_ms=mean_ms("cdc_latency_seconds"),
        batch_ms=mean_ms("cdc_apply_seconds"),
    )
