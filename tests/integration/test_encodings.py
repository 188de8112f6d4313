"""F39: a character arrives as what it is, or loudly not at all; by copy and by stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cdc.errors import PermanentError
from tests.conftest import NewDatabase
from tests.mirror import Mirror, filled_mirror
from tests.servers import Database, PostgresServer

Fill = Callable[[Database, Database], Mirror]


@pytest.fixture
def encoded(postgres18: PostgresServer, target18: PostgresServer) -> Iterator[Callable[..., Database]]:
    """Makes a database in an encoding, at the source or the target."""
    made: list[Database] = []

    def new(encoding: str, *, target: bool = False) -> Database:
        database = Database(target18 if target else postgres18, f"in_{encoding.lower()}_{len(made)}")
        options = f"ENCODING '{encoding}' LOCALE 'C' LOCALE_PROVIDER libc TEMPLATE template0"
        database.server.psql(f"CREATE DATABASE {database.name} {options}")
        made.append(database)
        return database

    yield new
    for database in made:
        database.drop()


@pytest.fixture
def start(tmp_path: Path, pg_dump: Path, request: pytest.FixtureRequest) -> Fill:
    def start(source: Database, target: Database) -> Mirror:
        context = filled_mirror(source, target, tmp_path, pg_dump)
        mirror = context.__enter__()
        request.addfinalizer(lambda: context.__exit__(None, None, None))
        return mirror

    return start


CHARACTERS = "".join(map(chr, [*range(0xA0, 0x100)]))
"""All of LATIN1 beyond ASCII."""

TABLES = """
CREATE TABLE "größe" (id int PRIMARY KEY, "ä" text, words text[], "char" "char", doc jsonb, search tsvector, raw bytea);
CREATE TABLE keyed ("ß" text PRIMARY KEY, n int);
"""


def client(database: Database) -> Any:
    """A session that speaks UTF8 whatever the database does."""
    return database.connect(client_encoding="utf8")


def rows(database: Database) -> list[tuple[Any, ...]]:
    with client(database) as connection:
        return [
            row
            for table in ('"größe"', "keyed")
            for row in connection.execute(f'SELECT t::text FROM {table} AS t ORDER BY t::text COLLATE "C"').fetchall()
        ]


def test_f39_latin1_arrives_as_what_it_is_in_utf8(
    encoded: Callable[..., Database], target_db: Database, start: Fill
) -> None:
    source = encoded("LATIN1")
    insert = """INSERT INTO "größe" VALUES (%s, %s, ARRAY[%s, 'ü'], 'x', '{"ö": "é"}', 'größe:1A', %s)"""
    with client(source) as connection:
        connection.execute(TABLES)
        connection.execute(insert, [1, CHARACTERS, CHARACTERS, bytes(range(256))])
        connection.execute("INSERT INTO keyed VALUES ('Ä', 1), ('ä', 2), ('é', 3)")
        assert connection.execute("SHOW server_encoding").fetchone() == ("LATIN1",)
        mirror = start(source, target_db)
        assert rows(source) == rows(target_db)
        connection.execute(insert, [2, CHARACTERS[::-1], "ÿ", b"\xff"])
        connection.execute("""UPDATE "größe" SET "ä" = "ä" || '¾' WHERE id = 1""")
        connection.execute("UPDATE keyed SET \"ß\" = 'ö' WHERE \"ß\" = 'ä'; DELETE FROM keyed WHERE \"ß\" = 'é'")
        for n in range(200):  # enough to be written set-wise
            connection.execute("INSERT INTO keyed VALUES (%s, %s)", [CHARACTERS[n % 90] * (n + 1), n])
    mirror.sync()
    assert rows(source) == rows(target_db)
    assert ("(ö,2)",) in rows(target_db)


INVALID = "convert_from('\\xe4f6', 'SQL_ASCII')"
"""The bytes of LATIN1's ä and ö, in a database that does not know that."""


def test_f39_bytes_that_are_no_text_stop_the_copy(
    encoded: Callable[..., Database], target_db: Database, start: Fill
) -> None:
    source = encoded("SQL_ASCII")
    source.execute("CREATE TABLE t (id int PRIMARY KEY, x text)")
    source.execute(f"INSERT INTO t VALUES (1, 'fine'), (2, {INVALID})")
    with pytest.raises(PermanentError, match=r'reading public\.t: invalid byte sequence for encoding "UTF8"'):
        start(source, target_db)
    assert target_db.execute("SELECT * FROM t") == []


def test_f39_bytes_that_are_no_text_stop_the_stream(
    encoded: Callable[..., Database], target_db: Database, start: Fill
) -> None:
    source = encoded("SQL_ASCII")
    source.execute("CREATE TABLE t (id int PRIMARY KEY, x text)")
    with source.connect(client_encoding="sql_ascii") as connection:
        connection.execute("INSERT INTO t VALUES (1, convert_from('\\xc3a4', 'SQL_ASCII'))")
    mirror = start(source, target_db)
    assert target_db.execute("SELECT * FROM t") == [(1, "ä")], "what is valid travels"
    source.execute(f"INSERT INTO t VALUES (2, {INVALID})")
    error = mirror.failure()
    assert isinstance(error, PermanentError)
    assert 'invalid byte sequence for encoding "UTF8"' in str(error)
    assert target_db.value("SELECT count(*) FROM t") == 1


def test_f39_characters_that_the_target_does_not_have_stop_the_copy(
    encoded: Callable[..., Database], source_db: Database, start: Fill
) -> None:
    source_db.execute("CREATE TABLE t (id int PRIMARY KEY, x text); INSERT INTO t VALUES (1, 'ä'), (2, '€')")
    target = encoded("LATIN1", target=True)
    with pytest.raises(PermanentError, match=r'copying public\.t: .* has no equivalent in encoding "LATIN1"'):
        start(source_db, target)
    assert target.execute("SELECT * FROM t") == []


@pytest.mark.parametrize("count", [1, 500])
def test_f39_characters_that_the_target_does_not_have_stop_the_stream(
    encoded: Callable[..., Database], source_db: Database, start: Fill, count: int
) -> None:
    source_db.execute("CREATE TABLE t (id int PRIMARY KEY, x text); INSERT INTO t VALUES (0, 'ä')")
    target = encoded("LATIN1", target=True)
    mirror = start(source_db, target)
    source_db.execute(f"INSERT INTO t SELECT n, CASE n WHEN {count} THEN '€' END FROM generate_series(1, {count}) n")
    assert 'has no equivalent in encoding "LATIN1"' in str(mirror.failure())
    with client(target) as connection:
        assert connection.execute("SELECT * FROM t").fetchall() == [(0, "ä")]


def test_f39_a_target_without_encoding_keeps_the_bytes(
    encoded: Callable[..., Database], source_db: Database, start: Fill, new_database: NewDatabase
) -> None:
    source_db.execute("CREATE TABLE t (id int PRIMARY KEY, x text); INSERT INTO t VALUES (1, 'Grüße 🐘')")
    target = encoded("SQL_ASCII", target=True)
    mirror = start(source_db, target)
    source_db.execute("INSERT INTO t VALUES (2, '世界')")
    mirror.sync()
    found = target.execute("SELECT convert_to(x, 'SQL_ASCII') FROM t ORDER BY id")
    assert [bytes(x).decode() for (x,) in found] == ["Grüße 🐘", "世界"]
