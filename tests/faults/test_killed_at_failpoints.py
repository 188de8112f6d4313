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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["queue.park.before", "queue.park.after"])
def test_f83_f89_killed_while_a_change_is_parked(mongodb_world: MongodbWorld, name: str) -> None:
    world = mongodb_world
    if not world.daemon.running:
        start(world)
    with world.load.resting():  # other changes that are refused beside it would be dead before the index is gone
        world.arrive()
        copied = "the copy, which cannot park, to be complete"
        world.wait(lambda: world.daemon.status()["sinks"]["mirror"]["state"] == "running", copied)
        world.target.poisoned.create_index("p", unique=True, sparse=True, name="of the mirror alone")
        start(world, f"{name}=kill")
        world.source.poisoned.insert_many([{"_id": f"{name} {number}", "p": name} for number in range(2)])
        await_end(world, -signal.SIGKILL)
        start(world)
        world.arrive()
        world.wait(lambda: world.parked == 1, "the change to be parked once")
        world.target.poisoned.drop_index("of the mirror alone")
        start(world)  # it is tried again at once
        world.wait(lambda: not world.parked, "the parked change to be applied")
        world.source.poisoned.delete_many({"p": name})
    world.arrive()
