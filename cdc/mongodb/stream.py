"""A change stream, by raw commands: replies are walked over, not decoded, and resuming is done here.

The drivers' change stream specification says how to resume; `mongodb/specifications`, change-streams.md. What it asks a
driver to cache, the last token that was given out, is the caller's: it knows which events it has used up.

Every getMore must reach the server that holds the cursor, and PyMongo's `command` does not pin it. Commands go to the
primary, of which there is one; after an election the new one does not know the cursor (43 CursorNotFound), which is
resumable. Of several routers (mongos) any might be chosen: a sharded cluster is streamed from by a client that knows
one of them only (`cdc.mongodb.deployment`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

import msgspec
import structlog
from bson.int64 import Int64
from bson.raw_bson import RawBSONDocument
from bson.timestamp import Timestamp
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import ConnectionFailure, OperationFailure, PyMongoError
from pymongo.read_preferences import ReadPreference

from cdc.change import TableName
from cdc.config import SourceConfig
from cdc.errors import DecodeError, FatalError, TransientError
from cdc.mongodb import walk
from cdc.mongodb.client import RAW, AsyncClient, translated_errors
from cdc.mongodb.deployment import Deployment
from cdc.mongodb.scope import Scope

log = structlog.get_logger()

AWAIT_MILLISECONDS: Final = 200
"""So long the server waits for a first event before it answers with none."""

BATCH_EVENTS: Final = 5000
"""Most replies stay well below the 16 MB that a server would send."""

_KILL_SECONDS: Final = 1.0

_CURSOR_NOT_FOUND: Final = 43

_RESUMABLE_CODES: Final = frozenset(
    {6, 7, 63, 89, 91, 133, 150, 189, 234, 262, 9001, 10107, 11600, 11602, 13388, 13435, 13436}
)
"""Of servers before 4.4, which set no label."""

_FIRST_VERSION_WITH_LABELS: Final = 9


class Reply(msgspec.Struct, frozen=True):
    """What a server answered.

    events: as BSON, in order.
    post_batch_token: where the stream stands after them; `None` from servers before 4.0.7.
    cluster_time: of the server when it answered; `None` where it did not tell.
    ended: the cursor is closed, after an invalidate.
    """

    events: Sequence[bytes]
    post_batch_token: bytes | None
    cluster_time: tuple[int, int] | None
    ended: bool


class Start(msgspec.Struct, frozen=True):
    """Where a stream begins.

    position: a resume token, or `{clusterTime: ...}` where none has ever been seen; `None`: now.
    new: begin another stream there (`startAfter`), as is needed after an invalidate, and does no harm after any other
        token; else the same one is resumed.
    """

    position: bytes | None
    new: bool


class ChangeStream:
    """One stream. All methods belong to one event loop."""

    def __init__(
        self,
        client: AsyncClient,
        target: TableName,
        options: Mapping[str, Any],
        pipeline: Sequence[Mapping[str, Any]],
        *,
        wire_version: int,
    ) -> None:
        """target: a collection, a database (the name is empty), or the deployment (both are).

        options: of the `$changeStream` stage; pipeline: the stages behind it.
        """
        self._target = target
        self._database = client[target.schema or "admin"]
        self._client = client
        self._options = dict(options) if target.schema else {"allChangesForCluster": True, **options}
        self._pipeline = list(pipeline)
        self._labels = wire_version >= _FIRST_VERSION_WITH_LABELS
        self._session: AsyncClientSession | None = None
        self._cursor: tuple[int, str] | None = None
        self._pending: asyncio.Task[Reply] | None = None
        self.resumed = 0

    # resumed: how often, since the start

    async def start(self, start: Start) -> Reply:
        """Open the cursor. An error of this is never resumable: `ResyncRequired`, `TransientError`, `FatalError`."""
        with translated_errors(streaming=True):
            return await self._aggregate(start)

    async def next(self, timeout_seconds: float, again: Callable[[], Start]) -> Reply | None:
        """What comes next; `None` if it takes longer than that, and then a later call gets it.

        again: where to resume. After a resumable error that is done at once; what goes wrong then, is raised.
        The next getMore is sent before this returns, so that the server works while the events are used up.
        """
        pending = self._pending or asyncio.create_task(self._get_more(), name="getMore")
        self._pending = pending
        await asyncio.wait({pending}, timeout=timeout_seconds)
        if not pending.done():
            return None
        self._pending = None
        try:
            reply = pending.result()
        except PyMongoError as exc:
            with translated_errors(streaming=True):
                if not self._resumable(exc):
                    raise
                log.info("resuming the change stream", error=type(exc).__name__, code=getattr(exc, "code", None))
                await self._kill_cursor()
                self.resumed += 1
                return await self._aggregate(again())
        if reply.events and not reply.ended:
            self._pending = asyncio.create_task(self._get_more(), name="getMore")
            await asyncio.sleep(0)  # until it is sent
        return reply

    async def close(self) -> None:
        """Let the server forget the cursor, if it can be told quickly."""
        if self._pending is not None:
            self._pending.cancel()
            with suppress(asyncio.CancelledError, PyMongoError):
                await self._pending
            self._pending = None
        await self._kill_cursor()
        if self._session is not None:
            with suppress(PyMongoError, TimeoutError):
                await asyncio.wait_for(self._session.end_session(), _KILL_SECONDS)
            self._session = None

    async def _aggregate(self, start: Start) -> Reply:
        if self._session is None:
            self._session = self._client.start_session(causal_consistency=False)
        command = {
            "aggregate": self._target.name or 1,
            "pipeline": [{"$changeStream": {**self._options, **_starting(start)}}, *self._pipeline],
            "cursor": {"batchSize": BATCH_EVENTS},
        }
        return self._read(await self._command(command), b"firstBatch")

    async def _get_more(self) -> Reply:
        if self._cursor is None:
            raise TransientError("the change stream is not open", hint="nothing: it is opened again")
        cursor_id, collection = self._cursor
        command = {
            "getMore": Int64(cursor_id),
            "collection": collection,
            "batchSize": BATCH_EVENTS,
            "maxTimeMS": AWAIT_MILLISECONDS,
        }
        return self._read(await self._command(command), b"nextBatch")

    async def _command(self, command: dict[str, Any]) -> bytes:
        reply = await self._database.command(
            command, codec_options=RAW, session=self._session, read_preference=ReadPreference.PRIMARY
        )
        return bytes(reply.raw)

    def _read(self, raw: bytes, batch: bytes) -> Reply:
        """Walk over a reply."""
        outer = walk.fields(raw)
        try:
            cursor = walk.fields(raw, outer[b"cursor"][1])
            cursor_id = walk.int64_at(raw, cursor[b"id"][1])
            events = walk.items(raw, cursor[batch][1])
            _, start, end = cursor[b"ns"]
        except KeyError as exc:
            raise DecodeError(f"a cursor's reply has no {exc.args[0].decode()}") from None
        self._cursor = (cursor_id, walk.string_at(raw, start, end).partition(".")[2]) if cursor_id else None
        post = cursor.get(b"postBatchResumeToken")
        time = outer.get(b"operationTime")
        return Reply(
            events,
            raw[post[1] : post[2]] if post and post[0] == walk.DOCUMENT else None,
            walk.timestamp_at(raw, time[1]) if time and time[0] == walk.TIMESTAMP else None,
            ended=not cursor_id,
        )

    def _resumable(self, error: PyMongoError) -> bool:
        """By the specification: whatever is no server's error, and of those the ones that it lists or labels."""
        if isinstance(error, ConnectionFailure):
            return True
        if not isinstance(error, OperationFailure):
            return False
        if error.code == _CURSOR_NOT_FOUND:
            return True
        if self._labels:
            return error.has_error_label("ResumableChangeStreamError")
        return error.code in _RESUMABLE_CODES and not error.has_error_label("NonResumableChangeStreamError")

    async def _kill_cursor(self) -> None:
        if self._cursor is None:
            return
        cursor_id, collection = self._cursor
        self._cursor = None
        command = {"killCursors": collection, "cursors": [Int64(cursor_id)]}
        with suppress(PyMongoError, TimeoutError):
            await asyncio.wait_for(self._command(command), _KILL_SECONDS)


