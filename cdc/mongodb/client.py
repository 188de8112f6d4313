"""Clients of MongoDB: documents stay raw, writes are durable whatever the URL says, errors are sorted."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from bson.codec_options import CodecOptions
from bson.errors import BSONError
from bson.raw_bson import RawBSONDocument
from pymongo import AsyncMongoClient, MongoClient
from pymongo.driver_info import DriverInfo
from pymongo.errors import (
    BulkWriteError,
    ConfigurationError,
    ConnectionFailure,
    ExecutionTimeout,
    InvalidName,
    InvalidURI,
    OperationFailure,
    ProtocolError,
    PyMongoError,
    ServerSelectionTimeoutError,
    WriteError,
    WTimeoutError,
)
from pymongo.uri_parser import parse_uri

from cdc import __version__
from cdc.errors import CdcError, DecodeError, FatalError, PermanentError, TransientError
from cdc.mongodb.error_codes import CHANGE_STREAM_CODES, CODES, TRANSIENT_LABELS
from cdc.pulse import elsewhere

Client = MongoClient[RawBSONDocument]
AsyncClient = AsyncMongoClient[RawBSONDocument]

RAW: Final[CodecOptions[RawBSONDocument]] = CodecOptions(
    document_class=RawBSONDocument, unicode_decode_error_handler="replace"
)
"""Replies stay bytes (`reply.raw`); only what is asked for by `reply[name]` is decoded."""

_DEFAULTS: Final = {"serverselectiontimeoutms": 10_000, "connecttimeoutms": 10_000, "heartbeatfrequencyms": 2_000}
"""What an URL may set otherwise. A server that said that it is no primary is asked again with the next heartbeat."""

_DURABLE: Final[dict[str, Any]] = {
    "w": "majority",
    "journal": True,
    "readConcernLevel": "majority",
    "readPreference": "primary",
    "retryWrites": True,
    "retryReads": True,
}
"""What no URL may set otherwise: a write that is confirmed stays, and nothing is read that may be rolled back."""

_NOT_OF_ONE_HOST: Final = frozenset({
    "replicaset", "directconnection", "loadbalanced", "srvservicename", "srvmaxhosts",
})  # fmt: skip

_CERTIFICATES: Final = "check tlsCAFile and tlsCertificateKeyFile of the url, and until when the certificates are valid"

_REACHABLE: Final = "is the server running, and reachable from here?"

_HANGS_UP: Final = f"{_REACHABLE} One that wants TLS, or another certificate of ours, hangs up as well"

_NO_TLS: Final = re.compile(r"CERTIFICATE_VERIFY_FAILED|_ALERT_\w*(?:CERTIFICATE|UNKNOWN_CA|HANDSHAKE_FAILURE|VERSION)")
"""One side does not take the other's certificate, or they have no version in common."""


def connect(url: str, *, application_name: str = "cdc", **options: Any) -> Client:
    """A client with raw documents, majority and journaled writes, majority reads from the primary.

    It connects when it is first used: use it within `translated_errors()`. Raises `FatalError` for an URL that cannot
    be read. options: PyMongo's, over those of the URL.
    """
    with _reading_url():
        return MongoClient(url, **_options(url, application_name, options))


def connect_async(
    url: str, *, host: tuple[str, int] | None = None, application_name: str = "cdc", **options: Any
) -> AsyncClient:
    """The same for asyncio. host: talk to this server of the deployment and to no other."""
    with _reading_url():
        address = url if host is None else _one_host(url, host)
        return AsyncMongoClient(address, **_options(url, application_name, options))


def database_name(url: str) -> str | None:
    """The database in an URL's path, if there is one. Raises `FatalError` for an URL that cannot be read."""
    with _reading_url():
        name: str | None = parse_uri(_without_srv(url), validate=False, warn=False)["database"]
        return name


@contextmanager
def translated_errors(*, streaming: bool = False) -> Iterator[None]:
    """Turn PyMongo's errors into `CdcError`s. Whoever waits for a server meanwhile does not hang (`cdc.pulse`).

    streaming: a change stream is read or opened, where some codes have a meaning of their own.
    """
    try:
        with elsewhere():
            yield
    except (PyMongoError, BSONError) as exc:
        raise to_cdc_error(exc, streaming=streaming) from exc


def to_cdc_error(error: PyMongoError | BSONError, *, streaming: bool = False) -> CdcError:
    """Sort an error by its class, and where the server sent it, by its code. Quotes no document."""
    if isinstance(error, OperationFailure) and not isinstance(error, ExecutionTimeout | WTimeoutError):
        return _of_operation(error, streaming=streaming)
    if isinstance(error, InvalidURI | ConfigurationError):
        return _of_configuration(error)
    if isinstance(error, ConnectionFailure) and _NO_TLS.search(str(error)):
        return FatalError(_first_reason(str(error)), hint=_CERTIFICATES)
    if isinstance(error, ServerSelectionTimeoutError):
        return TransientError(f"no server could be used: {_first_reason(str(error))}", hint=_reachable(error))
    # a ProtocolError ends its connection: what came was no message, and the next connection may be a better one
    if isinstance(error, ConnectionFailure | ProtocolError | ExecutionTimeout | WTimeoutError):
        return TransientError(_first_reason(str(error)), hint=_reachable(error))
    if isinstance(error, InvalidName):
        return FatalError(f"a database or collection cannot have this name: {clean(str(error))}", hint="correct it")
    if isinstance(error, BSONError):
        return DecodeError(f"the server's answer is no BSON: {clean(str(error))}", hint="is there a proxy between?")
    kind = TransientError if error.timeout else FatalError
    return kind(f"{type(error).__name__}: {clean(str(error))}", hint=_REACHABLE if error.timeout else "")


