"""Clients of MongoDB: documents stay raw, writes are durable whatever the URL says, errors are sorted."""

from __future__ import annotations

import re
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

from cdc import __version__
from cdc.errors import CdcError, DecodeError, FatalError, PermanentError, TransientError
from cdc.mongodb.error_codes import CHANGE_STREAM_CODES, CODES, TRANSIENT_LABELS
from cdc.mongodb.url import CERTIFICATES, one_host, parsed, reading_url, url_error
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

_REACHABLE: Final = "is the server running, and reachable from here?"

_HANGS_UP: Final = f"{_REACHABLE} One that wants TLS, or another certificate of ours, hangs up as well"

_NO_TLS: Final = re.compile(r"CERTIFICATE_VERIFY_FAILED|_ALERT_\w*(?:CERTIFICATE|UNKNOWN_CA|HANDSHAKE_FAILURE|VERSION)")
"""One side does not take the other's certificate, or they have no version in common."""


def connect(url: str, *, application_name: str = "cdc", **options: Any) -> Client:
    """A client with raw documents, majority and journaled writes, majority reads from the primary.

    It connects when it is first used: use it within `translated_errors()`. Raises `FatalError` for an URL that cannot
    be read. options: PyMongo's, over those of the URL.
    """
    with reading_url():
        return MongoClient(url, **_options(url, application_name, options))


def connect_async(
    url: str, *, host: tuple[str, int] | None = None, application_name: str = "cdc", **options: Any
) -> AsyncClient:
    """The same for asyncio. host: talk to this server of the deployment and to no other."""
    with reading_url():
        address = url if host is None else one_host(url, host)
        return AsyncMongoClient(address, **_options(url, application_name, options))


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
        return url_error(error)
    if isinstance(error, ConnectionFailure) and _NO_TLS.search(str(error)):
        return FatalError(_first_reason(str(error)), hint=CERTIFICATES)
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


def _reachable(error: PyMongoError) -> str:
    return _HANGS_UP if re.search(r"closed|reset by peer", _first_reason(str(error))) else _REACHABLE


def _first_reason(text: str) -> str:
    """Without the description of the topology, which names every server and all that was tried."""
    text = re.split(r", Timeout: |, Topology Description: ", text)[0]
    return clean(re.sub(r"\(configured timeouts:[^)]*\)", "", text))


def _options(url: str, application_name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    given = {name.lower() for name in parsed(url)["options"]} | {name.lower() for name in options}
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
