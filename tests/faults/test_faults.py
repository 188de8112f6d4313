"""Short runs of `scripts/faults`."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest

from tests.faults.runner import WORLDS, draw, run


@pytest.mark.slow
def test_f4_f22_f23_f25_f40_f48_f49_f50_f83_f90_f93_f94_f95_f97_f116_whatever_breaks_nothing_is_lost_or_doubled(
    tmp_path: Path,
) -> None:
    """PostgreSQL: kills, a broken network, a full disk, servers that are away, locked or read-only, all under load."""
    result = run("postgres", tmp_path, seed=5, faults=2)
    assert result.problems == []
    assert sum(tally.recovered for tally in result.faults.values()) == 2
    assert result.transactions > 100
    assert result.feed_rows > 100


@pytest.mark.slow
def test_f48_f50_f62_f65_f66_f82_f83_f94_f97_f101_whatever_breaks_it_ends_equal(tmp_path: Path) -> None:
    """MongoDB: on a single server, and with looked-up documents, since the seed says so."""
    result = run("mongodb", tmp_path, seed=5, faults=2)
    assert result.problems == []
    assert sum(tally.recovered for tally in result.faults.values()) == 2
    assert result.feed_rows > 50


@pytest.mark.parametrize("kind", WORLDS)
def test_a_seed_draws_the_same_faults_again_and_all_of_them_first(kind: str) -> None:
    faults = WORLDS[kind][1]
    count = 2 * len(faults)
    plans = [[(fault.name, rng.random()) for fault, rng in islice(draw(faults, seed), count)] for seed in (1, 1, 2)]
    assert plans[0] == plans[1] != plans[2]
    assert {name for name, _ in plans[0][: len(faults)]} == {fault.name for fault in faults if fault.needs}
