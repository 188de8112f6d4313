"""The certificate that the HTTP interface shows to whoever connects."""

from __future__ import annotations

import datetime as dt
import hashlib
import ssl
from pathlib import Path
from typing import Final, NamedTuple

from cdc.errors import ConfigError
from cdc.http_config import Http

_MISMATCH: Final = "KEY_VALUES_MISMATCH"


class Certificate(NamedTuple):
    """A certificate as it was read, with its key.

    context: shows it, to clients that know TLS 1.2 or newer.
    fingerprint: its SHA-256, in hex.
    """

    context: ssl.SSLContext
    fingerprint: str
    not_before: dt.datetime
    not_after: dt.datetime

    @property
    def problem(self) -> str:
        """Why clients refuse it today, if they do."""
        now = dt.datetime.now(dt.UTC)
        if now > self.not_after:
            return f"has expired at {self.not_after:%Y-%m-%d %H:%M} UTC"
        if now < self.not_before:
            return f"is not valid before {self.not_before:%Y-%m-%d %H:%M} UTC"
        return ""


def read_certificate(http: Http) -> Certificate | None:
    """What the configured files hold now; `None` where there are none. Raises `ConfigError` if it cannot be used."""
    if not http.certificate_file:
        return None
    from cryptography import x509  # noqa: PLC0415 - 8 MiB, for those alone who have a certificate
    from cryptography.hazmat.primitives.serialization import Encoding  # noqa: PLC0415

    key_option = "key_file" if http.key_file else "certificate_file"
    pem = _read("certificate_file", http.certificate_file)
    _read(key_option, http.key_file or http.certificate_file)
    try:
        certificate = x509.load_pem_x509_certificate(pem)
    except ValueError as exc:
        raise ConfigError(
            f"http.certificate_file: {http.certificate_file}: no certificate in PEM",
            hint="first the certificate itself, then those between it and the authority",
        ) from exc
    return Certificate(
        _context(http, key_option),
        hashlib.sha256(certificate.public_bytes(Encoding.DER)).hexdigest(),
        certificate.not_valid_before_utc,
        certificate.not_valid_after_utc,
    )


def _context(http: Http, key_option: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        # with a password, though none fits: OpenSSL would ask for one at the terminal
        context.load_cert_chain(http.certificate_file, http.key_file or None, password="")
    except ssl.SSLError as exc:
        reason = (
            f"is not the key of {http.certificate_file}"
            if exc.reason == _MISMATCH
            else "no private key in PEM, or one with a password"
        )
        raise ConfigError(
            f"http.{key_option}: {http.key_file or http.certificate_file}: {reason}",
            hint="a key without a password, which this user alone can read, and that belongs to http.certificate_file",
        ) from exc
    return context


def _read(option: str, file: str) -> bytes:
    """OpenSSL does not say which file it cannot read."""
    try:
        return Path(file).read_bytes()
    except OSError as exc:
        raise ConfigError(
            f"http.{option}: {file}: {exc.strerror}", hint="it must be readable by the user that runs cdc"
        ) from exc
