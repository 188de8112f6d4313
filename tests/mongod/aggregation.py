"""The command aggregate: change streams, stages that keep the documents' bytes, and mongomock for all others."""

from __future__ import annotations

import datetime as dt
import random
from collections.abc import Callable
from typing import Any, Final

from . import mock, raw
from .change_streams import has_change_stream, open_stream
from .cursors import ListCursor
from .errors import CommandError
from .projections import project
from .queries import Query, sort_documents
from .reads import collection_of, open_cursor
from .state import Request, State
from .storage import Collection

Documents = list[bytes]


async def aggregate(state: State, request: Request) -> bytes:
    """`aggregate` on a collection, on a database (1) or on the cluster (admin, 1)."""
    pipeline = request.body.get("pipeline")
    if not isinstance(pipeline, list):
        raise CommandError(14, "'pipeline' option must be specified as an array")
    if "cursor" not in request.body:
        raise CommandError(9, "The 'cursor' option is required, except for aggregate with the explain argument")
    whole_database = not isinstance(request.body["aggregate"], str)
    name = "" if whole_database else request.collection
    batch_size = (request.body["cursor"] or {}).get("batchSize")
    request.notes["change_stream"] = has_change_stream(pipeline)
    if request.notes["change_stream"]:
        if request.transaction is not None:
            raise CommandError(263, "$changeStream cannot run in a transaction")
        return await open_cursor(state, open_stream(state, request.db, name, pipeline), batch_size)
    namespace = f"{request.db}.{name or '$cmd.aggregate'}"
    if whole_database:
        return await open_cursor(state, ListCursor(namespace, iter(())), batch_size)
    documents = _start(state, request, pipeline)
    return await open_cursor(state, ListCursor(namespace, iter(documents)), batch_size)


def _start(state: State, request: Request, pipeline: list[dict[str, Any]]) -> Documents:
    collection = collection_of(state, request)
    overlay = None if request.transaction is None else request.transaction.overlay(collection)
    rest = pipeline
    condition = raw.EMPTY
    if pipeline and "$collStats" in pipeline[0]:
        documents = [_coll_stats(state, collection, pipeline[0]["$collStats"])]
        rest = pipeline[1:]
    else:
        if pipeline and "$match" in pipeline[0]:
            condition = _raw_match(request)
            rest = pipeline[1:]
        documents = [document for _, document in Query(condition, collection).select(overlay)]
    for stage in rest:
        documents = _run(documents, stage)
    return documents


def _raw_match(request: Request) -> bytes:
    stages = raw.find_value(request.raw, b"pipeline")
    assert stages is not None
    first = raw.array_documents(stages[1])[0]
    value = raw.find_value(first, b"$match")
    if value is None or value[0] != raw.OBJECT:
        raise CommandError(15959, "the match filter must be an expression in an object")
    return value[1]


def _coll_stats(state: State, collection: Collection, options: dict[str, Any]) -> bytes:
    parts: dict[str, Any] = {"ns": collection.namespace, "host": state.host, "localTime": _now()}
    if "storageStats" in options:
        if state.catalog.get(collection.db, collection.name) is not collection:
            missing = f"Collection [{collection.namespace}] not found."
            raise CommandError(26, f"Unable to retrieve storageStats in $collStats stage :: caused by :: {missing}")
        parts["storageStats"] = storage_stats(collection)
    if "count" in options:
        parts["count"] = len(collection.documents)
    return raw.encode(parts)


def storage_stats(collection: Collection) -> dict[str, Any]:
    """What collStats tells, as far as anybody asks."""
    size = sum(map(len, collection.documents.values()))
    count = len(collection.documents)
    found: dict[str, Any] = {"size": size, "count": count}
    if count:
        found["avgObjSize"] = size // count
    return found | {"storageSize": size, "capped": collection.capped, "nindexes": len(collection.indexes) + 1,
                    "totalIndexSize": 4096, "totalSize": size + 4096, "indexSizes": {"_id_": 4096}}  # fmt: skip


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


def _run(documents: Documents, stage: dict[str, Any]) -> Documents:
    if len(stage) != 1:
        raise CommandError(40323, "A pipeline stage specification object must contain exactly one field.")
    name, argument = next(iter(stage.items()))
    own = _OWN.get(name)
    if own is not None:
        return own(documents, argument)
    if name == "$group" and _only_counts(argument):
        return _count_group(documents, argument)
    return [raw.encode(found) for found in mock.run_stage([raw.decode(document) for document in documents], stage)]


def _project(documents: Documents, argument: Any) -> Documents:
    return [project(document, argument) for document in documents]


def _unset(documents: Documents, argument: Any) -> Documents:
    return _project(documents, dict.fromkeys(argument if isinstance(argument, list) else [argument], 0))


def _only_counts(argument: dict[str, Any]) -> bool:
    inner = [value for name, value in argument.items() if name != "_id"]
    constant = not isinstance(argument.get("_id"), (str, dict))
    return constant and all(value == {"$sum": 1} for value in inner)


def _count_group(documents: Documents, argument: dict[str, Any]) -> Documents:
    if not documents:
        return []
    return [raw.encode({"_id": argument["_id"]} | {name: len(documents) for name in argument if name != "_id"})]


_OWN: Final[dict[str, Callable[[Documents, Any], Documents]]] = {
    "$match": lambda documents, argument: [one for one in documents if mock.matches_raw(argument, one)],
    "$sort": sort_documents,
    "$limit": lambda documents, argument: documents[: int(argument)],
    "$skip": lambda documents, argument: documents[int(argument) :],
    "$project": _project,
    "$unset": _unset,
    "$count": lambda documents, argument: [raw.encode({argument: len(documents)})] if documents else [],
    "$sample": lambda documents, argument: random.sample(documents, min(len(documents), int(argument["size"]))),
}
