"""Break things at random under load, for as long as it is told, and look whether anything is lost, doubled or torn.

Everything is real but MongoDB's servers, which are stand-ins: the `cdc` command, PostgreSQL servers, sockets, files.
The seed decides what is broken, in which order, where and for how long, and what the load writes. After each fault all
must arrive; now and then the load rests, and mirror, feed and `cdc verify` are compared with the source. Exit code 1
after anything that must not be; then logs and data stay where it says.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec

from tests.faults.faults import EVERYWHERE, Fault
from tests.faults.faults_mongodb import MONGODB
from tests.faults.faults_postgres import POSTGRES
from tests.faults.world import Violation, World
from tests.faults.world_mongodb import MongodbWorld
from tests.faults.world_postgres import PostgresWorld

WORLDS: Final[dict[str, tuple[type[World], Sequence[Fault]]]] = {
    "postgres": (PostgresWorld, (*EVERYWHERE, *POSTGRES)),
    "mongodb": (MongodbWorld, (*EVERYWHERE, *MONGODB)),
}

SETTLE_SECONDS: Final = 60.0
"""How often the load rests and all is compared."""

COPY_KILLS: Final = 3

RATE: Final = 60.0


class Tally(msgspec.Struct):
    """Of one kind of fault. recovered: how often all arrived afterwards; seconds that took, in all and at worst."""

    count: int = 0
    recovered: int = 0
    seconds: float = 0.0
    worst_seconds: float = 0.0


class Result(msgspec.Struct):
    """What happened. problems: what must not be; empty where all is well."""

    kind: str
    seed: int
    seconds: float = 0.0
    faults: dict[str, Tally] = {}
    checks: int = 0
    transactions: int = 0
    feed_rows: int = 0
    peak_memory_mb: float = 0.0
    problems: list[str] = []


def draw(faults: Sequence[Fault], seed: int) -> Iterator[tuple[Fault, random.Random]]:
    """Faults for ever, each with what decides its details: all kinds first, in some order, then any."""
    rng = random.Random(seed)
    usable = [fault for fault in faults if fault.needs]
    number = 0
    for fault in rng.sample(usable, len(usable)):
        yield fault, random.Random(f"{seed}:{number}")
        number += 1
    while True:
        yield rng.choice(usable), random.Random(f"{seed}:{number}")
        number += 1


class Run:
    """One run. progress: is told what happens, a line at a time."""

    def __init__(
        self, world: World, plan: Iterator[tuple[Fault, random.Random]], progress: Callable[[str], None]
    ) -> None:
        self.result = Result(world.kind, world.seed)
        self._world = world
        self._plan = plan
        self._progress = progress
        self._rng = random.Random(world.seed)
        self._begin = self._settled_at = time.monotonic()

    def run(self, *, seconds: float = 0.0, faults: int = 0) -> Result:
        """So long, and at least so many faults. Problems are in the result."""
        world = self._world
        try:
            self._copy_and_kill()
            while self._elapsed() < seconds or sum(tally.count for tally in self.result.faults.values()) < faults:
                world.rest(self._rng.uniform(0.2, 2.0))
                self._strike(*next(self._plan))
                if time.monotonic() - self._settled_at > SETTLE_SECONDS:
                    self._settle()
            self._settle()
            world.load.stop()
            world.daemon.stop()
        except (Violation, TimeoutError) as exc:
            self.result.problems.append(str(exc))
        self.result.seconds = round(self._elapsed(), 1)
        self.result.transactions = world.load.transactions
        self.result.feed_rows = world.feed.rows
        self.result.peak_memory_mb = round(world.memory.peak_bytes / 1024**2, 1)
        return self.result

    def _copy_and_kill(self) -> None:
        """The initial copy, which is killed a few times."""
        daemon = self._world.daemon
        for _ in range(COPY_KILLS):
            daemon.start()
            self._world.rest(self._rng.uniform(0.8, 2.5))
            self._world.check()
            daemon.kill()
        daemon.start()
        self._say(f"copied after {COPY_KILLS} kills, in {self._world.arrive():.1f} s")

    def _strike(self, fault: Fault, rng: random.Random) -> None:
        tally = self.result.faults.setdefault(fault.name, Tally())
        tally.count += 1
        begin = time.monotonic()
        try:
            fault.strike(self._world, rng)
            lasted = time.monotonic() - begin
            seconds = self._world.arrive()
        except (Violation, TimeoutError) as exc:
            raise Violation(f"{fault.name}: {exc}") from None
        tally.recovered += 1
        tally.seconds = round(tally.seconds + seconds, 2)
        tally.worst_seconds = round(max(tally.worst_seconds, seconds), 2)
        self._say(f"{fault.name}: for {lasted:.1f} s, all there {seconds:.1f} s later")

    def _settle(self) -> None:
        problems = self._world.settle()
        self.result.checks += 1
        self._settled_at = time.monotonic()
        if problems:
            raise Violation("; ".join(problems))
        memory = self._world.memory.peak_bytes / 1024**2
        self._say(f"equal; {self._world.load.transactions:,} transactions, {self._world.feed.rows:,} rows in the feed, "
                  f"{memory:.0f} MB")  # fmt: skip

    def _elapsed(self) -> float:
        return time.monotonic() - self._begin

    def _say(self, line: str) -> None:
        self._progress(f"{self._elapsed():6.1f} s  {self.result.kind}: {line}")


def run(
    kind: str,
    folder: Path,
    *,
    seed: int,
    seconds: float = 0.0,
    faults: int = 0,
    only: str = "",
    rate: float = RATE,
    progress: Callable[[str], None] = print,
) -> Result:
    """Run with servers of its own. only: faults whose names contain this. rate: transactions a second, at most."""
    world_type, all_faults = WORLDS[kind]
    chosen = [fault for fault in all_faults if only in fault.name]
    with world_type(folder, seed=seed, rate=rate) as world:
        return Run(world, draw(chosen, seed), progress).run(seconds=seconds, faults=faults)


def away(kind: str, folder: Path, *, seed: int, seconds: float, progress: Callable[[str], None] = print) -> Result:
    """The target is away so long under load; then everything must arrive by itself, in bounded memory."""
    world_type, _ = WORLDS[kind]

    def target_away(world: World, rng: random.Random) -> None:
        line = world.lines["target"]
        line.close()
        world.rest(seconds)
        line.open()

    with world_type(folder, seed=seed) as world:
        world.patience_seconds = max(world.patience_seconds, 3 * seconds)
        return Run(world, draw([Fault("target away", target_away)], seed), progress).run(faults=1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, say what happened, return the exit code."""
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything is ended
    kinds = list(WORLDS) if options.kind == "both" else [options.kind]
    results = [_run(kind, options, options.minutes * 60 / len(kinds)) for kind in kinds]
    if options.json is not None:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(results)) + b"\n")
    return 1 if any(result.problems for result in results) else 0


