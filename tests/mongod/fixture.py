"""Fixtures that give tests a MongoDB server: a real one where there is one, else the stand-in."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pymongo
import pytest
from pymongo.database import Database

from tests.mongod.process import StandIn, start_server

MongoDatabase = Database[dict[str, Any]]
NewStandIn = Callable[..., StandIn]

_names = itertools.count(1)


@pytest.fixture(scope="session")
def mongodb() -> Iterator[str]:
    """URL of a replica set: `CDC_TEST_MONGODB_URL`, or a `mongod` from PATH, or the stand-in."""
    given = os.environ.get("CDC_TEST_MONGODB_URL")
    if given:
        yield given
        return
    with start_server() as server:
        yield server.url


@pytest.fixture(scope="session")
def mongodb_client(mongodb: str) -> Iterator[pymongo.MongoClient[dict[str, Any]]]:
    """A client of `mongodb`."""
    with pymongo.MongoClient[dict[str, Any]](mongodb) as client:
        yield client


@pytest.fixture
def mongo_database(mongodb_client: pymongo.MongoClient[dict[str, Any]]) -> Iterator[MongoDatabase]:
    """A database of the test's own on `mongodb`, dropped afterwards."""
    database = mongodb_client[f"test_{os.getpid()}_{next(_names)}"]
    yield database
    mongodb_client.drop_database(database)


@pytest.fixture(scope="session")
def stand_in() -> Iterator[StandIn]:
    """The stand-in, whatever else there is: for tests of its own commands. Shared: leave it as it was."""
    with StandIn() as server:
        yield server


@pytest.fixture
def new_stand_in() -> Iterator[NewStandIn]:
    """Starts stand-ins with options of the test's own (`new_stand_in("--version", "5.0")`); they end with the test."""
    with ExitStack() as stack:
        yield lambda *arguments: stack.enter_context(StandIn(*arguments))


@pytest.fixture
def stand_in_client(stand_in: StandIn) -> Iterator[pymongo.MongoClient[dict[str, Any]]]:
    """A client of `stand_in`; a server that it takes for unavailable is looked at again soon."""
    with pymongo.MongoClient[dict[str, Any]](stand_in.url, heartbeatFrequencyMS=500) as client:
        yield client
