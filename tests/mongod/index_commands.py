"""Commands about indexes: createIndexes, dropIndexes, listIndexes."""

from __future__ import annotations

from typing import Any

from . import raw
from .catalog import full_collation, id_index
from .cursors import ListCursor
from .errors import CommandError
from .indexes import Index
from .oplog import Entry
from .reads import open_cursor
from .state import Request, State
from .storage import Collection


async def create_indexes(state: State, request: Request) -> bytes:
    """`createIndexes`; `CommandError` 85, 86, 11000 or 67."""
    value = raw.find_value(request.raw, b"indexes")
    if value is None or value[0] != raw.ARRAY:
        raise CommandError(40414, "BSON field 'createIndexes.indexes' is missing but a required field")
    existed = state.catalog.get(request.db, request.collection) is not None
    collection = state.collection_for_write(request.db, request.collection)
    before = len(collection.indexes) + 1
    made = []
    for spec in raw.array_documents(value[1]):
        index = _new_index(collection, spec)
        if index is not None:
            if index.unique:
                index.fill(collection.documents, collection.namespace)
            made.append(index)
    for index in made:
        collection.indexes[index.name] = index
    specs = [index.spec for index in made]
    # a server builds the indexes of an empty collection one by one, those of any other together
    for group in [specs] if collection.documents and specs else [[spec] for spec in specs]:
        details = raw.wrap(raw.element(b"indexes", raw.ARRAY, raw.document_array(group)))
        state.oplog.append([Entry("createIndexes", request.db, collection.name, collection.uuid, details=details)])
    reply: dict[str, Any] = {
        "numIndexesBefore": before,
        "numIndexesAfter": before + len(made),
        "createdCollectionAutomatically": not existed,
    }
    if made:
        reply["commitQuorum"] = "votingMembers"
    else:
        reply["note"] = "all indexes already exist"
    return raw.fields(reply)


def _new_index(collection: Collection, spec: bytes) -> Index | None:
    index = Index(_normalized(collection, spec))
    if not index.key or index.name == "*":
        raise CommandError(67, "Index keys cannot be empty")
    if index.key == {"_id": 1}:
        return None
    same_name = collection.indexes.get(index.name)
    if same_name is not None:
        if same_name.spec == index.spec:
            return None
        raise CommandError(
            86, f"An existing index has the same name as the requested index. Requested index: {index.settings}, "
            f"existing index: {same_name.settings}"
        )  # fmt: skip
    for other in collection.indexes.values():
        if list(other.key.items()) == list(index.key.items()) and _identity(other) == _identity(index):
            raise CommandError(85, f"Index already exists with a different name: {other.name}")
    return index


def _identity(index: Index) -> tuple[Any, Any]:
    """What makes two indexes on the same keys different ones."""
    return index.settings.get("collation"), index.settings.get("partialFilterExpression")


def _normalized(collection: Collection, spec: bytes) -> bytes:
    """The definition in the order in which servers keep it: version, key, name, then options as they came."""
    parts = {name: (name, kind, payload) for name, kind, payload in raw.elements(spec)}
    if b"key" not in parts or b"name" not in parts:
        missing = "key" if b"key" not in parts else "name"
        raise CommandError(9, f"The '{missing}' field is a required property of an index specification")
    parts.pop(b"ns", None)
    parts.pop(b"background", None)
    head = [(b"v", *raw.encode_value(2)), parts.pop(b"key"), parts.pop(b"name")]
    parts.pop(b"v", None)
    if b"collation" in parts:
        collation = raw.decode(parts[b"collation"][2])
        parts[b"collation"] = (b"collation", raw.OBJECT, raw.encode(full_collation(collation)))
        if collation.get("locale") == "simple":
            del parts[b"collation"]
    elif "collation" in collection.settings:
        parts[b"collation"] = (b"collation", raw.OBJECT, raw.encode(collection.settings["collation"]))
    return raw.document([*head, *parts.values()])


async def drop_indexes(state: State, request: Request) -> bytes:
    """`dropIndexes` by name, by key, several, or all but that on `_id`."""
    collection = state.catalog.existing(request.db, request.collection)
    before = len(collection.indexes) + 1
    wanted = request.body["index"]
    if wanted == "*":
        doomed = list(collection.indexes.values())
    else:
        doomed = [_find(collection, one) for one in (wanted if isinstance(wanted, list) else [wanted])]
    for index in doomed:
        del collection.indexes[index.name]
        details = raw.wrap(raw.element(b"indexes", raw.ARRAY, raw.document_array([index.spec])))
        state.oplog.append([Entry("dropIndexes", request.db, collection.name, collection.uuid, details=details)])
    return raw.fields({"nIndexesWas": before})


def _find(collection: Collection, wanted: Any) -> Index:
    if wanted in ("_id_", {"_id": 1}):
        raise CommandError(72, "cannot drop _id index")
    for index in collection.indexes.values():
        if wanted in (index.name, index.key):
            return index
    raise CommandError(
        27,
        f"index not found with name [{wanted}]" if isinstance(wanted, str) else f"can't find index with key: {wanted}",
    )


async def list_indexes(state: State, request: Request) -> bytes:
    """`listIndexes`."""
    found = state.catalog.get(request.db, request.collection)
    if found is None:
        raise CommandError(26, f"ns does not exist: {request.db}.{request.collection}")
    specs = [index.spec for index in found.indexes.values()]
    if "clusteredIndex" not in found.settings:
        specs.insert(0, raw.encode(id_index(found)))
    cursor = ListCursor(f"{request.db}.{request.collection}", iter(specs))
    return await open_cursor(state, cursor, (request.body.get("cursor") or {}).get("batchSize"))
