"""The preflight on real servers: each obstacle is found before anything is created, and its fix is right."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from cdc.config import Config
from cdc.config_file import parse
from cdc.errors import CdcError, FatalError
from cdc.postgres import preflight
from cdc.postgres.connection import connect
from cdc.postgres.preflight import check_sink, check_source
from cdc.postgres.slot import create_slot
from cdc.preflight import Finding, collect
from sinks import options_of
from tests.conftest import NewDatabase
from tests.processes import wait_until
from tests.servers import Database, PostgresServer

KEY = "CREATE TABLE t (id int PRIMARY KEY, v text)"


def configured(
    source: str, sink: str | None = None, *, options: dict[str, Any] | None = None, **settings: Any
) -> Config:
    """settings: more of the source. options: more of the sink."""
    raw: dict[str, Any] = {"sources": {"shop": {"url": source} | settings}}
    if sink is not None:
        raw["sinks"] = {"backup": {"from": "shop", "url": sink} | (options or {})}
    return parse(raw, {})


def of_source(url: str, **settings: Any) -> list[Finding]:
    config = configured(url, **settings)
    return list(check_source(config, config.sources["shop"]))


def of_feed(source: Database, entities: dict[str, Any]) -> list[Finding]:
    sink = {"kind": "data_changes", "from": "shop", "entities": entities}
    config = parse({"sources": {"shop": {"url": source.url}}, "sinks": {"c": sink}}, {}, options_of=options_of)
    return list(check_source(config, config.sources["shop"]))


def of_sink(source: Database, sink: str | Database, **options: Any) -> list[Finding]:
    url = sink if isinstance(sink, str) else sink.url
    config = configured(source.url, url, options=options)
    return list(check_sink(config, config.sinks["backup"]))


def errors(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.level == "error"]


def only_error(findings: list[Finding], subject: str) -> Finding:
    (finding,) = errors(findings)
    assert finding.subject == subject
    assert finding.fix
    return finding


def about(findings: list[Finding], subject: str) -> Finding:
    (finding,) = (finding for finding in findings if finding.subject == subject)
    return finding


def statement(finding: Finding) -> str:
    """The SQL of a fix, without the words around it."""
    return finding.fix.removeprefix("as a superuser: ").removeprefix("as its owner: ")


@pytest.fixture
def role(source_db: Database) -> Iterator[str]:
    """A role that may log in and replicate, on the source's server."""
    yield from _role(source_db, "REPLICATION")


@pytest.fixture
def target_role(target_db: Database) -> Iterator[str]:
    """A role that may only log in, on the target's server."""
    yield from _role(target_db, "")


def _role(database: Database, attributes: str) -> Iterator[str]:
    name = f"{database.name}_role"
    database.execute(f"CREATE ROLE {name} LOGIN {attributes}")
    yield name
    database.execute(f"DROP OWNED BY {name}; DROP ROLE {name}")


def as_role(database: Database, role: str) -> str:
    return database.server.url(database.name, user=role)


def catalog_snapshot(database: Database) -> list[tuple[Any, ...]]:
    return database.execute(
        "SELECT 'class', oid::bigint FROM pg_class UNION ALL SELECT 'publication', oid::bigint FROM pg_publication "
        "UNION ALL SELECT slot_name, 0 FROM pg_replication_slots UNION ALL SELECT nspname, 0 FROM pg_namespace "
        "WHERE nspname !~ '^pg_(toast_)?temp' ORDER BY 1, 2"
    )


def test_ready_servers_have_no_errors_and_are_not_changed(
    postgres: PostgresServer, source_db: Database, target_db: Database, pg_dump: Path
) -> None:
    source_db.execute(KEY + "; CREATE TABLE log (line text)")
    filtered = {"public.t": {"where": "id > 5", "columns": ["id"]}}
    config = configured(
        source_db.url,
        target_db.url,
        options={"tables": filtered},
        insert_only=["public.log"],
        pg_dump=str(pg_dump),
    )
    before = catalog_snapshot(source_db), catalog_snapshot(target_db)
    source = list(check_source(config, config.sources["shop"]))
    sink = list(check_sink(config, config.sinks["backup"]))
    assert errors(source) == errors(sink) == []
    assert about(source, "publication cdc_shop").message == "will be created"
    assert about(source, "publication cdc_shop_insert_only").message == "will be created"
    assert about(source, "slot cdc_shop").message == "will be created"
    assert about(source, "replication").level == about(source, "pg_dump").level == "ok"
    assert (catalog_snapshot(source_db), catalog_snapshot(target_db)) == before


