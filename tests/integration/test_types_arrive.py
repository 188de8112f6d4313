"""F36, F37: every value of every type is the same on the mirror, whichever way it took."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

from cdc.errors import FatalError
from tests import types
from tests.conftest import NewDatabase
from tests.mirror import Mirror, filled_mirror
from tests.servers import Database

Start = Callable[[Database, Database], Mirror]

VERSIONS = pytest.mark.parametrize(("source_version", "target_version"), [(18, 18), (16, 18), (16, 16)])


@pytest.fixture
def start(tmp_path: Path, pg_dump: Path, request: pytest.FixtureRequest) -> Start:
    """Starts a mirror of what is in the source."""

    def start(source: Database, target: Database, **options: Any) -> Mirror:
        context = filled_mirror(source, target, tmp_path, pg_dump, **options)
        mirror = context.__enter__()
        request.addfinalizer(lambda: context.__exit__(None, None, None))
        return mirror

    return start


@pytest.fixture
def pair(
    request: pytest.FixtureRequest, new_database: NewDatabase, source_version: int, target_version: int
) -> tuple[Database, Database]:
    source = new_database(request.getfixturevalue(f"postgres{source_version}"))
    return source, new_database(request.getfixturevalue("target18" if target_version == 18 else "postgres16"))


def assert_same(mirror: Mirror) -> None:
    """Compare as text, table by table: pytest would take minutes to explain a difference in megabytes."""
    mirror.sync()
    with mirror.source_db.connect() as source, mirror.target_db.connect() as target:
        expected, found = types.contents(source), types.contents(target)
    for table in types.TABLES:
        pairs = zip(expected[table], found[table], strict=False)
        differences = [f"{left[:300]} -> {right[:300]}" for left, right in pairs if left != right]
        assert not differences, f"{table}: {differences[0]}"
        assert len(expected[table]) == len(found[table]), table


@VERSIONS
def test_f36_f37_every_type_arrives_by_copy_and_by_stream(pair: tuple[Database, Database], start: Start) -> None:
    source, target = pair
    with source.connect() as connection:
        types.create_types_schema(connection)
        types.fill(connection)
        mirror = start(source, target)
        assert_same(mirror)
        for _ in range(2):
            types.rotate(connection)
            assert_same(mirror)
        connection.execute(sql.SQL("TRUNCATE {}").format(sql.SQL(", ").join(map(sql.Identifier, types.TABLES))))
        types.fill(connection)  # row by row
        assert_same(mirror)
        with connection.transaction():  # all at once
            for table in types.TABLES:
                connection.execute(sql.SQL("CREATE TEMP TABLE held AS SELECT * FROM {}").format(sql.Identifier(table)))
                connection.execute(sql.SQL("DELETE FROM {}").format(sql.Identifier(table)))
                connection.execute(sql.SQL("INSERT INTO {} SELECT * FROM held").format(sql.Identifier(table)))
                connection.execute("DROP TABLE held")
        assert_same(mirror)
    assert mirror.delivery_stats.missing_rows == 0


@VERSIONS
def test_f19_f36_rows_are_found_by_their_image_whatever_the_modifiers(
    pair: tuple[Database, Database], start: Start
) -> None:
    """`character` without a modifier would be a single character, `bit` a single bit."""
    source, target = pair
    with source.connect() as connection:
        types.create_types_schema(connection)
        types.fill(connection)
        connection.execute("CREATE TABLE images (LIKE typmods); ALTER TABLE images REPLICA IDENTITY FULL")
        connection.execute("INSERT INTO images SELECT * FROM typmods")
        mirror = start(source, target)
        connection.execute("INSERT INTO images SELECT * FROM typmods")
        connection.execute("UPDATE images SET id = id + 10")
        connection.execute("UPDATE images SET c = 'ccc', b = B'01010' WHERE id = 11")
        connection.execute("DELETE FROM images WHERE ctid = (SELECT max(ctid) FROM images WHERE id = 12)")
    mirror.assert_equal("images")
    assert mirror.delivery_stats.missing_rows == 0


KEY_CHANGES = (
    "INSERT INTO {table} SELECT id, 0 FROM (SELECT DISTINCT id FROM {values} ORDER BY id OFFSET 1) AS all_but_one",
    "UPDATE {table} SET n = n + 1",
    "UPDATE {table} SET n = 7 WHERE ctid = (SELECT min(ctid) FROM {table})",
    "DELETE FROM {table} WHERE ctid = (SELECT min(ctid) FROM {table}) AND (SELECT count(*) > 2 FROM {table})",
    "UPDATE {table} SET id = (SELECT id FROM {values} ORDER BY id LIMIT 1)"
    " WHERE ctid = (SELECT max(ctid) FROM {table})",
    "UPDATE {table} SET n = n + 1",
)


@pytest.mark.parametrize(
    ("source_version", "target_version", "together"), [(18, 18, False), (18, 18, True), (16, 16, True)]
)
def test_f36_f37_rows_are_found_by_keys_of_every_type(
    pair: tuple[Database, Database], start: Start, together: bool
) -> None:
    source, target = pair
    with source.connect() as connection:
        types.create_types_schema(connection)
        names = keyed_tables(connection)
        mirror = start(source, target)
        for change in KEY_CHANGES:
            statements = [
                sql.SQL(change).format(table=sql.Identifier(name), values=sql.Identifier(f"values_{name}"))
                for name in names
            ]
            if together:
                with connection.transaction():
                    for statement in statements:
                        connection.execute(statement)
            else:
                for statement in statements:
                    connection.execute(statement)
    assert len(names) > 50
    mirror.sync()
    assert mirror.delivery_stats.missing_rows == 0
    query = sql.SQL(" UNION ALL ").join(
        sql.SQL("SELECT {} || t::text FROM {} AS t").format(name, sql.Identifier(name)) for name in names
    )
    with source.connect() as left, target.connect() as right:
        expected, found = (sorted(connection.execute(query).fetchall()) for connection in (left, right))
    assert found == expected
    assert len(expected) > len(names)


def keyed_tables(connection: psycopg.Connection[Any]) -> list[str]:
    """A table with a key of each type that can be one, and another with values for it."""
    names = []
    columns = [*types._built_in(connection), *types._user_made()]
    for column in [column for column in columns if column.name[:2] == "c_" or column.name in {"a_text", "a_numeric"}]:
        values = [value for value in column.values if len(value) < 500]
        table, held = sql.Identifier(column.name), sql.Identifier(f"values_{column.name}")
        create = sql.SQL("CREATE TABLE {} (id {} PRIMARY KEY, n int)").format(table, sql.SQL(column.type_name))
        try:
            connection.execute(create)
        except (psycopg.errors.UndefinedObject, psycopg.errors.FeatureNotSupported):
            continue  # no order, no key
        connection.execute(sql.SQL("CREATE UNLOGGED TABLE {} (id {})").format(held, sql.SQL(column.type_name)))
        for value in values:
            connection.execute(sql.SQL("INSERT INTO {} VALUES (%s)").format(held), [value])
        if values:
            names.append(column.name)
    return [name for name in names if is_comparable(connection, name)]


def is_comparable(connection: psycopg.Connection[Any], table: str) -> bool:
    """Whether keys can be compared: an array may be a key whose elements have no order."""
    query = sql.SQL("SELECT FROM {} AS a, {} AS b WHERE a.id < b.id")
    try:
        connection.execute(query.format(*[sql.Identifier(f"values_{table}")] * 2))
    except psycopg.errors.UndefinedFunction:
        connection.execute(sql.SQL("DROP TABLE {}").format(sql.Identifier(table)))
        return False
    return True


MOODS = """
CREATE TYPE mood AS ENUM ('sad', 'glad');
CREATE TYPE feeling AS (mood mood, at date);
CREATE TABLE t (id int PRIMARY KEY, mood mood, moods mood[], feeling feeling, feelings feeling[]);
CREATE TABLE k (mood mood PRIMARY KEY, n int);
INSERT INTO t VALUES (1, 'sad', '{glad}', '(sad,)', '{"(glad,)"}')
"""

NEW_MOOD = "ALTER TYPE mood ADD VALUE 'in between' BEFORE 'glad'"

USES = """
INSERT INTO t SELECT n, 'in between', '{sad,in between}', '("in between",)', '{"(in between,)"}'
  FROM generate_series(2, 100) n;
