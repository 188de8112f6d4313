"""Sessions whose settings nobody else decides, and errors that tell no values."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import psycopg
import pytest
from psycopg import pq

from cdc.errors import FatalError, PermanentError, TransientError
from cdc.postgres.connection import connect, result_error, to_cdc_error, while_doing
from cdc.postgres.snapshot import PostgresReader
from cdc.source import Chunk
from tests.mirror import filled_mirror
from tests.servers import Database, PostgresServer

TIMEOUTS = {
    "statement_timeout": 90600,
    "lock_timeout": 90600,
    "idle_in_transaction_session_timeout": 90600,
    "idle_session_timeout": 140000,
    "transaction_timeout": 170000,
}
"""Each with the first version that knows it."""

LONGER_SECONDS = 1.5


def limit_everything(database: Database) -> list[str]:
    """Give new sessions of a database a second for everything, and return what limits them."""
    version = database.value("SELECT current_setting('server_version_num')::int")
    names = [name for name, since in TIMEOUTS.items() if version >= since]
    for name in names:
        database.execute(f"ALTER DATABASE {database.name} SET {name} = '1s'")
    return names


@pytest.mark.parametrize("password", ["ge heim", "geheim%", "geheim%zz"])
def test_f113_an_url_that_cannot_be_read_is_not_quoted(password: str) -> None:
    with pytest.raises(FatalError) as caught:
        connect(f"postgresql://me:{password}@127.0.0.1:1/shop")
    assert "heim" not in f"{caught.value} {caught.value.hint} {caught.value.__cause__}"
    assert "%XX" in caught.value.hint


@pytest.mark.parametrize("replication", [False, True])
def test_f38_no_time_out_of_a_database_applies(
    postgres: PostgresServer, source_db: Database, replication: bool
) -> None:
    names = limit_everything(source_db)
    with connect(source_db.url, replication=replication) as connection:
        assert {name: connection.execute(f"SHOW {name}").fetchone() for name in names} == dict.fromkeys(names, ("0",))


def test_f38_neither_copy_nor_stream_are_cut_by_time_outs(
    postgres: PostgresServer,
    source_db: Database,
    target_db: Database,
    tmp_path: Path,
    pg_dump: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source_db.execute("CREATE TABLE a (id int PRIMARY KEY); INSERT INTO a SELECT generate_series(1, 1000)")
    for database in (source_db, target_db):
        limit_everything(database)
    read = PostgresReader.read
    pause = threading.Event()  # nobody sets it: only time ends what limits time

    def slowly(reader: PostgresReader, chunk: Chunk, *, columns: Sequence[str], binary: bool) -> Iterator[bytes]:
        for block in read(reader, chunk, columns=columns, binary=binary):
            yield block
            pause.wait(LONGER_SECONDS)
        pause.wait(LONGER_SECONDS)

    monkeypatch.setattr(PostgresReader, "read", slowly)
    source = {"heartbeat_seconds": 0}
    with filled_mirror(source_db, target_db, tmp_path, pg_dump, source=source) as mirror:
        assert mirror.delivery_stats.retries == 0, mirror.delivery_stats.error
        source_db.execute("INSERT INTO a VALUES (0)")
        mirror.assert_equal("a")

        def kept() -> bool:
            before = sessions(source_db), sessions(target_db)
            pause.wait(LONGER_SECONDS)
            return (sessions(source_db), sessions(target_db)) == before and min(map(len, before)) > 0

        # a sink that was just filled may connect once more; one whose session is cut does so every time
        assert any(kept() for _ in range(4))


def sessions(database: Database) -> set[int]:
    """The backends that capture and delivery keep open."""
    query = """SELECT pid FROM pg_stat_activity
                WHERE datname = current_database() AND application_name IN ('cdc shop', 'cdc sink mirror')"""
    return {pid for (pid,) in database.execute(query)}


SECRET = "geheim@example.com"


@pytest.fixture
def customers(source_db: Database) -> Database:
    source_db.execute(
        f"""CREATE TABLE customers (email text UNIQUE, boss text REFERENCES customers (email), n int CHECK (n > 0));
            INSERT INTO customers VALUES ('{SECRET}')"""
    )
    return source_db


REFUSED = [
    f"INSERT INTO public.customers VALUES ('{SECRET}')",
    f"INSERT INTO public.customers VALUES ('x', '{SECRET}x')",
    f"INSERT INTO public.customers VALUES ('{SECRET}1', NULL, -1)",
    f"DO $$ BEGIN EXECUTE $x$INSERT INTO public.customers VALUES ('{SECRET}')$x$; END $$",
]


@pytest.mark.parametrize("statement", REFUSED)
def test_f113_errors_tell_no_values_of_rows(customers: Database, statement: str) -> None:
    with connect(customers.url) as connection:
        with pytest.raises(psycopg.Error) as caught:
            connection.execute(statement)
        assert SECRET in str(caught.value), "there is something to hide"
        error = to_cdc_error(caught.value)
        assert isinstance(error, PermanentError)
        assert "violates" in str(error)
        assert SECRET not in str(error) + error.hint
        with pytest.raises(PermanentError) as told, while_doing("writing"):
            connection.execute(statement)
        assert SECRET not in str(told.value)


@pytest.mark.parametrize("statement", REFUSED)
def test_f113_nor_do_those_of_libpqs_results(customers: Database, statement: str) -> None:
    with connect(customers.url) as connection:
        result = connection.pgconn.exec_(statement.encode())
    error = result_error(result)
    assert isinstance(error, PermanentError)
    assert "violates" in str(error)
    assert SECRET not in str(error)


def test_f94_what_libpq_finds_wrong_by_itself_is_a_lost_connection(source_db: Database) -> None:
    """As an answer that is no message of the protocol: psycopg does not call that an `OperationalError`."""
    with connect(source_db.url) as connection:
        result = connection.pgconn.make_empty_result(pq.ExecStatus.FATAL_ERROR)
    error = psycopg.errors.error_from_result(result)
    assert not isinstance(error, psycopg.OperationalError)
    assert isinstance(to_cdc_error(error), TransientError)
    assert isinstance(result_error(result), TransientError)
    assert isinstance(to_cdc_error(psycopg.ProgrammingError("not adapted")), FatalError)


@pytest.mark.parametrize(
    "option",
    [
        "sslmode=foo",
        "target_session_attrs=foo",
        "channel_binding=foo",
        "gssencmode=foo",
        "require_auth=foo",
        "ssl_min_protocol_version=foo",
        "connect_timeout=foo",
        "keepalives_idle=foo",
        "port=foo",
        "port=99999",
        "port=1,2",
        "hostaddr=foo",
        "hostaddr=127.0.0.1,127.0.0.1",
        "sslmodee=require",
    ],
)
def test_a_mistaken_option_of_the_url_is_named_and_not_tried_again(option: str) -> None:
    with pytest.raises(FatalError) as caught:
        connect(f"postgresql://me:geheim@127.0.0.1:1/shop?{option}")
    name = option.partition("=")[0]
    assert name in str(caught.value)
    assert re.search(rf"option|\b{name}\b", caught.value.hint)
    assert "geheim" not in str(caught.value)


@pytest.mark.parametrize("password", ["geh?eim=geheim", "geh:eim@host:geheim", "geh?sslmode=geheim&geheim=1"])
def test_a_password_that_is_taken_for_an_option_is_not_shown(password: str) -> None:
    with pytest.raises((FatalError, TransientError)) as caught:
        connect(f"postgresql://me:{password}@127.0.0.1:1/shop")
    assert "eim" not in str(caught.value)
