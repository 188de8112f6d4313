"""Publications on real servers: what we create never breaks the user's own statements, what exists is compared."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest

from cdc.change import TableName
from cdc.config import Config, SourceConfig
from cdc.config_file import parse
from cdc.errors import CdcError, FatalError
from cdc.postgres.connection import connect
from cdc.postgres.publication import Publication, captured_tables, desired_publications
from cdc.postgres.publication_check import check_publications, identity_fault, parse_filter, publication_problems
from cdc.postgres.publication_setup import (
    create_publications,
    drop_publications,
    existing_publications,
    extend_publications,
)
from cdc.postgres.schema import read_tables
from cdc.preflight import Finding
from tests.servers import Database, PostgresServer

KEY = "CREATE TABLE t (id int PRIMARY KEY, v int, w text)"


def configured(database: Database, *, options: dict[str, Any] | None = None, **source: Any) -> Config:
    """A configuration with one source, and one sink for each entry of the list `options["sinks"]`."""
    raw: dict[str, Any] = {"sources": {"shop": {"url": database.url} | source}, "sinks": {}}
    for number, tables in enumerate((options or {}).get("sinks", [])):
        raw["sinks"][f"sink{number}"] = {"from": "shop", "url": database.url, "tables": tables}
    return parse(raw, {})


def desired(database: Database, config: Config) -> tuple[Publication, ...]:
    with connect(database.url) as connection:
        return desired_publications(config, source_of(config), read_tables(connection))


def source_of(config: Config) -> SourceConfig:
    return config.sources["shop"]


def create(database: Database, config: Config) -> list[str]:
    with connect(database.url) as connection:
        return create_publications(connection, desired(database, config))


def problems(database: Database, config: Config) -> list[Finding]:
    with connect(database.url) as connection:
        return list(publication_problems(connection, desired(database, config)))


def check(database: Database, config: Config) -> list[Finding]:
    with connect(database.url) as connection:
        return list(check_publications(connection, desired(database, config)))


def only(findings: list[Finding]) -> Finding:
    (finding,) = findings
    assert finding.level == "error"
    return finding


def published(database: Database) -> set[tuple[str, str]]:
    return set(database.execute("SELECT pubname, schemaname || '.' || tablename FROM pg_publication_tables"))


def test_tables_are_chosen_by_globs(source_db: Database) -> None:
    source_db.execute(
        "CREATE SCHEMA cdc; CREATE TABLE cdc.position (id int PRIMARY KEY); CREATE TABLE a (id int PRIMARY KEY);"
        'CREATE TABLE b (id int PRIMARY KEY); CREATE SCHEMA "S p"; CREATE TABLE "S p"."T ""t" (id int PRIMARY KEY)'
    )
    config = configured(source_db, tables={"include": ["*"], "exclude": ["public.b"]})
    with connect(source_db.url) as connection:
        chosen = {table.name for table in captured_tables(source_of(config), read_tables(connection))}
    assert chosen == {TableName("public", "a"), TableName("S p", 'T "t')}
    assert create(source_db, config) == ["cdc_shop"]
    assert published(source_db) == {("cdc_shop", "public.a"), ("cdc_shop", 'S p.T "t')}


def test_created_publications_are_complete(postgres: PostgresServer, source_db: Database) -> None:
    source_db.execute(KEY + "; CREATE TABLE log (line text)")
    config = configured(source_db, insert_only=["public.log"])
    assert create(source_db, config) == ["cdc_shop", "cdc_shop_insert_only"]
    assert published(source_db) == {("cdc_shop", "public.t"), ("cdc_shop_insert_only", "public.log")}
    columns = "pubname, pubinsert, pubupdate, pubdelete, pubtruncate, pubviaroot"
    assert source_db.execute(f"SELECT {columns} FROM pg_publication ORDER BY 1") == [
        ("cdc_shop", True, True, True, True, True),
        ("cdc_shop_insert_only", True, False, False, True, True),
    ]
    assert check(source_db, config) == []
    assert create(source_db, config) == []


def test_only_missing_publications_are_created(source_db: Database) -> None:
    source_db.execute(KEY + "; CREATE TABLE log (line text); CREATE PUBLICATION cdc_shop FOR TABLE t")
    config = configured(source_db, insert_only=["public.log"])
    assert create(source_db, config) == ["cdc_shop_insert_only"]
    with connect(source_db.url) as connection:
        assert existing_publications(connection, source_of(config)) == ("cdc_shop", "cdc_shop_insert_only")
        drop_publications(connection, source_of(config))
        drop_publications(connection, source_of(config))
        assert existing_publications(connection, source_of(config)) == ()


def test_inheritance_publishes_only_what_is_configured(source_db: Database) -> None:
    source_db.execute(KEY + "; CREATE TABLE child () INHERITS (t)")
    create(source_db, configured(source_db, tables={"include": ["public.t"]}))
    assert published(source_db) == {("cdc_shop", "public.t")}


def test_f26_partitioned_table_is_published_by_its_root(postgres: PostgresServer, source_db: Database) -> None:
    source_db.execute(
        "CREATE TABLE t (id int PRIMARY KEY) PARTITION BY RANGE (id); CREATE TABLE t1 PARTITION OF t DEFAULT"
    )
    config = configured(source_db)
    create(source_db, config)
    assert published(source_db) == {("cdc_shop", "public.t")}
    source_db.execute("ALTER PUBLICATION cdc_shop SET (publish_via_partition_root = false)")
    finding = only(check(source_db, config))
    assert "partitions" in finding.message
    source_db.execute(finding.fix)
    assert check(source_db, config) == []


IDENTITIES = {
    "key": KEY,
    "composite-key": "CREATE TABLE t (a int, b int, v int, PRIMARY KEY (b, a))",
    "key-beside-generated": "CREATE TABLE t (id int PRIMARY KEY, v int, g int GENERATED ALWAYS AS (id + 1) STORED)",
    "index": "CREATE TABLE t (id int NOT NULL, v int); CREATE UNIQUE INDEX i ON t (id);"
    "ALTER TABLE t REPLICA IDENTITY USING INDEX i",
    "full": "CREATE TABLE t (v int); ALTER TABLE t REPLICA IDENTITY FULL",
    "none": "CREATE TABLE t (v int)",
    "nothing": KEY + "; ALTER TABLE t REPLICA IDENTITY NOTHING",
    "deferrable-key": "CREATE TABLE t (id int PRIMARY KEY DEFERRABLE, v int)",
    "deferrable-key-but-full": "CREATE TABLE t (id int PRIMARY KEY DEFERRABLE, v int);"
    "ALTER TABLE t REPLICA IDENTITY FULL",
    "dropped-index": "CREATE TABLE t (id int PRIMARY KEY, n int NOT NULL, v int); CREATE UNIQUE INDEX i ON t (n);"
    "ALTER TABLE t REPLICA IDENTITY USING INDEX i; DROP INDEX i",
    "full-with-generated": "CREATE TABLE t (v int, g int GENERATED ALWAYS AS (v + 1) STORED);"
    "ALTER TABLE t REPLICA IDENTITY FULL",
    "full-with-key-and-generated": "CREATE TABLE t (id int PRIMARY KEY, v int,"
    " g int GENERATED ALWAYS AS (v + 1) STORED); ALTER TABLE t REPLICA IDENTITY FULL",
}


@pytest.mark.parametrize("shape", IDENTITIES)
def test_f17_f18_f21_identity_is_judged_as_the_server_does(
    postgres: PostgresServer, source_db: Database, shape: str
) -> None:
    """What we call publishable, the user can update once it is published; and nothing else; and our fix cures it."""
    source_db.execute(IDENTITIES[shape])
    config = configured(source_db)
    findings = problems(source_db, config)
    source_db.execute("CREATE PUBLICATION everything FOR ALL TABLES")
    assert updatable(source_db) is (not findings)
    if findings:
        with pytest.raises(FatalError, match=r"public\.t: .*every UPDATE and DELETE of it would fail") as raised:
            create(source_db, config)
        assert raised.value.hint == findings[0].fix
        assert ("everything", "public.t") in published(source_db)
        assert ("cdc_shop", "public.t") not in published(source_db)
        statement = findings[0].fix.partition(";")[0]
        if not statement.endswith("..."):
            source_db.execute(statement)
            assert updatable(source_db)
            assert problems(source_db, config) == []


def test_f17_generated_key(postgres: PostgresServer, source_db: Database) -> None:
    """Before 18 the server accepts it and sends rows without any identity: refused all the same."""
    source_db.execute("CREATE TABLE t (id int GENERATED ALWAYS AS (v + 1) STORED PRIMARY KEY, v int)")
    finding = only(problems(source_db, configured(source_db)))
    assert "includes a generated column" in finding.message
    source_db.execute("CREATE PUBLICATION everything FOR ALL TABLES")
    assert updatable(source_db) is (postgres.version < 18)


def test_f17_virtual_generated_column(source_db: Database) -> None:
    source_db.execute("CREATE TABLE t (v int, g int GENERATED ALWAYS AS (v + 1)); ALTER TABLE t REPLICA IDENTITY FULL")
    finding = only(problems(source_db, configured(source_db)))
    assert "includes a generated column" in finding.message
    source_db.execute("CREATE PUBLICATION everything FOR ALL TABLES")
    assert not updatable(source_db)


def updatable(database: Database) -> bool:
    """Whether the user may still update and delete rows of `t`."""
    with database.connect(autocommit=False) as connection:
        try:
            connection.execute("UPDATE t SET v = v")
            connection.execute("DELETE FROM t")
        except (psycopg.errors.ObjectNotInPrerequisiteState, psycopg.errors.InvalidColumnReference):
            return False
        finally:
            connection.rollback()
    return True


def test_f17_f21_insert_only_table_stays_updatable(postgres: PostgresServer, source_db: Database) -> None:
    source_db.execute("CREATE TABLE t (v int)")
    config = configured(source_db, insert_only=["public.*"])
    assert problems(source_db, config) == []
    assert create(source_db, config) == ["cdc_shop_insert_only"]
    assert updatable(source_db)
    source_db.execute("CREATE PUBLICATION cdc_shop FOR ALL TABLES; DROP PUBLICATION cdc_shop_insert_only")
    source_db.execute("ALTER PUBLICATION cdc_shop RENAME TO cdc_shop_insert_only")
    assert not updatable(source_db)
    finding = only(check(source_db, config))
    assert "published with updates" in finding.message


def test_f17_nothing_is_created_when_one_table_is_refused(source_db: Database) -> None:
    source_db.execute(KEY + "; CREATE TABLE a (v int); CREATE TABLE b (v int); CREATE TABLE log (v int)")
    with pytest.raises(FatalError, match=r"public\.a: .* \(and 1 more"):
        create(source_db, configured(source_db, insert_only=["public.log"]))
    assert published(source_db) == set()


@pytest.mark.parametrize(
    ("root", "leaf", "sound"),
    [
        ("DEFAULT", "DEFAULT", True),
        ("DEFAULT", "FULL", True),
        ("FULL", "DEFAULT", False),
        ("DEFAULT", "NOTHING", False),
    ],
)
def test_f17_f26_partition_has_an_identity_of_its_own(source_db: Database, root: str, leaf: str, sound: bool) -> None:
    source_db.execute(
        "CREATE TABLE t (id int PRIMARY KEY, v int) PARTITION BY RANGE (id); CREATE TABLE leaf PARTITION OF t DEFAULT;"
        f"ALTER TABLE t REPLICA IDENTITY {root}; ALTER TABLE leaf REPLICA IDENTITY {leaf}"
    )
    config = configured(source_db)
    findings = problems(source_db, config)
    assert (not findings) is sound
    for finding in findings:
        assert finding.subject == "public.leaf"
        source_db.execute(finding.fix)
    assert problems(source_db, config) == []


@pytest.mark.parametrize(
    ("where", "columns"),
    [
        ("id > 5", {"id"}),
        ("t.v = 1 AND w <> ')'", {"v", "w"}),
        ("true", set()),
        ("lower(w) = 'x'", {"w"}),
        ("coalesce(id, v) > 0 OR w IS NULL", {"id", "v", "w"}),
    ],
)
def test_filter_columns_are_found(postgres: PostgresServer, source_db: Database, where: str, columns: set[str]) -> None:
    """The server's own text of the expression is that of a publication, and nothing is left behind."""
    source_db.execute("CREATE TABLE t (gone int, v int, id int PRIMARY KEY, w text); ALTER TABLE t DROP COLUMN gone")
    source_db.execute(f"CREATE PUBLICATION p FOR TABLE t WHERE ({where})")
    with connect(source_db.url) as connection:
        parsed = parse_filter(connection, TableName("public", "t"), where)
        assert parsed.columns == columns
        query = "SELECT rowfilter FROM pg_publication_tables"
        assert connection.execute(query).fetchone() == (parsed.expression,)
        assert connection.execute("SELECT count(*) FROM pg_class WHERE relname = 't'").fetchone() == (1,)


