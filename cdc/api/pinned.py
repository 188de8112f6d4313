"""Connections of the command line to its daemon."""

from __future__ import annotations

import hashlib
import ssl
from http.client import HTTPConnection, HTTPSConnection
from urllib.parse import urlsplit


def connection_to(url: str, certificate: str, timeout_seconds: float) -> HTTPConnection:
    """A connection that is made when it is first used.

    certificate: SHA-256, in hex, of the one that the server must show. Empty: whichever the system trusts.
    """
    parts = urlsplit(url)
    if parts.scheme != "https":
        return HTTPConnection(parts.netloc, timeout=timeout_seconds)
    if not certificate:
        return HTTPSConnection(parts.netloc, timeout=timeout_seconds)
    return _Pinned(parts.netloc, certificate, timeout_seconds)


class _Pinned(HTTPSConnection):
    """Talks to the owner of one certificate and to nobody else, whatever name it was asked by and who signed it."""

    def __init__(self, netloc: str, certificate: str, timeout_seconds: float) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        super().__init__(netloc, timeout=timeout_seconds, context=context)
        self._certificate = certificate

    def connect(self) -> None:
        """Connect, and compare before anything is sent."""
        super().connect()
        shown = self.sock.getpeercert(binary_form=True)
        if hashlib.sha256(shown or b"").hexdigest() != self._certificate:
            self.close()
            raise ConnectionError("shows another certificate than the daemon's")
