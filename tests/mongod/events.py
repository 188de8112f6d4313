"""Change events: an oplog entry as the bytes that a stream with certain options delivers."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

from . import raw, tokens
from .errors import CommandError
from .oplog import Entry
from .raw import ARRAY, DATE, OBJECT, TIMESTAMP
from .storage import Catalog
from .versions import Version

EXPANDED = frozenset(("create", "modify", "createIndexes", "dropIndexes"))


@dataclass(frozen=True, slots=True)
class EventOptions:
    """What the `$changeStream` stage asked for."""

    version: Version
    full_document: str = "default"
    before_change: str = "off"
    expanded: bool = False


@dataclass(slots=True)
class Event:
    """One event before it is filtered: its token, its type and namespace for quick decisions, and its bytes."""

    token: str
    operation: str
    db: str
    coll: str
    document: bytes
    position: tuple[int, int] = (0, 0)
    fragments: list[bytes] = field(default_factory=list)


def build(entry: Entry, options: EventOptions, catalog: Catalog) -> Event:
    """The event of an entry; `CommandError` 47 if an image that is required is not there."""
    version = options.version
    token = token_of(entry, version.token_version)
    parts = []
    if entry.to is not None:
        parts.append(raw.element(b"to", OBJECT, _namespace(*entry.to)))
    if entry.transaction is not None:
        parts.append(entry.transaction)
    parts += (_id(token), _operation_type(entry.operation))
    parts.append(raw.element(b"clusterTime", TIMESTAMP, entry.timestamp.to_bytes(8, "little")))
    if options.expanded and entry.uuid is not None:
        parts.append(raw.element(b"collectionUUID", raw.BINARY, b"\x10\0\0\0\x04" + entry.uuid))
    if version.has_expanded_events:
        parts.append(raw.element(b"wallTime", DATE, raw.pack_int64(entry.wall_ms)))
    parts.append(_full_document(entry, options, catalog))
    parts.append(raw.element(b"ns", OBJECT, _namespace(entry.db, entry.coll)))
    if entry.key is not None:
        parts.append(raw.element(b"documentKey", OBJECT, entry.key))
    if options.expanded and entry.details is not None:
        parts.append(raw.element(b"operationDescription", OBJECT, entry.details))
    if entry.difference is not None:
        parts.append(_update_description(entry, options))
    if entry.state_before is not None:
        parts.append(raw.element(b"stateBeforeChange", OBJECT, entry.state_before))
    if options.before_change != "off" and entry.operation in {"update", "replace", "delete"}:
        parts.append(_image(b"fullDocumentBeforeChange", entry.before, options.before_change, entry))
    return Event(token, entry.operation, entry.db, entry.coll, raw.wrap(b"".join(parts)), entry.position)


def token_of(entry: Entry, version: int, *, invalidate: bool = False) -> str:
    """The token of an entry's event, or of the invalidate that follows it."""
    if version >= 2:
        operation = "invalidate" if invalidate else entry.operation
        if entry.key is not None:
            identifier = tokens.operation(operation, b"documentKey", (OBJECT, entry.key))
        else:
            value = None if entry.details is None or invalidate else (OBJECT, entry.details)
            identifier = tokens.operation(operation, b"operationDescription", value)
    else:
        identifier = tokens.document_key(entry.key) if entry.key is not None else b""
    return tokens.event(entry.timestamp, entry.index, version, entry.uuid, identifier, invalidate=invalidate)


def build_invalidate(entry: Entry, options: EventOptions) -> Event:
    """The event that ends a stream after its collection or database has gone."""
    token = token_of(entry, options.version.token_version, invalidate=True)
    parts = [_id(token), raw.string_element(b"operationType", "invalidate")]
    parts.append(raw.element(b"clusterTime", TIMESTAMP, entry.timestamp.to_bytes(8, "little")))
    if options.version.has_expanded_events:
        parts.append(raw.element(b"wallTime", DATE, raw.pack_int64(entry.wall_ms)))
    return Event(token, "invalidate", entry.db, entry.coll, raw.wrap(b"".join(parts)), entry.position)


