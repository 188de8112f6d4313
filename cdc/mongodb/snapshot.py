"""What the initial copy reads: collections in ranges of `_id`, each by workers of its own.

MongoDB has no view of a large database at one moment (a snapshot read ends after five minutes). So this is none: every
document is read as it is when its turn comes, and the stream, which began before the first read, brings what changed.
Applied on top, in order, every change leads to the document as it was after it, so that once the stream has passed
the moment of the last read, the mirror is as the source was then.

Two things make that hold. Reads come after `position`, a moment taken at the start: what happened until then is in the
copy for certain, and need not be applied (drops and renames *must* not). And a collection that was renamed, dropped or
made anew while it was read is not counted as copied.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Final

import bson
import structlog
from bson.raw_bson import RawBSONDocument
from bson.timestamp import Timestamp
from pymongo.errors import OperationFailure
from pymongo.read_concern import ReadConcern

from cdc.change import TableName
from cdc.errors import TransientError
from cdc.mongodb import walk
from cdc.mongodb.client import RAW, Client, connect, translated_errors
from cdc.mongodb.collections import Catalog, CollectionInfo, read_collections
from cdc.mongodb.moment import encode_moment, moment
from cdc.source import Chunk, Estimate

log = structlog.get_logger()

MAX_CHUNKS: Final = 2_000
"""Of one collection: what the target remembers of them is one document."""

SAMPLES_PER_CHUNK: Final = 20
_MAX_SAMPLES: Final = 20_000
_RESUMES: Final = 10
"""So often in a row a range is read on after an error that brought no document; then the run ends, and begins anew."""

BLOCK_BYTES: Final = 256 * 1024

_BY_ID: Final = {"_id": 1}
_NAMESPACE_NOT_FOUND: Final = 26

IdRange = tuple[bytes | None, bytes | None]
"""From a document `{_id: value}` to before another one, in the order of the index on `_id`; `None` is open."""


class MongoSnapshot:
    """`cdc.source.Snapshot` of a MongoDB deployment, which is none: see above. Close it when done."""

    def __init__(self, url: str, tables: Iterable[TableName]) -> None:
        self._client = connect(url, application_name="cdc-copy")
        self.position: bytes = encode_moment(now(self._client))
        self._collections = _described(self._client, tables)

    def chunks(self, table: TableName, chunk_bytes: int) -> Sequence[Chunk]:
        """Split by ranges of `_id`. A capped collection is one part: its order is that of its documents."""
        collection = self._collections[table]
        estimate = estimate_size(self._client, table)
        wanted = min(max(1, -(-estimate.size // chunk_bytes)), MAX_CHUNKS, max(1, estimate.rows))
        bounds = [] if wanted == 1 or collection.capped else split_points(self._client, table, wanted)
        ranges = ranges_between(bounds)
        rows, size = estimate.rows // len(ranges), estimate.size // len(ranges)
        return [Chunk(table, (collection.uuid, *ids), rows, size) for ids in ranges]

    def check_schema(self, schema: object, tables: Collection[TableName]) -> None:
        """Raise `TransientError` if collections are no longer those that `dump_schema` has described.

        The mirror's, and what a killed copy has finished of them, are of those.
        """
        assert isinstance(schema, Catalog)
        described = {each.name: each.uuid for each in schema.collections}
        for table in tables:
            found = self._collections.get(table)
            if found is None or found.uuid != described[table]:
                raise TransientError(f"{table} was renamed, dropped or made anew while its copy began")

    def binary_columns(self, table: TableName) -> dict[str, str]:  # noqa: ARG002 - the protocol's
        """Documents have no columns."""
        return {}

    def check(self) -> None:
        """There is nothing that could be lost."""

    def end(self, table: TableName) -> bytes:
        """The moment by which all of a collection was read.

        Raises `TransientError` if it is no longer the collection that it was: parts of two may have been read.
        """
        was = self._collections[table]
        found = _described(self._client, [table]).get(table)
        if found is None or found.uuid != was.uuid:
            raise TransientError(f"{table} was renamed, dropped or made anew while it was copied")
        return encode_moment(now(self._client))

    def reader(self) -> MongoReader:
        """Another reader; all share the client, which has a connection for each."""
        return MongoReader(self._client, moment(self.position), {t: c.capped for t, c in self._collections.items()})

    def close(self) -> None:
        """Disconnect, readers included. Safe to call twice."""
        self._client.close()


class MongoReader:
    """A `SnapshotReader` of one worker."""

    def __init__(self, client: Client, since: int, capped: Mapping[TableName, bool]) -> None:
        self._client = client
        self._since = since
        self._capped = capped

    def read(self, chunk: Chunk, *, columns: Sequence[str], binary: bool) -> Iterator[bytes]:  # noqa: ARG002
        """Yield the documents of a range, end to end, in blocks of about 256 KiB."""
        _, low, high = chunk.part
        assert low is None or isinstance(low, bytes)
        assert high is None or isinstance(high, bytes)
        if self._capped.get(chunk.table):
            return read_in_order(self._client, self._since, chunk.table)
        return read_range(self._client, self._since, chunk.table, (low, high))

    def close(self) -> None:
        """Nothing is open between two reads."""


def read_range(client: Client, since: int, table: TableName, ids: IdRange) -> Iterator[bytes]:
    """Yield all documents of a range in the order of `_id`, in blocks, whatever types their `_id`s have.

    since: a moment; nothing older than it is read. After an error that may pass it goes on from the last document,
    which then comes twice.
    """
    low, high = ids
    failures = 0
    while True:
        try:
            for documents in find_documents(client, table.schema, find_command(table, since, (low, high))):
                failures = 0
                yield b"".join(documents)
                low = id_of(documents[-1])
            return
        except TransientError as exc:
            failures += 1
            if failures > _RESUMES:
                raise
            log.warning("reading on after an error", collection=str(table), error=str(exc))


def read_in_order(client: Client, since: int, table: TableName) -> Iterator[bytes]:
    """Yield a capped collection's documents as they were inserted."""
    command = {"find": table.name, "hint": {"$natural": 1}, "readConcern": read_concern(since)}
    for documents in find_documents(client, table.schema, command):
        yield b"".join(documents)


