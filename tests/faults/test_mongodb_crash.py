"""kill -9 at random moments of a MongoDB mirror's life: while it copies, catches up and streams."""

from __future__ import annotations

import os

import pytest

from tests.command import Cdc
from tests.faults.crash_mongodb import CrashTest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("full_document", "faults"), [("updateLookup", False), ("off", False), ("updateLookup", True), ("off", True)]
)
def test_f48_f50_f62_f65_f66_f82_f83_f101_killed_at_random_moments_it_ends_equal(
    cdc: Cdc, mongodb: str, full_document: str, faults: bool
) -> None:
    database = f"crash_{os.getpid()}_{full_document}_{faults}"
    test = CrashTest(cdc, mongodb, database, kills=6, seed=1, full_document=full_document, faults=faults)
    result = test.run()
    assert result.kills == 6
    assert not result.problems, cdc.log[-3000:]
