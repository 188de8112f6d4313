"""`cdc init`: from nothing to a configuration, and a role that may do what the daemon must, and no more."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from cdc import first_config
from cdc.config_file import load, parse
from cdc.first_config import Wanted
from sinks import options_of
from tests.command import Cdc, assert_complaint
from tests.processes import wait_until
from tests.servers import Database

SHOP = """
    CREATE SCHEMA sales; CREATE SCHEMA secret;
    CREATE TABLE sales.orders (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, total numeric NOT NULL, note text);
    CREATE TABLE "sales"."Odd name" (id serial PRIMARY KEY, v text);
    CREATE TABLE sales.log (line text); ALTER TABLE sales.log REPLICA IDENTITY FULL;
    CREATE TABLE sales.days (day date PRIMARY KEY, v int) PARTITION BY RANGE (day);
    CREATE TABLE sales.days_1 PARTITION OF sales.days FOR VALUES FROM ('2020-01-01') TO ('2030-01-01');
    CREATE TABLE sales.hidden (id int PRIMARY KEY, owner text); ALTER TABLE sales.hidden ENABLE ROW LEVEL SECURITY;
    CREATE TABLE secret.salaries (id int PRIMARY KEY, amount int);
    ALTER TABLE sales.orders ADD clerk int REFERENCES secret.salaries;
    CREATE VIEW sales.paid AS SELECT amount FROM secret.salaries;
    CREATE VIEW sales.best AS SELECT max(amount) FROM sales.paid;
    CREATE FUNCTION sales.of_row(secret.salaries) RETURNS int LANGUAGE sql AS 'SELECT 1';
    CREATE VIEW sales.large AS SELECT id FROM sales.orders WHERE total > 500;
    INSERT INTO sales.orders (total) SELECT g FROM generate_series(1, 1000) g;
    INSERT INTO sales."Odd name" (v) VALUES ('a'), ('b'); INSERT INTO sales.log VALUES ('one');
    INSERT INTO sales.days VALUES ('2024-05-01', 1); INSERT INTO sales.hidden VALUES (1, 'x')
"""
CHANGES = """
    INSERT INTO sales.orders (total) VALUES (7); UPDATE sales.orders SET note = 'x' WHERE id <= 10;
    DELETE FROM sales.orders WHERE id = 20; UPDATE sales.log SET line = 'two'; UPDATE sales.days SET v = 2;
    UPDATE sales.hidden SET owner = 'y'; DELETE FROM sales."Odd name" WHERE v = 'a'
