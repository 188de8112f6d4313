"""Where the daemon's time goes: a flame graph of one drain of a backlog, thread by thread, as py-spy samples it."""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.benchmarks.benchmark import Result
from tests.benchmarks.contenders import Cdc
from tests.benchmarks.drain import Drain, drain
from tests.benchmarks.lab import Lab
from tests.benchmarks.table import BenchFailed, create_source
from tests.benchmarks.workloads import WORKLOADS, workload

HELP = "draw where the daemon's time goes"

_SAMPLES: Final = 100
"""A second. More of them slow it down."""


class Sampled(Cdc):
    """A daemon that is sampled from the moment on in which it takes its slot until it ends."""

    file: Path

    def wait_until_reading(self) -> None:
        super().wait_until_reading()
        assert self._process is not None
        what = ("--pid", str(self._process.pid), "--rate", str(_SAMPLES), "--threads", "--function")
        self._sampler = subprocess.Popen(
            ["py-spy", "record", *what, "--output", self.file], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def stop(self) -> None:
        if self._process is not None:
            self._sampler.send_signal(signal.SIGINT)  # it writes the file then
            self._sampler.wait(timeout=60)
        super().stop()


@dataclass(frozen=True)
class Flame(Result):
    """A drain that was sampled."""

    workload: str
    file: Path
    drain: Drain

    def title(self) -> str:
        return f"{self.workload}: {self.file} shows where the time went"

    def heading(self) -> tuple[str, ...]:
        return ("", "seconds")

    def rows(self) -> Iterator[tuple[str, ...]]:
        yield ("drained in, sampled", f"{self.drain.seconds:.2f}")

    def as_json(self) -> dict[str, Any]:
        return {"workload": self.workload, "file": str(self.file), "seconds": round(self.drain.seconds, 3)}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Of what, and where to."""
    parser.add_argument(
        "--workload", choices=sorted(WORKLOADS), default="backlog", help="what is drained (%(default)s)"
    )
    parser.add_argument("--output", type=Path, default=Path("flame.svg"), metavar="FILE", help="default: %(default)s")


def run(options: argparse.Namespace, lab: Lab) -> Flame:
    """Drain one backlog."""
    if shutil.which("py-spy") is None:
        raise BenchFailed("there is no py-spy: `pip install py-spy`, and let it look into other processes (as root)")
    source = lab.source.create_database("flame")
    create_source(source)
    contender = Sampled("flame", source, lab.target, lab.folder)
    contender.file = options.output
    contender.prepare()
    backlog = workload(options.workload, small=options.small)
    backlog.write(source)
    with closing(contender):
        drained = drain(contender)
    return Flame(options.workload, options.output, drained)
