"""A source database, its changes as batches, and a sink that mirrors them: for tests of the sink alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
import pymongo
from bson import ObjectId
from bson.codec_options import CodecOptions
from bson.raw_bson import RawBSONDocument

from cdc.change import Batch, Image, Table, TableName
from cdc.config import SinkConfig, TableGlobs
from cdc.mongodb import walk
from cdc.mongodb.assembly import Assembler
from cdc.mongodb.positions import POSITIONS, Positions
from cdc.mongodb.reread import read_again
from cdc.mongodb.scope import Scope
from cdc.position import Position
from cdc.secret import Secret
from cdc.sink import SinkContext
from sinks.mongodb import MongodbSink

RAW: CodecOptions[RawBSONDocument] = CodecOptions(document_class=RawBSONDocument)
SINK = "backup"


class MongoPair:
    """Database `name` and its mirror `name_backup`, on one server or two.

    full_document: as of the change stream. expanded: whether it shows expanded events.
    """

    def __init__(
        self,
        client: pymongo.MongoClient[Any],
        url: str,
        name: str,
        *,
        full_document: str = "updateLookup",
        expanded: bool = True,
        target: pymongo.MongoClient[Any] | None = None,
    ) -> None:
        self.source = client[name]
        self.target = (target or client)[f"{name}_backup"]
        self.config = SinkConfig(
            name=SINK, source="shop", kind="mongodb", url=Secret(url), rename={name: f"{name}_backup"}
        )
        self.config = msgspec.structs.replace(self.config, url=Secret(_with_database(url, f"{name}_backup")))
        self.rereads: list[Image] = []
        self.seq = 0
        self.sink = self.new_sink()
        pipeline = [{"$match": {"ns.db": name}}]
        options: dict[str, Any] = {"max_await_time_ms": 50}
        if full_document != "off":
            options["full_document"] = full_document
        if expanded:
            options["show_expanded_events"] = True
        self._raw = pymongo.MongoClient[RawBSONDocument](url, document_class=RawBSONDocument)
        self.stream = self._raw.watch(pipeline, **options)  # of the deployment: no drop ends it
        self.stream.try_next()
        token = self.stream.resume_token
        assert isinstance(token, RawBSONDocument)
        self.token = bytes(token.raw)
        self._scope = Scope(TableGlobs(include=(f"{name}.*",)))
        Positions(self.target.client, self.target.name, SINK).begin(Position("queue", 0, self.token))

    def new_sink(self) -> MongodbSink:
        """Another sink of the same name, as after a restart."""
        return MongodbSink(self.config, SinkContext(reread=self._reread))

    def events(self) -> list[bytes]:
        """What happened since the last call."""
        found: list[bytes] = []
        while (event := self.stream.try_next()) is not None:
            found.append(bytes(event.raw))
        return found

    def batch(self, events: Sequence[bytes] | None = None) -> Batch:
        """The same as a batch, as the source would give it."""
        events = self.events() if events is None else events
        assembler = Assembler(self._scope, self.token)
        at = 0
        while at < len(events):
            at = assembler.feed(events, at)
        assembler.exhausted(walk.document(), empty=True)
        return assembler.take() or Batch((), [], self.token, 0)

    def deliver(self, *batches: Batch, sink: MongodbSink | None = None) -> Any:
        """Give batches (or all that has happened) to the sink, opened if need be."""
        sink = sink or self.sink
        if sink._connection is None:
            assert sink.open() is not None
        found = list(batches) or [self.batch()]
        self.seq += len(found)
        return sink.apply(found, Position("queue", self.seq, found[-1].position))

    def documents(self, database: Any, collection: str) -> dict[bytes, bytes]:
        """The bytes of all documents, by the bytes of their `_id`."""
        found = database.get_collection(collection, codec_options=RAW).find({})
        return {_id(bytes(document.raw)): bytes(document.raw) for document in found}

    def check_equal(self) -> None:
        """Both sides hold the same collections and bytes."""
        names = set(self.source.list_collection_names())
        assert set(self.target.list_collection_names()) - {POSITIONS} == names
        for name in sorted(names):
            assert self.documents(self.target, name) == self.documents(self.source, name), name

    def close(self) -> None:
        self.sink.close()
        self.stream.close()
        self._raw.close()
        for database in (self.source, self.target):
            database.client.drop_database(database.name)

    def _reread(self, table: Table, key: Image) -> Image | None:
        assert table.qualified == TableName(self.source.name, table.name)
        self.rereads.append(key)
        return read_again(self._raw, table, key)


def _id(document: bytes) -> bytes:
    found = walk.find(document, b"_id")
    assert found is not None
    return document[found.at : found.end]


def _with_database(url: str, name: str) -> str:
    head, _, query = url.partition("/?")
    return f"{head.rstrip('/')}/{name}" + (f"?{query}" if query else "")


@contextmanager
def parking_pair(client: pymongo.MongoClient[dict[str, Any]], url: str, full_document: str) -> Iterator[MongoPair]:
    """A pair whose sink parks what the mirror refuses."""
    pair = MongoPair(client, url, f"shop_{ObjectId()}", full_document=full_document)
    pair.config = msgspec.structs.replace(pair.config, on_error="park")
    pair.sink = pair.new_sink()
    try:
        yield pair
    finally:
        pair.close()
