"""How the server presents itself: hello and its legacy names, buildInfo, hostInfo and other questions of drivers."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import platform
import time
from typing import Any

import bson

from . import raw
from .aggregation import storage_stats
from .errors import CommandError
from .oplog import to_timestamp
from .state import Request, State

_PROCESS_ID = bson.ObjectId()
_REPLICA_SET_ID = bson.ObjectId()
_ELECTION_ID = bson.ObjectId("7fffffff0000000000000001")


async def hello(state: State, request: Request) -> bytes:
    """`hello`, `isMaster`, `ismaster`; with `topologyVersion` and `maxAwaitTimeMS` it waits for a change of role."""
    known = request.body.get("topologyVersion")
    if known is not None and known["processId"] == _PROCESS_ID and known["counter"] == state.topology_counter:
        with contextlib.suppress(TimeoutError):
            seconds = int(request.body.get("maxAwaitTimeMS", 0)) / 1000
            await asyncio.wait_for(state.topology_changed.wait(), seconds)
    application = (request.body.get("client") or {}).get("application") or {}
    if application:
        request.connection.app_name = str(application.get("name", ""))
    legacy = request.name != "hello"
    reply: dict[str, Any] = {"helloOk": True} if request.body.get("helloOk") else {}
    if state.standalone:
        reply["ismaster" if legacy else "isWritablePrimary"] = True
    else:
        reply |= _member(state, legacy=legacy)
    reply |= {
        "maxBsonObjectSize": 16 * 1024 * 1024,
        "maxMessageSizeBytes": 48_000_000,
        "maxWriteBatchSize": 100_000,
        "localTime": dt.datetime.now(dt.UTC),
        "logicalSessionTimeoutMinutes": 30,
        "connectionId": request.connection.id,
        "minWireVersion": 0,
        "maxWireVersion": state.version.max_wire_version,
        "readOnly": False,
    }
    return raw.fields(reply)


def topology_version(state: State) -> dict[str, Any]:
    """Which of two statements about this server's role is newer."""
    return {"processId": _PROCESS_ID, "counter": bson.Int64(state.topology_counter)}


def _member(state: State, *, legacy: bool) -> dict[str, Any]:
    last = state.oplog.last_timestamp
    stamp = {"ts": to_timestamp(last), "t": bson.Int64(1)}
    date = dt.datetime.fromtimestamp(last >> 32, dt.UTC)
    found: dict[str, Any] = {
        "topologyVersion": topology_version(state),
        "hosts": [state.host],
        "setName": state.settings.set_name,
        "setVersion": 1,
        "ismaster" if legacy else "isWritablePrimary": state.primary,
        "secondary": not state.primary,
    }
    if state.primary:
        found["primary"] = state.host
    found["me"] = state.host
    if state.primary:
        found["electionId"] = _ELECTION_ID
    majority = state.oplog.majority[1]
    found["lastWrite"] = {
        "opTime": stamp,
        "lastWriteDate": date,
        "majorityOpTime": {"ts": to_timestamp(majority), "t": bson.Int64(1)},
        "majorityWriteDate": dt.datetime.fromtimestamp(majority >> 32, dt.UTC),
    }
    return found


async def build_info(state: State, request: Request) -> bytes:
    """`buildInfo`: says that this is no MongoDB."""
    return raw.fields({
        "version": state.version.full,
        "gitVersion": "stand-in for tests, not a MongoDB server",
        "modules": [],
        "allocator": "system",
        "javascriptEngine": "none",
        "sysInfo": "deprecated",
        "versionArray": state.version.numbers,
        "bits": 64,
        "debug": False,
        "maxBsonObjectSize": 16 * 1024 * 1024,
        "storageEngines": ["ephemeralForTest"],
    })  # fmt: skip


async def host_info(state: State, request: Request) -> bytes:
    """`hostInfo`, minimal."""
    system = {"currentTime": dt.datetime.now(dt.UTC), "hostname": state.host, "cpuAddrSize": 64}
    return raw.fields({"system": system, "os": {"type": platform.system(), "name": "", "version": ""}, "extra": {}})


async def server_status(state: State, request: Request) -> bytes:
    """`serverStatus`, minimal."""
    return raw.fields({
        "host": state.host,
        "version": state.version.full,
        "process": "mongod",
        "uptime": time.monotonic() - state.started,
        "localTime": dt.datetime.now(dt.UTC),
        "connections": {"current": request.connection.id, "available": 1000},
        "repl": {} if state.standalone else _member(state, legacy=False),
        "storageEngine": {"name": "ephemeralForTest", "persistent": False},
    })  # fmt: skip


async def repl_set_get_status(state: State, request: Request) -> bytes:
    """`replSetGetStatus`, minimal."""
    if state.standalone:
        raise CommandError(76, "not running with --replSet")
    now = dt.datetime.now(dt.UTC)
    last = to_timestamp(state.oplog.last_timestamp)
    number, name = (1, "PRIMARY") if state.primary else (2, "SECONDARY")
    member = {"_id": 0, "name": state.host, "health": 1.0, "state": number, "stateStr": name,
              "optime": {"ts": last, "t": bson.Int64(1)}, "self": True}  # fmt: skip
    return raw.fields({"set": state.settings.set_name, "date": now, "myState": number, "term": bson.Int64(1),
                       "members": [member]})  # fmt: skip


async def repl_set_get_config(state: State, request: Request) -> bytes:
    """`replSetGetConfig`, minimal."""
    if state.standalone:
        raise CommandError(76, "not running with --replSet")
    members = [{"_id": 0, "host": state.host, "votes": 1, "priority": 1.0}]
    return raw.fields({"config": {
        "_id": state.settings.set_name,
        "version": 1,
        "term": bson.Int64(1),
        "members": members,
        "settings": {"replicaSetId": _REPLICA_SET_ID},
    }})  # fmt: skip


async def get_parameter(state: State, request: Request) -> bytes:
    """`getParameter`: only featureCompatibilityVersion is known."""
    if "featureCompatibilityVersion" in request.body or request.body["getParameter"] == "*":
        return raw.fields({"featureCompatibilityVersion": {"version": state.version.name}})
    raise CommandError(72, "no option found to get")


async def connection_status(state: State, request: Request) -> bytes:
    """`connectionStatus`: nobody is logged in."""
    return raw.fields({"authInfo": {"authenticatedUsers": [], "authenticatedUserRoles": []}})


async def nothing(state: State, request: Request) -> bytes:
    """`ping` and the like."""
    return b""


async def coll_stats(state: State, request: Request) -> bytes:
    """`collStats`."""
    found = state.catalog.get(request.db, request.collection)
    if found is None:
        return raw.fields({"ns": f"{request.db}.{request.collection}", "size": 0, "count": 0, "nindexes": 0})
    return raw.fields({"ns": found.namespace} | storage_stats(found))


async def db_stats(state: State, request: Request) -> bytes:
    """`dbStats`."""
    collections = list(state.catalog.databases.get(request.db, {}).values())
    stats = [storage_stats(collection) for collection in collections]
    size = float(sum(one["size"] for one in stats))
    return raw.fields({
        "db": request.db,
        "collections": len(collections),
        "views": 0,
        "objects": sum(one["count"] for one in stats),
        "dataSize": size,
        "storageSize": size,
        "indexes": sum(one["nindexes"] for one in stats),
    })  # fmt: skip
