"""What keys that the mirror refuses cost all others: drains with and without them, in turn."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

from tests.benchmarks.benchmark import Result, add_runs
from tests.benchmarks.contenders import Cdc
from tests.benchmarks.drain import Drain, Leg, drain
from tests.benchmarks.lab import Lab, console
from tests.benchmarks.table import Backlog, BenchFailed, create_source, require_equal
from tests.processes import wait_until
from tests.servers import Database, PostgresServer

HELP = "what refused keys cost all others"

_REFUSE: Final = """
ALTER TABLE item ADD CONSTRAINT poison CHECK (
    id < 1 OR id % {apart} <> 0 OR quantity <= id % 1000 + (id / {apart} - 1) * {rounds} / {refused}
)
"""
"""A row is inserted with the last three digits of its key as its quantity, which every update makes larger."""

_HEAL_SECONDS: Final = 120

_TICK: Final = 0.01
"""Seconds: how exactly CPU time is known. A small backlog may take less."""


@dataclass(frozen=True)
class Poison:
    """A backlog, and how many of its keys are refused: an only one from its first update on, others one by one."""

    backlog: Backlog
    refused: int

    @property
    def apart(self) -> int:
        """The refused keys are the multiples of this."""
        return self.backlog.inserts // self.refused

    def refuse(self, target: Database) -> None:
        """Let a mirror refuse them."""
        rounds = self.backlog.updates // self.backlog.inserts
        target.execute(_REFUSE.format(apart=self.apart, rounds=rounds, refused=self.refused))

    def require_healed(self, source: Database, target: Database) -> None:
        """Raise `BenchFailed` unless all other keys are right, and the mirror heals when it is put right."""
        others = f"SELECT count(*), sum(hashtextextended(item::text, 0)) FROM item WHERE id % {self.apart} <> 0"
        if source.execute(others) != target.execute(others):
            raise BenchFailed(f"{target.name}: others than the refused keys differ from the source")
        refused = f"SELECT id, quantity FROM item WHERE id % {self.apart} = 0 AND id > 0"
        if len(set(source.execute(refused)) - set(target.execute(refused))) != self.refused:
            raise BenchFailed(f"{target.name}: not {self.refused} keys were refused")
        target.execute("ALTER TABLE item DROP CONSTRAINT poison")
        expected = set(source.execute(refused))
        wait_until(
            lambda: set(target.execute(refused)) == expected,
            timeout_seconds=_HEAL_SECONDS,
            what="the mirror to heal",
        )
        require_equal(source, target)


class Contender(Cdc):
    """A mirror that parks. prepared: what is done to it before the backlog comes."""

    def __init__(
        self, name: str, source: Database, target: PostgresServer, folder: Path, prepared: Callable[[Database], None]
    ) -> None:
        super().__init__(name, source, target, folder, on_error="park")
        self._prepared = prepared

    def prepare(self) -> None:
        super().prepare()
        self._prepared(self.target)


@dataclass(frozen=True)
class Results(Result):
    """Drains without and with refused keys, in pairs."""

    poison: Poison
    pairs: Sequence[tuple[Drain, Drain]]

    def as_json(self) -> dict[str, Any]:
        """Medians; what each pair had without refused keys, as a share of what it had with them.

        `ratio` is about time, so about the rate of all other keys; the others are about the CPU that the daemon and the
        target's server took, which other work on the machine does not change so much. `steady` is the same from the
        backlog's mark on: an only refused key is parked by then, and looking for it is over.
        """
        backlog = self.poison.backlog
        steady = [(_steady(plain), _steady(poisoned)) for plain, poisoned in self.pairs]
        return {
            "keys": backlog.inserts,
            "refused": self.poison.refused,
            "rows": backlog.rows,
            **_compared(self.pairs, backlog.rows),
            "steady": _compared(steady, backlog.updates - backlog.mark),
        }

    def title(self) -> str:
        backlog, count = self.poison.backlog, self.poison.refused
        return (
            f"{backlog.rows:,} changes of {backlog.inserts:,} keys, {count} refused; medians of {len(self.pairs)} pairs"
        )

    def heading(self) -> tuple[str, ...]:
        return ("", "without", "with", "ratio", "of the target's CPU")

    def rows(self) -> Iterator[tuple[str, ...]]:
        found = self.as_json()
        for part, of in (("", found), ("steady: ", found["steady"])):
            target = f"{of['target_cpu_ratio']:.2f}"
            yield (f"{part}seconds", f"{of['seconds']:.2f}", f"{of['poison_seconds']:.2f}", f"{of['ratio']:.2f}", "")
            cpu = (f"{of['cpu_us_per_change']:.1f}", f"{of['poison_cpu_us_per_change']:.1f}", f"{of['cpu_ratio']:.2f}")
            yield (f"{part}us of the daemon's CPU a change", *cpu, target)


def _compared(pairs: Sequence[tuple[Leg, Leg]], rows: int) -> dict[str, float]:
    def share(of: Callable[[Leg], float]) -> float:
        return round(median(max(of(plain), _TICK) / max(of(poisoned), _TICK) for plain, poisoned in pairs), 3)

    plain, poisoned = zip(*pairs, strict=True)
    return {
        "seconds": round(median(leg.seconds for leg in plain), 3),
        "poison_seconds": round(median(leg.seconds for leg in poisoned), 3),
        "cpu_us_per_change": round(median(map(_daemon_cpu_seconds, plain)) / rows * 1e6, 2),
        "poison_cpu_us_per_change": round(median(map(_daemon_cpu_seconds, poisoned)) / rows * 1e6, 2),
        "ratio": share(lambda leg: leg.seconds),
        "cpu_ratio": share(_daemon_cpu_seconds),
        "target_cpu_ratio": share(lambda leg: leg.target_cpu_seconds),
    }


def _steady(drain: Drain) -> Leg:
    assert drain.steady is not None
    return drain.steady


def _daemon_cpu_seconds(leg: Leg) -> float:
    assert leg.usage is not None
    return leg.usage.cpu_seconds


def add_options(parser: argparse.ArgumentParser) -> None:
    """How often, and with how many refused keys."""
    add_runs(parser)
    parser.add_argument("--refused", type=int, default=1, help="keys that the mirror refuses (%(default)s)")


def run(options: argparse.Namespace, lab: Lab) -> Results:
    """Measure pairs."""
    full = Backlog(inserts=10_000, updates=400_000, mark=100_000)
    backlog = Backlog(inserts=2_000, updates=4_000, mark=2_000) if options.small else full
    return compare(lab.source, lab.target, lab.folder, Poison(backlog, options.refused), options.runs)


def compare(source: PostgresServer, target: PostgresServer, folder: Path, poison: Poison, runs: int) -> Results:
    """Drain the same backlog `runs` times with and without refused keys; each mirror ends equal to its source."""
    database = source.create_database("poison")
    create_source(database)
    pairs = [
        (
            Contender(f"plain_{run}", database, target, folder, lambda _target: None),
            Contender(f"poison_{run}", database, target, folder, poison.refuse),
        )
        for run in range(1, runs + 1)
    ]
    for contender in (each for pair in pairs for each in pair):
        contender.prepare()
    poison.backlog.write(database)
    drains: list[tuple[Drain, Drain]] = []
    for number, (plain, poisoned) in enumerate(pairs):
        found = {}
        for contender in (plain, poisoned) if number % 2 else (poisoned, plain):  # nobody is always the first
            with closing(contender):
                check = poison.require_healed if contender is poisoned else require_equal
                found[contender] = drain(contender, check, marked=True)
            console.print(f"{contender.name}: {found[contender].seconds:.2f} s, equal in the end")
        drains.append((found[plain], found[poisoned]))
    return Results(poison, drains)