"""
TABLES = ("sales.orders", 'sales."Odd name"', "sales.log", "sales.days", "sales.hidden")


@pytest.fixture
def role(source_db: Database, target_db: Database) -> Iterator[str]:
    """Made by what is printed, on both servers; all it has goes with it."""
    name = f"cdc_{source_db.name}"
    yield name
    for database in (source_db, target_db):
        parameter = f"REVOKE SET ON PARAMETER session_replication_role FROM {name}"
        database.execute(
            f"DROP OWNED BY {name} CASCADE; {parameter if database is target_db else ''}; DROP ROLE {name}"
        )


@pytest.fixture
def begun(cdc: Cdc, source_db: Database, target_db: Database, role: str, pg_dump: Path, monkeypatch: Any) -> Cdc:
    """`cdc init` has run, its scripts too, and all that follows is done by the role."""
    monkeypatch.setenv("PATH", f"{pg_dump.parent}:{os.environ['PATH']}")
    source_db.execute(SHOP)
    urls = {"CDC_URL": source_db.url, "CDC_MIRROR_URL": target_db.url}
    tables = ("--tables", "sales.*", "--name", "shop", "--data-dir", str(cdc.data_dir))
    made = cdc("init", "--role", role, *tables, **urls)
    assert made.returncode == 0, made.stderr
    at_source, at_mirror = scripts(made)
    run(source_db, at_source)
    run(target_db, at_mirror)
    monkeypatch.setenv("SHOP_PASSWORD", "not-asked-for")
    monkeypatch.setenv("MIRROR_PASSWORD", "not-asked-for")
    with cdc.file.open("a") as file:
        file.write('\n[http]\naddress = "127.0.0.1:0"\n[queue]\nmin_free_bytes = 0\nmax_bytes = 10000000\n')
    return cdc


def scripts(made: subprocess.CompletedProcess[str]) -> list[str]:
    """What is for an administrator, one of each server."""
    return [part.partition("\n")[2] for part in made.stdout.split("-- for an administrator, at ")[1:]]


def run(database: Database, script: str) -> None:
    """As psql does: one statement after the other."""
    for statement in script.split(";\n"):
        if statement.strip():
            database.execute(statement)


def rows(database: Database) -> list[list[Any]]:
    return [database.execute(f"SELECT t::text FROM {table} AS t ORDER BY 1") for table in TABLES]


def test_everything_is_done_by_a_role_that_is_no_superuser(
    begun: Cdc, source_db: Database, target_db: Database, role: str
) -> None:
    checked = begun("check")
    assert checked.returncode == 0, checked.stdout
    copied = begun("copy")
    assert copied.returncode == 0, copied.stderr
    assert rows(source_db) == rows(target_db)
    with begun.running():
        begun.wait_for_sink("running")
        source_db.execute(CHANGES)
        verified = begun("verify")
        assert verified.returncode == 0, verified.stdout + verified.stderr
        target_db.execute("UPDATE sales.orders SET note = 'wrong' WHERE id = 1; DELETE FROM sales.log")
        assert begun("verify").returncode == 1
        ordered = begun("resync", "mirror")
        assert ordered.returncode == 0, ordered.stderr
        wait_until(lambda: rows(source_db) == rows(target_db), what=lambda: f"the resync: {begun.status()}")
        assert begun("verify").returncode == 0
    assert rows(source_db) == rows(target_db)
    views = "SELECT viewname::text FROM pg_views WHERE schemaname = 'sales'"
    assert target_db.execute(views) == [("large",)]
    for database in (source_db, target_db):
        query = f"SELECT rolsuper, rolcreaterole, rolcreatedb FROM pg_roles WHERE rolname = '{role}'"
        assert database.execute(query) == [(False, False, False)]


def test_f15_a_new_table_that_the_role_may_not_read_stops_the_mirror(
    begun: Cdc, source_db: Database, target_db: Database, role: str
) -> None:
    def sink() -> Any:
        return begun.status()["sinks"]["mirror"]

    assert begun("copy").returncode == 0
    with begun.running():
        begun.wait_for_sink("running")
        source_db.execute("CREATE TABLE sales.more (id int PRIMARY KEY); INSERT INTO sales.more VALUES (1)")
        begun.wait_for_sink("failed")
        assert "permission denied for table more" in sink()["error"]
        assert "`cdc check` says what is missing" in sink()["hint"]
        assert "GRANT SELECT" in begun("check").stdout
        source_db.execute(f"GRANT SELECT ON sales.more TO {role}; ALTER PUBLICATION cdc_shop ADD TABLE sales.more")
        assert begun("resume", "mirror").returncode == 0
        source_db.execute("INSERT INTO sales.more VALUES (2)")
        wait_until(lambda: target_db.value("SELECT to_regclass('sales.more') IS NOT NULL"), what=lambda: begun.log)
        wait_until(lambda: target_db.execute("TABLE sales.more") == [(1,), (2,)], what=lambda: begun.log)


def test_the_role_may_not_read_what_is_not_captured(begun: Cdc, source_db: Database, role: str) -> None:
    with psycopg.connect(source_db.server.url(source_db.name, user=role), autocommit=True) as connection:
        for statement in (
            "SELECT * FROM secret.salaries",
            "INSERT INTO sales.log VALUES ('x')",
            "CREATE TABLE sales.mine (id int)",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(statement)


def test_scripts_may_be_run_again(begun: Cdc, source_db: Database, target_db: Database, role: str) -> None:
    urls = {"CDC_URL": source_db.url, "CDC_MIRROR_URL": target_db.url}
    again = cdc_again(begun, role, urls)
    at_source, at_mirror = scripts(again)
    run(source_db, at_source)
    run(target_db, at_mirror)
    assert "CREATE PUBLICATION" not in at_source


def cdc_again(begun: Cdc, role: str, urls: dict[str, str]) -> subprocess.CompletedProcess[str]:
    again = begun("init", "--force", "--role", role, "--tables", "sales.*", "--name", "shop", **urls)
    assert again.returncode == 0, again.stderr
    return again


def test_nothing_is_written_over_unasked(cdc: Cdc, source_db: Database) -> None:
    cdc.file.write_text("mine")
    assert_complaint(cdc("init", "--url", source_db.url), 1, "is there already", "--force")
    assert cdc.file.read_text() == "mine"
    assert cdc("init", "--url", source_db.url, "--force").returncode == 0
    assert "[sources." in cdc.file.read_text()


def test_what_keeps_it_from_being_captured_is_told(cdc: Cdc, source_db: Database) -> None:
    source_db.execute("CREATE SCHEMA s; CREATE TABLE s.keyless (v int); CREATE TABLE public.t (id int PRIMARY KEY)")
    made = cdc("init", "--url", source_db.url)
    assert "found s, 1 tables" in made.stderr
    assert "PostgreSQL 18" in made.stderr
    assert "wal_level: logical" in made.stderr
    assert "REPLICA IDENTITY FULL" in made.stderr
    assert f'CREATE DATABASE "{source_db.name}_backup" OWNER "cdc";' in made.stdout
    assert tomllib.loads(cdc.file.read_text())["sources"][source_db.name]["tables"]["include"] == ["public.*", "s.*"]


def test_globs_that_match_no_table_are_refused_with_what_there_is(cdc: Cdc, source_db: Database) -> None:
    source_db.execute("CREATE SCHEMA s; CREATE TABLE s.t (id int PRIMARY KEY); CREATE TABLE public.t (id int)")
    result = cdc("init", "--url", source_db.url, "--tables", "nope.*", "--tables", "Public.t")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.splitlines()[-2:] == [
        "error: no table matches nope.*, Public.t",
        "hint: there are public.t, s.t; --tables takes globs over schema.table, in which case counts",
    ]
    assert list(cdc.folder.iterdir()) == []


def test_one_of_several_globs_that_matches_nothing_is_named(cdc: Cdc, source_db: Database) -> None:
    source_db.execute("CREATE TABLE public.t (id int PRIMARY KEY)")
    result = cdc("init", "--url", source_db.url, "--tables", "public.*", "--tables", "nope.*")
    assert result.returncode == 0
    assert "! tables: 1 captured, of which none matches nope.*" in result.stderr


def test_globs_that_match_no_collection_are_refused_likewise(cdc: Cdc, mongodb: str, mongo_database: Any) -> None:
    mongo_database.orders.insert_one({"a": 1})
    result = cdc("init", "--tables", "nope.*", CDC_URL=mongodb.replace("/?", f"/{mongo_database.name}?"))
    assert (result.returncode, result.stdout) == (2, "")
    assert "error: no collection matches nope.*" in result.stderr
    assert f"{mongo_database.name}.orders" in result.stderr.splitlines()[-1]
    assert list(cdc.folder.iterdir()) == []


def test_a_database_is_made_from_another_that_is_there(cdc: Cdc, source_db: Database) -> None:
    """What is printed, each script where its head says."""
    source_db.execute("CREATE TABLE public.t (id int PRIMARY KEY)")
    role = f"cdc_{source_db.name}"
    made = cdc("init", "--role", role, CDC_URL=source_db.url)
    places = re.findall(r"^-- for an administrator, at (.*)$", made.stdout, re.MULTILINE)
    assert places == [source_db.url, source_db.server.url("postgres")]
    try:
        with psycopg.connect(places[1], autocommit=True) as connection:
            for statement in scripts(made)[1].strip().split(";\n"):
                connection.execute(statement.encode())
        mirror = source_db.server.url(f"{source_db.name}_backup", user=role)
        psycopg.connect(mirror).close()
    finally:
        source_db.execute(f'DROP DATABASE IF EXISTS "{source_db.name}_backup" WITH (FORCE)')
        source_db.execute(f"REVOKE SET ON PARAMETER session_replication_role FROM {role}")
        source_db.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


def test_a_database_that_cannot_be_reached_leaves_nothing(cdc: Cdc) -> None:
    result = cdc("init", "--url", "postgresql://me:geheim@127.0.0.1:1/shop")
    assert result.returncode == 1
    assert "geheim" not in result.stdout + result.stderr
    assert list(cdc.folder.iterdir()) == []


def test_questions_are_asked_where_no_url_is_given(cdc: Cdc, source_db: Database) -> None:
    source_db.execute("CREATE TABLE public.t (id int PRIMARY KEY)")
    answers = [source_db.url, "", "my_shop", "", "me", "/srv/cdc", "y"]
    surroundings = {**cdc.surroundings(), "input": "\n".join(answers) + "\n"}
    made = subprocess.run(cdc.command("init"), check=False, timeout=60, **surroundings)
    assert made.returncode == 0, made.stderr
    config = load(cdc.file, {"MY_SHOP_PASSWORD": "x"}, options_of=options_of)
    source = config.sources["my_shop"]
    assert source.tables.include == ("public.*",)
    assert source.url is not None
    assert "//me:x@" in source.url.reveal()
    assert set(config.sinks) == {"mirror", "changes"}
    assert config.daemon.data_dir == "/srv/cdc"


def test_passwords_are_in_the_file_only_if_asked_for(cdc: Cdc, source_db: Database) -> None:
    """And then nobody else may read it."""
    url = source_db.url.replace("@", ":ge$heim@")
    assert "heim" in url
    for arguments in ((), ("--secrets", "file")):
        made = cdc("init", "--force", *arguments, CDC_URL=url)
        assert made.returncode == 0, made.stderr
        assert "heim" not in made.stdout + made.stderr + cdc.file.read_text()
    made = cdc("init", "--force", "--role", "", CDC_URL=url)
    assert load(cdc.file, {}).sources[source_db.name].url.reveal() == url  # type: ignore[union-attr]
    assert stat.S_IMODE(cdc.file.stat().st_mode) == 0o600
    assert made.stdout == ""


def test_mongodb(cdc: Cdc, mongodb: str, mongo_database: Any) -> None:
    mongo_database.orders.insert_one({"a": 1})
    made = cdc("init", CDC_URL=mongodb.replace("/?", f"/{mongo_database.name}?"))
    assert made.returncode == 0, made.stderr
    assert f"found {mongo_database.name}, 1 collections" in made.stderr
    assert "replica set" in made.stderr
    assert '{"role": "read", "db": "local"}' in made.stdout
    (name,) = tomllib.loads(cdc.file.read_text())["sources"]
    assert load(cdc.file, {f"{name.upper()}_PASSWORD": "x"}).sources[name].kind == "mongodb"


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (Wanted(name="s", url="postgresql://admin:p@h/d", role="cdc"), "postgresql://cdc:S@h/d"),
        (
            Wanted(name="s", url="postgresql://h:5433/d?sslmode=require", role="a b"),
            "postgresql://a%20b:S@h:5433/d?sslmode=require",
        ),
        (
            Wanted(name="s", url="mongodb://h1,h2/d?replicaSet=r", role="cdc"),
            "mongodb://cdc:S@h1,h2/d?replicaSet=r&authSource=admin",
        ),
        (Wanted(name="s", url="mongodb://a:p@h/d?authSource=x", role="cdc"), "mongodb://cdc:S@h/d?authSource=x"),
        (Wanted(name="s", url="postgresql://a:p$p@h/d"), "postgresql://a:p$p@h/d"),
    ],
)
def test_urls_are_the_roles(wanted: Wanted, expected: str) -> None:
    config = parse(tomllib.loads(first_config.text(wanted)), {"S_PASSWORD": "S"})
    assert config.sources["s"].url is not None
    assert config.sources["s"].url.reveal() == expected


@pytest.mark.parametrize("name", ["mirror", "changes"])
def test_no_sink_is_called_as_its_source(name: str) -> None:
    wanted = Wanted(name=name, url="postgresql://h/d", feed=True)
    assert len(parse(tomllib.loads(first_config.text(wanted)), {}, options_of=options_of).sinks) == 2


def test_what_is_no_url_is_refused(cdc: Cdc) -> None:
    assert_complaint(cdc("init", "--url", "host=db dbname=shop"), 2, "not the url of a database", "postgresql://")


@pytest.mark.parametrize("option", ["--url", "--mirror-url"])
def test_an_url_that_cannot_be_read_is_refused_before_anything_is_asked(cdc: Cdc, option: str) -> None:
    urls = {"--url": "postgresql://127.0.0.1:1/shop"} | {option: "postgresql://me:ge#heim@127.0.0.1:port/shop"}
    made = cdc("init", *(part for pair in urls.items() for part in pair))
    assert_complaint(made, 2, f"{option}: the url", "special characters")
    assert "heim" not in made.stdout + made.stderr