def test_filter_that_is_no_sql(source_db: Database) -> None:
    source_db.execute(KEY)
    config = configured(source_db, options={"sinks": [{"public.t": {"where": "id >"}}]})
    finding = only(problems(source_db, config))
    assert "not valid" in finding.message
    assert finding.fix == 'correct sinks.*.tables."public.t".where'


def test_f17_filter_outside_the_identity(postgres: PostgresServer, source_db: Database) -> None:
    source_db.execute(KEY)
    config = configured(source_db, options={"sinks": [{"public.t": {"where": "id > 5 AND v = 1"}}]})
    finding = only(problems(source_db, config))
    assert "the row filter uses v" in finding.message
    with pytest.raises(FatalError, match="row filter uses v"):
        create(source_db, config)
    source_db.execute(finding.fix.partition(";")[0])
    assert create(source_db, config) == ["cdc_shop"]
    assert updatable(source_db)
    assert check(source_db, config) == []


def test_f20_switched_identity_is_judged_anew(postgres: PostgresServer, source_db: Database) -> None:
    """A filter that fitted the old identity makes the user's UPDATE fail under the new one: said by the next check."""
    source_db.execute("CREATE TABLE t (id int PRIMARY KEY, n int NOT NULL, v int); CREATE UNIQUE INDEX i ON t (n)")
    config = configured(source_db, options={"sinks": [{"public.t": {"where": "id > 5"}}]})
    create(source_db, config)
    assert updatable(source_db)
    source_db.execute("ALTER TABLE t REPLICA IDENTITY USING INDEX i")
    assert not updatable(source_db)
    finding = only(problems(source_db, config))
    assert "the row filter uses id" in finding.message
    source_db.execute("DROP INDEX i")
    assert [finding.message.partition(":")[0] for finding in problems(source_db, config)] == [
        "the index that was its replica identity is gone",
        "the row filter uses id, not part of the replica identity",
    ]


