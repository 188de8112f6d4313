"""A short run of `scripts/soak`, and the rule by which it finds a leak."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.soak import phases
from tests.soak.counts import FEWEST_SIZES, growth, leaks
from tests.soak.runner import Soak
from tests.soak.setting import Setting

BRIEF = phases.Pace(transactions=20, idle_seconds=0, away_seconds=0.5, clients=2, silent=0)
LONG = (phases.idle, phases.resync, phases.verify)


@pytest.mark.slow
def test_f109_f110_days_of_work_leak_nothing(tmp_path: Path) -> None:
    """Two lives; one round more in the first than a leak takes to be seen."""
    brief = [phase for phase in phases.PHASES if phase not in LONG]
    with Setting(tmp_path, seed=1) as setting:
        soak = Soak(setting, seed=1, pace=BRIEF, phases=brief, patience_seconds=1)
        assert soak.run(lives=1, rounds=4).problems == []
        result = soak.run(lives=2, rounds=1)
    assert result.problems == []
    assert [len(life.counts) for life in result.lives] == [4, 1]
    assert set(result.phases.values()) == {5}
    assert all(life.counts[-1]["descriptors of sockets"] > 5 for life in result.lives)


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ([5, 6, 7, 8], ["it grows: 5, 6, 7, 8"]),
        ([5, 6, 5, 7, 6, 8, 7], ["it grows: 5, 6, 5, 7, 6, 8, 7"]),
        ([5, 6, 7, 8, 8, 8, 8, 8], []),
        ([5, 5, 5, 5, 5], []),
        ([5, 8, 4, 9, 9, 7, 9], []),
        ([5, 6, 7, 8, 5], []),
    ],
    ids=[
        "each round",
        "some rounds",
        "a small pool that is filled",
        "level",
        "a pool that shrinks",
        "what comes down again",
    ],
)
def test_a_count_that_grows_for_ever_is_a_leak(values: list[int], found: list[str]) -> None:
    assert leaks([{"it": value} for value in values]) == found


def test_memory_may_grow_at_first() -> None:
    third = FEWEST_SIZES // 3
    assert growth([{"it": size} for size in [10] * third + [100] * third + [110] * third]) == []
    assert growth([{"it": size} for size in [10] * third + [100] * third + [120] * third]) != []
    assert growth([{"it": size} for size in range(1, FEWEST_SIZES)]) == []
