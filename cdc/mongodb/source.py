"""MongoDB as a source: a change stream, turned into batches."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Collection, Coroutine, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, TypeVar

import structlog
from pymongo.errors import PyMongoError

from cdc.change import Batch, Image, Table, TableName
from cdc.config import Config, SourceConfig
from cdc.errors import DecodeError, TransientError
from cdc.mongodb.assembly import PART_BYTES, Assembler
from cdc.mongodb.client import AsyncClient, Client, connect, connect_async, translated_errors
from cdc.mongodb.collections import Catalog, mirrored, read_catalog, read_collections
from cdc.mongodb.deployment import (
    STALLED_SECONDS,
    Deployment,
    describe,
    majority_delay_seconds,
    one_router,
    read_oplog,
)
from cdc.mongodb.event import uuid_of
from cdc.mongodb.fingerprint import FACT, check, encode, fingerprint
from cdc.mongodb.moment import moment
from cdc.mongodb.reread import made_as, read_again, read_all
from cdc.mongodb.scope import scope_of
from cdc.mongodb.snapshot import MongoSnapshot, estimate_size
from cdc.mongodb.stream import ChangeStream, Reply, Start, start_at, stream_options, stream_pipeline
from cdc.position import SourcePosition
from cdc.process import loop_factory
from cdc.pulse import elsewhere
from cdc.source import Beginning, Estimate, Facts
from cdc.stats import CaptureStats, OplogStatus, State

log = structlog.get_logger()

IDLE_SECONDS: Final = 1.0
"""While nothing happens in the captured collections, the position moves at most so often: each move is an fsync."""

OBSERVE_SECONDS: Final = 5.0
"""How often the server is asked how it is."""

OPLOG_SECONDS: Final = 30.0
"""How often it is asked how far its oplog reaches back."""

NO_MAJORITY: Final = "no majority of the replica set confirms writes: no change is given out"

Result = TypeVar("Result")


class MongoSource:
    """Streams the changes of one deployment, database or collection. Implements `cdc.source.Source`.

    The stream runs in an event loop of its own, in the thread that calls `open`, `read`, `observe` and `close`;
    everything else uses a client of its own.
    """

    def __init__(self, config: Config, source: SourceConfig, facts: Facts) -> None:
        assert source.url is not None
        self.name = source.name
        self._source = source
        self._url = source.url.reveal()
        self._facts = facts
        self._scope = scope_of(config, source)
        self._runner: asyncio.Runner | None = None
        self._client: AsyncClient | None = None
        self._stream: ChangeStream | None = None
        self._assembler: Assembler | None = None
        self._anew: dict[str, str] | None = None  # while the stream begins anew: the facts of its new beginning
        self._reply: Reply | None = None
        self._at = 0
        self._moving: Iterator[Batch] | None = None
        self._idle = False  # whether the server had nothing more when it answered last
        self._given_at = 0.0
        self._observed_at = 0.0
        self._oplog_at = 0.0
        self._oplog: OplogStatus | None = None
        self._delay_seconds = 0.0
        self._reader: Client | None = None
        self._reader_lock = threading.Lock()

    def open(self, position: SourcePosition | None) -> SourcePosition:
        """Connect, check that it is the same stream that `position` is from, and go on with it.

        Batches that were given out by this object count, even where they are not durable yet.
        """
        self.close()
        self._runner = asyncio.Runner(loop_factory=loop_factory())
        self._runner.get_loop().set_exception_handler(_forgotten)
        return self._run(self._open(position))

    def restart(self) -> Beginning:
        """Stream from now on."""
        self.close()
        self._assembler = None
        self._anew = {}
        try:
            return Beginning(self.open(None), self._anew)
        finally:
            self._anew = None

    def read(self, timeout_seconds: float) -> Batch | None:
        """Wait for changes; a batch without transactions moves the position while nothing happens."""
        stream, assembler = self._opened()
        if assembler.moved_in is not None:
            return self._move_in(assembler)
        if self._reply is None:
            self._reply, self._at = self._run(stream.next(timeout_seconds, self._resume_at)), 0
            if self._reply is None:
                return self._idle_batch(assembler)
            self._idle = not self._reply.events
        if self._at < len(self._reply.events):
            self._at = _fed(assembler, self._reply.events, self._at)
        if self._at >= len(self._reply.events) and assembler.moved_in is None:
            assembler.exhausted(self._reply.post_batch_token, empty=not self._reply.events)
            self._reply = self._run(stream.start(self._resume_at())) if self._reply.ended else None
            self._at = 0
        batch = assembler.take()
        if batch is None:
            return self._idle_batch(assembler)
        self._given_at = time.monotonic()
        return batch

    def confirm(self, *, durable: SourcePosition, applied: SourcePosition | None) -> None:
        """A MongoDB server does not wait for its readers: there is nobody to be told."""

    def observe(self, stats: CaptureStats) -> None:
        """Fill in whether everything was read, and how far the oplog reaches back; say so if a majority is missing."""
        if self._stream is None or self._assembler is None:
            return
        stats.server_end = self._assembler.position if self._idle and self._reply is None else None
        if time.monotonic() - self._observed_at > OBSERVE_SECONDS:
            self._observed_at = time.monotonic()
            self._run(self._observe_server())
        stats.oplog = self._oplog
        if self._delay_seconds > STALLED_SECONDS:
            stats.state, stats.error = State.WAITING, NO_MAJORITY
            stats.hint = "see rs.status(): most of its voting members must be up and keep pace"
        elif stats.error == NO_MAJORITY:
            stats.state, stats.error, stats.hint = State.RUNNING, None, ""

    def close(self) -> None:
        """Disconnect. What the last reply still held is asked for again."""
        runner, self._runner = self._runner, None
        if runner is not None:
            with suppress(PyMongoError, TransientError):
                runner.run(self._close())
            runner.close()
        self._stream = self._client = self._reply = self._moving = None
        with self._reader_lock:
            reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()

    # for the initial copy and verification, from other threads

    def tables(self) -> Sequence[TableName]:
        """The collections that are captured, by name; without views and time series, which have no change stream."""
        client = self._asking()
        databases = [self._scope.target.schema]
        if not databases[0]:
            with translated_errors():
                databases = [name for name in client.list_database_names() if self._scope.match_database(name)]
        found = read_collections(client, databases=databases, wanted=self._scope.match)
        return sorted(collection.name for collection in mirrored(found))

    def estimates(self) -> Mapping[TableName, Estimate]:
        """How large each captured collection is, as the server believes."""
        client = self._asking()
        return {table: estimate_size(client, table) for table in self.tables()}

    def dump_schema(self) -> Catalog:
        """Describe the captured collections: options and indexes."""
        return read_catalog(self._asking(), self.tables())

    def sequences(self) -> list[object]:
        """There are none."""
        return []

    def snapshot(self) -> MongoSnapshot:
        """A view for copying, while the stream goes on; what it promises is less than a snapshot (see there)."""
        return MongoSnapshot(self._url, self.tables())

    def primary_key(self, table: TableName) -> Sequence[str]:  # noqa: ARG002 - the same for all
        """Documents have their `_id`."""
        return ("_id",)

    def shapes(self, oids: Collection[int]) -> Sequence[object]:  # noqa: ARG002 - the protocol's
        """Nothing: documents have their shape with them."""
        return ()

    def reread(self, table: Table, image: Image) -> Image | None:
        """Read one document as it is now, by the `_id` in `image`: see `cdc.mongodb.reread`."""
        return read_again(self._asking(), table, image)

    def nudge(self) -> None:
        """Advance the cluster's time, so that an idle stream passes what happened before. Takes a privilege."""
        with translated_errors():
            self._asking().admin.command("appendOplogNote", 1, data={"msg": "cdc"})

    def _asking(self) -> Client:
        """A client that any thread may use."""
        with self._reader_lock:
            if self._reader is None:
                self._reader = connect(self._url, application_name=f"cdc {self.name}")
            return self._reader

    # opening

    async def _open(self, position: SourcePosition | None) -> SourcePosition:
        self._client = client = connect_async(self._url, application_name=f"cdc {self.name}")
        deployment = await describe(client)
        if deployment.sharded and len(client.nodes) > 1:
            router = await one_router(client)
            await client.close()
            self._client = client = connect_async(self._url, host=router, application_name=f"cdc {self.name}")
        self._check_fingerprint(deployment, position)
        self._stream = ChangeStream(
            client,
            self._scope.target,
            stream_options(self._source, deployment),
            stream_pipeline(self._source, self._scope, deployment),
            wire_version=deployment.wire_version,
        )
        if self._assembler is None:
            start = Start(position if isinstance(position, bytes) else None, new=True)
        else:
            self._assembler.forget_unfinished()
            start = self._resume_at()
        self._reply, self._at = await self._stream.start(start), 0
        self._idle = not self._reply.events
        if self._assembler is None:
            self._assembler = Assembler(self._scope, start.position or _beginning(self._reply))
        return self._assembler.position if position is None else position

    def _check_fingerprint(self, deployment: Deployment, position: SourcePosition | None) -> None:
        current = fingerprint(self._source, deployment)
        stored, encoded = self._facts.get(FACT), encode(current)
        if self._anew is not None:
            self._anew[FACT] = encoded
            return
        if position is not None:
            check(stored, current)
        if stored != encoded:
            self._facts.set(FACT, encoded)

    async def _close(self) -> None:
        if self._stream is not None:
            await self._stream.close()
        if self._client is not None:
            await self._client.close()

    # streaming

    def _opened(self) -> tuple[ChangeStream, Assembler]:
        if self._stream is None or self._assembler is None:
            raise TransientError(f"source {self.name} is not connected")
        return self._stream, self._assembler

    def _resume_at(self) -> Start:
        assert self._assembler is not None
        self._assembler.forget_unfinished()
        return Start(self._assembler.token, new=self._assembler.invalidated)

    def _idle_batch(self, assembler: Assembler) -> Batch | None:
        """Move the position by what the server has passed, so that it is not forgotten while nothing happens."""
        now = time.monotonic()
        if now - self._given_at < IDLE_SECONDS or (token := assembler.idle()) is None:
            return None
        self._given_at = now
        return Batch((), [], token, 0)

    def _move_in(self, assembler: Assembler) -> Batch:
        """A part of the collection that was renamed to a captured name; before it, what came before the rename."""
        if (batch := assembler.take()) is not None:
            return batch
        if self._moving is None:
            self._moving = self._moved_batches(assembler)
        batch = next(self._moving)
        if assembler.moved_in is None:
            self._moving = None
        return batch

    def _moved_batches(self, assembler: Assembler) -> Iterator[Batch]:
        """All documents, as they are now: what happens to them after the rename comes by the stream once more."""
        assert assembler.moved_in is not None
        name, event = assembler.moved_in
        log.info("reading a collection that was renamed to a captured name", source=self.name, collection=str(name))
        uuid = uuid_of(event.detail.description) if event.detail is not None else b""
        made = made_as(self._asking(), name, uuid)
        documents: list[bytes] = []
        size = 0
        for document in read_all(self._asking(), name, uuid):
            documents.append(document)
            size += len(document)
            if size >= PART_BYTES:
                yield assembler.moved_batch(made, documents, complete=False)
                documents, size = [], 0
        yield assembler.moved_batch(made, documents, complete=True)

    async def _observe_server(self) -> None:
        assert self._client is not None
        self._delay_seconds = await majority_delay_seconds(self._client)
        if time.monotonic() - self._oplog_at < OPLOG_SECONDS or self._assembler is None:
            return
        self._oplog_at = time.monotonic()
        oplog = await read_oplog(self._client)
        if oplog is None:
            return
        reached = moment(self._assembler.position) >> 32
        remaining = float(max(reached - oplog.first, 0)) if oplog.full else None
        self._oplog = OplogStatus(float(oplog.last - oplog.first), remaining)
        if self._oplog.is_short:
            log.warning("the oplog is about to forget the captured position", source=self.name)

    def _run(self, work: Coroutine[Any, Any, Result]) -> Result:
        if self._runner is None:
            work.close()
            raise TransientError(f"source {self.name} is not connected")
        with elsewhere():
            return self._runner.get_loop().run_until_complete(
                work
            )  # `run` would print every reply, for a signal's sake


def _forgotten(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """PyMongo leaves futures of handshakes that fail: what they failed with is what no server can be selected for."""
    log.debug("dropped by the driver", message=context.get("message"), error=repr(context.get("exception")))


def _fed(assembler: Assembler, events: Sequence[bytes], at: int) -> int:
    try:
        return assembler.feed(events, at)
    except DecodeError as exc:
        raise DecodeError(
            f"a change event is not understood: {exc}",
            hint="please report this, with the version of the server; excluding the collection leads past it",
        ) from exc


def _beginning(reply: Reply) -> bytes:
    """Where a stream began that was started without a position."""
    if reply.post_batch_token is not None and not reply.events:
        return reply.post_batch_token
    if reply.cluster_time is None:
        raise TransientError("the server tells neither a resume token nor its time", hint="it may be starting up")
    return start_at(reply.cluster_time)