def test_f14_another_filter(postgres: PostgresServer, source_db: Database) -> None:
    source_db.execute(KEY)
    create(source_db, configured(source_db, options={"sinks": [{"public.t": {"where": "id>5"}}]}))
    assert check(source_db, configured(source_db, options={"sinks": [{"public.t": {"where": "(id > 5)"}}]})) == []
    config = configured(source_db, options={"sinks": [{"public.t": {"where": "id > 6"}}]})
    finding = only(check(source_db, config))
    assert "filters rows by (id > 5), not by (id > 6)" in finding.message
    apply_fix(source_db, finding)
    assert check(source_db, config) == []


def apply_fix(database: Database, finding: Finding) -> None:
    database.execute(finding.fix.replace("; then copy the table again", ""))


def test_column_list_is_the_union_of_what_sinks_want(postgres: PostgresServer, source_db: Database) -> None:
    source_db.execute(KEY)
    one, other = {"public.t": {"columns": ["id", "v"]}}, {"public.t": {"columns": ["w", "id"]}}
    config = configured(source_db, options={"sinks": [one, one]})
    create(source_db, config)
    assert source_db.value("SELECT attnames FROM pg_publication_tables") == ["id", "v"]
    assert check(source_db, config) == []
    for sinks in ([one, other], [one, {}]):
        finding = only(check(source_db, config := configured(source_db, options={"sinks": sinks})))
        assert "does not publish the columns w" in finding.message
    apply_fix(source_db, finding)
    assert check(source_db, config) == []
    assert source_db.value("SELECT prattrs FROM pg_publication_rel") is None