def test_unreachable_server_is_a_finding() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        config = configured(f"postgresql://postgres:hidden@127.0.0.1:{probe.getsockname()[1]}/shop")
        (finding,) = collect("source shop", check_source(config, config.sources["shop"])).findings
    assert finding.level == "error"
    assert "hidden" not in finding.message


@contextmanager
def between(server: PostgresServer, to_client: Callable[[bytes], bytes]) -> Iterator[int]:
    """A listener that relays to the server and changes what comes back; its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=_accept, args=(listener, server.port, to_client), daemon=True).start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)


def _accept(listener: socket.socket, port: int, to_client: Callable[[bytes], bytes]) -> None:
    with suppress(OSError):
        while True:
            client, _ = listener.accept()
            server = socket.create_connection(("127.0.0.1", port))
            threading.Thread(target=_relay, args=(client, server, bytes), daemon=True).start()
            threading.Thread(target=_relay, args=(server, client, to_client), daemon=True).start()


def _relay(origin: socket.socket, destination: socket.socket, change: Callable[[bytes], bytes]) -> None:
    with suppress(OSError):
        while data := origin.recv(65536):
            destination.sendall(change(data))
        destination.shutdown(socket.SHUT_WR)


def other_backend_key(data: bytes) -> bytes:
    """What every pooler does: hand out a cancellation key (message `K`, 12 bytes) of its own."""
    at = data.find(b"K\x00\x00\x00\x0c")
    return data if at < 0 else data[: at + 5] + b"\x00\x00\x00\x07" + data[at + 9 :]


def test_pooler_is_refused(postgres: PostgresServer, source_db: Database, target_db: Database) -> None:
    source_db.execute(KEY)
    with between(postgres, other_backend_key) as port:
        findings = of_source(f"postgresql://postgres@127.0.0.1:{port}/{source_db.name}")
    finding = only_error(findings, "server")
    assert "pooler" in finding.message
    assert finding.fix == "connect to the server itself"
    assert "slot cdc_shop" not in {finding.subject for finding in findings}
    with between(target_db.server, other_backend_key) as port:
        findings = of_sink(source_db, f"postgresql://postgres@127.0.0.1:{port}/{target_db.name}")
    assert errors(findings) == []
    assert any("pooler" in finding.message for finding in findings if finding.level == "warning")


def test_pooler_that_refuses_startup_parameters(source_db: Database) -> None:
    """PgBouncer, unless told to ignore them."""

    def refuse(_: bytes) -> bytes:
        fields = b"SFATAL\0C08P01\0Munsupported startup parameter: options\0\0"
        return b"E" + (len(fields) + 4).to_bytes(4, "big") + fields

    with between(source_db.server, refuse) as port, pytest.raises(FatalError) as raised:
        of_source(f"postgresql://postgres@127.0.0.1:{port}/{source_db.name}?sslmode=disable")
    assert "pooler" in raised.value.hint


def test_relay_alone_is_not_taken_for_a_pooler(source_db: Database) -> None:
    source_db.execute(KEY)
    with between(source_db.server, bytes) as port:
        findings = of_source(f"postgresql://postgres@127.0.0.1:{port}/{source_db.name}")
    assert errors(findings) == []


def test_settings_of_a_server_as_it_comes() -> None:
    """Each setting that keeps capture from working, or makes it lose its slot, with the statement that changes it."""
    settings = {
        "wal_level": "replica",
        "max_replication_slots": "1",
        "max_wal_senders": "1",
        "max_slot_wal_keep_size": "100MB",
        "idle_replication_slot_timeout": "1h",
        "logical_decoding_work_mem": "1MB",
    }
    with PostgresServer(18, settings=settings) as server:
        Database(server, "postgres").execute(KEY)
        findings = of_source(server.url())
        assert {finding.subject for finding in errors(findings)} == {
            "wal_level",
            "max_replication_slots",
            "max_wal_senders",
        }
        warnings = {finding.subject for finding in findings if finding.level == "warning"}
        assert warnings >= {
            "max_slot_wal_keep_size",
            "idle_replication_slot_timeout",
            "logical_decoding_work_mem",
            "server",
        }
        with server.connect() as connection:
            for finding in findings:
                if finding.fix.startswith("ALTER SYSTEM"):
                    connection.execute(finding.fix.partition(";")[0].partition(",")[0])
        server.restart()
        findings = of_source(server.url())
        assert errors(findings) == []
        assert {finding.subject for finding in findings if finding.level == "warning"} == {"server"}


def test_unlimited_retention_is_a_warning(source_db: Database) -> None:
    source_db.execute(KEY)
    finding = about(of_source(source_db.url), "max_slot_wal_keep_size")
    assert finding.level == "warning"
    assert "no limit" in finding.message


def test_f13_standby() -> None:
    with PostgresServer(18) as server:
        database = Database(server, "postgres")
        database.execute(KEY + "; CHECKPOINT")
        server.stop()
        (server.data_dir / "standby.signal").touch()
        server.start()
        findings = of_source(server.url())
        assert any("is a standby" in finding.message for finding in errors(findings))


def test_role_without_any_privilege(postgres: PostgresServer, source_db: Database, role: str) -> None:
    """Following the fixes one after the other, an ordinary role ends with all that is needed."""
    source_db.execute(f"ALTER ROLE {role} NOREPLICATION; CREATE SCHEMA s; CREATE TABLE s.t (id int PRIMARY KEY)")
    url = as_role(source_db, role)
    seen: list[str] = []
    while found := errors(of_source(url, tables={"include": ["s.*"]})):
        assert len(seen) < 10, "the fixes do not help"
        seen += [finding.subject for finding in found]
        for finding in found:
            source_db.execute(statement(finding))
    assert set(seen) == {"replication", "privileges", "publication"}
    assert seen.count("privileges") == 2
    with connect(url, replication=True) as replication:
        create_slot(replication, "cdc_shop", failover=True)
    assert errors(of_source(url, tables={"include": ["s.*"]})) == []


def test_table_of_another_owner(source_db: Database, role: str) -> None:
    source_db.execute(
        f"{KEY}; GRANT SELECT ON t TO {role}; GRANT CREATE ON DATABASE {source_db.name} TO {role}",
    )
    finding = only_error(of_source(as_role(source_db, role)), "publication")
    assert "does not own public.t" in finding.message
    source_db.execute(statement(finding))
    assert errors(of_source(as_role(source_db, role))) == []


def test_f118_row_level_security(source_db: Database, role: str) -> None:
    source_db.execute(
        f"{KEY}; GRANT SELECT ON t TO {role}; ALTER TABLE t ENABLE ROW LEVEL SECURITY; CREATE PUBLICATION cdc_shop"
        " FOR TABLE t"
    )
    finding = only_error(of_source(as_role(source_db, role)), "public.t")
    assert "row-level security" in finding.message
    source_db.execute(statement(finding))
    assert errors(of_source(as_role(source_db, role))) == []
    assert errors(of_source(source_db.url)) == []


def test_f17_f21_identity_is_checked_before_anything_is_created(source_db: Database) -> None:
    source_db.execute("CREATE TABLE t (v int)")
    finding = only_error(of_source(source_db.url), "public.t")
    assert "every UPDATE and DELETE of it would fail" in finding.message
    assert errors(of_source(source_db.url, insert_only=["public.t"])) == []


def test_f14_publication_that_does_not_cover(postgres: PostgresServer, source_db: Database) -> None:
    source_db.execute(KEY + "; CREATE TABLE u (id int PRIMARY KEY); CREATE PUBLICATION cdc_shop FOR TABLE t")
    finding = only_error(of_source(source_db.url), "public.u")
    source_db.execute(finding.fix)
    findings = of_source(source_db.url)
    assert errors(findings) == []
    assert about(findings, "publication cdc_shop").message == "covers 2 tables: insert, update, delete, truncate"


def test_f14_publication_dropped_beside_its_slot(postgres: PostgresServer, source_db: Database) -> None:
    source_db.execute(KEY)
    with connect(source_db.url, replication=True) as replication:
        create_slot(replication, "cdc_shop", failover=False)
    finding = only_error(of_source(source_db.url), "publication cdc_shop")
    assert finding.message == "does not exist"


def test_f10_slot_in_use_is_no_error(source_db: Database) -> None:
    """As a rule it is our own daemon that uses it."""
    source_db.execute(KEY + "; CREATE PUBLICATION cdc_shop FOR TABLE t")
    with connect(source_db.url, replication=True) as replication:
        create_slot(replication, "cdc_shop", failover=False)
    reader = connect(source_db.url, replication=True, application_name="cdc shop")
    try:
        query = "START_REPLICATION SLOT cdc_shop LOGICAL 0/0 (proto_version '1', publication_names 'cdc_shop')"
        reader.pgconn.send_query(query.encode())
        active = "SELECT active FROM pg_replication_slots WHERE slot_name = 'cdc_shop'"
        wait_until(lambda: source_db.value(active), what="the slot to be in use")
        finding = about(of_source(source_db.url), "slot cdc_shop")
    finally:
        reader.close()
    assert (finding.level, finding.message) == ("ok", f"read by process {reader_pid(finding)} (cdc shop)")


def reader_pid(finding: Finding) -> int:
    return int(finding.message.split()[3])


def test_slot_of_another_plugin(source_db: Database) -> None:
    source_db.execute(KEY + "; CREATE PUBLICATION cdc_shop FOR TABLE t")
    source_db.execute("SELECT pg_create_physical_replication_slot('cdc_shop')")
    try:
        finding = only_error(of_source(source_db.url), "slot")
        assert "slot cdc_shop is a physical one" in finding.message
    finally:
        source_db.execute("SELECT pg_drop_replication_slot('cdc_shop')")


@pytest.mark.parametrize("prepared", [False, True], ids=["open", "prepared"])
def test_old_transaction_is_named(
    postgres: PostgresServer, source_db: Database, prepared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    source_db.execute(KEY)
    gid = f"old of {source_db.name}"
    monkeypatch.setattr(preflight, "OLD_TRANSACTION_SECONDS", 0)
    with source_db.connect(application_name="nightly report") as old:
        pid = old.info.backend_pid
        old.execute("BEGIN; INSERT INTO t VALUES (1)")
        if prepared:
            old.execute(f"PREPARE TRANSACTION '{gid}'")
        try:
            warned = [finding for finding in of_source(source_db.url) if finding.subject == "transactions"]
        finally:
            old.execute(f"ROLLBACK PREPARED '{gid}'" if prepared else "ROLLBACK")
    who = f"prepared transaction '{gid}'" if prepared else f"process {pid} (nightly report)"
    assert [finding.level for finding in warned if finding.message.startswith(who)] == ["warning"]
    assert not [finding for finding in of_source(source_db.url) if finding.subject == "transactions"]


def test_f34_f35_what_is_left_out_is_reported(postgres: PostgresServer, source_db: Database) -> None:
    source_db.execute(
        KEY + "; CREATE VIEW seen AS SELECT * FROM t; CREATE MATERIALIZED VIEW kept AS SELECT * FROM t;"
        "CREATE UNLOGGED TABLE fast (id int PRIMARY KEY); CREATE SCHEMA elsewhere;"
        "CREATE VIEW elsewhere.hidden AS SELECT 1; SELECT lo_create(0)"
    )
    findings = of_source(source_db.url)
    assert errors(findings) == []
    for subject, name in {"views": "seen", "materialized views": "kept", "unlogged tables": "fast"}.items():
        assert about(findings, subject).level == "warning"
        assert about(findings, subject).message.endswith(f": public.{name}")
    assert about(findings, "large objects").level == "warning"
    excluded = of_source(source_db.url, tables={"exclude": ["public.[skf]*"]})
    assert not [finding for finding in excluded if "does not carry the contents" in finding.message]


def test_names_that_fit_nothing(source_db: Database) -> None:
    source_db.execute(KEY)
    finding = only_error(of_source(source_db.url, tables={"include": ["publik.*"]}), "tables")
    assert "no table matches publik.*" in finding.message
    config = configured(source_db.url, source_db.url, options={"tables": {"public.tt": {"columns": ["id"]}}})
    findings = list(check_source(config, config.sources["shop"]))
    assert about(findings, "public.tt").level == "warning"


def test_one_of_several_globs_that_fits_nothing(source_db: Database) -> None:
    source_db.execute(KEY + "; CREATE TABLE u (id int PRIMARY KEY)")
    globs = {"include": ["public.*", "nope.*", "public.u"], "exclude": ["public.u"]}
    findings = of_source(source_db.url, tables=globs)
    assert errors(findings) == []
    (finding,) = (each for each in findings if each.subject == "tables" and each.level == "warning")
    assert finding.message == "1 captured, of which none matches nope.*, public.u"
    assert "sources.shop.tables.include" in finding.fix


@pytest.mark.parametrize(
    ("entity", "level", "words"),
    [
        ({"exclude": ["nots"]}, "error", "hides columns that are not there: nots"),
        ({"mask": {"emial": "redact"}}, "error", "hides columns that are not there: emial"),
        ({"columns": ["id", "nam"]}, "warning", "names columns that are not there: nam"),
        ({"location": "bransh"}, "warning", "names columns that are not there: bransh"),
    ],
)
def test_columns_of_entities_that_fit_nothing(source_db: Database, entity: Any, level: str, words: str) -> None:
    source_db.execute(KEY)
    found = of_feed(source_db, {"public.t": entity, "public.tt": "T"})
    assert (about(found, 'sinks.c.entities."public.t"').level) == level
    assert about(found, 'sinks.c.entities."public.t"').message == words
    assert about(found, 'sinks.c.entities."public.tt"').level == "warning"


def test_pg_dump_missing_or_too_old(source_db: Database, target_db: Database, tmp_path: Path) -> None:
    source_db.execute(KEY)
    old = tmp_path / "pg_dump"
    old.write_text("#!/bin/sh\necho 'pg_dump (PostgreSQL) 13.4'\n")
    old.chmod(0o755)
    for path, message in {str(old): "version 13.4", str(tmp_path / "none"): "No such file"}.items():
        config = configured(source_db.url, target_db.url, pg_dump=path)
        assert message in only_error(list(check_source(config, config.sources["shop"])), "pg_dump").message


def test_pg_dump_is_for_mirrors_only(source_db: Database, tmp_path: Path) -> None:
    source_db.execute(KEY)
    source = {"url": source_db.url, "pg_dump": str(tmp_path / "none")}
    raw = {"sources": {"shop": source}, "sinks": {"feed": {"kind": "data_changes", "from": "shop"}}}
    config = parse(raw, {}, options_of=options_of)
    findings = list(check_source(config, config.sources["shop"]))
    assert errors(findings) == []
    assert not any(finding.subject == "pg_dump" for finding in findings)


def test_f39_encodings(source_db: Database, target_db: Database) -> None:
    """UTF8 takes everything; into LATIN1 not every character fits; SQL_ASCII checks nothing."""
    levels = {}
    for encoding in ("UTF8", "LATIN1", "SQL_ASCII"):
        name = f"{target_db.name}_{encoding.lower()}"
        target_db.execute(
            f"CREATE DATABASE {name} ENCODING '{encoding}' LOCALE 'C' LOCALE_PROVIDER libc TEMPLATE template0"
        )
        other = Database(target_db.server, name)
        try:
            levels[encoding] = about(of_sink(source_db, other), "encoding").level
            if encoding == "LATIN1":
                assert about(of_sink(other, target_db), "encoding").level == "ok"
        finally:
            other.drop()
    assert levels == {"UTF8": "ok", "LATIN1": "error", "SQL_ASCII": "warning"}


def test_f117_mirror_into_the_source_itself(
    postgres: PostgresServer, source_db: Database, new_database: NewDatabase
) -> None:
    finding = only_error(of_sink(source_db, source_db, rename={"public": "copy"}), "database")
    assert "is the source's own database" in finding.message
    assert errors(of_sink(source_db, new_database(postgres))) == []


def test_missing_database(source_db: Database, target_db: Database, target_role: str) -> None:
    absent = f"{target_db.name}_absent"
    finding = about(of_sink(source_db, target_db.server.url(absent)), "database")
    assert (finding.level, finding.message) == ("ok", f"{absent} does not exist yet: the copy creates it")
    finding = only_error(of_sink(source_db, target_db.server.url(absent, user=target_role)), "database")
    target_db.execute(statement(finding))
    try:
        assert errors(of_sink(source_db, target_db.server.url(absent, user=target_role))) == []
    finally:
        target_db.server.drop_database(absent)


def test_refused_login_is_not_taken_for_a_missing_database(source_db: Database, target_db: Database) -> None:
    with pytest.raises(CdcError, match="does not exist"):
        of_sink(source_db, target_db.server.url(target_db.name, user="nobody_at_all"))


def test_target_privileges(source_db: Database, target_db: Database, target_role: str) -> None:
    """Following the fixes, an ordinary role may do all that mirroring needs."""
    source_db.execute("CREATE SCHEMA s; CREATE TABLE s.t (id int PRIMARY KEY)")
    target_db.execute(
        "CREATE SCHEMA s; CREATE TABLE s.t (id int PRIMARY KEY); ALTER TABLE s.t ENABLE ROW LEVEL SECURITY"
    )
    config = configured(source_db.url, as_role(target_db, target_role), tables={"include": ["s.*"]})
    seen: list[str] = []
    while found := errors(list(check_sink(config, config.sinks["backup"]))):
        assert len(seen) < 10, "the fixes do not help"
        seen += [finding.message for finding in found]
        for finding in found:
            target_db.execute(statement(finding))
    assert [message.partition(" may not ")[2] for message in seen if "may not" in message] == [
        "create schema cdc",
        "write to s.t",
    ]
    assert sum("row-level security" in message for message in seen) == 1


def test_target_schema_that_may_not_be_used(source_db: Database, target_db: Database, target_role: str) -> None:
    source_db.execute("CREATE SCHEMA s; CREATE TABLE s.t (id int PRIMARY KEY)")
    target_db.execute(f"CREATE SCHEMA s; CREATE SCHEMA cdc AUTHORIZATION {target_role}")
    config = configured(source_db.url, as_role(target_db, target_role), tables={"include": ["s.*"]})
    finding = only_error(list(check_sink(config, config.sinks["backup"])), "privileges")
    target_db.execute(statement(finding))
    assert errors(list(check_sink(config, config.sinks["backup"]))) == []


def test_read_only_target(source_db: Database, target_db: Database) -> None:
    target_db.execute(f"ALTER DATABASE {target_db.name} SET default_transaction_read_only = on")
    finding = only_error(of_sink(source_db, target_db), "server")
    with target_db.connect() as connection:
        connection.execute("SET default_transaction_read_only = off")
        connection.execute(statement(finding))
    assert errors(of_sink(source_db, target_db)) == []


def test_f99_triggers_that_cannot_be_kept_still(source_db: Database, target_db: Database, target_role: str) -> None:
    target_db.execute(f"GRANT CREATE ON DATABASE {target_db.name} TO {target_role}")
    finding = about(of_sink(source_db, as_role(target_db, target_role)), "session_replication_role")
    assert finding.level == "warning"
    target_db.execute(statement(finding))
    try:
        finding = about(of_sink(source_db, as_role(target_db, target_role)), "session_replication_role")
        assert finding.level == "ok"
    finally:
        target_db.execute(f"REVOKE SET ON PARAMETER session_replication_role FROM {target_role}")


def test_f99_f119_rules_and_triggers_that_fire_all_the_same(
    source_db: Database, target_db: Database, target_role: str
) -> None:
    source_db.execute(KEY)
    target_db.execute(
        f"{KEY}; CREATE RULE swallow AS ON INSERT TO t DO INSTEAD NOTHING; ALTER TABLE t OWNER TO {target_role};"
        "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';"
        "CREATE TRIGGER audit BEFORE INSERT ON t FOR EACH ROW EXECUTE FUNCTION f();"
        f"CREATE SCHEMA cdc AUTHORIZATION {target_role}"
    )
    assert firing(of_sink(source_db, target_db)) == []
    assert firing(of_sink(source_db, as_role(target_db, target_role))) == ["rule swallow", "trigger audit"]
    target_db.execute("ALTER TABLE t ENABLE ALWAYS RULE swallow; ALTER TABLE t ENABLE REPLICA TRIGGER audit")
    findings = of_sink(source_db, target_db)
    assert firing(findings) == ["rule swallow", "trigger audit"]
    for finding in findings:
        if finding.subject == "public.t":
            target_db.execute(finding.fix)
    assert firing(of_sink(source_db, as_role(target_db, target_role))) == []


def firing(findings: list[Finding]) -> list[str]:
    found = [finding for finding in findings if finding.subject == "public.t"]
    assert all(finding.level == "warning" for finding in found)
    return [finding.message.partition(" on the target")[0] for finding in found]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("id int PRIMARY KEY", "column v is missing"),
        ("id int PRIMARY KEY, v varchar(3)", "column v is character varying(3) on the target, text at the source"),
        ("id smallint PRIMARY KEY, v text", "column id is smallint on the target, integer at the source"),
        ("id int PRIMARY KEY, v text GENERATED ALWAYS AS ('x') STORED", "column v is generated on the target only"),
        ("id int PRIMARY KEY, v text, more int NOT NULL", "column more of the target is NOT NULL without a default"),
    ],
)
def test_f102_table_with_other_columns(source_db: Database, target_db: Database, target: str, message: str) -> None:
    source_db.execute(KEY)
    target_db.execute(f"CREATE TABLE t ({target})")
    finding = only_error(of_sink(source_db, target_db), "public.t")
    assert message in finding.message
    target_db.execute(finding.fix)
    assert errors(of_sink(source_db, target_db)) == []


def test_f102_columns_that_fit(source_db: Database, target_db: Database) -> None:
    source_db.execute("CREATE TABLE t (id int PRIMARY KEY, v text, w int, g int GENERATED ALWAYS AS (w) STORED)")
    target_db.execute("CREATE SCHEMA s; CREATE TABLE s.u (id bigint PRIMARY KEY, v text, extra int NOT NULL DEFAULT 1)")
    options = {"rename": {"public.t": "s.u"}, "tables": {"public.t": {"columns": ["id", "v"]}}}
    assert errors(of_sink(source_db, target_db, **options)) == []


def test_f102_tables_that_are_missing_beside_others(source_db: Database, target_db: Database) -> None:
    source_db.execute(KEY + "; CREATE TABLE u (id int PRIMARY KEY)")
    target_db.execute(KEY)
    finding = only_error(of_sink(source_db, target_db), "missing tables")
    assert finding.message.endswith(": public.u")


def test_f102_view_where_a_table_should_be(source_db: Database, target_db: Database) -> None:
    source_db.execute(KEY)
    target_db.execute("CREATE VIEW t AS SELECT 1 AS id, 'x' AS v")
    assert only_error(of_sink(source_db, target_db), "public.t").message == "is a view on the target"


def test_target_older_than_the_source(
    source_db: Database, postgres16: PostgresServer, new_database: NewDatabase
) -> None:
    findings = of_sink(source_db, new_database(postgres16))
    assert errors(findings) == []
    assert any("older than the source" in finding.message for finding in findings if finding.level == "warning")
