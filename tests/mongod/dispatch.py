"""From a message to its reply: which command it is, what must hold before it runs, and the reply's frame."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final

import bson

from . import admin, aggregation, catalog, crud, handshake, index_commands, raw, reads, sessions
from .change_streams import has_change_stream
from .errors import RESUMABLE, RETRIABLE, TRANSIENT, CloseConnection, CommandError, code_name
from .oplog import to_timestamp
from .state import BULK_FIELDS, Connection, Request, State
from .wire import Message

Handler = Callable[[State, Request], Awaitable[bytes]]

log = logging.getLogger(__name__)

_WRITES: Final[dict[str, Handler]] = {
    "insert": crud.insert, "update": crud.update, "delete": crud.delete, "findAndModify": crud.find_and_modify,
    "findandmodify": crud.find_and_modify, "create": catalog.create, "drop": catalog.drop,
    "dropDatabase": catalog.drop_database, "renameCollection": catalog.rename, "collMod": catalog.coll_mod,
    "createIndexes": index_commands.create_indexes, "dropIndexes": index_commands.drop_indexes,
    "deleteIndexes": index_commands.drop_indexes, "commitTransaction": sessions.commit,
    "abortTransaction": sessions.abort, "appendOplogNote": admin.append_note, "replSetStepDown": admin.step_down,
}  # fmt: skip
_READS: Final[dict[str, Handler]] = {
    "find": reads.find, "count": reads.count, "distinct": reads.distinct, "aggregate": aggregation.aggregate,
    "getMore": reads.get_more, "listCollections": catalog.list_collections, "listIndexes": index_commands.list_indexes,
    "listDatabases": catalog.list_databases, "collStats": handshake.coll_stats, "dbStats": handshake.db_stats,
}  # fmt: skip
_OTHERS: Final[dict[str, Handler]] = {
    "hello": handshake.hello, "isMaster": handshake.hello, "ismaster": handshake.hello, "ping": handshake.nothing,
    "buildInfo": handshake.build_info, "buildinfo": handshake.build_info, "hostInfo": handshake.host_info,
    "serverStatus": handshake.server_status, "replSetGetStatus": handshake.repl_set_get_status,
    "replSetGetConfig": handshake.repl_set_get_config, "getParameter": handshake.get_parameter,
    "connectionStatus": handshake.connection_status, "killCursors": reads.kill_cursors, "endSessions": sessions.end,
    "killSessions": sessions.kill,
    "startSession": handshake.nothing, "refreshSessions": handshake.nothing, "logout": handshake.nothing,
    "fsync": handshake.nothing, "configureFailPoint": admin.configure_fail_point,
    "cdcTestTruncateOplog": admin.truncate_oplog, "cdcTestBlackout": admin.blackout,
    "cdcTestHoldMajority": admin.hold_majority,
    "cdcTestExpire": admin.expire_documents, "cdcTestStatistics": admin.statistics,
}  # fmt: skip
COMMANDS: Final = _WRITES | _READS | _OTHERS
_ADMIN_ONLY: Final = {"listDatabases", "renameCollection", "replSetStepDown", "replSetGetStatus", "getParameter"}
_NOT_IN_TRANSACTIONS: Final = {
    "drop",
    "dropDatabase",
    "renameCollection",
    "collMod",
    "dropIndexes",
    "listCollections",
    "count",
}
_BULK: Final = frozenset(BULK_FIELDS.values())
_OK: Final = raw.fields({"ok": 1.0})
_NO_SIGNATURE: Final = raw.fields({"signature": {"hash": bson.Binary(b"\0" * 20), "keyId": bson.Int64(0)}})


async def answer(state: State, message: Message, connection: Connection) -> bytes:
    """The reply to a command. `CloseConnection` if there is none."""
    request: Request | None = None
    try:
        request = _request(message, connection)
        return await _run(state, request)
    except CommandError as exc:
        return _failure(state, request, exc)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as exc:
        log.exception("command not understood: %s", request.name if request else "?")
        return _failure(state, request, CommandError(9, f"not understood by this stand-in: {exc!r}"))


def _request(message: Message, connection: Connection) -> Request:
    small = [one for one in raw.elements(message.body) if one[0] not in _BULK or one[1] != raw.ARRAY]
    body = raw.decode(raw.document(small))
    if "$query" in body:
        body = body["$query"]
    name = next(iter(body), "")
    db = message.database or body.get("$db")
    if not isinstance(db, str):
        raise CommandError(40571, "OP_MSG requests require a $db argument")
    return Request(name, db, body, message.body, message, connection)


async def _run(state: State, request: Request) -> bytes:
    handler = COMMANDS.get(request.name)
    if handler is None:
        raise CommandError(59, f"no such command: '{request.name}'")
    if request.name in _ADMIN_ONLY and request.db != "admin":
        raise CommandError(13, f"{request.name} may only be run against the admin database.")
    injected = await _inject(state, request)
    if not state.primary and request.name not in _OTHERS:
        code, text = (10107, "not primary") if request.name not in _READS or request.name == "getMore" else (
            13435, "not primary and secondaryOk=false")  # fmt: skip
        if code == 10107 or not _may_read_secondary(request):
            raise CommandError(code, text)
    sessions.attach(state, request)
    if request.transaction is not None:
        _check_in_transaction(request)
    try:
        reply = await handler(state, request)
    except CommandError:
        _abort_if_open(state, request)
        raise
    if injected.get("closeConnectionAfter"):
        raise CloseConnection
    if "writeConcernError" in injected:
        reply += raw.fields({"writeConcernError": injected["writeConcernError"]})
        if injected.get("errorLabels"):
            reply = raw.fields({"errorLabels": injected["errorLabels"]}) + reply
    return raw.wrap(reply + _OK + _times(state))


def _may_read_secondary(request: Request) -> bool:
    preference = request.body.get("$readPreference") or {}
    return bool(preference.get("mode", "primary") != "primary")


def _check_in_transaction(request: Request) -> None:
    if request.name in _NOT_IN_TRANSACTIONS:
        raise CommandError(263, f"Cannot run '{request.name}' in a multi-document transaction.")


def _abort_if_open(state: State, request: Request) -> None:
    transaction = request.transaction
    if transaction is not None and transaction.status == "open" and request.name != "commitTransaction":
        transaction.abort(state)


async def _inject(state: State, request: Request) -> dict[str, Any]:
    """Do what `failCommand` says; what is left is for after the command."""
    if request.name == "configureFailPoint":
        return {}
    data = state.fail_points.hit(request.name, request.connection.app_name)
    if data is None:
        return {}
    if data.get("blockConnection"):
        await asyncio.sleep(int(data.get("blockTimeMS", 0)) / 1000)
    if data.get("closeConnection"):
        raise CloseConnection
    if "errorCode" in data:
        request.notes["injected"] = True
        request.notes["labels"] = data.get("errorLabels")
        request.notes["change_stream"] = request.name == "aggregate" and has_change_stream(request.body.get("pipeline"))
        request.notes["retryable"] = "txnNumber" in request.body and "autocommit" not in request.body
        raise CommandError(int(data["errorCode"]), "Failing command via 'failCommand' failpoint")
    return data


def _failure(state: State, request: Request | None, exc: CommandError) -> bytes:
    parts = b""
    labels = _labels(request, exc)
    if labels:
        parts += raw.fields({"errorLabels": labels})
    if not state.standalone:
        parts += raw.element(b"operationTime", raw.TIMESTAMP, state.oplog.last_timestamp.to_bytes(8, "little"))
    parts += raw.fields(
        {"ok": 0.0, "errmsg": exc.errmsg, "code": exc.code, "codeName": code_name(exc.code)} | exc.extra
    )
    if exc.code in {10107, 13435, 11602}:  # without it drivers forget the server until their next heartbeat
        parts += raw.fields({"topologyVersion": handshake.topology_version(state)})
    return raw.wrap(parts + _cluster_time(state))


def _labels(request: Request | None, exc: CommandError) -> list[str]:
    """The labels that a server gives to an error, by what failed (a fail point's own replace them)."""
    if request is None:
        return list(exc.labels)
    if request.notes.get("labels") is not None:
        return list(request.notes["labels"])
    labels = list(exc.labels)
    ends = request.name in {"commitTransaction", "abortTransaction"}
    if request.body.get("autocommit") is False and not ends and exc.code in TRANSIENT:
        labels.append("TransientTransactionError")
    elif (request.retryable or request.notes.get("retryable") or ends) and exc.code in RETRIABLE:
        labels.append("RetryableWriteError")
    elif request.notes.get("change_stream") and exc.code in RESUMABLE:
        labels.append("ResumableChangeStreamError")
    if exc.code in {280, 286}:
        labels.append("NonResumableChangeStreamError")
    return list(dict.fromkeys(labels))


def _cluster_time(state: State) -> bytes:
    if state.standalone:
        return b""
    inner = raw.fields({"clusterTime": to_timestamp(state.oplog.last_timestamp)}) + _NO_SIGNATURE
    return raw.element(b"$clusterTime", raw.OBJECT, raw.wrap(inner))


def _times(state: State) -> bytes:
    if state.standalone:
        return b""
    stamp = state.oplog.last_timestamp.to_bytes(8, "little")
    return _cluster_time(state) + raw.element(b"operationTime", raw.TIMESTAMP, stamp)