@pytest.mark.parametrize(
    ("columns", "message"),
    [(["v"], "leave out id"), (["id", "nonsense"], "no column nonsense"), (["id", "g"], "no column g")],
)
def test_column_list_that_cannot_be_published(source_db: Database, columns: list[str], message: str) -> None:
    source_db.execute("CREATE TABLE t (id int PRIMARY KEY, v int, g int GENERATED ALWAYS AS (v) STORED)")
    config = configured(source_db, options={"sinks": [{"public.t": {"columns": columns}}]})
    assert message in only(problems(source_db, config)).message


def test_f14_missing_publication(postgres: PostgresServer, source_db: Database) -> None:
    source_db.execute(KEY)
    config = configured(source_db)
    finding = only(check(source_db, config))
    assert (finding.subject, finding.message) == ("publication cdc_shop", "does not exist")
    source_db.execute(finding.fix)
    assert check(source_db, config) == []


def test_f14_table_that_is_not_covered(postgres: PostgresServer, source_db: Database) -> None:
    source_db.execute(KEY)
    config = configured(source_db)
    create(source_db, config)
    source_db.execute("CREATE TABLE another (id int PRIMARY KEY)")
    finding = only(check(source_db, config))
    assert finding.subject == "public.another"
    source_db.execute(finding.fix)
    assert check(source_db, config) == []