def stream_options(source: SourceConfig, deployment: Deployment) -> dict[str, Any]:
    """The `$changeStream` stage's options. Raises `FatalError` where the server does not know one that is wanted."""
    options: dict[str, Any] = {}
    wanted = {"full_document": source.full_document, "full_document_before_change": source.full_document_before_change}
    for name, value in wanted.items():
        if value in {"whenAvailable", "required"} and not deployment.has_images:
            raise FatalError(
                f"sources.{source.name}.{name}: MongoDB {'.'.join(map(str, deployment.version))} keeps no such images",
                hint="upgrade the server to 6.0, or set full_document to 'updateLookup' and the other to 'off'",
            )
    if source.full_document != "off":
        options["fullDocument"] = source.full_document
    if source.full_document_before_change != "off":
        options["fullDocumentBeforeChange"] = source.full_document_before_change
    if source.show_expanded_events and deployment.has_images:
        options["showExpandedEvents"] = True
    return options


def stream_pipeline(source: SourceConfig, scope: Scope, deployment: Deployment) -> list[dict[str, Any]]:
    """The stages behind `$changeStream`."""
    split = source.split_large_events and deployment.can_split_events
    return [*scope.pipeline(), *([{"$changeStreamSplitLargeEvent": {}}] if split else [])]


def start_at(cluster_time: tuple[int, int]) -> bytes:
    """A position for where no token has been seen yet: the stream starts at this cluster time."""
    seconds, increment = cluster_time
    value = (seconds << 32 | increment).to_bytes(8, "little")
    return walk.document(walk.element(walk.TIMESTAMP, b"clusterTime", value))


def _starting(start: Start) -> dict[str, Any]:
    if start.position is None:
        return {}
    time = walk.find(start.position, b"clusterTime")
    if time is not None and time.kind == walk.TIMESTAMP:
        return {"startAtOperationTime": Timestamp(*walk.timestamp_at(start.position, time.start))}
    return {"startAfter" if start.new else "resumeAfter": RawBSONDocument(start.position)}
