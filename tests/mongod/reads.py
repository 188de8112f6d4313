"""Commands that read: find, count, distinct, getMore, killCursors."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import bson

from . import raw
from .cursors import FIRST_BATCH, Batch, Cursor, ListCursor, reply
from .errors import CloseConnection, CommandError
from .keys import Key, key_of
from .oplog import to_timestamp
from .projections import project
from .queries import Query, sort_documents
from .state import Request, State
from .storage import Collection

DEFAULT_AWAIT_SECONDS = 1.0


def collection_of(state: State, request: Request) -> Collection:
    """The collection, or an empty one that is not kept."""
    found = state.catalog.get(request.db, request.collection)
    if found is not None and "viewOn" in found.settings:
        found = state.catalog.get(request.db, found.settings["viewOn"])
    return found or Collection(request.db, request.collection)


def _query(state: State, request: Request, name: bytes) -> tuple[Query, Any]:
    condition = raw.find_value(request.raw, name)
    if condition is not None and condition[0] not in {raw.OBJECT, raw.NULL}:
        raise CommandError(14, f"BSON field '{request.name}.{name.decode()}' is the wrong type, expected type 'object'")
    collection = collection_of(state, request)
    query = Query(condition[1] if condition and condition[0] == raw.OBJECT else raw.EMPTY, collection)
    return query, None if request.transaction is None else request.transaction.overlay(collection)


async def find(state: State, request: Request) -> bytes:
    """`find`, with documents as the bytes that were written."""
    body = request.body
    if (request.db, request.collection) == ("local", "oplog.rs"):
        return await open_cursor(state, ListCursor("local.oplog.rs", _oplog_ends(state, body)), body.get("batchSize"))
    query, overlay = _query(state, request, b"filter")
    order: dict[str, Any] = body.get("sort") or {}
    by_id = _id_order(order)
    low, high = _bound(request, b"min"), _bound(request, b"max")
    if (low or high) and not body.get("hint"):
        raise CommandError(51173, "When using min()/max() a hint of which index to use must be provided")
    by_hint = 1 if not order and body.get("hint") in ({"_id": 1}, "_id_") else 0
    selected = query.select(overlay, by_id=by_id or by_hint, low=low, high=high)
    documents: Iterator[bytes] = (document for _, document in selected)
    if order and not by_id:
        documents = iter(_in_order(list(documents), order))
    limit = abs(int(body.get("limit") or 0))
    skip = int(body.get("skip") or 0)
    if skip or limit:
        documents = itertools.islice(documents, skip, skip + limit if limit else None)
    projection = body.get("projection") or {}
    if projection:
        documents = (project(document, projection) for document in documents)
    cursor = ListCursor(f"{request.db}.{request.collection}", documents)
    return await open_cursor(state, cursor, body.get("batchSize"), single=bool(body.get("singleBatch")))


def _oplog_ends(state: State, body: dict[str, Any]) -> Iterator[bytes]:
    """The oplog as far as it is emulated: the times of its oldest and its newest entry."""
    times = [state.oplog.oldest_timestamp, state.oplog.last_timestamp]
    if (body.get("sort") or {}).get("$natural", 1) < 0:
        times.reverse()
    return (bson.encode({"ts": to_timestamp(time), "op": "n"}) for time in times)


def _in_order(documents: list[bytes], order: dict[str, Any]) -> list[bytes]:
    if "$natural" in order:
        return documents[::-1] if order["$natural"] < 0 else documents
    return sort_documents(documents, order)


def _id_order(order: dict[str, Any]) -> int:
    name = next(iter(order), None)
    return (1 if order["_id"] > 0 else -1) if name == "_id" else 0


def _bound(request: Request, name: bytes) -> Key | None:
    value = raw.find_value(request.raw, name)
    if value is None or value[1] == raw.EMPTY:
        return None
    if value[0] != raw.OBJECT:
        raise CommandError(14, f"BSON field 'find.{name.decode()}' is the wrong type, expected type 'object'")
    inner = raw.find_value(value[1], b"_id")
    if inner is None:
        raise CommandError(51174, "min() and max() are only emulated for the index on _id")
    return key_of(inner)


async def open_cursor(state: State, cursor: Cursor, batch_size: Any, *, single: bool = False) -> bytes:
    """The reply that opens a cursor; it is kept unless the first batch was all."""
    batch = Batch(FIRST_BATCH if batch_size is None else int(batch_size))
    await cursor.fill(batch, 0)
    if single:
        cursor.closed = True
    if not cursor.closed:
        state.cursors[cursor.id] = cursor
    return reply(cursor, b"firstBatch", batch)


async def get_more(state: State, request: Request) -> bytes:
    """`getMore`: waits on change streams, up to `maxTimeMS` (1 s by default)."""
    body = request.body
    cursor = state.cursors.get(int(body["getMore"]))
    request.notes["change_stream"] = cursor is not None and cursor.is_change_stream
    if cursor is None:
        raise CommandError(43, f"cursor id {body['getMore']} not found")
    if f"{request.db}.{body['collection']}" != cursor.namespace:
        asked = f"{request.db}.{body['collection']}"
        raise CommandError(
            13,
            f"Requested getMore on namespace '{asked}', but cursor belongs to a different namespace {cursor.namespace}",
        )
    _fail_after_checkout(state)
    size = body.get("batchSize")
    batch = Batch(int(size) if size else None)
    wait = int(body["maxTimeMS"]) / 1000 if "maxTimeMS" in body else DEFAULT_AWAIT_SECONDS
    try:
        await cursor.fill(batch, wait if cursor.tailable else 0)
    except CommandError:
        state.cursors.pop(cursor.id, None)  # a cursor does not survive an error of its own
        raise
    if cursor.closed:
        state.cursors.pop(cursor.id, None)
    return reply(cursor, b"nextBatch", batch)


def _fail_after_checkout(state: State) -> None:
    data = state.fail_points.hit_get_more()
    if data is None:
        return
    if data.get("closeConnection"):
        raise CloseConnection
    raise CommandError(int(data["errorCode"]), "Hit the 'failGetMoreAfterCursorCheckout' failpoint")


async def kill_cursors(state: State, request: Request) -> bytes:
    """`killCursors`; a getMore that waits on one ends with CursorKilled."""
    killed, missing = [], []
    for number in request.body["cursors"]:
        cursor = state.cursors.pop(number, None)
        if cursor is None:
            missing.append(number)
            continue
        killed.append(number)
        cursor.killed = (237, f"cursor killed because of killCursors: {number}")
    if killed:
        state.oplog.wake()
    return raw.fields({"cursorsKilled": killed, "cursorsNotFound": missing, "cursorsAlive": [], "cursorsUnknown": []})


async def count(state: State, request: Request) -> bytes:
    """`count`."""
    query, overlay = _query(state, request, b"query")
    collection = collection_of(state, request)
    if not query.decoded and overlay is None:
        number = len(collection.documents)
    else:
        number = sum(1 for _ in query.select(overlay))
    number = max(0, number - int(request.body.get("skip") or 0))
    limit = abs(int(request.body.get("limit") or 0))
    return raw.fields({"n": min(number, limit) if limit else number})


async def distinct(state: State, request: Request) -> bytes:
    """`distinct`, in the order of first appearance."""
    query, overlay = _query(state, request, b"query")
    path = request.body["key"].encode().split(b".")
    values: dict[Key, raw.Value] = {}
    for _, document in query.select(overlay):
        for kind, payload in raw.values_at(document, path):
            inner = [(k, p) for _, k, p in raw.elements(payload)] if kind == raw.ARRAY else [(kind, payload)]
            for value in inner:
                values.setdefault(key_of(value), value)
    return raw.element(b"values", raw.ARRAY, raw.array(values.values()))