def test_f14_operation_that_is_not_published(postgres: PostgresServer, source_db: Database) -> None:
    source_db.execute(KEY + "; CREATE PUBLICATION cdc_shop FOR TABLE t WITH (publish = 'insert, update')")
    config = configured(source_db)
    finding = only(check(source_db, config))
    assert "does not publish delete, truncate" in finding.message
    source_db.execute(finding.fix)
    assert check(source_db, config) == []


@pytest.mark.parametrize("scope", ["ALL TABLES", "TABLES IN SCHEMA public"])
def test_f14_broad_publications_cover(postgres: PostgresServer, source_db: Database, scope: str) -> None:
    source_db.execute(KEY + f"; CREATE PUBLICATION cdc_shop FOR {scope}")
    assert check(source_db, configured(source_db)) == []


def test_f14_broad_publication_covers_insert_only_tables_too(source_db: Database) -> None:
    source_db.execute(KEY + "; CREATE TABLE log (id int PRIMARY KEY); CREATE PUBLICATION cdc_shop FOR ALL TABLES")
    assert check(source_db, configured(source_db, insert_only=["public.log"])) == []


def test_f27_generated_columns_are_not_published(source_db: Database) -> None:
    source_db.execute(
        "CREATE TABLE t (id int PRIMARY KEY, g int GENERATED ALWAYS AS (id) STORED);"
        "CREATE PUBLICATION cdc_shop FOR TABLE t WITH (publish_generated_columns = stored)"
    )
    assert "publishes the generated columns g" in only(check(source_db, configured(source_db))).message
    source_db.execute("DROP PUBLICATION cdc_shop")
    create(source_db, configured(source_db))
    assert check(source_db, configured(source_db)) == []


def test_missing_privilege_names_the_statement(postgres: PostgresServer, source_db: Database) -> None:
    role = f"{source_db.name}_role"
    source_db.execute(KEY + f"; CREATE ROLE {role} LOGIN; GRANT CREATE ON DATABASE {source_db.name} TO {role}")
    try:
        publications = desired(source_db, configured(source_db))
        with (
            connect(source_db.server.url(source_db.name, user=role)) as connection,
            pytest.raises(FatalError, match="publication cdc_shop cannot be created: must be owner") as raised,
        ):
            create_publications(connection, publications)
    finally:
        source_db.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")
    assert 'CREATE PUBLICATION "cdc_shop" FOR TABLE ONLY "public"."t"' in raised.value.hint


def test_f16_a_table_that_only_a_superuser_can_publish_names_the_statement(source_db: Database) -> None:
    role = f"{source_db.name}_role"
    source_db.execute(KEY + f"; CREATE ROLE {role} LOGIN")
    create(source_db, configured(source_db))
    source_db.execute("CREATE TABLE new (id int PRIMARY KEY)")
    try:
        publications = desired(source_db, configured(source_db))
        with (
            connect(source_db.server.url(source_db.name, user=role)) as connection,
            pytest.raises(
                FatalError, match=r"cannot be added to the publication \(public.new\): must be owner"
            ) as raised,
        ):
            extend_publications(connection, publications)
    finally:
        source_db.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")
    assert raised.value.hint == 'as a superuser: ALTER PUBLICATION "cdc_shop" ADD TABLE ONLY "public"."new"'


def test_f17_identity_fault_on_old_servers(source_db: Database) -> None:
    source_db.execute(IDENTITIES["full-with-generated"])
    with connect(source_db.url) as connection:
        (table,) = read_tables(connection).values()
    assert identity_fault(table, 170000) is None
    assert identity_fault(table, 180000) is not None


def test_failed_creation_is_one_error(source_db: Database) -> None:
    source_db.execute("CREATE TABLE t (id int PRIMARY KEY)")
    config = configured(source_db, options={"sinks": [{"public.t": {"where": "id > pg_catalog.random()"}}]})
    with pytest.raises(CdcError, match="WHERE"):
        create(source_db, config)
    assert published(source_db) == set()