def server_error(
    code: int | None, message: str, *, labels: tuple[str, ...] = (), streaming: bool = False, write: bool = False
) -> CdcError:
    """The `CdcError` of an error that a server sent, as in a reply's `writeErrors`.

    write: it is about one statement of a write; what is not known otherwise is then this change's fault.
    """
    text = f"{clean(message)} ({code})"
    known = (CHANGE_STREAM_CODES.get(code) if streaming and code else None) or (CODES.get(code) if code else None)
    if known is not None:
        kind, hint = known
        return kind(text, hint=hint)
    if any(label in TRANSIENT_LABELS for label in labels):
        return TransientError(text, hint="nothing: it is tried again")
    if write:
        return PermanentError(text, hint="correct the document, the collection's validator or its indexes")
    return FatalError(text, hint="look the code up in MongoDB's list of error codes")


def clean(message: str) -> str:
    """A server's message without the documents and values that it quotes, in one line."""
    text = " ".join(message.split())
    for mark in ("{", " in element", "dup key", "First element", ", full error"):
        text = text.partition(mark)[0]
    return text.rstrip(" :,(") or "no reason given"


def _of_operation(error: OperationFailure, *, streaming: bool) -> CdcError:
    labels = tuple((error.details or {}).get("errorLabels", ()))
    if isinstance(error, BulkWriteError):
        for failed in error.details.get("writeErrors", ()):
            return server_error(failed.get("code"), str(failed.get("errmsg")), labels=labels, write=True)
        for concern in error.details.get("writeConcernErrors", ()):
            return server_error(concern.get("code"), str(concern.get("errmsg")), labels=labels)
    message = str((error.details or {}).get("errmsg") or error)
    return server_error(error.code, message, labels=labels, streaming=streaming, write=isinstance(error, WriteError))


def _of_configuration(error: PyMongoError) -> CdcError:
    text = str(error)
    if "DNS" in text or "SRV" in text or "resolution lifetime" in text:
        return TransientError("the url's host name could not be resolved by DNS (SRV)", hint="check host and DNS")
    if "Authentication" in text or "authentication" in text:
        return FatalError("the url asks for an authentication that cannot be had", hint="correct its authMechanism")
    if "certificate" in text:
        return FatalError("the certificate of the url's tlsCertificateKeyFile cannot be used", hint=_CERTIFICATES)
    # PyMongo's text may quote the url, and a password with an unescaped character is where it stumbles
    hint = "as in mongodb://user:password@host:27017/?replicaSet=rs0; special characters are written as %XX"
    return FatalError("the url of a MongoDB server cannot be read", hint=hint)


def _reachable(error: PyMongoError) -> str:
    return _HANGS_UP if re.search(r"closed|reset by peer", _first_reason(str(error))) else _REACHABLE


def _first_reason(text: str) -> str:
    """Without the description of the topology, which names every server and all that was tried."""
    text = re.split(r", Timeout: |, Topology Description: ", text)[0]
    return clean(re.sub(r"\(configured timeouts:[^)]*\)", "", text))


@contextmanager
def _reading_url() -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of options that PyMongo does not know: `cdc check` tells them
            yield
    except OSError as exc:  # ssl.SSLError is one; both come before anything is sent
        named = f"{exc.filename}: " if exc.filename else ""
        raise FatalError(
            f"a file of the url's tls options cannot be used: {named}{exc.strerror}", hint=_CERTIFICATES
        ) from exc
    except (PyMongoError, ValueError, TypeError) as exc:
        if isinstance(exc, PyMongoError):
            raise to_cdc_error(exc) from None
        raise _of_configuration(InvalidURI()) from None


def _options(url: str, application_name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    parsed = parse_uri(_without_srv(url), validate=False, warn=False)["options"]
    given = {name.lower() for name in parsed} | {name.lower() for name in options}
    defaults = {name: value for name, value in _DEFAULTS.items() if name not in given}
    return {
        **defaults,
        **_DURABLE,
        "appname": application_name,
        "driver": DriverInfo("cdc", __version__),
        "document_class": RawBSONDocument,
        "unicode_decode_error_handler": "replace",
        **options,
    }


def _one_host(url: str, host: tuple[str, int]) -> str:
    """The URL with this host only, directly; what DNS says about a mongodb+srv one is written out."""
    scheme, _, rest = url.partition("://")
    netloc, _, rest = rest.partition("/")
    database, _, query = rest.partition("?")
    login = f"{user}@" if (user := netloc.rpartition("@")[0]) else ""
    options = [part for part in re.split("[&;]", query) if part.partition("=")[0].lower() not in _NOT_OF_ONE_HOST]
    names = {part.partition("=")[0].lower() for part in options}
    if scheme.endswith("+srv"):
        found = {name.lower(): value for name, value in parse_uri(url, validate=False, warn=False)["options"].items()}
        options += [f"authSource={found['authsource']}"] if "authsource" in found and "authsource" not in names else []
        options += [] if names & {"tls", "ssl"} else ["tls=true"]
    name = f"[{host[0]}]" if ":" in host[0] else host[0]
    options = [part for part in options if part]
    return f"mongodb://{login}{name}:{host[1]}/{database}?{'&'.join([*options, 'directConnection=true'])}"


def _without_srv(url: str) -> str:
    """So that reading an URL asks no DNS."""
    return re.sub(r"^mongodb\+srv://", "mongodb://", url)