def find_command(table: TableName, since: int, ids: IdRange) -> dict[str, Any]:
    """Find a range of `_id`. `min` and `max` bound the index itself: unlike `$gte` and `$lt` they know no types."""
    command: dict[str, Any] = {"find": table.name, "hint": _BY_ID, "sort": _BY_ID}
    for name, bound in zip(("min", "max"), ids, strict=True):
        if bound is not None:
            command[name] = RawBSONDocument(bound)  # decoded and encoded again it might be another value
    return command | {"readConcern": read_concern(since)}


def read_concern(since: int) -> dict[str, Any]:
    """Nothing that may be rolled back, and nothing older than a moment, on whatever server."""
    return {"level": "majority", "afterClusterTime": Timestamp(since >> 32, since & 0xFFFFFFFF)}


def find_documents(client: Client, database: str, command: dict[str, Any]) -> Iterator[list[bytes]]:
    """The documents that a `find` finds, about 256 KiB together; nothing where there is no collection."""
    documents: list[bytes] = []
    size = 0
    with translated_errors(), client[database].cursor_command(command, codec_options=RAW) as cursor:
        for document in cursor:
            documents.append(bytes(document.raw))
            size += len(documents[-1])
            if size >= BLOCK_BYTES:
                yield documents
                documents, size = [], 0
    if documents:
        yield documents


def id_of(document: bytes) -> bytes:
    """A document's `_id`, as a document."""
    found = walk.find(document, b"_id")
    if found is None:
        raise TransientError("a document came without _id")
    return walk.document(document[found.at : found.end])


def now(client: Client) -> int:
    """The deployment's cluster time: everything that could be read up to now happened no later."""
    with translated_errors():
        reply = client.admin.command("ping")
    known = [stamp for stamp in (reply.get("operationTime"), _gossiped(reply)) if stamp is not None]
    if not known:
        raise TransientError("the server tells no cluster time: is it a replica set?")
    latest = max(known)
    return int(latest.time) << 32 | int(latest.inc)


def _gossiped(reply: Mapping[str, Any]) -> Timestamp | None:
    """Routers have no operations of their own, and tell this only."""
    if reply.get("operationTime") is not None:
        return None
    stamp = reply.get("$clusterTime", {}).get("clusterTime")
    return stamp if isinstance(stamp, Timestamp) else None


def estimate_size(client: Client, table: TableName) -> Estimate:
    """How many documents there are, and their bytes without indexes and compression, as the server believes.

    None where there is no collection: one may go at any time after it was listed.
    """
    pipeline: list[dict[str, Any]] = [{"$collStats": {"storageStats": {}}}]
    collection = client[table.schema].get_collection(table.name, codec_options=RAW, read_concern=ReadConcern("local"))
    with translated_errors():
        try:
            with collection.aggregate(pipeline) as found:  # which has no majority to wait for
                stats = [bson.decode(shard.raw).get("storageStats", {}) for shard in found]
        except OperationFailure as exc:
            if exc.code != _NAMESPACE_NOT_FOUND:
                raise
            stats = []
    return Estimate(
        rows=sum(int(each.get("count", 0)) for each in stats), size=sum(int(each.get("size", 0)) for each in stats)
    )


def split_points(client: Client, table: TableName, parts: int) -> list[bytes]:
    """Up to `parts - 1` documents `{_id: value}` in the order of the index, that split it about evenly."""
    size = min(parts * SAMPLES_PER_CHUNK, _MAX_SAMPLES)
    # sorted by the server: nobody else knows a collation's order
    pipeline = [{"$sample": {"size": size}}, {"$project": {"_id": 1}}, {"$sort": {"_id": 1}}]
    collection = client[table.schema].get_collection(table.name, codec_options=RAW)
    with translated_errors(), collection.aggregate(pipeline, allowDiskUse=True) as cursor:
        sampled = [id_of(bytes(document.raw)) for document in cursor]
    chosen = [sampled[number * len(sampled) // parts] for number in range(1, parts)] if sampled else []
    return list(dict.fromkeys(chosen))


def ranges_between(bounds: Sequence[bytes]) -> list[IdRange]:
    """The ranges that bounds cut all `_id`s into."""
    return list(pairwise([None, *bounds, None]))


def _described(client: Client, tables: Iterable[TableName]) -> dict[TableName, CollectionInfo]:
    wanted = set(tables)
    found = read_collections(client, databases={table.schema for table in wanted}, wanted=lambda table: table in wanted)
    return {collection.name: collection for collection in found}
