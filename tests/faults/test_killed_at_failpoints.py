"""kill -9 at every boundary that a change passes, under load: nothing is lost, nothing is doubled."""

from __future__ import annotations

import signal
from typing import Final

import pytest

from cdc.failpoints import FAILPOINTS, VARIABLE
from tests.faults.faults import await_end
from tests.faults.world import World
from tests.faults.world_mongodb import MongodbWorld
from tests.faults.world_postgres import PostgresWorld

EVERY: Final = [name for name in FAILPOINTS if not name.startswith("queue.park")]
IN_DELIVERY: Final = [name for name in EVERY if name.startswith(("delivery", "target"))]
"""Where databases differ."""


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_f3_f4_f83_f94_f116_killed_at(postgres_world: PostgresWorld, name: str) -> None:
    die_at(postgres_world, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_DELIVERY)
def test_f57_f83_f94_f101_killed_at(mongodb_world: MongodbWorld, name: str) -> None:
    die_at(mongodb_world, name)


def die_at(world: World, name: str) -> None:
    start(world, f"{name}=kill@2")
    await_end(world, -signal.SIGKILL)


def start(world: World, failpoints: str = "") -> None:
    """In place of the daemon that was there, if one was left."""
    if world.daemon.running:
        world.daemon.kill()
    world.daemon.start(**{VARIABLE: failpoints})
