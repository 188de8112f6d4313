"""Commands that change and show collections: create, drop, rename, collMod, lists."""

from __future__ import annotations

from typing import Any, Final

import bson

from . import mock, raw
from .cursors import ListCursor
from .errors import CommandError
from .indexes import Index
from .oplog import Entry
from .raw import Element
from .reads import open_cursor
from .state import Request, State
from .storage import Collection, check_namespace

ID_INDEX: Final = {"v": 2, "key": {"_id": 1}, "name": "_id_"}
_COLLATION: Final = {
    "caseLevel": False, "caseFirst": "off", "strength": 3, "numericOrdering": False, "alternate": "non-ignorable",
    "maxVariable": "punct", "normalization": False, "backwards": False, "version": "57.1",
}  # fmt: skip
_OPTIONS: Final = (
    b"capped", b"autoIndexId", b"size", b"max", b"storageEngine", b"validator", b"validationLevel",
    b"validationAction", b"indexOptionDefaults", b"viewOn", b"pipeline", b"collation", b"timeseries",
    b"expireAfterSeconds", b"clusteredIndex", b"changeStreamPreAndPostImages", b"encryptedFields",
)  # fmt: skip


def full_collation(collation: dict[str, Any]) -> dict[str, Any]:
    """A collation with all its settings, as servers keep it."""
    if collation.get("locale") == "simple":
        return collation
    return {"locale": collation["locale"]} | _COLLATION | collation


def id_index(collection: Collection) -> dict[str, Any]:
    """The definition of the index on `_id`."""
    collation = collection.settings.get("collation")
    return ID_INDEX | ({"collation": collation} if collation else {})


def create_entry(collection: Collection) -> Entry:
    """The oplog entry of a new collection."""
    details = raw.document(collection.options)[4:-1] + raw.fields({"idIndex": id_index(collection)})
    return Entry("create", collection.db, collection.name, collection.uuid, details=raw.wrap(details))


def _options(request: Request) -> list[Element]:
    chosen = []
    for name, kind, payload in raw.elements(request.raw):
        if name == b"collation" and kind == raw.OBJECT:
            chosen.append((name, kind, raw.encode(full_collation(raw.decode(payload)))))
        elif name in _OPTIONS:
            chosen.append((name, kind, payload))
    return [one for one in chosen if one[0] != b"collation" or b"simple" not in one[2]]


async def create(state: State, request: Request) -> bytes:
    """`create`: every option is kept, but only validator, collation, capped and images have an effect."""
    check_namespace(request.db, request.collection)
    if state.catalog.get(request.db, request.collection) is not None:
        raise CommandError(48, f"Collection {request.db}.{request.collection} already exists.")
    options = _options(request)
    collection = Collection(request.db, request.collection, options)
    if "changeStreamPreAndPostImages" in collection.settings and not state.version.has_expanded_events:
        raise CommandError(40415, "BSON field 'create.changeStreamPreAndPostImages' is an unknown field.")
    if collection.capped and not collection.settings.get("size"):
        raise CommandError(72, "the 'size' field is required when 'capped' is true")
    if {"viewOn", "timeseries"} & set(collection.settings):
        state.catalog.add(collection)
        hidden = "system.views" if "viewOn" in collection.settings else f"system.buckets.{collection.name}"
        if state.catalog.get(request.db, hidden) is None:
            state.catalog.add(Collection(request.db, hidden))
    else:
        state.create(collection)
    return b""


async def drop(state: State, request: Request) -> bytes:
    """`drop`; what is not there is an error before 7.0."""
    found = state.catalog.get(request.db, request.collection)
    if found is None:
        if int(state.version.name.split(".")[0]) >= 7:
            return b""
        raise CommandError(26, "ns not found")
    indexes = len(found.indexes) + 1
    drop_collection(state, found)
    return raw.fields({"nIndexesWas": indexes, "ns": found.namespace})


def drop_collection(state: State, collection: Collection) -> None:
    """Remove a collection and tell the change streams."""
    _abort_transactions_on(state, collection)
    state.catalog.drop(collection)
    state.oplog.append([Entry("drop", collection.db, collection.name, collection.uuid)])


def _abort_transactions_on(state: State, collection: Collection) -> None:
    for transaction in list(state.open_transactions):
        if transaction.overlays.get(collection.uuid):
            transaction.abort(state)  # a server would wait for them instead


async def drop_database(state: State, request: Request) -> bytes:
    """`dropDatabase`: a drop of each collection, then of the database."""
    collections = state.catalog.databases.get(request.db)
    if not collections:
        return b""
    for collection in list(collections.values()):
        drop_collection(state, collection)
    state.oplog.append([Entry("dropDatabase", request.db, "", None)])
    return raw.fields({"dropped": request.db})


async def rename(state: State, request: Request) -> bytes:
    """`renameCollection`; to another database it is a copy, whose events are those of the temporary collection."""
    old_db, _, old_name = request.body["renameCollection"].partition(".")
    new_db, _, new_name = request.body["to"].partition(".")
    source = state.catalog.get(old_db, old_name)
    if source is None:
        raise CommandError(26, f"Source collection {old_db}.{old_name} does not exist")
    check_namespace(new_db, new_name)
    if (old_db, old_name) == (new_db, new_name):
        raise CommandError(20, "Can't rename a collection to itself")
    target = state.catalog.get(new_db, new_name)
    if target is not None and not request.body.get("dropTarget"):
        raise CommandError(48, "target namespace exists")
    if old_db == new_db:
        _rename(state, source, target, new_name)
        return b""
    copy = Collection(new_db, f"tmp{source.uuid[:3].hex()}.renameCollection", source.options)
    state.create(copy)
    copy.indexes = {name: Index(index.spec) for name, index in source.indexes.items()}
    for key, document in source.documents.items():
        copy.put(key, document)
        identity = raw.wrap(raw.element(b"_id", *(raw.find_value(document, b"_id") or raw.NULL_VALUE)))
        state.record(Entry("insert", copy.db, copy.name, copy.uuid, identity, document), copy, key)
    _rename(state, copy, target, new_name)
    drop_collection(state, source)
    return b""


