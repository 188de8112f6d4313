"""Worlds that the tests of this folder share: starting one takes longer than most of what happens to it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import pytest

from tests.faults.world import World
from tests.faults.world_mongodb import MongodbWorld
from tests.faults.world_postgres import PostgresWorld

W = TypeVar("W", bound=World)


@pytest.fixture(scope="package")
def postgres_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresWorld]:
    """Its daemon runs when a test begins, or was killed by the one before."""
    with PostgresWorld(tmp_path_factory.mktemp("postgres"), seed=1, rate=20) as world:
        yield from _begun(world)


@pytest.fixture(scope="package")
def mongodb_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MongodbWorld]:
    """Its daemon runs when a test begins, or was killed by the one before."""
    with MongodbWorld(tmp_path_factory.mktemp("mongodb"), seed=2) as world:
        yield from _begun(world)


@pytest.fixture
def world(request: pytest.FixtureRequest) -> World:
    """Of PostgreSQL or of MongoDB, as the test says (indirectly); the daemon runs and has caught up."""
    found = request.getfixturevalue(f"{request.param}_world")
    assert isinstance(found, World)
    if not found.daemon.running:
        found.daemon.start()
    found.arrive()
    return found


def _begun(world: W) -> Iterator[W]:
    """What all tests have done to it is compared at the end."""
    world.daemon.start()
    world.arrive()
    yield world
    if not world.daemon.running:
        world.daemon.start()
    assert world.settle() == []
