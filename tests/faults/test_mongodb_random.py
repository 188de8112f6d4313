"""A short run of `scripts/crash --random`."""

from __future__ import annotations

import pytest

from tests.command import Cdc
from tests.faults.random_mongodb import run
from tests.mongod.fixture import NewStandIn


@pytest.mark.parametrize("looked_up", [True, False])
def test_f62_f82_f94_f97_f101_what_happens_at_random_arrives(
    cdc: Cdc, new_stand_in: NewStandIn, looked_up: bool
) -> None:
    server = new_stand_in()
    run(cdc, server, server if looked_up else new_stand_in(), seed=1, looked_up=looked_up, kills=2)
