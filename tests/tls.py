"""Certificates, good and bad; and servers that want them: one that says nothing more, and PostgreSQL."""

from __future__ import annotations

import datetime as dt
import shutil
import socket
import ssl
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, NamedTuple, Self
from urllib.parse import quote, urlencode

import trustme

from tests.processes import wait_until
from tests.servers import PASSWORD_ROLE, PostgresServer, give_away, newest_of_system

HOST: Final = "127.0.0.1"

_SSL_REQUEST: Final = struct.pack("!II", 8, 80877103)
"""With what clients of PostgreSQL ask for TLS."""

_DAY: Final = dt.timedelta(days=1)


class Pair(NamedTuple):
    """PEM files of a certificate with its key."""

    certificate: Path
    key: Path

    @property
    def in_one_file(self) -> Path:
        """Both, as MongoDB's clients want them."""
        both = self.certificate.with_suffix(".both.pem")
        both.write_bytes(self.key.read_bytes() + self.certificate.read_bytes())
        return both


class Authority:
    """Issues certificates for 127.0.0.1. file: its own, for those who trust it."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        self._folder = folder
        self._ca = trustme.CA(organization_name=name)
        self.file = folder / f"{name}.pem"
        self._ca.cert_pem.write_to_path(str(self.file))

    def issue(self, name: str, *, expired: bool = False, days: int = 1) -> Pair:
        """name: also the common name, which PostgreSQL takes for that of a role."""
        now = dt.datetime.now(dt.UTC)
        ends = now - _DAY if expired else now + days * _DAY
        issued = self._ca.issue_cert(HOST, common_name=name, not_before=now - 3 * _DAY, not_after=ends)
        pair = Pair(self._folder / f"{name}.pem", self._folder / f"{name}.key")
        issued.cert_chain_pems[0].write_to_path(str(pair.certificate))
        issued.private_key_pem.write_to_path(str(pair.key))
        pair.key.chmod(0o600)
        return pair


class TlsServer:
    """Agrees to encrypt, as a database's server does, and hangs up after the handshake.

    asked: whether clients ask first, as PostgreSQL's do.
    """

    def __init__(self, shown: Pair, *, asked: bool) -> None:
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(*shown)
        self._asked = asked

    def __enter__(self) -> Self:
        self._socket = socket.create_server((HOST, 0))
        self.port: int = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(60)

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._socket.accept()
                with suppress(OSError), client:
                    client.settimeout(5)
                    if self._asked:
                        client.recv(len(_SSL_REQUEST))
                        client.sendall(b"S")
                    with self._context.wrap_socket(client, server_side=True):
                        pass


class TlsPostgres(PostgresServer):
    """Lets nobody in over TCP without TLS: members of `PASSWORD_ROLE` by a password, others by a certificate.

    The tests' own connections, of the superuser, come by the socket.
    """

    def __init__(self, authority: Authority) -> None:
        """authority: of its certificate, and of those that it takes. Raises `ServerUnavailable`."""
        self._authority = authority
        settings = {"ssl": "on"} | {f"ssl_{name}_file": f"server.{name}" for name in ("ca", "cert", "key")}
        hba = f"""
            local all postgres trust
            hostssl all +{PASSWORD_ROLE} {HOST}/32 scram-sha-256
            hostssl all all {HOST}/32 cert
        """
        super().__init__(newest_of_system(), settings=settings, hba=hba)

    @contextmanager
    def showing(self, pair: Pair) -> Iterator[None]:
        """All who connect meanwhile see this certificate."""
        try:
            self._show(pair)
            yield
        finally:
            self._show(self._authority.issue("server"))

    def _show(self, pair: Pair) -> None:
        self._install(pair)
        with self.connect() as connection:
            connection.execute("SELECT pg_reload_conf()")
        der = ssl.PEM_cert_to_DER_cert(pair.certificate.read_text())
        wait_until(lambda: self._shown() == der, what="the server to show another certificate")

    def _shown(self) -> bytes | None:
        """The certificate that newcomers see."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with socket.create_connection((HOST, self.port)) as connection:
            connection.sendall(_SSL_REQUEST)
            assert connection.recv(1) == b"S"
            with context.wrap_socket(connection) as encrypted:
                return encrypted.getpeercert(binary_form=True)

    def url(self, database: str = "postgres", *, user: str = "postgres", password: str | None = None) -> str:
        """By the socket."""
        assert password is None
        return f"postgresql://{quote(user)}@/{quote(database)}?{urlencode({'host': self.folder, 'port': self.port})}"

    def tls_url(self, database: str, user: str, **options: object) -> str:
        """Over TCP, to a server that is checked as strictly as can be, unless options say otherwise."""
        options = {"sslmode": "verify-full", "sslrootcert": self._authority.file, **options}
        return f"postgresql://{quote(user)}@{HOST}:{self.port}/{quote(database)}?{urlencode(options)}"

    def _make_cluster(self) -> None:
        super()._make_cluster()
        self._install(self._authority.issue("server"))

    def _install(self, pair: Pair) -> None:
        for name, file in {"ca": self._authority.file, "cert": pair.certificate, "key": pair.key}.items():
            installed = self.data_dir / f"server.{name}"
            shutil.copy(file, installed)  # with its mode: a key is for its owner alone
            give_away(installed)
