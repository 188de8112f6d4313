"""All that answers over HTTP, for the daemon and for a gateway alike: server, routes, and the feed behind them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import structlog

from cdc.api.app import create_app
from cdc.api.backend import Backend
from cdc.api.certificate import read_certificate
from cdc.api.feed import Feed
from cdc.api.keyring import Keyring
from cdc.api.server import Server
from cdc.api.traced import Traced
from cdc.config import Config
from cdc.directory import Address
from cdc.feed.place import served
from cdc.http_config import Http
from cdc.status import HttpStatus

log = structlog.get_logger()


class Web:
    """Listens from the moment it is made, and answers while `serve` runs."""

    def __init__(self, config: Config, backend: Backend | None) -> None:
        """backend: the daemon; `None` for a gateway. Raises `CdcError` where address or certificate cannot be used."""
        place = served(config)
        self._feed = None if place is None else Feed.at(place)
        self._http, self._keyring = config.http, Keyring(config.http)
        app = create_app(backend, config.http, self._feed, self._keyring, self.status)
        self._server = Server(
            Traced(app),
            config.http.host_and_port,
            max_connections=config.http.max_connections,
            certificate=read_certificate(config.http),
        )
        self._warn()

    @property
    def address(self) -> Address:
        """Where this machine reaches it, and what it shows."""
        host, port = self._server.address
        netloc, certificate = f"[{host}]:{port}" if ":" in host else f"{host}:{port}", self._server.certificate
        if certificate is None:
            return Address(f"http://{netloc}")
        return Address(f"https://{netloc}", certificate.fingerprint)

    def status(self) -> HttpStatus:
        """What is told of the interface itself."""
        certificate = self._server.certificate
        return HttpStatus(None if certificate is None else certificate.not_after.timestamp())

    async def serve(self) -> None:
        """Answer until `stop`. Replication does not notice if that fails."""
        try:
            if self._feed is not None:
                self._feed.start()
            await self._server.serve()
        except Exception as exc:  # the task's outer edge
            log.error("HTTP failed", exc_info=exc)
        finally:
            if self._feed is not None:
                await self._feed.stop()

    def renew_certificate(self) -> list[str]:
        """Show whoever connects from now on what the files hold now; returns the option whose file has changed, if so.

        Raises `ConfigError`: all is as it was then.
        """
        before, certificate = self._server.certificate, read_certificate(self._http)
        if before is None or certificate is None or before.fingerprint == certificate.fingerprint:
            return []
        self._server.certificate = certificate
        log.info("certificate renewed", valid_until=certificate.not_after.isoformat())
        self._warn()
        return ["http.certificate_file"]

    def _warn(self) -> None:
        certificate = self._server.certificate
        if certificate is not None and certificate.problem:
            log.warning("clients refuse the certificate", file=self._http.certificate_file, problem=certificate.problem)

    def adopt(self, http: Http) -> None:
        """Go on with other tokens: streams end, and come back with one of them. Call it in the event loop."""
        if http.tokens == self._http.tokens:
            return
        self._http = http
        self._keyring.adopt(http)
        if self._feed is not None:
            self._feed.end_streams()

    def stop(self) -> None:
        """Let `serve` end: requests at hand get a second, open streams end at once. Call it in the event loop."""
        if self._feed is not None:
            self._feed.end_streams()
        self._server.stop()

    def close(self) -> None:
        """Stop listening. Safe to call twice."""
        self._server.close()


@contextmanager
def listening(config: Config, backend: Backend | None) -> Iterator[Web]:
    """A `Web` that no longer listens afterwards."""
    web = Web(config, backend)
    try:
        yield web
    finally:
        web.close()
