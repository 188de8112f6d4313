"""This daemon beside what else does its work: every benchmark is a file in tests/benchmarks/commands.

docs/performance.md tells how each of them measures. All run on servers of their own, in the temporary folder
(`TMPDIR`), and prove that what was measured is right.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from tests.benchmarks.benchmark import Result, benchmarks, show
from tests.benchmarks.lab import Lab, console, surroundings
from tests.benchmarks.table import BenchFailed
from tests.servers import ServerUnavailable


def main() -> int:
    """Run what was asked for and return the exit code."""
    options = _parser().parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything below is ended
    where = surroundings()
    console.print(", ".join(f"{name} {value}" for name, value in where.items()), soft_wrap=True)
    folder = Path(tempfile.mkdtemp(prefix="cdc-bench-"))
    try:
        with Lab(folder) as lab:
            result: Result = options.run(options, lab)
    except (BenchFailed, TimeoutError, ServerUnavailable) as exc:
        console.print(f"The benchmark failed: {exc}", style="bold red", markup=False)
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    show(result)
    if options.json is not None:
        options.json.write_text(json.dumps({**result.as_json(), "surroundings": where}, indent=2) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    commands = parser.add_subparsers(metavar="BENCHMARK", required=True)
    for name, benchmark in benchmarks().items():
        command = commands.add_parser(name, help=benchmark.HELP)
        command.add_argument("--small", action="store_true", help="shows only that it works")
        command.add_argument("--json", type=Path, metavar="FILE", help="write what was measured there")
        benchmark.add_options(command)
        command.set_defaults(run=benchmark.run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
