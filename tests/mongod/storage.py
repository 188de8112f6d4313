"""Databases and collections in memory: documents by the server's key of their `_id`, as the bytes that came in."""

from __future__ import annotations

import bisect
import os
from collections.abc import Iterable, Iterator
from typing import Any

from . import mock, raw
from .errors import CommandError
from .indexes import Index
from .keys import Key, fold_of, key_of
from .raw import Element

Overlay = dict[Key, bytes | None]
"""A transaction's own view of a collection: what it wrote, None for what it deleted."""


class Collection:
    """One collection. Natural order is the order of insertion."""

    def __init__(self, db: str, name: str, options: list[Element] | None = None) -> None:
        self.db = db
        self.name = name
        self.uuid = _uuid()
        self.documents: dict[Key, bytes] = {}
        self._sorted: list[Key] | None = None
        self.indexes: dict[str, Index] = {}
        self.set_options(options or [])
        self._bytes = 0

    def set_options(self, options: list[Element]) -> None:
        """Take over the options of `create` or `collMod`, and derive what writes need to know."""
        self.options = options
        self.settings = raw.decode(raw.document(options))
        self.fold = fold_of(self.settings.get("collation"))
        self.validator: dict[str, Any] | None = self.settings.get("validator") or None
        if self.settings.get("validationLevel") == "off":
            self.validator = None
        self.keeps_images = bool((self.settings.get("changeStreamPreAndPostImages") or {}).get("enabled"))
        self.capped = bool(self.settings.get("capped"))

    @property
    def namespace(self) -> str:
        """Database and collection."""
        return f"{self.db}.{self.name}"

    def key(self, value: raw.Value) -> Key:
        """The key under which a document with this `_id` is kept."""
        return key_of(value, self.fold)

    def put(self, key: Key, document: bytes) -> None:
        """Write a document; constraints have been checked."""
        before = self.documents.get(key)
        if self.indexes:
            self._reindex(key, before, document)
        self.documents[key] = document
        if before is None and self._sorted is not None:
            if self._sorted and key < self._sorted[-1]:
                bisect.insort(self._sorted, key)
            else:
                self._sorted.append(key)
        if self.capped:
            self._bytes += len(document) - len(before or b"")
            self._evict()

    def remove(self, key: Key) -> None:
        """Delete a document that is there."""
        before = self.documents.pop(key)
        if self.indexes:
            self._reindex(key, before, None)
        if self._sorted is not None:
            del self._sorted[bisect.bisect_left(self._sorted, key)]

    def _reindex(self, key: Key, before: bytes | None, after: bytes | None) -> None:
        for index in self.indexes.values():
            if index.unique:
                index.replace(key, before, after)

    def _evict(self) -> None:
        limit = self.settings.get("size") or 0
        count = self.settings.get("max") or 0
        while self.documents and ((count and len(self.documents) > count) or (limit and self._bytes > limit)):
            oldest = next(iter(self.documents))
            self._bytes -= len(self.documents[oldest])
            self.remove(oldest)

    def sorted_keys(self) -> list[Key]:
        """All keys in the order of `_id`."""
        if self._sorted is None:
            self._sorted = sorted(self.documents)
        return self._sorted

    def check_valid(self, document: bytes) -> None:
        """`CommandError` 121 if the validator refuses the document."""
        if self.validator is None or _valid(self.validator, document):
            return
        found = raw.find_value(document, b"_id") or raw.NULL_VALUE
        info = {"failingDocumentId": raw.decode_value(found), "details": {"operatorName": "$validator"}}
        raise CommandError(121, "Document failed validation", extra={"errInfo": info})

    def validation_warns(self) -> bool:
        """Whether what fails validation is accepted all the same."""
        return self.settings.get("validationAction") == "warn"

    def unique_conflict(self, key: Key, document: bytes, overlay: Overlay | None) -> CommandError | None:
        """The error for a document that would break a unique index."""
        for index in self.indexes.values():
            if index.unique:
                found = index.conflict(key, document, overlay)
                if found is not None:
                    return index.error(self.namespace, found)
        return None


def _valid(validator: dict[str, Any], document: bytes) -> bool:
    schema = validator.get("$jsonSchema")
    decoded = raw.decode(document)
    if schema is not None:
        if any(name not in decoded for name in schema.get("required", [])):
            return False
        validator = {name: {"$type": rule["bsonType"]} for name, rule in schema.get("properties", {}).items()
                     if "bsonType" in rule and name in decoded}  # fmt: skip
    return mock.matches(validator, decoded)


def duplicate_id(collection: Collection, value: raw.Value) -> CommandError:
    """The error for an `_id` that is there already."""
    shown = raw.decode_value(value)
    return CommandError(
        11000,
        f"E11000 duplicate key error collection: {collection.namespace} index: _id_ dup key: {{ _id: {show(shown)} }}",
        extra={"keyPattern": {"_id": 1}, "keyValue": {"_id": shown}},
    )


def show(value: Any) -> str:
    """A value as error messages print it."""
    if isinstance(value, str):
        return f'"{value}"'
    if type(value).__name__ == "ObjectId":
        return f"ObjectId('{value}')"
    return "null" if value is None else str(value)


def scan(
    collection: Collection, overlay: Overlay | None, keys: Iterable[Key] | None = None
) -> Iterator[tuple[Key, bytes]]:
    """Keys and documents as a transaction with this overlay sees them; in natural order if no keys are given."""
    documents = collection.documents
    if overlay is None:
        for key in list(documents) if keys is None else keys:
            if key in documents:
                yield key, documents[key]
        return
    chosen = [*documents, *(key for key in overlay if key not in documents)] if keys is None else keys
    for key in chosen:
        document = overlay.get(key) if key in overlay else documents.get(key)
        if document is not None:
            yield key, document


def _uuid() -> bytes:
    data = bytearray(os.urandom(16))
    data[6] = data[6] & 0x0F | 0x40
    data[8] = data[8] & 0x3F | 0x80
    return bytes(data)


class Catalog:
    """All databases."""

    def __init__(self) -> None:
        self.databases: dict[str, dict[str, Collection]] = {}
        self.by_uuid: dict[bytes, Collection] = {}

    def get(self, db: str, name: str) -> Collection | None:
        """A collection that exists."""
        found = self.databases.get(db)
        return None if found is None else found.get(name)

    def existing(self, db: str, name: str) -> Collection:
        """A collection that exists; `CommandError` 26 otherwise."""
        found = self.get(db, name)
        if found is None:
            raise CommandError(26, f"ns not found {db}.{name}" if name else "ns not found")
        return found

    def add(self, collection: Collection) -> None:
        """Put a collection under its name."""
        self.databases.setdefault(collection.db, {})[collection.name] = collection
        self.by_uuid[collection.uuid] = collection

    def drop(self, collection: Collection) -> None:
        """Remove a collection."""
        names = self.databases[collection.db]
        del names[collection.name]
        if not names:
            del self.databases[collection.db]
        self.by_uuid.pop(collection.uuid, None)


def check_namespace(db: str, name: str) -> None:
    """`CommandError` 73 for a name that no collection may have."""
    if not name or name.startswith(".") or "$" in name or "\0" in name or len(f"{db}.{name}") > 255:
        raise CommandError(73, f"Invalid namespace specified '{db}.{name}'")
