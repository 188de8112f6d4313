"""A daemon's days in short: idle and bursty work, reloads, log rotation, servers away, clients that vanish, restarts.

One real daemon mirrors PostgreSQL and MongoDB (a stand-in), with a feed that clients listen to. Each round does all of
this once, in an order that the seed decides, and then waits until nothing is at work. There all that could leak is
counted: descriptors, threads, children, connections, replication slots, cursors, files. What is beyond all before it in
half of the rounds of one life is a leak; so are memory and queues that go on growing. Exit code 1 after either, or
after anything that must not be; then logs and data stay where it says.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Final

import msgspec

from tests.soak.counts import Counts, growth, leaks, series
from tests.soak.phases import PHASES, Pace, Phase
from tests.soak.setting import Setting

PACE: Final = Pace(transactions=400, idle_seconds=5, away_seconds=3, clients=5, silent=2)

ROUNDS: Final = 12
"""Of a life, until the daemon is restarted."""

PATIENCE_SECONDS: Final = 10.0
"""How long a count may take to come down at a quiet point."""


class Life(msgspec.Struct):
    """Of one process: what was counted, round after round, and how large it was in bytes."""

    counts: list[Counts] = []
    sizes: list[Counts] = []

    def problems(self) -> list[str]:
        return [*leaks(self.counts), *growth(self.sizes)]


class Result(msgspec.Struct):
    """What happened. problems: what must not be; empty where all is well."""

    seed: int
    seconds: float = 0.0
    phases: dict[str, int] = {}
    lives: list[Life] = []
    problems: list[str] = []


class Soak:
    """One run. progress: is told what happens, a line at a time."""

    def __init__(
        self,
        setting: Setting,
        *,
        seed: int,
        pace: Pace = PACE,
        phases: Sequence[Phase] = PHASES,
        patience_seconds: float = PATIENCE_SECONDS,
        progress: Callable[[str], None] = print,
    ) -> None:
        self.result = Result(seed)
        self._setting = setting
        self._pace = pace
        self._phases = phases
        self._patience_seconds = patience_seconds
        self._progress = progress
        self._begin = time.monotonic()

    def run(self, *, seconds: float = 0.0, lives: int = 0, rounds: int = ROUNDS) -> Result:
        """So long, and at least so many lives of so many rounds. Problems are in the result."""
        try:
            while len(self.result.lives) < lives or self._elapsed() < seconds:
                self._live(rounds, at_least=rounds if len(self.result.lives) < lives else 1, seconds=seconds)
        except (AssertionError, OSError) as exc:
            self.result.problems.append(f"{type(exc).__name__}: {exc}")
        self.result.seconds = round(self._elapsed(), 1)
        return self.result

    def _live(self, rounds: int, *, at_least: int, seconds: float) -> None:
        """So many rounds, or fewer where the time is over before."""
        life = Life()
        self.result.lives.append(life)
        self._setting.start()
        while len(life.counts) < rounds and (len(life.counts) < at_least or self._elapsed() < seconds):
            self._round(life)
        if code := self._setting.daemon.stop():
            self.result.problems.append(f"SIGTERM ended in exit code {code}")
        self.result.problems += [*life.problems(), *self._setting.left_behind()]
        self._say(f"life {len(self.result.lives)} ends; {len(self.result.problems)} problems")

    def _round(self, life: Life) -> None:
        for phase in self._setting.rng.sample(self._phases, len(self._phases)):
            begin = time.monotonic()
            phase(self._setting, self._pace)
            self._setting.arrive()
            name = phase.__name__
            self.result.phases[name] = self.result.phases.get(name, 0) + 1
            self._say(f"{name}: {time.monotonic() - begin:.1f} s")
        self._setting.await_quiet()
        highest = {name: max(values) for name, values in series(life.counts).items()}
        life.counts.append(self._setting.count(highest, patience_seconds=self._patience_seconds))
        life.sizes.append(self._setting.sizes())
        above = [f"{name} {number}" for name, number in life.counts[-1].items() if number > highest.get(name, 0)]
        memory = life.sizes[-1]["memory"] / 2**20
        self._say(f"round {len(life.counts)}, {memory:.0f} MB; new highs: {', '.join(above) or 'none'}")

    def _elapsed(self) -> float:
        return time.monotonic() - self._begin

    def _say(self, line: str) -> None:
        self._progress(f"{self._elapsed():6.1f} s  {line}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, say what happened, return the exit code."""
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything is ended
    folder = Path(tempfile.mkdtemp(prefix="cdc-soak-"))
    with Setting(folder, seed=options.seed) as setting:
        soak = Soak(setting, seed=options.seed, progress=_say)
        result = soak.run(seconds=options.minutes * 60, rounds=options.rounds)
    if options.json is not None:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(result)) + b"\n")
    _print(result)
    if result.problems:
        _say(f"Its logs and data are in {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


def _print(result: Result) -> None:
    """A table of what was counted, a life after the other."""
    rounds = sum(len(life.counts) for life in result.lives)
    _say(f"seed {result.seed}: {result.seconds:.0f} s, {len(result.lives)} lives, {rounds} rounds")
    _say(f"  {'':44}{'life':>5}{'first':>7}{'least':>7}{'most':>7}{'last':>7}")
    for number, life in enumerate(result.lives, 1):
        for name, values in series(life.counts).items():
            columns = (values[0], min(values), max(values), values[-1])
            _say(f"  {name:44}{number:5}" + "".join(f"{value:7}" for value in columns))
        for name, values in series(life.sizes).items():
            megabytes = [value / 1e6 for value in (values[0], median(values), max(values), values[-1])]
            _say(
                f"  {name + ' (MB; first, median, most, last)':44}{number:5}"
                + "".join(f"{value:7.1f}" for value in megabytes)
            )
    for problem in result.problems:
        _say(f"PROBLEM: {problem}")
    if not result.problems:
        _say("Nothing leaked, nothing was left behind.")


def _say(line: str) -> None:
    print(line, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30, help="how long (30)")
    parser.add_argument(
        "--rounds", type=int, default=ROUNDS, help=f"of a life, until the daemon is restarted ({ROUNDS})"
    )
    parser.add_argument(
        "--seed", type=int, default=1, help="decides orders, what is written, and where the feed is (1)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
