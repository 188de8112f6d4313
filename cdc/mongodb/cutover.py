"""What a cut-over from MongoDB to MongoDB asks of both servers."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

import bson
from bson.timestamp import Timestamp
from pymongo.change_stream import ChangeStream
from pymongo.errors import OperationFailure, PyMongoError

from cdc.cutover import Finished
from cdc.errors import FatalError
from cdc.mirroring import Mirroring
from cdc.mongodb.client import Client, connect, translated_errors
from cdc.mongodb.collections import CollectionInfo, drop_index, read_catalog
from cdc.mongodb.moment import encode_moment, format_moment, has_passed, moment
from cdc.mongodb.snapshot import now
from cdc.mongodb.target import MongoCopyTarget
from cdc.urls import redact

_AWAIT_MILLISECONDS: Final = 500
_INDEX_OPTION_NOT_CHANGEABLE: Final = (72, 2, 27)
"""InvalidOptions, BadValue, IndexNotFound: servers before 5.1 cannot make an index delete."""


class MongoHandover:
    """`cdc.cutover.Handover`. Watches the source by a change stream of its own."""

    def __init__(self, mirroring: Mirroring) -> None:
        assert mirroring.source.url is not None
        assert mirroring.sink.url is not None
        self.source = redact(mirroring.source.url.reveal())
        self.target = redact(mirroring.sink.url.reveal())
        self._mirroring = mirroring
        tables = mirroring.tables()
        self._captured = frozenset(map(str, tables))
        self._databases = frozenset(table.schema for table in tables)
        self._client = connect(mirroring.source.url.reveal(), application_name="cdc-cutover")
        self._stream: ChangeStream[Any] | None = None
        self._watched = 0
        self._written: set[str] = set()

    def watch(self) -> str:
        """Open the stream behind everything that has happened. A transaction that commits later shows as a write."""
        self._watched = now(self._client)
        begin = Timestamp(self._watched >> 32, (self._watched & 0xFFFFFFFF) + 1)
        with translated_errors(streaming=True):
            self._stream = self._watch(start_at_operation_time=begin)
        return format_moment(self._watched)

    def nudge(self) -> None:
        """Write a note to the oplog, where that is allowed; elsewhere servers do so themselves, every ten seconds."""
        nudge(self._client)

    def behind(self) -> str:
        """How far the mirror is behind what had happened; empty when it has passed it."""
        position = self._mirroring.position() if self._mirroring.position is not None else None
        if position is None:
            return "everything"
        if has_passed(position, encode_moment(self._watched)):
            return ""
        return f"{(self._watched >> 32) - (moment(position) >> 32)} seconds"

    def writes(self) -> tuple[str, ...]:
        """Collections with writes since `watch`."""
        assert self._stream is not None
        end = now(self._client)
        while True:
            with translated_errors(streaming=True):
                event = self._stream.try_next()
            if event is not None and "ns" in event:
                self._note(event["ns"])
            reached = moment(bson.encode(self._stream.resume_token or {}))
            # at the very moment there may be more to come, unless the server has found nothing more
            if reached > end or (event is None and reached == end):
                return tuple(sorted(self._written))

    def _note(self, namespace: Mapping[str, Any]) -> None:
        database, collection = namespace["db"], namespace.get("coll")
        name = database if collection is None else f"{database}.{collection}"
        if name in self._captured or (collection is None and database in self._databases):
            self._written.add(name)

    def finish(self) -> Finished:
        """See that all indexes are built, and let those delete that do so at the source."""
        mirroring = self._mirroring
        states = MongoCopyTarget(mirroring.sink).pending_indexes()
        if states:
            raise FatalError(
                f"indexes are not built yet: {', '.join(map(str, states))}",
                hint="they are built when the mirror has caught up: see `cdc status`, then cut over again",
            )
        done = []
        catalog = read_catalog(self._client, mirroring.tables())
        assert mirroring.sink.url is not None
        with connect(mirroring.sink.url.reveal(), application_name="cdc-cutover") as target:
            for collection in catalog.collections:
                done += _let_expire(target, mirroring, collection)
        return Finished((f"{len(catalog.collections)} collections have all indexes", *done))

    def close(self) -> None:
        """Disconnect. Safe to call twice."""
        self._client.close()

    def _watch(self, **options: Any) -> ChangeStream[Any]:
        """As little as holds everything: it takes the least privileges."""
        databases = sorted(self._databases)
        watched: Any = self._client[databases[0]] if len(databases) == 1 else self._client
        stream: ChangeStream[Any] = watched.watch(max_await_time_ms=_AWAIT_MILLISECONDS, **options)
        return stream


def nudge(client: Client) -> None:
    """Write a note to the oplog, which moves every stream. It takes a privilege, and is only a courtesy."""
    with suppress(PyMongoError):
        client.admin.command("appendOplogNote", 1, data={"msg": "cdc"})


def _let_expire(target: Client, mirroring: Mirroring, collection: CollectionInfo) -> list[str]:
    name = mirroring.sink.target_name(collection.name)
    done = []
    for index in collection.indexes:
        if not index.expires:
            continue
        seconds = bson.decode(index.spec)["expireAfterSeconds"]
        change = {"name": index.name, "expireAfterSeconds": seconds}
        try:
            target[name.schema].command("collMod", name.name, index=change)
        except OperationFailure as exc:
            if exc.code not in _INDEX_OPTION_NOT_CHANGEABLE:
                with translated_errors():
                    raise
            drop_index(target, name, index.name)
            with translated_errors():
                target[name.schema].command("createIndexes", name.name, indexes=[bson.decode(index.spec)])
        done.append(f"{name}.{index.name} deletes after {seconds} seconds again")
    if collection.expires_after_seconds is not None:
        with translated_errors():
            target[name.schema].command("collMod", name.name, expireAfterSeconds=collection.expires_after_seconds)
        done.append(f"{name} lets documents expire again")
    return done
