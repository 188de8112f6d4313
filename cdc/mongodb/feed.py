"""A feed in a MongoDB database: its writers.

The lock of all writers is the document of the state collection: the first statement of every transaction changes it, so
that any other transaction conflicts until this one has ended. Commits are journaled by a majority.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final

import structlog
from bson.binary import STANDARD, Binary
from bson.int64 import Int64
from pymongo import ReplaceOne, ReturnDocument, UpdateOne
from pymongo.errors import BulkWriteError, OperationFailure, PyMongoError

from cdc.errors import TransientError
from cdc.feed.bell import bell_of
from cdc.feed.cache import Key
from cdc.feed.place import Place
from cdc.feed.record import EntityState, Record
from cdc.feed.tables import LOCK_SECONDS, tables_of
from cdc.feed.writer import Locked, Session, StoreWriter
from cdc.mongodb.client import translated_errors
from cdc.mongodb.feed_documents import STATE, Collections, Document, date, document_of, microseconds, number
from cdc.mongodb.feed_reader import MongoReader as Reader
from cdc.mongodb.positions import DURABLE
from cdc.mongodb.writes import DUPLICATE_KEY
from cdc.position import Position, format_position, parse_position
from cdc.preflight import Finding

__all__ = ["Reader", "Writer", "check"]

_WRITE_CONFLICT: Final = 112
_RETRY_SECONDS: Final = 0.05

log = structlog.get_logger()


def check(place: Place) -> Iterator[Finding]:
    """Whether the server can hold a feed; what this user may do shows when it is made."""
    collections = Collections(place, tables_of(place.table))
    try:
        with translated_errors():
            collections.check_server()
            found = "is there" if collections.is_there() else "can be made"
    finally:
        collections.client.close()
    yield Finding("ok", "feed", f"{collections.main.full_name} {found}")


class Writer(StoreWriter):
    """`cdc.feed.store.FeedWriter`."""

    def _connect(self) -> Session:
        return _Session(self._place)


class _Session:
    """One client and one logical session. Implements `cdc.feed.writer.Session`."""

    def __init__(self, place: Place) -> None:
        self._bell = bell_of(place)
        self._collections = Collections(place, tables_of(place.table))
        self._client = self._collections.client
        try:
            self._collections.create()
            with translated_errors():
                self._session = self._client.start_session(causal_consistency=False)
        except BaseException:
            self._client.close()
            raise
        self._to_end: str | None = None
        # a duplicate ends the whole transaction: where there may be some, look first
        self._look = True
        self._seen = False

    def alive(self) -> bool:
        """Whether the server answers."""
        try:
            self._client.admin.command("ping")
        except PyMongoError:
            return False
        return True

    def take_over(self, source: str) -> Position | None:
        """The stored position of a source. What an earlier writer has left is ended by the first `lock`."""
        self._to_end = source
        with translated_errors():
            return self._position(source)

    def lock(self, source: str) -> Locked:
        """Begin a transaction with a change of the state, as soon as nobody else's is open."""
        deadline = time.monotonic() + LOCK_SECONDS
        with translated_errors():
            if self._to_end == source:
                self._end_earlier(source)
            while (state := self._try_lock(may_wait=time.monotonic() < deadline)) is None:
                self._bell.wait(self._bell.rung, _RETRY_SECONDS)
            now = self._client.admin.command("hello")["localTime"]
            position = self._position(source)
        recorded_at = microseconds(state["recorded_at"])
        return Locked(int(state["last_id"]), recorded_at, microseconds(now), position, resolution=1000)

    def states(self, source: str, keys: Sequence[Key]) -> Sequence[EntityState]:
        """Those of the states that are there."""
        wanted = [_entity(source, key) for key in keys]
        with translated_errors():
            found = list(self._collections.entities.find({"_id": {"$in": wanted}}, session=self._session))
        return list(map(_state, found))

    def existing(self, source: str, positions: Sequence[str]) -> set[str]:
        """Those of the positions of which there are records."""
        query = {"source": source, "position": {"$in": list(positions)}}
        with translated_errors():
            found = self._collections.main.find(query, {"_id": 0, "position": 1}, session=self._session)
            return {document["position"] for document in found}

    def encoded(self, records: Sequence[Record]) -> Sequence[Document]:
        """As documents."""
        return list(map(document_of, records))

    def insert(self, encoded: Sequence[Document], first_id: int, recorded_at: int) -> bool:
        """Insert records; False, and none of them is there, if the (source, position) of one was there before.

        Looks for that first after connecting, and as long as there are some. Else a duplicate is a `TransientError`.
        """
        if self._look:
            positions = [document["position"] for document in encoded]
            if len(set(positions)) < len(positions) or self.existing(encoded[0]["source"], positions):
                self._seen = True
                return False
        for id_, document in enumerate(encoded, first_id):
            number(document, id_, recorded_at)
        with translated_errors():
            try:
                self._collections.main.insert_many(encoded, session=self._session)
            except BulkWriteError as exc:
                if any(map(_is_replay, exc.details.get("writeErrors", ()))):
                    raise TransientError("the feed holds some of this already: it is looked at first") from exc
                raise
        return True

    def put_states(
        self,
        source: str,
        states: Sequence[EntityState],
        *,
        new: bool = False,  # noqa: ARG002 - costs no less
    ) -> None:
        """Insert states, or replace those that are there."""
        writes = [ReplaceOne({"_id": _entity(source, (each.entity_type, each.key))}, _kept(each), upsert=True)
                  for each in states]  # fmt: skip
        with translated_errors():
            self._collections.entities.bulk_write(writes, ordered=False, session=self._session)

    def move(self, source: str, position: Position) -> None:
        """Store a position."""
        fields = {
            "queue_id": position.queue_id,
            "seq": Int64(position.seq),
            "position": format_position(position.source),
        }
        with translated_errors():
            self._collections.positions.update_one(
                {"_id": source}, {"$set": fields}, upsert=True, session=self._session
            )

    def commit(self, head: int, recorded_at: int) -> None:
        """Store both, commit durably, and wake the readers."""
        change = {"$set": {"last_id": Int64(head), "recorded_at": date(recorded_at)}}
        with translated_errors():
            self._collections.state.update_one({"_id": STATE}, change, session=self._session)
            self._session.commit_transaction()
        self._look, self._seen = self._seen, False
        self._bell.ring()

    def rollback(self) -> None:
        """End the transaction without effect."""
        with translated_errors():
            self._session.abort_transaction()

    def prune(
        self, entity_type: str | None, recorded_before: int, rows: int, sources: Collection[str] | None = None
    ) -> int:
        """Remove the oldest, and note it."""
        main = self._collections.main
        old = {"recorded_at": {"$lt": date(recorded_before)}}
        fields = {"entity_type": 1, "channel": 1, "recorded_at": 1}
        with translated_errors(), self._transaction():
            last = main.find_one(old, {"_id": 1}, sort=[("recorded_at", -1), ("_id", -1)], session=self._session)
            if last is None:
                return 0
            query = {"_id": {"$lte": last["_id"]}} | ({} if entity_type is None else {"entity_type": entity_type})
            query |= {} if sources is None else {"source": {"$in": list(sources)}}
            doomed = list(main.find(query, fields, session=self._session).sort("_id", 1).limit(rows))
            if doomed:
                main.delete_many({"_id": {"$in": [each["_id"] for each in doomed]}}, session=self._session)
                self._collections.pruned.bulk_write(_notes(doomed), session=self._session)
        return len(doomed)

    def entity_types(self) -> Sequence[str]:
        """All types of which there are records."""
        with translated_errors():
            return sorted(self._collections.main.distinct("entity_type"))

    def forget(self, source: str) -> None:
        """Remove the documents that are known of a source, then its position: a drop that is killed is done again."""
        known = {"_id.source": source, "known": {"$ne": None}}
        with translated_errors():
            self._collections.entities.update_many(known, {"$set": {"known": None}})
            self._collections.positions.delete_one({"_id": source})

    def close(self) -> None:
        """Disconnect; an open transaction is aborted."""
        with suppress(PyMongoError):
            self._session.end_session()
        with suppress(PyMongoError):
            self._client.close()

    def _try_lock(self, *, may_wait: bool) -> Document | None:
        """The state as it was found, or `None` while somebody else has it, and there is time to wait."""
        self._session.start_transaction(write_concern=DURABLE)
        try:
            return self._collections.state.find_one_and_update(
                {"_id": STATE},
                {"$inc": {"turns": Int64(1)}},
                return_document=ReturnDocument.AFTER,
                session=self._session,
            )
        except OperationFailure as exc:
            with suppress(PyMongoError):
                self._session.abort_transaction()
            if exc.code != _WRITE_CONFLICT or not may_wait:
                raise
            return None

    def _end_earlier(self, source: str) -> None:
        """End the session of the writer before us: a transaction of it would hold the lock for a minute."""
        positions = self._collections.positions
        found = positions.find_one({"_id": source})
        if found is not None and found.get("session"):
            try:
                self._client.admin.command({"killSessions": [{"id": found["session"]}]})
            except OperationFailure as exc:
                log.warning("cannot end what an earlier writer left", source=source, code=exc.code)
        own = Binary.from_uuid(self._session.session_id["id"].as_uuid(), STANDARD)
        positions.update_one({"_id": source}, {"$set": {"session": own}}, upsert=True)
        self._to_end = None

    def _position(self, source: str) -> Position | None:
        found = self._collections.positions.find_one({"_id": source}, session=self._session)
        if found is None or "position" not in found:
            return None
        return Position(found["queue_id"], int(found["seq"]), parse_position(found["position"]))

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._session.start_transaction(write_concern=DURABLE):
            yield


