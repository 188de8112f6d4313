"""What a source leads to: which servers of which version, which deployment, how far back its oplog reaches."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final

import msgspec
from pymongo.errors import OperationFailure

from cdc.errors import FatalError, TransientError
from cdc.mongodb.client import RAW, AsyncClient, translated_errors
from cdc.mongodb.error_codes import REPLICA_SET_HINT

STALLED_SECONDS: Final = 10.0
"""What is written for longer than that without reaching a majority, waits for one."""

_FULL: Final = 0.9
"""Of its largest size; a server begins to remove the oldest entries a little before."""

_FIRST_WITH_IMAGES: Final = (6, 0)
_FIRST_WITH_SPLIT: Final = (6, 0, 9)
_OLDEST: Final = (4, 2)


class Deployment(msgspec.Struct, frozen=True):
    """A replica set, or a sharded cluster by way of a router.

    version: of the server that answered. wire_version: of its protocol.
    set_name: of the replica set; `None` for a sharded cluster.
    unique_id: made with the deployment; `None` where we may not read it.
    """

    version: tuple[int, ...]
    wire_version: int
    set_name: str | None
    unique_id: str | None

    @property
    def sharded(self) -> bool:
        """Whether it is a sharded cluster."""
        return self.set_name is None

    @property
    def has_images(self) -> bool:
        """Pre- and post-images in change streams, and events of what happens to collections and indexes."""
        return self.version >= _FIRST_WITH_IMAGES

    @property
    def can_split_events(self) -> bool:
        """Whether it knows `$changeStreamSplitLargeEvent`."""
        return self.version >= _FIRST_WITH_SPLIT

    @property
    def identity(self) -> dict[str, str]:
        """What tells it from another; only what both sides know can be compared."""
        known = {"replica set": self.set_name or "", "id": self.unique_id or ""}
        return {name: value for name, value in known.items() if value}


class Oplog(msgspec.Struct, frozen=True):
    """The oldest and the newest entry of the oplog, in unix seconds, and whether old ones leave as new ones come."""

    first: int
    last: int
    full: bool


def read_deployment(hello: Mapping[str, Any], build_info: Mapping[str, Any], unique_id: str | None) -> Deployment:
    """Understand what a server says of itself. Raises `FatalError` for one that has no change streams."""
    version = tuple(int(part) for part in build_info.get("versionArray", ())[:3])
    set_name = hello.get("setName")
    if hello.get("serviceId") is not None:
        raise FatalError(
            "the url leads to a load balancer: the server that holds a cursor cannot be chosen through one",
            hint="connect to the servers (mongod, or mongos) themselves, without loadBalanced=true",
        )
    if set_name is None and hello.get("msg") != "isdbgrid":
        raise FatalError("the server is a standalone: it keeps no oplog, so no change stream", hint=REPLICA_SET_HINT)
    if version < _OLDEST:
        raise FatalError(
            f"MongoDB {'.'.join(map(str, version))} is too old", hint="upgrade the server: 4.2 is the oldest that works"
        )
    return Deployment(version, int(hello.get("maxWireVersion", 0)), set_name, unique_id)


async def describe(client: AsyncClient) -> Deployment:
    """Ask."""
    with translated_errors():
        hello = await client.admin.command("hello", codec_options=RAW)
        build_info = await client.admin.command("buildInfo", codec_options=RAW)
    if hello.get("setName") is None and hello.get("msg") != "isdbgrid":
        return read_deployment(hello, build_info, None)
    with translated_errors():
        return read_deployment(hello, build_info, await _unique_id(client, sharded="setName" not in hello))


async def read_oplog(client: AsyncClient) -> Oplog | None:
    """How far the oplog reaches; `None` for a sharded cluster, and where we may not read it."""
    oplog = client.local.get_collection("oplog.rs", codec_options=RAW)
    try:
        times = []
        for direction in (1, -1):
            entry = await oplog.find_one({}, {"ts": 1}, sort=[("$natural", direction)], max_time_ms=2000)
            if entry is None:
                return None
            times.append(int(entry["ts"].time))
        stats = await client.local.command("collStats", "oplog.rs", codec_options=RAW)
        return Oplog(times[0], times[1], is_full(stats))
    except (OperationFailure, KeyError, AttributeError):
        return None


def is_full(stats: Mapping[str, Any]) -> bool:
    """Whether the oplog, by its `collStats`, forgets its oldest entries; also where that is not known."""
    return not stats.get("maxSize") or bool(stats["size"] >= _FULL * stats["maxSize"])


async def majority_delay_seconds(client: AsyncClient) -> float:
    """How long the newest write has been waiting for a majority; 0 where it does not, or nobody tells."""
    with translated_errors():
        hello = await client.admin.command("hello", codec_options=RAW)
    return majority_delay(hello)


def majority_delay(hello: Mapping[str, Any]) -> float:
    """The same, from an answer."""
    written = hello.get("lastWrite")
    if not isinstance(written, Mapping):
        return 0.0
    last, majority = written.get("lastWriteDate"), written.get("majorityWriteDate")
    if not isinstance(last, datetime) or not isinstance(majority, datetime):
        return 0.0
    return max((last - majority).total_seconds(), 0.0)


async def one_router(client: AsyncClient) -> tuple[str, int]:
    """A router that answers: cursors live on one of them."""
    with translated_errors():
        await client.admin.command("ping")
    for host, port in sorted(client.nodes):
        if port is not None:
            return host, port
    raise TransientError("no router (mongos) answers", hint="are they running, and reachable from here?")


async def _unique_id(client: AsyncClient, *, sharded: bool) -> str | None:
    try:
        if sharded:
            found = await client.config.get_collection("version", codec_options=RAW).find_one({}, {"clusterId": 1})
            return str(found["clusterId"]) if found is not None else None
        config = (await client.admin.command("replSetGetConfig", codec_options=RAW))["config"]
        return str(config["settings"]["replicaSetId"])
    except (OperationFailure, KeyError):  # it takes a privilege (clusterMonitor) that is not needed otherwise
        return None
