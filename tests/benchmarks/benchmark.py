"""What a benchmark is: a module in `commands`, whose name is the command's. Adding one is adding one file."""

from __future__ import annotations

import argparse
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, Final, Protocol, cast

from rich.table import Table

from tests.benchmarks.lab import Lab, console

_COMMANDS: Final = Path(__file__).with_name("commands")


class Result(ABC):
    """What was measured, once everything that was done has been found right."""

    @abstractmethod
    def title(self) -> str:
        """What it is about, in one line."""

    @abstractmethod
    def heading(self) -> tuple[str, ...]:
        """Of the columns."""

    @abstractmethod
    def rows(self) -> Iterable[tuple[str, ...]]:
        """For people: first what it is, then a value a column."""

    @abstractmethod
    def as_json(self) -> dict[str, Any]:
        """With the keys that others look for; units are in their names."""


def show(result: Result) -> None:
    """Print it for people."""
    console.print(result.title(), markup=False, soft_wrap=True)
    table = Table(*result.heading(), box=None, pad_edge=False)
    for row in result.rows():
        table.add_row(*row)
    console.print(table)


class Benchmark(Protocol):
    """A module in `commands`."""

    HELP: str
    """One line, for `--help`."""

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Add what it knows besides `--json FILE` and `--small`."""

    def run(self, options: argparse.Namespace, lab: Lab) -> Result:
        """Measure. Raise `BenchFailed` for what did not do its work; its time means nothing."""


def benchmarks() -> Mapping[str, Benchmark]:
    """All that there are, by name."""
    return {
        module.name: cast("Benchmark", import_module(f"tests.benchmarks.commands.{module.name}"))
        for module in iter_modules([str(_COMMANDS)])
    }


def add_runs(parser: argparse.ArgumentParser) -> None:
    """Let a benchmark repeat what it measures, for medians."""
    parser.add_argument("--runs", type=int, default=5, help="of each, in turn (%(default)s)")