def _is_replay(failed: Document) -> bool:
    return failed.get("code") in DUPLICATE_KEY and "index: _id_" not in str(failed.get("errmsg"))


def _entity(source: str, key: Key) -> Document:
    return {"source": source, "entity_type": key[0], "key": key[1]}


def _kept(state: EntityState) -> Document:
    return {
        "version": Int64(state.version),
        "location_id": state.location_id,
        "scope": None if state.scope is None else state.scope.decode(),
        "known": state.known,
    }


def _state(found: Document) -> EntityState:
    scope = found["scope"]
    return EntityState(
        entity_type=found["_id"]["entity_type"],
        key=found["_id"]["key"],
        version=int(found["version"]),
        location_id=found["location_id"],
        scope=None if scope is None else scope.encode(),
        known=found["known"],
    )


def _notes(doomed: Sequence[Document]) -> list[UpdateOne]:
    """What to note of removed documents, which are in the order of their ids."""
    latest = {(each["entity_type"], each["channel"]): each for each in doomed}
    counts = Counter((each["entity_type"], each["channel"]) for each in doomed)
    return [
        UpdateOne({"_id": {"entity_type": kind[0], "channel": kind[1]}}, _note(last, counts[kind]), upsert=True)
        for kind, last in sorted(latest.items())
    ]


def _note(last: Document, rows: int) -> dict[str, Any]:
    through = {"through_id": last["_id"], "through_recorded_at": last["recorded_at"]}
    return {"$max": through, "$inc": {"rows": Int64(rows)}}
