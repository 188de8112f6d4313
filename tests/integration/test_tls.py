"""TLS to the databases: with passwords and with certificates, and what is said where that cannot work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import pytest

from cdc.api.client import Client
from cdc.status import DaemonStatus
from tests.command import Cdc
from tests.conftest import NewDatabase
from tests.processes import wait_until
from tests.servers import PASSWORD_ROLE, Database
from tests.tls import Authority, TlsPostgres

PASSWORD: Final = "geheim"

TABLE: Final = "CREATE TABLE items (id int PRIMARY KEY, name text); INSERT INTO items VALUES (1, 'copied')"

CONNECTIONS: Final = """
    SELECT activity.application_name, activity.backend_type, tls.ssl, tls.client_dn
      FROM pg_stat_activity activity JOIN pg_stat_ssl tls USING (pid) WHERE activity.client_addr IS NOT NULL
"""
"""All that came over TCP."""

END_SOURCE: Final = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'cdc shop'"

CERTIFICATES_HINT: Final = "until when the certificates are valid"


@pytest.fixture(scope="module")
def server(tls_postgres: TlsPostgres) -> TlsPostgres:
    """With `clerk`, who has a password, and `robot`, who has a certificate."""
    with tls_postgres.connect() as connection:
        connection.execute(f"CREATE ROLE clerk SUPERUSER LOGIN PASSWORD '{PASSWORD}' IN ROLE {PASSWORD_ROLE}")
        connection.execute("CREATE ROLE robot SUPERUSER LOGIN")
    return tls_postgres


@pytest.fixture(params=["clerk", "robot"])
def shop(
    request: pytest.FixtureRequest, cdc: Cdc, server: TlsPostgres, authority: Authority, new_database: NewDatabase
) -> tuple[Database, Database]:
    """A source, and a target for its mirror and its feed, all as one role; the URL is in a file."""
    source, target = new_database(server), new_database(server)
    source.execute(TABLE)
    robot = authority.issue("robot")
    logins: dict[str, dict[str, object]] = {
        "clerk": {"password": PASSWORD},
        "robot": {"sslcert": robot.certificate, "sslkey": robot.key},
    }
    urls = [server.tls_url(database.name, request.param, **logins[request.param]) for database in (source, target)]
    (cdc.folder / "target_url").write_text(urls[1])
    cdc.configure(
        urls[0],
        source=f'pg_dump = "{server.bin_dir}/pg_dump"',
        sink=f"""
            url_file = "{cdc.folder}/target_url"
            [sinks.feed]
            kind = "data_changes"
            from = "shop"
            url_file = "{cdc.folder}/target_url"
        """,
    )
    return source, target


def test_all_connections_are_encrypted(cdc: Cdc, shop: tuple[Database, Database]) -> None:
    source, target = shop
    checked = cdc("check")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    with cdc.running():
        wait_until(lambda: status(cdc).sinks["mirror"].state == "running", what=lambda: cdc.log)
        source.execute("INSERT INTO items VALUES (2, 'streamed')")
        rows = [(1, "copied"), (2, "streamed")]
        wait_until(lambda: target.execute("SELECT * FROM items ORDER BY id") == rows, what=lambda: cdc.log)
        wait_until(lambda: target.value("SELECT count(*) FROM data_changes") == 1, what=lambda: cdc.log)
        all_of_them = {"cdc shop", "cdc sink mirror", "cdc feed"}
        wait_until(lambda: {name for name, *_ in source.execute(CONNECTIONS)} >= all_of_them, what=lambda: cdc.log)
        connections = source.execute(CONNECTIONS)
        verified = cdc("verify")
        assert verified.returncode == 0, verified.stdout + verified.stderr
    assert {kind for _, kind, _, _ in connections} == {"walsender", "client backend"}
    assert [name for name, _, encrypted, _ in connections if not encrypted] == []
    assert len({"CN=robot" in (subject or "") for _, _, _, subject in connections}) == 1
    assert PASSWORD not in cdc.log


@pytest.mark.parametrize("shop", ["clerk"], indirect=True)
def test_certificate_of_the_server_expires_while_all_runs(
    cdc: Cdc, shop: tuple[Database, Database], server: TlsPostgres, authority: Authority
) -> None:
    source, target = shop
    with cdc.running():
        wait_until(lambda: status(cdc).sinks["mirror"].state == "running", what=lambda: cdc.log)
        with server.showing(authority.issue("late", expired=True)):
            source.execute(END_SOURCE)
            wait_until(lambda: status(cdc).sources["shop"].state == "failed", what=lambda: cdc.log)
            failed = status(cdc).sources["shop"]
            assert "certificate verify failed" in str(failed.error)
            assert CERTIFICATES_HINT in str(failed.hint)
            source.execute("INSERT INTO items VALUES (2, 'meanwhile')")
        assert cdc("resume", "shop").returncode == 0
        wait_until(lambda: target.value("SELECT count(*) FROM items") == 2, what=lambda: cdc.log)


def status(cdc: Cdc) -> DaemonStatus:
    """Of the daemon that runs."""
    return Client((cdc.data_dir / "http").read_text()).status()


@pytest.fixture
def refused(tmp_path: Path, server: TlsPostgres, authority: Authority) -> dict[str, tuple[str, str, str]]:
    """What cannot work, as sources by their names: the url, the error and its hint."""
    other = Authority(tmp_path, "other")
    robot, stranger = authority.issue("robot"), other.issue("robot")
    late, clerk = authority.issue("late", expired=True), {"user": "clerk"}
    open_key = tmp_path / "open.key"
    open_key.write_bytes(robot.key.read_bytes())
    open_key.chmod(0o644)
    passwords = tmp_path / "passwords"
    passwords.write_text(f"*:*:*:*:{PASSWORD}\n")
    passwords.chmod(0o644)
    shown = {"sslcert": robot.certificate, "sslkey": robot.key}
    cases: dict[str, tuple[dict[str, Any], str, str]] = {
        "other_authority": ({**shown, "sslrootcert": other.file}, "certificate verify failed", CERTIFICATES_HINT),
        "other_host": ({**shown, "host": "localhost"}, "does not match host name", CERTIFICATES_HINT),
        "no_certificate": ({}, "requires a valid client certificate", CERTIFICATES_HINT),
        "expired": ({"sslcert": late.certificate, "sslkey": late.key}, "certificate expired", CERTIFICATES_HINT),
        "stranger": ({"sslcert": stranger.certificate, "sslkey": stranger.key}, "unknown ca", CERTIFICATES_HINT),
        "somebody_else": ({**shown, "user": "postgres"}, "certificate authentication failed", CERTIFICATES_HINT),
        "key_missing": ({**shown, "sslkey": tmp_path / "no.key"}, "no.key", CERTIFICATES_HINT),
        "key_open": ({**shown, "sslkey": open_key}, "has group or world access", CERTIFICATES_HINT),
        "no_passfile": ({**clerk, "passfile": tmp_path / "none"}, "no password supplied", "passfile"),
        "passfile_open": ({**clerk, "passfile": passwords}, "no password supplied", "passfile"),
        "wrong_password": ({**clerk, "password": f"not{PASSWORD}"}, "authentication failed", "check user, password"),
        "in_clear": ({**clerk, "password": PASSWORD, "sslmode": "disable"}, "no encryption", "sslmode"),
    }
    return {
        name: (server.tls_url("postgres", **{"user": "robot", **options}), error, hint)
        for name, (options, error, hint) in cases.items()
    }


def test_what_is_refused_is_said_in_one_line(cdc: Cdc, refused: dict[str, tuple[str, str, str]]) -> None:
    """All in one configuration, since each starts alone."""
    cdc.configure_sources({name: url for name, (url, _, _) in refused.items()})
    checked, run = cdc("check", "--json"), cdc("run")
    assert (checked.returncode, run.returncode) == (1, 1), run.stderr
    found = {section["title"]: section["findings"][-1] for section in json.loads(checked.stdout)["sections"]}
    failed = [json.loads(line) for line in run.stderr.splitlines() if '"event": "failed"' in line]
    for name, (_, error, hint) in refused.items():
        finding = found[f"source {name}"]
        said = [(line["error"], line["hint"]) for line in failed if line["name"] == name]
        assert said == [(finding["message"], finding["fix"])], name
        assert error in finding["message"]
        assert hint in finding["fix"], finding
    for text in (checked.stdout, checked.stderr, run.stderr):
        assert PASSWORD not in text
        assert "Traceback" not in text
