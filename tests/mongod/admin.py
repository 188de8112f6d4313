"""Commands with which tests break things: fail points, step-down, and the stand-in's own (`cdcTest...`)."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from . import raw
from .errors import CommandError
from .state import Request, State
from .writes import Target


async def configure_fail_point(state: State, request: Request) -> bytes:
    """`configureFailPoint`."""
    body = request.body
    if request.db != "admin":
        raise CommandError(13, "configureFailPoint may only be run against the admin database.")
    count = state.fail_points.configure(body["configureFailPoint"], body.get("mode"), body.get("data") or {})
    return raw.fields({"count": count})


async def step_down(state: State, request: Request) -> bytes:
    """`replSetStepDown`: no primary for so many seconds, then this server is elected again."""
    seconds = float(request.body["replSetStepDown"])
    state.set_primary(False)
    asyncio.get_running_loop().call_later(seconds, state.set_primary, True)
    return b""


async def append_note(state: State, request: Request) -> bytes:
    """`appendOplogNote`: advances the cluster's time."""
    state.oplog.note()
    return b""


async def truncate_oplog(state: State, request: Request) -> bytes:
    """`cdcTestTruncateOplog`: forget the oldest entries (all, or `{keep: n}`)."""
    oplog = state.oplog
    keep = int(request.body.get("keep", 0))
    oplog.truncate(max(0, oplog.end - oplog.first - keep))
    oplog.truncated = True
    oplog.note()
    return b""


async def hold_majority(state: State, request: Request) -> bytes:
    """`cdcTestHoldMajority: true`: writes succeed, but change streams do not see them until it is false again."""
    state.oplog.hold_majority(hold=bool(request.body["cdcTestHoldMajority"]))
    return b""


async def blackout(state: State, request: Request) -> bytes:
    """`cdcTestBlackout: seconds`: answer, then close the listening socket and every connection for that time."""
    if state.blackout is not None and not state.blackout.done():
        asyncio.get_running_loop().call_later(0.02, state.blackout.set_result, float(request.body["cdcTestBlackout"]))
    return b""


async def expire_documents(state: State, request: Request) -> bytes:
    """`cdcTestExpire`: what the TTL monitor does once a minute on a server, at once. Replies `deleted`."""
    now = time.time() * 1000
    deleted = 0
    for collections in list(state.catalog.databases.values()):
        for collection in list(collections.values()):
            target = Target(state, collection, None, validate=False)
            for index in list(collection.indexes.values()):
                seconds = index.settings.get("expireAfterSeconds")
                if seconds is None or len(index.key) != 1:
                    continue
                path = next(iter(index.key)).encode().split(b".")
                for key, document in list(collection.documents.items()):
                    if _expired(document, path, now - seconds * 1000):
                        target.delete(key, document)
                        deleted += 1
    return raw.fields({"deleted": deleted})


def _expired(document: bytes, path: list[bytes], before_ms: float) -> bool:
    return any(
        kind == raw.DATE and int.from_bytes(payload, "little", signed=True) <= before_ms
        for kind, payload in raw.values_at(document, path)
    )


async def statistics(state: State, request: Request) -> bytes:
    """`cdcTestStatistics`: what is kept in memory."""
    found: dict[str, Any] = {
        "oplogEntries": state.oplog.end - state.oplog.first,
        "openCursors": len(state.cursors),
        "openTransactions": len(state.open_transactions),
        "sessions": len(state.sessions),
    }
    return raw.fields(found)