def _run(kind: str, options: argparse.Namespace, seconds: float) -> Result:
    folder = Path(tempfile.mkdtemp(prefix=f"cdc-faults-{kind}-"))
    if options.scenario == "target-away":
        result = away(kind, folder, seed=options.seed, seconds=seconds, progress=_say)
    else:
        result = run(
            kind, folder, seed=options.seed, seconds=seconds, only=options.only, rate=options.rate, progress=_say
        )
    _print(result)
    if result.problems:
        _say(f"Its logs and data are in {folder}")
    else:
        shutil.rmtree(folder)
    return result


def _print(result: Result) -> None:
    _say(
        f"{result.kind}, seed {result.seed}: {result.seconds:.0f} s, {result.transactions:,} transactions, "
        f"{result.feed_rows:,} rows in the feed, {result.checks} times compared, {result.peak_memory_mb} MB at most"
    )
    for name, tally in sorted(result.faults.items()):
        mean = tally.seconds / max(tally.recovered, 1)
        times = f"after {mean:5.1f} s, {tally.worst_seconds:.1f} s at worst"
        _say(f"  {name:26}{tally.count:5}  recovered {tally.recovered:5}  {times}")
    for problem in result.problems:
        _say(f"PROBLEM: {problem}")
    if not result.problems:
        _say("Nothing lost, nothing doubled, nothing torn.")


def _say(line: str) -> None:
    print(line, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/faults", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5, help="how long, of all kinds together (5)")
    parser.add_argument("--seed", type=int, default=1, help="decides what is broken, and the load (1)")
    parser.add_argument("--kind", choices=(*WORLDS, "both"), default="both", help="of databases (both)")
    parser.add_argument(
        "--rate",
        type=float,
        default=RATE,
        metavar="N",
        help=f"of PostgreSQL: transactions a second, at most ({RATE:g})",
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="only faults whose names contain this")
    parser.add_argument(
        "--scenario", choices=("random", "target-away"), default="random", help="target-away: for all of the time, once"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
