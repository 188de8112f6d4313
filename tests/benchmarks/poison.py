"""What one key that the mirror refuses costs all others: drains with and without it, in turn."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

from tests.benchmarks.contenders import Cdc
from tests.benchmarks.drain import drain
from tests.benchmarks.table import Backlog, BenchFailed, create_source, require_equal
from tests.processes import wait_until
from tests.servers import Database, PostgresServer

KEY: Final = 1_000
"""Inserted with quantity 0, which every update makes larger."""

_REFUSE: Final = f"ALTER TABLE item ADD CONSTRAINT poison CHECK (id <> {KEY} OR quantity < 1)"
_HEAL_SECONDS: Final = 60


class Poisoned(Cdc):
    """A mirror that refuses every update of one key."""

    def prepare(self) -> None:
        super().prepare()
        self.target.execute(_REFUSE)


@dataclass(frozen=True)
class Poison:
    """Seconds of each drain, in turn."""

    backlog: Backlog
    without: Sequence[float]
    with_poison: Sequence[float]

    def as_json(self) -> dict[str, Any]:
        """Medians; `ratio` is the rate of all other keys with the poison, as a share of the rate without."""
        plain, poisoned = median(self.without), median(self.with_poison)
        return {
            "keys": self.backlog.inserts,
            "rows": self.backlog.rows,
            "seconds": round(plain, 3),
            "poison_seconds": round(poisoned, 3),
            "ratio": round(plain / poisoned, 3),
        }


def compare(source: PostgresServer, target: PostgresServer, folder: Path, backlog: Backlog, runs: int) -> Poison:
    """Drain the same backlog `runs` times with and without poison; every mirror is equal to its source at last."""
    database = source.create_database("poison")
    create_source(database)
    pairs = [
        (
            Cdc(f"plain_{run}", database, target, folder, on_error="park"),
            Poisoned(f"poison_{run}", database, target, folder, on_error="park"),
        )
        for run in range(1, runs + 1)
    ]
    for contender in (each for pair in pairs for each in pair):
        contender.prepare()
    backlog.write(database)
    seconds: dict[type[Cdc], list[float]] = {Cdc: [], Poisoned: []}
    for number, pair in enumerate(pairs):
        for contender in pair if number % 2 else pair[::-1]:  # nobody is always the first
            with closing(contender):
                check = require_healed if isinstance(contender, Poisoned) else require_equal
                seconds[type(contender)].append(drain(contender, check).seconds)
    return Poison(backlog, seconds[Cdc], seconds[Poisoned])


def require_healed(source: Database, target: Database) -> None:
    """Raise `BenchFailed` unless the refused key alone stood still, and the mirror heals when it is put right."""
    others = f"SELECT count(*), sum(hashtextextended(item::text, 0)) FROM item WHERE id <> {KEY}"
    if source.execute(others) != target.execute(others):
        raise BenchFailed(f"{target.name}: others than the refused key differ from the source")
    if target.value(f"SELECT quantity FROM item WHERE id = {KEY}"):
        raise BenchFailed(f"{target.name}: nothing was refused")
    target.execute("ALTER TABLE item DROP CONSTRAINT poison")
    row = f"SELECT item::text FROM item WHERE id = {KEY}"
    expected = source.execute(row)
    wait_until(lambda: target.execute(row) == expected, timeout_seconds=_HEAL_SECONDS, what="the mirror to heal")
    require_equal(source, target)