def _id(token: str) -> bytes:
    return raw.element(b"_id", OBJECT, raw.wrap(raw.string_element(b"_data", token)))


@functools.lru_cache(maxsize=1000)
def _operation_type(operation: str) -> bytes:
    return raw.string_element(b"operationType", operation)


@functools.lru_cache(maxsize=1000)
def _namespace(db: str, coll: str) -> bytes:
    return raw.wrap(raw.string_element(b"db", db) + (raw.string_element(b"coll", coll) if coll else b""))


def _full_document(entry: Entry, options: EventOptions, catalog: Catalog) -> bytes:
    if entry.operation in {"insert", "replace"}:
        assert entry.document is not None
        return raw.element(b"fullDocument", OBJECT, entry.document)
    if entry.operation != "update" or options.full_document == "default":
        return b""
    if options.full_document == "updateLookup":
        return _optional(b"fullDocument", _look_up(entry, catalog))
    return _image(b"fullDocument", entry.after, options.full_document, entry)


def _look_up(entry: Entry, catalog: Catalog) -> bytes | None:
    collection = catalog.by_uuid.get(entry.uuid or b"")
    assert entry.key is not None
    value = raw.find_value(entry.key, b"_id")
    if collection is None or value is None:
        return None
    return collection.documents.get(collection.key(value))


def _image(name: bytes, image: bytes | None, mode: str, entry: Entry) -> bytes:
    if image is None and mode == "required":
        change = {"op": entry.operation, "ns": f"{entry.db}.{entry.coll}"}
        raise CommandError(
            47, f"Change stream was configured to require a {name.decode()} image, but it was not found for {change}"
        )
    return _optional(name, image)


def _optional(name: bytes, document: bytes | None) -> bytes:
    return raw.element(name, raw.NULL, b"") if document is None else raw.element(name, OBJECT, document)


def _update_description(entry: Entry, options: EventOptions) -> bytes:
    described = entry.description
    inner = raw.element(b"updatedFields", OBJECT, described.updated)
    inner += raw.element(b"removedFields", ARRAY, described.removed)
    inner += raw.element(b"truncatedArrays", ARRAY, described.truncated)
    if options.expanded and options.version.has_disambiguated_paths:
        inner += raw.element(b"disambiguatedPaths", OBJECT, described.ambiguous)
    return raw.element(b"updateDescription", OBJECT, raw.wrap(inner))


def split(token: str, document: bytes, max_bytes: int) -> list[bytes]:
    """A large event as fragments: fields by size, as many in each as fit.

    `CommandError` 7182500 if a single field does not fit.
    """
    fields = [element for element in raw.elements(document) if element[0] != b"_id"]
    fields.sort(key=lambda element: (len(element[2]) + len(element[0]) + 2, element[0]))
    groups: list[list[raw.Element]] = []
    size = max_bytes + 1
    for element in fields:
        own = len(element[2]) + len(element[0]) + 2
        if size + own > max_bytes:
            groups.append([])
            size = len(token) + 80
        if size + own > max_bytes:
            raise CommandError(
                7182500,
                f"Splitting change event failed: fragment size {size + own} is greater than maximum allowed "
                f"fragment size {max_bytes}",
            )
        groups[-1].append(element)
        size += own
    return [_fragment(token, number, len(groups), group) for number, group in enumerate(groups)]


def _fragment(token: str, number: int, of: int, group: list[raw.Element]) -> bytes:
    head = _id(tokens.fragment(token, number)) + raw.fields({"splitEvent": {"fragment": number + 1, "of": of}})
    return raw.wrap(head + b"".join(raw.element(*element) for element in group))


def quick_fields(event: Event) -> dict[str, Any]:
    """What a filter on type and namespace alone needs to see."""
    namespace = {"db": event.db}
    if event.coll:
        namespace["coll"] = event.coll
    return {"operationType": event.operation, "ns": namespace}
