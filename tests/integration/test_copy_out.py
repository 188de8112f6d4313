"""COPY's data in large blocks, by compiled code and by Python."""

from __future__ import annotations

from contextlib import closing

import pytest

from cdc.errors import PermanentError, TransientError
from cdc.postgres import copy_out
from cdc.postgres.connection import connect, translated_errors
from cdc.postgres.copy_out import BLOCK_BYTES, Take, take_in_python
from tests.servers import Database

COMPILED = pytest.param(
    copy_out.take, marks=pytest.mark.skipif(not copy_out.COMPILED, reason="no C compiler was there")
)


@pytest.fixture(params=[COMPILED, take_in_python], ids=["compiled", "python"])
def take(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Take:
    chosen: Take = request.param
    monkeypatch.setattr(copy_out, "take", chosen)
    return chosen


def blocks(database: Database, query: str) -> list[bytes]:
    with connect(database.url) as connection:
        found = list(copy_out.copy_out(connection.pgconn, f"COPY ({query}) TO STDOUT".encode()))
        assert connection.execute("SELECT 1").fetchall() == [(1,)]
    return found


@pytest.mark.usefixtures("take")
def test_all_rows_come_in_order_in_large_blocks(source_db: Database) -> None:
    found = blocks(source_db, "SELECT n FROM generate_series(1, 200000) AS n")
    assert b"".join(found) == b"".join(b"%d\n" % n for n in range(1, 200_001))
    assert all(BLOCK_BYTES <= len(block) < BLOCK_BYTES + 10 for block in found[:-1])


@pytest.mark.usefixtures("take")
def test_rows_larger_than_a_block_come_whole(source_db: Database) -> None:
    found = blocks(source_db, "SELECT repeat('x', n * 1000000) FROM generate_series(0, 3) AS n")
    assert b"".join(found) == b"".join(b"x" * (n * 1_000_000) + b"\n" for n in range(4))


@pytest.mark.usefixtures("take")
def test_no_rows_are_no_blocks(source_db: Database) -> None:
    assert blocks(source_db, "SELECT 1 WHERE false") == []


@pytest.mark.usefixtures("take")
def test_an_error_after_some_rows_is_raised(source_db: Database) -> None:
    with pytest.raises(PermanentError, match="division by zero"):
        blocks(source_db, "SELECT 1 / (100000 - n) FROM generate_series(1, 200000) AS n")


@pytest.mark.usefixtures("take")
def test_a_connection_that_is_lost_in_the_middle_is_an_error(source_db: Database) -> None:
    with closing(connect(source_db.url)) as connection:
        rows = copy_out.copy_out(connection.pgconn, b"COPY (SELECT generate_series(1, 10000000)) TO STDOUT")
        next(rows)
        source_db.execute(f"SELECT pg_terminate_backend({connection.info.backend_pid})")
        with pytest.raises(TransientError), translated_errors():  # who notices first, libpq or the server, is chance
            list(rows)
