"""Servers and databases that all tests share."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

import hypothesis
import pytest

from tests.command import Cdc
from tests.mongod.fixture import (
    mongo_database,
    mongodb,
    mongodb_client,
    new_stand_in,
    stand_in,
    stand_in_client,
)
from tests.servers import Database, PostgresServer, ServerUnavailable
from tests.tls import Authority, TlsPostgres

Server = TypeVar("Server", PostgresServer, TlsPostgres)

NewDatabase = Callable[[PostgresServer], Database]

_names = itertools.count(1)

hypothesis.settings.register_profile(  # whatever else the machine does meanwhile
    "untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("untimed")

__all__ = ["mongo_database", "mongodb", "mongodb_client", "new_stand_in", "stand_in", "stand_in_client"]  # fixtures


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes more than a few seconds")
    for name in [name for name in os.environ if name.startswith("PG")]:
        del os.environ[name]  # libpq would mix them into every connection
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # each of the many commands that tests start would compile `cdc`


@pytest.fixture(scope="session")
def postgres18() -> Iterator[PostgresServer]:
    """The PostgreSQL 18 server that is the source of most tests."""
    yield from _server(18)


@pytest.fixture(scope="session")
def postgres16() -> Iterator[PostgresServer]:
    """A PostgreSQL 16 server, where versions differ."""
    yield from _server(16)


@pytest.fixture(scope="session")
def target18() -> Iterator[PostgresServer]:
    """Another PostgreSQL 18 cluster, for mirrors."""
    yield from _server(18)


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Who issued the certificate of `tls_postgres`, and issues those of its clients."""
    return Authority(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="session")
def tls_postgres(authority: Authority) -> Iterator[TlsPostgres]:
    """A server that wants TLS, of whatever version the system has."""
    yield from _running(lambda: TlsPostgres(authority))


@pytest.fixture(params=[18, 16], ids=lambda version: f"pg{version}")
def postgres(request: pytest.FixtureRequest) -> PostgresServer:
    """Runs the test on both versions; the test's `source_db` is then on this server."""
    server = request.getfixturevalue(f"postgres{request.param}")
    assert isinstance(server, PostgresServer)
    return server


@pytest.fixture
def new_database() -> Iterator[NewDatabase]:
    """Makes empty databases that are dropped after the test, with their slots and connections."""
    with ExitStack() as stack:

        def new(server: PostgresServer) -> Database:
            database = server.create_database(f"test_{next(_names)}")
            stack.callback(_drop, database)
            return database

        yield new


@pytest.fixture
def source_db(request: pytest.FixtureRequest, new_database: NewDatabase) -> Database:
    """An empty database on `postgres18`, or on both versions in turn if the test also asks for `postgres`."""
    server = "postgres" if "postgres" in request.fixturenames else "postgres18"
    return new_database(request.getfixturevalue(server))


@pytest.fixture
def target_db(target18: PostgresServer, new_database: NewDatabase) -> Database:
    """An empty database on `target18`."""
    return new_database(target18)


@pytest.fixture
def cdc(tmp_path: Path) -> Cdc:
    """The command line, with a folder of its own."""
    return Cdc(tmp_path)


@pytest.fixture(scope="session")
def pg_dump(postgres18: PostgresServer) -> Path:
    """A `pg_dump` that reads all versions under test; `pg_restore` lies beside it."""
    return postgres18.bin_dir / "pg_dump"


def _server(version: int) -> Iterator[PostgresServer]:
    yield from _running(lambda: PostgresServer(version))


def _running(make: Callable[[], Server]) -> Iterator[Server]:
    """While it is wanted; skips where it cannot be had."""
    try:
        server = make()
    except ServerUnavailable as exc:
        pytest.skip(str(exc))
    with server:
        yield server


def _drop(database: Database) -> None:
    if not database.server.running:  # a test that stops a shared server breaks the others: let it start again
        database.server.start()
    database.drop()
