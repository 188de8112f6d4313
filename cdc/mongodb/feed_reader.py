"""Reads a feed in a MongoDB database."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final

from pymongo.errors import InvalidOperation, PyMongoError

from cdc.errors import TransientError
from cdc.feed.bell import bell_of
from cdc.feed.place import Place
from cdc.feed.record import Pruned, Record
from cdc.feed.store import Scan, Wanted
from cdc.feed.tables import Window, rows_to_look_at, tables_of
from cdc.mongodb.client import translated_errors
from cdc.mongodb.feed_documents import STATE, Collections, date, microseconds, record_of

_POLL_SECONDS: Final = 0.1
"""How often to look for what other processes have committed."""

_SELECTION_MILLISECONDS: Final = 5000


class MongoReader:
    """`cdc.feed.store.FeedReader`. Reads what a majority has, from the primary."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._tables = tables_of(place.table)
        self._opened: Collections | None = None

    def open(self) -> None:
        """Check that the feed can be read. Raises `TransientError` if it is not there (yet)."""
        self.close()
        collections = Collections(self._place, self._tables, serverSelectionTimeoutMS=_SELECTION_MILLISECONDS)
        self._opened = collections
        with self._collections():
            if not collections.is_there():
                raise TransientError("the feed is not there yet", hint="the daemon makes it when it begins to write")

    def head(self) -> int:
        """The last id that is visible, also if its record was pruned since."""
        with self._collections() as collections:
            return _head(collections)

    def scan(self, after: int, wanted: Wanted, limit: int) -> Scan:
        """The first `limit` wanted records behind `after`, of the next `SCAN_ROWS` rows."""
        with self._collections() as collections:
            window = _window(collections, after, rows_to_look_at(wanted, limit))
            query = {"_id": {"$gt": after, "$lte": window.end}, **_condition(wanted)}
            # by _id, whatever matches: what is looked at is bounded by it
            found = collections.main.find(query, hint="_id_").sort("_id", 1).limit(limit + 1)
            return window.scan(list(map(record_of, found)), limit)

    def history(self, entity_type: str, entity_id: str, before: int | None, limit: int) -> Sequence[Record]:
        """The newest records of one entity, newest first; with `before`, those with smaller ids."""
        query: dict[str, Any] = {"entity_type": entity_type, "entity_id": entity_id}
        if before is not None:
            query["_id"] = {"$lt": before}
        with self._collections() as collections:
            return list(map(record_of, collections.main.find(query).sort("_id", -1).limit(limit)))

    def cursor_at(self, recorded_at: int) -> int:
        """The largest cursor behind which are all records recorded at that time (microseconds) or later."""
        query = {"recorded_at": {"$gte": date(recorded_at)}}
        with self._collections() as collections:
            head = _head(collections)  # first: what is committed meanwhile is behind it
            found = collections.main.find_one(query, {"_id": 1}, sort=[("recorded_at", 1), ("_id", 1)])
        return head if found is None else min(int(found["_id"]) - 1, head)

    def pruned(self) -> Mapping[tuple[str, str], Pruned]:
        """By (entity_type, channel), what retention has removed."""
        with self._collections() as collections:
            return {
                (each["_id"]["entity_type"], each["_id"]["channel"]): Pruned(
                    int(each["through_id"]), microseconds(each["through_recorded_at"]), int(each["rows"])
                )
                for each in collections.pruned.find()
            }

    def oldest(self) -> int | None:
        """The smallest id that is there."""
        with self._collections() as collections:
            found = collections.main.find_one({}, {"_id": 1}, sort=[("_id", 1)])
        return None if found is None else int(found["_id"])

    @contextmanager
    def listen(self) -> Iterator[MongoListener]:
        """Begin to listen: what is committed from now on wakes the listener."""
        yield MongoListener(self)

    def close(self) -> None:
        """Disconnect. Safe to call twice."""
        opened, self._opened = self._opened, None
        if opened is not None:
            with suppress(PyMongoError):
                opened.client.close()

    @property
    def place(self) -> Place:
        """Where the feed is."""
        return self._place

    @contextmanager
    def _collections(self) -> Iterator[Collections]:
        if self._opened is None:
            raise TransientError("the feed is not open for reading")
        with translated_errors():
            try:
                yield self._opened
            except InvalidOperation as exc:  # closed meanwhile
                raise TransientError("the feed is no longer open for reading") from exc


class MongoListener:
    """`cdc.feed.store.Listener`: writers of this process ring, those of others are seen by the last id."""

    def __init__(self, reader: MongoReader) -> None:
        self._reader = reader
        self._bell = bell_of(reader.place)
        self._rung = self._bell.rung
        self._head = reader.head()

    def wait(self, timeout_seconds: float) -> bool:
        """Return when something was committed since the last call, or after the time-out: then False."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            rung = self._bell.rung
            head = self._reader.head()
            if (rung, head) != (self._rung, self._head):
                self._rung, self._head = rung, head
                return True
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            self._bell.wait(rung, min(left, _POLL_SECONDS))


def _head(collections: Collections) -> int:
    state = collections.state.find_one({"_id": STATE}, {"last_id": 1})
    if state is None:
        raise TransientError("the feed is gone", hint="the daemon makes a new one when it begins to write")
    return int(state["last_id"])


def _window(collections: Collections, after: int, rows: int) -> Window:
    """The rows behind `after` that are to be looked at."""
    last = collections.main.find_one({}, {"_id": 1}, sort=[("_id", -1)])
    beyond = collections.main.find({"_id": {"$gt": after}}, {"_id": 1}).sort("_id", 1).skip(rows).limit(1)
    for each in beyond:
        return Window.of(after, int(each["_id"]), more=True)
    return Window(max(after, int(last["_id"])) if last is not None else after, more=False)


def _condition(wanted: Wanted) -> dict[str, Any]:
    condition: dict[str, Any] = {}
    if wanted.entity_types is not None:
        condition["entity_type"] = {"$in": sorted(wanted.entity_types)}
    if wanted.channels is not None:
        condition["channel"] = {"$in": sorted(wanted.channels)}
    if wanted.location_id is not None:
        condition["location_id"] = wanted.location_id
    return condition
