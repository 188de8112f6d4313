"""Verification on real servers: equal is equal, every difference is found and named, and load changes neither."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import Any, Final

import msgspec
import pytest

from cdc.change import TableName
from cdc.config import SinkConfig, TableOptions
from cdc.errors import TransientError
from cdc.postgres.connection import connect
from cdc.postgres.digest import Comparison, plan_comparison
from cdc.postgres.schema import read_tables
from cdc.verify import Comparable, KeyRange, RangeDigest, verify
from cdc.verify_report import TableReport, VerifyReport
from tests import types
from tests.conftest import NewDatabase
from tests.processes import wait_until
from tests.servers import Database, PostgresServer

SINK: Final = SinkConfig(name="mirror", source="shop")

ODD: Final = ("", " ", "a b", 'quo"te', "com,ma", "back\\slash", "(paren)", "50%", "%s", "tab\t", "new\n",
              "{x}", "a", "B", "b", "Z", "z", "é", "e\u0301", "ß", "世界", "🐘", "NULL", "x" * 500)  # fmt: skip
"""Keys that quoting, formatting and collations treat in ways of their own."""


def plan(source: Database, target: Database, sink: SinkConfig = SINK) -> Comparison:
    with connect(source.url) as one, connect(target.url) as other:
        return plan_comparison(one, other, sink, list(read_tables(one)))


def compare(source: Database, target: Database, sink: SinkConfig = SINK, **options: Any) -> VerifyReport:
    comparison = plan(source, target, sink)
    return verify(comparison.source_view(source.url), comparison.target_view(target.url), comparison.tables, **options)


def compare_one(source: Database, target: Database, sink: SinkConfig = SINK, **options: Any) -> TableReport:
    (table,) = compare(source, target, sink, **options).tables
    assert table.counted
    assert table.source_rows - table.target_rows == table.missing.count - table.extra.count
    return table


def on_both(source: Database, target: Database, *statements: str) -> None:
    for database in (source, target):
        database.execute("; ".join(statements))


@pytest.fixture(params=["18to18", "18to16", "16to18"])
def pair(request: pytest.FixtureRequest, new_database: NewDatabase) -> tuple[Database, Database]:
    """Two empty databases, also on servers of different versions."""
    servers = {
        "18to18": ("postgres18", "target18"),
        "18to16": ("postgres18", "postgres16"),
        "16to18": ("postgres16", "target18"),
    }
    source, target = (request.getfixturevalue(name) for name in servers[request.param])
    return new_database(source), new_database(target)


def test_f36_f37_every_type_and_extreme_value_is_equal_to_itself(source_db: Database, target_db: Database) -> None:
    for database in (source_db, target_db):
        with database.connect() as connection:
            types.create_types_schema(connection)
            types.fill(connection)
    report = compare(source_db, target_db)
    assert report.equal, report
    assert {table.table for table in report.tables} == {f"public.{name}" for name in types.TABLES}
    assert not report.exact, "nobody held the mirror"
    assert compare(source_db, target_db, workers=4, parts=1).equal


def test_types_that_both_versions_have_are_equal_across_them(pair: tuple[Database, Database]) -> None:
    on_both(
        *pair,
        "CREATE TABLE t (id int PRIMARY KEY, f4 real, f8 float8, n numeric, tz timestamptz, i interval, m money,"
        " j json, jb jsonb, b bytea, r regclass, ra tstzrange, mr int4multirange, a text[], u uuid, p point,"
        " v tsvector)",
        """INSERT INTO t SELECT x, x / 3.0, sqrt(x), x / 7.0, 'epoch'::timestamptz + x * interval '1 day 01:02:03.4',
                  x * interval '1 mon -1 s', x * 1.5, ('{"b":  ' || x || ', "a": 1}')::json,
                  jsonb_build_object('bb', 1, 'a', x), convert_to('ä' || x, 'UTF8'), 'pg_class',
                  tstzrange('epoch', NULL), '{[1,3),[5,6)}', ARRAY['q"', NULL, E'\\\\'], md5(x::text)::uuid,
                  point(x / 3.0, -0.0), to_tsvector('simple', 'b a ' || x)
             FROM generate_series(1, 2000) x""",
    )
    table = compare_one(*pair)
    assert table.equal
    assert table.source_rows == 2000
    assert table.ranges > 30


DIFFERENCES: Final = {
    "numeric scale": ("n", "1.0", "1.00"),
    "negative zero": ("f", "0.0::float8", "'-0'::float8"),
    "null and empty": ("t", "NULL", "''"),
    "null array and empty": ("a", "NULL", "'{}'"),
    "array bounds": ("a", "'{1}'", "'[0:0]={1}'"),
    "one character in toast": ("t", "repeat('abcdefghij', 100000)", "repeat('abcdefghij', 99999) || 'abcdefghiJ'"),
    "trailing blank": ("t", "'a'", "'a '"),
    "json white space": ("j", "'{\"a\":1}'", "'{\"a\": 1}'"),
    "composed and decomposed": ("t", "'é'", "E'e\\u0301'"),
    "microsecond": ("tz", "'2000-01-01 00:00:00+00'", "'2000-01-01 00:00:00.000001+00'"),
    "last bit of a float": ("f", "'0.1'::float8", "'0.10000000000000002'::float8"),
}


@pytest.mark.parametrize("what", DIFFERENCES)
def test_a_difference_in_one_value_is_found(source_db: Database, target_db: Database, what: str) -> None:
    column, one, other = DIFFERENCES[what]
    on_both(
        source_db,
        target_db,
        "CREATE TABLE t (id int PRIMARY KEY, n numeric, f float8, t text, a int[], j json, tz timestamptz)",
        "INSERT INTO t (id, t) SELECT x, 'row ' || x FROM generate_series(1, 50) x",
    )
    source_db.execute(f"UPDATE t SET {column} = {one} WHERE id = 7")
    target_db.execute(f"UPDATE t SET {column} = {other} WHERE id = 7")
    table = compare_one(source_db, target_db)
    assert not table.equal
    assert table.different.keys == ("(7)",)
    assert (table.missing.count, table.extra.count, table.different.count) == (0, 0, 1)


def test_missing_extra_and_different_rows_are_told_apart(pair: tuple[Database, Database]) -> None:
    source, target = pair
    on_both(
        source,
        target,
        "CREATE TABLE t (id bigint PRIMARY KEY, v text)",
        "INSERT INTO t SELECT x, 'v' FROM generate_series(1, 5000) x",
    )
    assert compare_one(source, target).equal
    target.execute("DELETE FROM t WHERE id IN (17, 4242)")
    target.execute("INSERT INTO t VALUES (-1, 'v'), (6000, 'v'), (6001, 'v')")
    target.execute("UPDATE t SET v = 'w' WHERE id = 2500")
    table = compare_one(source, target)
    assert table.missing.keys == ("(17)", "(4242)")
    assert table.extra.keys == ("(-1)", "(6000)", "(6001)")
    assert table.different.keys == ("(2500)",)
    assert 0 < table.differing_ranges < table.ranges


def test_f52_an_empty_table_and_one_row(source_db: Database, target_db: Database) -> None:
    on_both(source_db, target_db, "CREATE TABLE t (id int PRIMARY KEY)")
    assert compare_one(source_db, target_db).equal
    source_db.execute("INSERT INTO t VALUES (1)")
    assert compare_one(source_db, target_db).missing.keys == ("(1)",)
    target_db.execute("INSERT INTO t VALUES (1)")
    assert compare_one(source_db, target_db).equal


def test_odd_keys_and_column_names(pair: tuple[Database, Database]) -> None:
    """Under `ucs_basic` on one side: of the collations that these servers have, none has another order."""
    for database, collation in zip(pair, ("ucs_basic", "C"), strict=True):
        database.execute(
            f'CREATE TABLE t ("key %s" text COLLATE "{collation}", "a ""b"" {{c}}" text, part int,'
            ' PRIMARY KEY ("key %s", "a ""b"" {c}"))'
        )
        with database.connect() as connection:
            connection.cursor().executemany(
                "INSERT INTO t VALUES (%s, %s, 1)", [(one, other) for one in ODD for other in ODD]
            )
    assert compare_one(*pair).equal
    pair[1].execute("""UPDATE t SET part = 2 WHERE "key %s" IN ('世界', 'a')""")
    table = compare_one(*pair, parts=7, max_keys=3)
    assert table.different.count == 2 * len(ODD)
    assert table.different.keys == ('(a," ")', '(a,"")', '(a,"(paren)")')


def test_duplicates_in_a_table_without_key_are_counted(pair: tuple[Database, Database]) -> None:
    source, target = pair
    on_both(
        source,
        target,
        "CREATE TABLE t (v text, n int)",
        "INSERT INTO t SELECT 'same', 1 FROM generate_series(1, 1000)",
        "INSERT INTO t SELECT 'row', x FROM generate_series(1, 1000) x",
    )
    assert compare_one(source, target).equal
    source.execute("INSERT INTO t VALUES ('same', 1), ('same', 1), ('only here', NULL)")
    target.execute("INSERT INTO t VALUES ('row', 7)")
    table = compare_one(source, target)
    assert (table.missing.count, table.extra.count, table.different.count) == (3, 1, 0)
    assert [key.partition(" #")[0] for key in table.missing.keys] == ['("only here",)', "(same,1)"]
    assert table.extra.keys[0].startswith("(row,7) #")


def test_a_target_with_one_key_twice_differs(source_db: Database, target_db: Database) -> None:
    source_db.execute("CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t VALUES (1, 'a'), (2, 'b')")
    target_db.execute("CREATE TABLE t (id int, v text); INSERT INTO t VALUES (1, 'a'), (2, 'b'), (2, 'b'), (1, 'c')")
    table = compare_one(source_db, target_db)
    assert table.extra.keys == ("(1)", "(2)")


def test_f45_only_filtered_rows_and_chosen_columns_are_compared(source_db: Database, target_db: Database) -> None:
    source_db.execute(
        "CREATE TABLE t (id int PRIMARY KEY, secret text, v text, region text);"
        "INSERT INTO t SELECT x, 'secret ' || x, 'v', CASE WHEN x % 2 = 0 THEN '50%' ELSE 'us' END"
        "  FROM generate_series(1, 100) x"
    )
    target_db.execute(
        "CREATE TABLE t (region text, note text DEFAULT 'mine', v text, id int PRIMARY KEY);"
        "INSERT INTO t (id, v, region) SELECT x, 'v', '50%' FROM generate_series(2, 100, 2) x"
    )
    options = TableOptions(columns=("id", "v", "region"), where="region = '50%' AND t.id > 0")
    sink = SinkConfig(name="mirror", source="shop", tables={"public.t": options})
    assert compare_one(source_db, target_db, sink).equal
    target_db.execute("INSERT INTO t (id, v, region) VALUES (1, 'v', 'us')")
    assert compare_one(source_db, target_db, sink).extra.keys == ("(1)",), "a row that the filter keeps away"


def test_renamed_tables_and_schemas(source_db: Database, target_db: Database) -> None:
    source_db.execute(
        "CREATE TABLE a (id int PRIMARY KEY); CREATE TABLE b (id int PRIMARY KEY); INSERT INTO a VALUES (1)"
    )
    target_db.execute(
        'CREATE SCHEMA shop; CREATE SCHEMA "Other %"; CREATE TABLE shop.b (id int PRIMARY KEY);'
        'CREATE TABLE "Other %"."x.y" (id int PRIMARY KEY); INSERT INTO "Other %"."x.y" VALUES (1)'
    )
    sink = SinkConfig(name="mirror", source="shop", rename={"public": "shop", "public.a": "Other %.x.y"})
    report = compare(source_db, target_db, sink)
    assert report.equal, report
    assert sum(table.source_rows for table in report.tables) == 1


def test_f27_generated_columns_are_left_to_each_server(source_db: Database, target_db: Database) -> None:
    source_db.execute("CREATE TABLE t (id int PRIMARY KEY, twice int GENERATED ALWAYS AS (id * 2) STORED)")
    target_db.execute("CREATE TABLE t (id int PRIMARY KEY)")
    on_both(source_db, target_db, "INSERT INTO t (id) VALUES (1)")
    assert compare_one(source_db, target_db).equal


def test_f26_a_partitioned_table_equals_a_plain_one_and_children_are_no_part_of_a_plain_one(
    source_db: Database, target_db: Database
) -> None:
    source_db.execute(
        "CREATE TABLE t (id int PRIMARY KEY, v text) PARTITION BY RANGE (id);"
        "CREATE TABLE t1 PARTITION OF t FOR VALUES FROM (0) TO (500); CREATE TABLE t2 PARTITION OF t DEFAULT;"
        "CREATE TABLE p (id int PRIMARY KEY); CREATE TABLE c (PRIMARY KEY (id)) INHERITS (p); INSERT INTO c VALUES (1)"
    )
    target_db.execute(
        "CREATE TABLE t (id int PRIMARY KEY, v text); CREATE TABLE p (id int PRIMARY KEY);"
        "CREATE TABLE c (id int PRIMARY KEY); INSERT INTO c VALUES (1)"
    )
    on_both(source_db, target_db, "INSERT INTO t SELECT x, 'v' FROM generate_series(1, 1000) x")
    report = compare(source_db, target_db)
    assert report.equal, report
    assert {table.table: table.source_rows for table in report.tables} == {
        "public.t": 1000,
        "public.p": 0,
        "public.c": 1,
    }


def test_f102_what_is_missing_on_the_mirror_is_named_and_the_rest_compared(
    source_db: Database, target_db: Database
) -> None:
    on_both(source_db, target_db, "CREATE TABLE good (id int PRIMARY KEY)")
    source_db.execute("CREATE TABLE gone (id int PRIMARY KEY); CREATE TABLE narrow (id int PRIMARY KEY, a int, b int)")
    target_db.execute("CREATE TABLE narrow (id int PRIMARY KEY)")
    report = compare(source_db, target_db)
    problems = {table.table: table.problem for table in report.tables}
    assert not report.equal
    assert problems == {
        "public.good": "",
        "public.gone": "the mirror has no table public.gone",
        "public.narrow": "the mirror's table public.narrow has no column a, b",
    }


def test_f39_encodings_that_differ(postgres18: PostgresServer, target18: PostgresServer) -> None:
    """A LATIN1 source and its UTF8 mirror have other bytes in other orders, and the same characters."""
    with postgres18.connect() as connection:
        connection.execute("CREATE DATABASE latin ENCODING LATIN1 LOCALE_PROVIDER libc LOCALE 'C' TEMPLATE template0")
    source, target = Database(postgres18, "latin"), target18.create_database("latin_mirror")
    try:
        on_both(
            source,
            target,
            "CREATE TABLE t (k text PRIMARY KEY, v text)",
            "INSERT INTO t SELECT 'Ä' || x, 'grüß \\ ' || x FROM generate_series(1, 300) x",
        )
        table = compare_one(source, target)
        assert table.equal
        assert table.ranges > 30
        target.execute("UPDATE t SET v = 'grüss' WHERE k = 'Ä7'; INSERT INTO t VALUES ('€', '')")
        table = compare_one(source, target)
        assert (table.different.keys, table.extra.keys) == (("(Ä7)",), ("(€)",))
    finally:
        source.drop()
        target.drop()


def test_f118_row_level_security_is_an_error_and_never_half_a_table(source_db: Database, target_db: Database) -> None:
    on_both(source_db, target_db, "CREATE TABLE t (id int PRIMARY KEY)", "INSERT INTO t VALUES (1)")
    role = f"verifier_{source_db.name}"
    source_db.execute(
        f"CREATE ROLE {role} LOGIN REPLICATION; GRANT SELECT ON t TO {role}; ALTER TABLE t ENABLE ROW LEVEL SECURITY"
    )
    try:
        comparison = plan(source_db, target_db)
        url = source_db.server.url(source_db.name, user=role)
        views = comparison.source_view(url), comparison.target_view(target_db.url)
        with pytest.raises(Exception, match="row-level security"):
            verify(*views, comparison.tables)
    finally:
        source_db.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


def test_many_differences_are_bounded_and_counted_where_they_can_be(
    source_db: Database, target_db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cdc.verify.LISTED_ROWS", 100)
    on_both(
        source_db,
        target_db,
        "CREATE TABLE t (id int PRIMARY KEY, v text)",
        "INSERT INTO t SELECT x, 'v' FROM generate_series(1, 5000) x",
    )
    target_db.execute("UPDATE t SET v = 'w' WHERE id IN (1, 2, 999, 2500, 2501, 4999)")
    table = compare_one(source_db, target_db, parts=4, max_keys=4)
    assert table.different.count == 6
    assert table.different.keys == ("(1)", "(2)", "(2500)", "(2501)")
    target_db.execute("UPDATE t SET v = 'x'")
    (table,) = compare(source_db, target_db).tables
    assert not table.counted
    assert table.differing_ranges == table.ranges
    assert 20 <= table.different.count < 5000
    assert len(table.different.keys) == 20
    target_db.execute("TRUNCATE t")
    table = compare_one(source_db, target_db)
    assert (table.missing.count, len(table.missing.keys)) == (5000, 20)


def test_a_million_equal_rows_without_key_cannot_be_split_and_need_not_be(
    source_db: Database, target_db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cdc.verify.LISTED_ROWS", 100)
    on_both(source_db, target_db, "CREATE TABLE t (v text)", "INSERT INTO t SELECT 'v' FROM generate_series(1, 20000)")
    source_db.execute("INSERT INTO t VALUES ('v')")
    assert compare_one(source_db, target_db).missing.count == 1


def test_views_do_not_see_what_comes_later_and_tables_cannot_be_emptied_meanwhile(
    source_db: Database, target_db: Database
) -> None:
    on_both(source_db, target_db, "CREATE TABLE t (id int PRIMARY KEY)", "INSERT INTO t VALUES (1)")
    comparison = plan(source_db, target_db)
    views = comparison.source_view(source_db.url), comparison.target_view(target_db.url)
    source_db.execute("INSERT INTO t VALUES (2)")
    target_db.execute("DELETE FROM t")
    for database in (source_db, target_db):
        with database.connect() as connection, pytest.raises(Exception, match="lock timeout"):
            connection.execute("SET lock_timeout = '50ms'; TRUNCATE t")
    assert verify(*views, comparison.tables).equal
    on_both(source_db, target_db, "TRUNCATE t")


def test_a_truncate_that_waits_does_not_stop_the_verify_it_waits_for(source_db: Database, target_db: Database) -> None:
    on_both(source_db, target_db, "CREATE TABLE t (id int PRIMARY KEY)", "INSERT INTO t VALUES (1)")
    comparison = plan(source_db, target_db)
    waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 't'::regclass"
    for view, database in [
        (comparison.source_view(source_db.url), source_db),
        (comparison.target_view(target_db.url), target_db),
    ]:
        with closing(view), closing(view.reader()) as reader, ThreadPoolExecutor(1) as thread:
            truncated = thread.submit(database.execute, "TRUNCATE t")
            wait_until(partial(database.value, waiting), what="the TRUNCATE to wait")
            (digest,) = reader.digest(comparison.tables[0], [KeyRange()])
            assert digest.rows == 1
            reader.close()
            view.close()
            truncated.result(timeout=30)


class Failing:
    """A side that fails while the other one is busy for minutes."""

    def bounds(self, table: TableName, parts: int) -> list[str]:
        return []

    def digest(self, table: TableName, ranges: list[KeyRange]) -> list[RangeDigest]:
        raise TransientError("connection lost")

    def cancel(self) -> None: ...

    def close(self) -> None: ...

    def reader(self) -> Comparable:
        return self  # type: ignore[return-value]


def test_an_error_on_one_side_cancels_the_other(source_db: Database, target_db: Database) -> None:
    on_both(source_db, target_db, "CREATE TABLE t (id int PRIMARY KEY)", "INSERT INTO t VALUES (1)")
    comparison = plan(source_db, target_db)
    slow = {
        name: msgspec.structs.replace(table, where="pg_sleep(600) IS NOT NULL")
        for name, table in comparison.target.items()
    }
    view = msgspec.structs.replace(comparison, target=slow).target_view(target_db.url)
    with pytest.raises(TransientError, match="connection lost"):
        verify(Failing(), view, comparison.tables)
    wait_until(
        lambda: (
            target_db.value("SELECT count(*) FROM pg_stat_activity WHERE query ~ 'pg_sleep' AND query !~ 'count'") == 0
        ),
        what="the slow query to end",
    )