def _rename(state: State, source: Collection, target: Collection | None, name: str) -> None:
    for gone in filter(None, (source, target)):
        _abort_transactions_on(state, gone)
        state.catalog.drop(gone)
    details = raw.fields({"to": {"db": source.db, "coll": name}})
    if target is not None:
        details += raw.element(b"dropTarget", raw.BINARY, b"\x10\0\0\0\x04" + target.uuid)
    entry = Entry("rename", source.db, source.name, source.uuid, to=(source.db, name), details=raw.wrap(details))
    source.name = name
    state.catalog.add(source)
    state.oplog.append([entry])


async def coll_mod(state: State, request: Request) -> bytes:
    """`collMod`: validator, images, and an index's expireAfterSeconds, hidden and unique."""
    collection = state.catalog.existing(request.db, request.collection)
    before = {"uuid": bson.Binary(collection.uuid, 4)} | collection.settings
    state_before: dict[str, Any] = {"collectionOptions": before}
    replaced = {name: (name, kind, payload) for name, kind, payload in _options(request)}
    options = [replaced.pop(name, (name, kind, payload)) for name, kind, payload in collection.options]
    collection.set_options([*options, *replaced.values()])
    reply: dict[str, Any] = {}
    if "index" in request.body:
        reply, state_before["indexOptions"] = _modify_index(collection, request.body["index"])
    described = [one for one in raw.elements(request.raw) if one[0] in _OPTIONS or one[0] == b"index"]
    entry = Entry("modify", request.db, collection.name, collection.uuid, details=raw.document(described))
    entry.state_before = raw.encode(state_before)
    state.oplog.append([entry])
    return raw.fields(reply)


def _modify_index(collection: Collection, wanted: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    for index in collection.indexes.values():
        if index.name == wanted.get("name") or index.key == wanted.get("keyPattern"):
            break
    else:
        raise CommandError(
            27, f"cannot find index {wanted.get('name') or wanted.get('keyPattern')} for ns {collection.namespace}"
        )
    reply: dict[str, Any] = {}
    old: dict[str, Any] = {}
    for name in ("expireAfterSeconds", "hidden", "unique", "prepareUnique"):
        if name in wanted:
            if name in index.settings:
                reply[f"{name}_old"] = old[name] = index.settings[name]
            reply[f"{name}_new"] = wanted[name]
    spec = index.settings | {name: value for name, value in wanted.items() if name not in {"name", "keyPattern"}}
    changed = Index(raw.encode(spec))
    if changed.unique:
        changed.fill(collection.documents, collection.namespace)
    collection.indexes[index.name] = changed
    return reply, old


async def list_databases(state: State, request: Request) -> bytes:
    """`listDatabases`."""
    names = sorted({*state.catalog.databases, "admin", "config", "local"})
    condition = request.body.get("filter") or {}
    found: list[dict[str, Any]] = []
    for name in names:
        collections = state.catalog.databases.get(name, {}).values()
        size = sum(len(document) for collection in collections for document in collection.documents.values())
        found.append({"name": name, "sizeOnDisk": bson.Int64(size + 8192), "empty": False})
    found = [one for one in found if mock.matches(condition, one)]
    if request.body.get("nameOnly"):
        return raw.fields({"databases": [{"name": one["name"]} for one in found]})
    total = sum(one["sizeOnDisk"] for one in found)
    return raw.fields({"databases": found, "totalSize": bson.Int64(total), "totalSizeMb": bson.Int64(total >> 20)})


async def list_collections(state: State, request: Request) -> bytes:
    """`listCollections`, views and time series included."""
    condition = request.body.get("filter") or {}
    names_only = bool(request.body.get("nameOnly"))
    found = []
    for collection in state.catalog.databases.get(request.db, {}).values():
        described = _describe(collection, names_only=names_only)
        if mock.matches_raw(condition, described):
            found.append(described)
    cursor = ListCursor(f"{request.db}.$cmd.listCollections", iter(found))
    return await open_cursor(state, cursor, (request.body.get("cursor") or {}).get("batchSize"))


def _describe(collection: Collection, *, names_only: bool) -> bytes:
    kind = (
        "view"
        if "viewOn" in collection.settings
        else "timeseries"
        if "timeseries" in collection.settings
        else "collection"
    )
    parts = raw.fields({"name": collection.name, "type": kind})
    if names_only:
        return raw.wrap(parts)
    parts += raw.element(b"options", raw.OBJECT, raw.document(collection.options))
    info: dict[str, Any] = {"readOnly": kind == "view"}
    if kind != "view":
        info["uuid"] = bson.Binary(collection.uuid, 4)
    parts += raw.fields({"info": info})
    if kind == "collection":
        parts += raw.fields({"idIndex": id_index(collection)})
    return raw.wrap(parts)
