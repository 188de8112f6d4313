"""Which ranges of `_id` of a collection are copied: one document a collection, beside the sink's position.

What a killed copy has finished stays. Ranges are what they were when the copy began, whoever has grown meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

import msgspec
from bson.codec_options import CodecOptions
from pymongo.collection import Collection
from pymongo.read_concern import ReadConcern

from cdc.change import TableName
from cdc.mongodb.client import Client, translated_errors
from cdc.mongodb.positions import DURABLE, POSITIONS
from cdc.source import Chunk

_MAX_BOUNDS_BYTES: Final = 8 * 1024**2
"""A server's document may have twice as many."""


class Plan(msgspec.Struct, frozen=True):
    """How a collection is split. `done` are numbers of ranges."""

    uuid: bytes
    bounds: tuple[bytes, ...]
    rows: int
    size: int
    done: tuple[int, ...] = ()

    def chunks(self, table: TableName) -> list[Chunk]:
        """All ranges."""
        edges = [None, *self.bounds, None]
        return [Chunk(table, (self.uuid, *edges[n : n + 2]), self.rows, self.size) for n in range(len(edges) - 1)]


class Ranges:
    """The plans of one sink."""

    def __init__(self, client: Client, database: str, sink: str) -> None:
        self._sink = sink
        collection: Any = client.get_database(database).get_collection(POSITIONS)
        self._collection: Collection[dict[str, Any]] = collection.with_options(
            CodecOptions(document_class=dict), write_concern=DURABLE, read_concern=ReadConcern("majority")
        )

    def get(self, table: TableName) -> Plan | None:
        """The plan of a collection whose copy has begun and not ended."""
        with translated_errors():
            found = self._collection.find_one({"_id": self._id(table)})
        return None if found is None else msgspec.convert(found, Plan, strict=False)

    def put(self, table: TableName, chunks: Sequence[Chunk]) -> Plan:
        """Store a plan; all of it at once. Bounds that are too large to be kept make it one range."""
        first = chunks[0]
        uuid, bounds = first.part[0], [chunk.part[1] for chunk in chunks[1:]]
        assert isinstance(uuid, bytes)
        plan = Plan(uuid, tuple(bound for bound in bounds if isinstance(bound, bytes)), first.rows, first.size)
        if sum(map(len, plan.bounds)) > _MAX_BOUNDS_BYTES:
            rows, size = sum(chunk.rows for chunk in chunks), sum(chunk.size for chunk in chunks)
            plan = Plan(plan.uuid, (), rows, size)
        with translated_errors():
            self._collection.replace_one({"_id": self._id(table)}, msgspec.structs.asdict(plan), upsert=True)
        return plan

    def done(self, table: TableName, number: int) -> None:
        """Record durably that a range is on the target."""
        with translated_errors():
            self._collection.update_one({"_id": self._id(table)}, {"$addToSet": {"done": number}})

    def remove(self, tables: Iterable[TableName]) -> None:
        """Forget plans."""
        with translated_errors():
            self._collection.delete_many({"_id": {"$in": [self._id(table) for table in tables]}})

    def _id(self, table: TableName) -> dict[str, str]:
        return {"copying": self._sink, "database": table.schema, "collection": table.name}