UPDATE t SET mood = 'in between', moods = '{in between}' WHERE id = 1;
INSERT INTO k VALUES ('in between', 0);
UPDATE k SET n = 1
"""


def test_f36_an_enum_value_added_later_on_both_sides(source_db: Database, target_db: Database, start: Start) -> None:
    source_db.execute(MOODS)
    mirror = start(source_db, target_db)
    source_db.execute("INSERT INTO t VALUES (200, 'glad', NULL, NULL, NULL)")
    mirror.assert_equal("t")
    for database in (target_db, source_db):
        database.execute(NEW_MOOD)
    source_db.execute(USES)
    mirror.assert_equal("t", "k")
    source_db.execute("UPDATE t SET id = id + 1000 WHERE mood = 'in between'")
    mirror.assert_equal("t")


def test_f36_an_enum_value_that_the_mirror_lacks_stops_it_until_it_has_it(
    source_db: Database, target_db: Database, start: Start
) -> None:
    source_db.execute(MOODS)
    mirror = start(source_db, target_db)
    source_db.execute(NEW_MOOD)
    source_db.execute(USES)
    error = mirror.failure()
    assert isinstance(error, FatalError)
    assert 'invalid input value for enum public.mood: "in between"' in str(error) or "enum mood" in str(error)
    target_db.execute(NEW_MOOD)
    mirror.restart()
    mirror.assert_equal("t", "k")


EXTENSIONS = """
CREATE SCHEMA extras;
CREATE EXTENSION hstore WITH SCHEMA extras;
CREATE EXTENSION citext;
CREATE TABLE h (id int PRIMARY KEY, h extras.hstore, hs extras.hstore[]);
CREATE TABLE words (word citext PRIMARY KEY, n int, UNIQUE (n));
CREATE TABLE full_words (word citext, h extras.hstore);
ALTER TABLE full_words REPLICA IDENTITY FULL
"""

HSTORES = """
INSERT INTO h SELECT n, extras.hstore(ARRAY['a', n::text, 'NULL', NULL, 'quo"te\\', '=>,', '', 'ü']),
                     ARRAY[extras.hstore('x', 'y'), NULL] FROM generate_series({0}, {1}) n;
