"""Prepared statements through libpq: several in one round trip."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
from psycopg.conninfo import make_conninfo

from cdc.errors import PermanentError, TransientError
from cdc.postgres import prepared as prepared_module
from cdc.postgres.connection import Connection, connect, translated_errors
from cdc.postgres.prepared import Prepared, strict
from tests.faults.proxy import POSTGRES, Proxy
from tests.servers import Database

INSERT = b"INSERT INTO a VALUES ($1, $2)"
UPDATE = b"UPDATE a SET note = $2 WHERE id = $1"
NAMES = "SELECT statement FROM pg_prepared_statements ORDER BY statement"


@pytest.fixture
def connection(target_db: Database) -> Iterator[Connection]:
    target_db.execute("CREATE TABLE public.a (id int PRIMARY KEY, note text)")
    with connect(target_db.url) as connection:
        connection.execute("SET search_path = public")
        yield connection


def rows(connection: Connection) -> list[tuple[int, str | None]]:
    return connection.execute("SELECT * FROM a ORDER BY id").fetchall()


def test_all_are_executed_in_order_and_counted(connection: Connection) -> None:
    prepared = Prepared(connection)
    run = [(INSERT, (b"1", b"one")), (INSERT, (b"2", None)), (UPDATE, (b"1", b"uno")), (UPDATE, (b"3", b"tre"))]
    assert prepared.run(run) == [1, 1, 1, 0]
    assert prepared.run([(b"DELETE FROM a WHERE id > $1", (b"0",)), *run]) == [2, 1, 1, 1, 0]
    assert rows(connection) == [(1, "uno"), (2, None)]


def test_the_first_that_is_refused_is_told_and_none_behind_it_is_executed(connection: Connection) -> None:
    prepared = Prepared(connection)
    with pytest.raises(PermanentError, match="duplicate key"):
        prepared.run([(b"BEGIN", ()), *[(INSERT, (b"1", None))] * 2, (UPDATE, (b"1", b"never"))])
    connection.execute("ROLLBACK")
    assert rows(connection) == []
    assert prepared.run([(INSERT, (b"1", None)), (UPDATE, (b"1", b"now"))]) == [1, 1]


def test_what_could_not_be_prepared_is_prepared_the_next_time(connection: Connection) -> None:
    prepared, query = Prepared(connection), b"INSERT INTO later VALUES ($1)"
    with pytest.raises(PermanentError, match="does not exist"):
        prepared.run([(query, (b"1",)), (INSERT, (b"1", None))])
    connection.execute("CREATE TABLE later (id int)")
    assert prepared.run([(query, (b"1",)), (INSERT, (b"1", None))]) == [1, 1]


def test_what_has_to_touch_a_row_is_refused_where_it_does_not(connection: Connection) -> None:
    prepared = Prepared(connection)
    one = strict((UPDATE, (b"1", b"uno")))
    assert prepared.run([(b"BEGIN", ()), (INSERT, (b"1", None)), one, (b"COMMIT", ())])[1:3] == [1, 1]
    with pytest.raises(PermanentError, match="division by zero"):
        prepared.run([(b"BEGIN", ()), (INSERT, (b"2", None)), strict((UPDATE, (b"3", None))), (b"COMMIT", ())])
    connection.execute("ROLLBACK")
    assert rows(connection) == [(1, "uno")]


def test_parameters_have_new_types_once_they_are_forgotten(connection: Connection) -> None:
    prepared = Prepared(connection)
    prepared.run([(INSERT, (b"1", None))])
    connection.execute("ALTER TABLE a ALTER id TYPE text")
    with pytest.raises(PermanentError, match="invalid input syntax"):
        prepared.run([(INSERT, (b"a text", None))])
    prepared.forget()
    assert prepared.run([(INSERT, (b"a text", None))]) == [1]


def test_no_more_stay_prepared_than_is_bounded(connection: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared_module, "_MOST", 2)
    prepared = Prepared(connection)
    for number in range(5):
        assert prepared.run([(b"UPDATE a SET id = %d" % number, ())]) == [0]
    assert len(connection.execute(NAMES).fetchall()) == 2


def test_a_lost_connection_is_transient(connection: Connection, target_db: Database) -> None:
    prepared = Prepared(connection)
    target_db.execute("SELECT pg_terminate_backend(%s)", [connection.info.backend_pid])
    with pytest.raises(TransientError), translated_errors():
        prepared.run([(INSERT, (b"1", None))])
    assert connection.closed


@pytest.mark.parametrize("known", [0, 1, 2])
def test_f62_an_answer_that_makes_no_sense_is_a_lost_connection(target_db: Database, known: int) -> None:
    """known: so many of the statements are prepared already."""
    run = [(b"SELECT 1", ()), (b"SELECT 2", ())]
    to = urlsplit(target_db.url).port or 0
    plain = {"sslmode": "disable", "gssencmode": "disable"}
    with Proxy(to, POSTGRES) as line, connect(make_conninfo(target_db.url, port=line.port, **plain)) as connection:
        prepared = Prepared(connection)
        if known:
            prepared.run(run[:known])
        line.corrupt()
        with pytest.raises(TransientError, match="lost synchronization"), translated_errors():
            prepared.run(run)
        assert connection.closed
