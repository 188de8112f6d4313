"""The HTTP interface by HTTPS: for the command line, for programs, for WebSockets; its certificate is renewed."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import signal
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.request import urlopen

import pytest
from cryptography.x509 import load_pem_x509_certificate
from websockets.sync.client import connect

from cdc.api.app import create_app
from cdc.api.certificate import read_certificate
from cdc.api.server import Server
from cdc.http_config import Http
from cdc.process import loop_factory
from tests.command import NOWHERE, Cdc, assert_complaint
from tests.feed_stores import opened, place_at
from tests.processes import is_cut_off, wait_until
from tests.tls import Authority, Pair

KEY_HINT = "a key without a password"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def configure(cdc: Cdc, shown: Pair | None = None, *, key: Path | None = None) -> Path:
    """The feed of a source that is away; returns the file of the certificate."""
    cdc.data_dir.mkdir()
    with opened(place_at(None, cdc.data_dir)):
        pass  # it is there, and can be followed
    certificate, key_file = cdc.folder / "shown.pem", cdc.folder / "shown.key"
    if shown is not None:
        install(cdc, shown)
    cdc.configure(
        NOWHERE,
        http=f'certificate_file = "{certificate}"\nkey_file = "{key or key_file}"',
        sink=f"""
            url = "{NOWHERE}"
            [sinks.feed]
            kind = "data_changes"
            from = "shop"
        """,
    )
    return certificate


def install(cdc: Cdc, pair: Pair) -> None:
    """Put it where the daemon reads it."""
    shutil.copy(pair.key, cdc.folder / "shown.key")
    shutil.copy(pair.certificate, cdc.folder / "shown.pem")


def trusting(authority: Authority) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(authority.file))


def shown_at(url: str, context: ssl.SSLContext) -> bytes | None:
    """The certificate that newcomers see."""
    host, _, port = url.removeprefix("https://").partition(":")
    with (
        socket.create_connection((host, int(port)), timeout=20) as plain,
        context.wrap_socket(plain, server_hostname=host) as encrypted,
    ):
        return encrypted.getpeercert(binary_form=True)


def der(pair: Pair) -> bytes:
    return ssl.PEM_cert_to_DER_cert(pair.certificate.read_text())


def test_everybody_comes_by_https(cdc: Cdc, authority: Authority) -> None:
    configure(cdc, authority.issue("api"))
    context = trusting(authority)
    with cdc.running():
        url = cdc.address.url
        assert url.startswith("https://127.0.0.1:")
        for path in ("/health", "/"):
            with urlopen(url + path, context=context, timeout=20) as answer:
                assert answer.status == 200
        with connect(url.replace("https", "wss") + "/ws", ssl=context) as websocket:
            assert json.loads(websocket.recv(timeout=20))["type"] == "welcome"
        status = cdc("status", "--json")
        assert json.loads(status.stdout)["sources"]["shop"]["state"] in {"starting", "waiting"}, status.stderr
        assert cdc("log-level", "debug").returncode == 0
        with pytest.raises(OSError, match="certificate verify failed"):
            urlopen(url, timeout=20)  # whoever does not know the authority
        with pytest.raises(OSError, match=r"(?i)reset|closed|disconnected|empty reply|without response"):
            urlopen(url.replace("https", "http"), timeout=20)


def test_nothing_older_than_tls_1_2(cdc: Cdc, authority: Authority) -> None:
    configure(cdc, authority.issue("api"))
    with cdc.running():
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            assert shown_at(cdc.address.url, limited(authority, version))
        with pytest.warns(DeprecationWarning, match="TLSv1_1"):
            old = limited(authority, ssl.TLSVersion.TLSv1_1)
        with pytest.raises(ssl.SSLError, match=r"(?i)version|EOF"):
            shown_at(cdc.address.url, old)


def limited(authority: Authority, version: ssl.TLSVersion) -> ssl.SSLContext:
    context = trusting(authority)
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = context.maximum_version = version
    return context


def test_the_command_line_trusts_its_daemon_alone(cdc: Cdc, authority: Authority) -> None:
    """Its token goes to nobody else, though he has a certificate of the same authority."""
    configure(cdc, authority.issue("api"))
    with cdc.running():
        url, fingerprint = cdc.address
        (cdc.data_dir / "http").write_text(f"{url}\n{fingerprint[::-1]}")
        refused = cdc("log-level", "debug")
        (cdc.data_dir / "http").write_text(f"{url}\n{fingerprint}")
    assert_complaint(refused, 1, "shows another certificate than the daemon's", hint=".")


def test_f110_another_certificate_without_a_restart(cdc: Cdc, authority: Authority) -> None:
    first, second = authority.issue("first"), authority.issue("second", days=2)
    configure(cdc, first)
    context = trusting(authority)
    with cdc.running() as process, connect(cdc.address.url.replace("https", "wss") + "/ws", ssl=context) as websocket:
        websocket.recv(timeout=20)
        assert shown_at(cdc.address.url, context) == der(first)
        assert told_to_expire(cdc.address.url, context) == expiry(first)
        shutil.copy(second.certificate, cdc.folder / "shown.pem")  # without its key: nothing changes
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: "is not the key of" in cdc.log, what=lambda: cdc.log)
        assert shown_at(cdc.address.url, context) == der(first)
        install(cdc, second)
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: '"certificate renewed"' in cdc.log, what=lambda: cdc.log)
        wait_until(lambda: '"reloaded"' in cdc.log, what=lambda: cdc.log)
        (line,) = (line for line in map(json.loads, cdc.log.splitlines()) if line["event"] == "reloaded")
        assert line["changed"] == ["http.certificate_file"]
        assert shown_at(cdc.address.url, context) == der(second)
        assert told_to_expire(cdc.address.url, context) == expiry(second) != expiry(first)
        assert cdc("log-level", "debug").returncode == 0
        websocket.send(json.dumps({"type": "ping"}))
        assert json.loads(websocket.recv(timeout=20))["type"] in {"pong", "error"}


def told_to_expire(url: str, context: ssl.SSLContext) -> float:
    """What `/metrics` says, in unix time."""
    with urlopen(f"{url}/metrics", timeout=60, context=context) as answer:
        found = re.search(
            r"^cdc_http_certificate_expiry_timestamp_seconds (\S+)$", answer.read().decode(), re.MULTILINE
        )
    assert found is not None
    return float(found[1])


def expiry(pair: Pair) -> float:
    return load_pem_x509_certificate(pair.certificate.read_bytes()).not_valid_after_utc.timestamp()


def test_f110_a_gateway_takes_another_certificate(cdc: Cdc, authority: Authority) -> None:
    first, second = authority.issue("first"), authority.issue("second", days=2)
    configure(cdc, first)
    context, log = trusting(authority), cdc.folder / "log"
    with log.open("w") as file:
        process = subprocess.Popen(cdc.command("serve"), **cdc.surroundings() | {"stderr": file})
    try:
        found = wait_until(lambda: re.search(r'"http": "(https://[^"]+)"', cdc.log), what=lambda: cdc.log)
        assert shown_at(found[1], context) == der(first)
        install(cdc, second)
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: '"certificate renewed"' in cdc.log, what=lambda: cdc.log)
        assert shown_at(found[1], context) == der(second)
        assert told_to_expire(found[1], context) == expiry(second)
    finally:
        process.terminate()
        process.communicate(timeout=20)


def test_expired_certificate_of_our_own(cdc: Cdc, authority: Authority) -> None:
    """Clients refuse it, and we say so; the command line goes on."""
    configure(cdc, authority.issue("api", expired=True))
    assert "! certificate: has expired at " in cdc("check").stdout
    with cdc.running():
        assert "clients refuse the certificate" in cdc.log
        assert "has expired at " in cdc.log
        assert cdc("log-level", "debug").returncode == 0


@pytest.mark.parametrize(
    ("certificate", "key", "error", "hint"),
    [
        (None, "api.key", "http.certificate_file: .*/shown.pem: No such file", "readable by the user"),
        ("api.pem", "none.key", "http.key_file: .*/none.key: No such file", "readable by the user"),
        ("api.key", "api.key", "http.certificate_file: .*/shown.pem: no certificate in PEM", "the certificate itself"),
        ("api.pem", "api.pem", "http.key_file: .*/api.pem: no private key in PEM", KEY_HINT),
        ("api.pem", "other.key", "http.key_file: .*/other.key: is not the key of .*/shown.pem", KEY_HINT),
    ],
)
def test_certificate_that_cannot_be_used(
    cdc: Cdc, authority: Authority, certificate: str | None, key: str, error: str, hint: str
) -> None:
    for name in ("api", "other"):
        authority.issue(name)
    configure(cdc, key=cdc.folder / key)
    if certificate is not None:
        shutil.copy(cdc.folder / certificate, cdc.folder / "shown.pem")
    assert_complaint(cdc("run"), 2, error, hint)


LOOPS = [asyncio.new_event_loop, *filter(None, [loop_factory()])]


@pytest.fixture(params=LOOPS, ids=lambda made_by: made_by.__module__)
def server(request: pytest.FixtureRequest, authority: Authority, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """For 30 connections, in a thread with an event loop of each kind."""
    monkeypatch.setattr("cdc.api.server.RESERVE", 10)
    shown = authority.issue("api")
    http = Http(certificate_file=str(shown.certificate), key_file=str(shown.key))
    server = Server(create_app(None, http), ("127.0.0.1", 0), max_connections=20, certificate=read_certificate(http))
    with asyncio.Runner(loop_factory=request.param) as runner:
        loop = runner.get_loop()
        thread = threading.Thread(target=lambda: runner.run(server.serve()))
        thread.start()
        try:
            yield server
        finally:
            loop.call_soon_threadsafe(server.stop)
            thread.join(30)
            server.close()


def test_f107_flood_of_handshakes_makes_room(server: Server, authority: Authority) -> None:
    with ExitStack() as stack:
        flood = [stack.enter_context(socket.create_connection(server.address, timeout=20)) for _ in range(100)]
        assert is_healthy(server, authority)
        wait_until(lambda: sum(map(is_cut_off, flood)) >= 70, what="silent connections to be ended")


def test_f107_dawdling_handshake_is_cut_off(
    server: Server, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cdc.api.handshakes.REQUEST_SECONDS", 0.1)
    with socket.create_connection(server.address, timeout=20) as connection:
        assert connection.recv(100) == b""
    with socket.create_connection(server.address, timeout=20) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
        wait_until(lambda: is_cut_off(connection))
    assert is_healthy(server, authority)


def is_healthy(server: Server, authority: Authority) -> bool:
    host, port = server.address
    with urlopen(f"https://{host}:{port}/health", context=trusting(authority), timeout=20) as answer:
        return bool(answer.status == 200)