INSERT INTO full_words SELECT CASE n % 2 WHEN 0 THEN 'Same' ELSE 'sAME' END, 'k=>v' FROM generate_series({0}, {1}) n
"""


@pytest.mark.parametrize("count", [5, 300])
def test_f36_f120_types_of_extensions(source_db: Database, target_db: Database, start: Start, count: int) -> None:
    """citext keys: equal to the server and not to us."""
    source_db.execute(EXTENSIONS)
    source_db.execute(HSTORES.format(1, count))
    source_db.execute(f"INSERT INTO words SELECT 'Word ' || n, n FROM generate_series(1, {count}) n")
    mirror = start(source_db, target_db)
    mirror.assert_equal("h", "words", "full_words")
    source_db.execute(HSTORES.format(count + 1, 2 * count))
    source_db.execute("UPDATE h SET h = h OPERATOR(extras.||) 'new=>1'::extras.hstore")
    source_db.execute("DELETE FROM full_words WHERE word = 'SAME' AND ctid < '(1,0)'")
    source_db.execute("UPDATE full_words SET h = NULL WHERE ctid IN (SELECT max(ctid) FROM full_words GROUP BY word)")
    source_db.execute("UPDATE words SET word = upper(word), n = n + 1000")
    source_db.execute("UPDATE words SET n = n - 500 WHERE word = 'word 3'")
    source_db.execute(
        """
        BEGIN;
        DELETE FROM words WHERE word = 'word 1';
        INSERT INTO words VALUES ('wOrD 1', 1);
        UPDATE words SET n = 2 WHERE word = 'WORD 1';
        UPDATE words SET word = 'worD 1' WHERE word = 'WORD 1';
        DELETE FROM words WHERE word = 'word 2';
        INSERT INTO words VALUES ('word 2', 3);
        DELETE FROM words WHERE word = 'WORD 2';
        INSERT INTO words VALUES ('Word 2', 4);
        COMMIT
        """
    )
    mirror.assert_equal("h", "words", "full_words")
    assert mirror.delivery_stats.missing_rows == 0
