"""Writing one document: constraints, locks, the collection and the oplog, inside and outside of transactions."""

from __future__ import annotations

from collections.abc import Iterable

import bson

from . import raw
from .deltas import Difference
from .errors import CommandError
from .keys import Key
from .oplog import Entry
from .queries import Query
from .raw import Value
from .sessions import Transaction
from .state import State
from .storage import Collection, Overlay, duplicate_id
from .tree import Node, set_path
from .updates import Change, Update, stamped

MAX_DOCUMENT_BYTES = 16 * 1024 * 1024


class Blocked(Exception):
    """The document is locked by a transaction; try again when that has finished."""

    def __init__(self, holder: Transaction) -> None:
        super().__init__("locked by a transaction")
        self.holder = holder


class Target:
    """A collection as one writer sees it."""

    def __init__(
        self, state: State, collection: Collection, transaction: Transaction | None, *, validate: bool
    ) -> None:
        self._state = state
        self.collection = collection
        self._transaction = transaction
        self._validate = validate

    @property
    def overlay(self) -> Overlay | None:
        """What the writer's transaction has written here."""
        return None if self._transaction is None else self._transaction.overlay(self.collection)

    def get(self, key: Key) -> bytes | None:
        """The document, as the writer sees it."""
        overlay = self.overlay
        if overlay is not None and key in overlay:
            return overlay[key]
        return self.collection.documents.get(key)

    def insert(self, document: bytes) -> Value:
        """Insert; returns the `_id`. `CommandError` 11000, 121, 2 or 10334."""
        document, value = with_id(stamped(document))
        check_size(document)
        key = self.collection.key(value)
        self._claim(key)
        if self.get(key) is not None:
            raise duplicate_id(self.collection, value)
        self._check(key, document)
        id_document = raw.wrap(raw.element(b"_id", *value))
        self._write(key, document, self._entry("insert", id_document, document=document))
        return value

    def update(self, key: Key, before: bytes, change: Change) -> bool:
        """Write a changed document; False if nothing changed."""
        after = change.document
        if before == after:
            return False
        check_size(after)
        self._claim(key)
        self._check(key, after)
        operation = "replace" if change.difference is None else "update"
        difference: Difference | None = change.difference
        entry = self._entry(operation, _id_of(before), before, document=after if difference is None else None)
        entry.difference = difference
        if self.collection.keeps_images:
            entry.after = after
        self._write(key, after, entry)
        return True

    def delete(self, key: Key, before: bytes) -> None:
        """Delete a document that is there."""
        self._claim(key)
        self._write(key, None, self._entry("delete", _id_of(before), before))

    def require_free(self, keys: Iterable[Key]) -> None:
        """Raise `Blocked` before anything is written, if a transaction has one of these documents."""
        if self._transaction is None and self._state.locks:
            for key in keys:
                self._claim(key)

    def _check(self, key: Key, document: bytes) -> None:
        collection = self.collection
        if collection.validator is not None and self._validate and not collection.validation_warns():
            collection.check_valid(document)
        if collection.indexes:
            conflict = collection.unique_conflict(key, document, self.overlay)
            if conflict is not None:
                raise conflict

    def _claim(self, key: Key) -> None:
        if self._transaction is not None:
            self._transaction.claim(self._state, self.collection, key)
        elif self._state.locks:
            holder = self._state.locks.get((self.collection.uuid, key))
            if holder is not None:
                raise Blocked(holder)

    def _entry(self, operation: str, key: bytes, before: bytes | None = None, document: bytes | None = None) -> Entry:
        collection = self.collection
        entry = Entry(operation, collection.db, collection.name, collection.uuid, key, document)
        if collection.keeps_images:
            entry.before = before
        return entry

    def _write(self, key: Key, document: bytes | None, entry: Entry) -> None:
        if self._transaction is not None:
            self._transaction.overlay(self.collection)[key] = document
            self._transaction.entries.append(entry)
            return
        if document is None:
            self.collection.remove(key)
        else:
            self.collection.put(key, document)
        self._state.record(entry, self.collection, key)


def _id_of(document: bytes) -> bytes:
    value = raw.find_value(document, b"_id")
    assert value is not None
    return raw.wrap(raw.element(b"_id", *value))


def with_id(document: bytes) -> tuple[bytes, Value]:
    """The document with its `_id` in front, made if there is none; `CommandError` 2 for a type that it may not have."""
    if document[5:9] == b"_id\0":
        kind = document[4]
        value = (kind, document[9 : raw.value_end(document, kind, 9)])
    else:
        found = raw.find_value(document, b"_id")
        value = found or (0x07, bson.ObjectId().binary)
        rest = document[4:-1]
        if found is not None:
            rest = b"".join(raw.element(*part) for part in raw.elements(document) if part[0] != b"_id")
        document = raw.wrap(raw.element(b"_id", *value) + rest)
    if value[0] in {raw.ARRAY, 0x0B, 0x06}:
        name = {raw.ARRAY: "array", 0x0B: "regex", 0x06: "undefined"}[value[0]]
        raise CommandError(53 if value[0] == raw.ARRAY else 2, f"The '_id' value cannot be of type {name}")
    if value[0] == raw.OBJECT and raw.has_operators(value[1]):
        raise CommandError(52, "_id fields may not contain '$'-prefixed fields")
    return document, value


def check_size(document: bytes) -> None:
    """`CommandError` 10334 for more than a document may have."""
    if len(document) > MAX_DOCUMENT_BYTES:
        size = len(document)
        raise CommandError(
            10334,
            f"BSONObj size: {size} (0x{size:X}) is invalid. Size must be between 0 and {MAX_DOCUMENT_BYTES}(16MB)",
        )


def upsert_document(query: Query, condition: bytes, update: Update) -> bytes:
    """The document that an upsert inserts: equalities of the query, changed by the update."""
    root = Node((raw.OBJECT, raw.EMPTY))
    if not update.is_replacement:
        _equalities(root, condition)
    else:
        value = raw.find_value(condition, b"_id")
        if value is not None and query.exact is not None and len(query.exact) == 1:
            _equalities(root, raw.wrap(raw.element(b"_id", *value)))
    return update.apply(root.value()[1], inserting=True).document


def _equalities(root: Node, condition: bytes) -> None:
    for name, kind, payload in raw.elements(condition):
        if name == b"$and":
            for inner in raw.array_documents(payload):
                _equalities(root, inner)
        elif kind == raw.OBJECT and raw.has_operators(payload):
            equal = raw.find_value(payload, b"$eq")
            if equal is not None:
                set_path(root, tuple(name.split(b".")), equal)
        elif not name.startswith(b"$") and kind != 0x0B:
            set_path(root, tuple(name.split(b".")), (kind, payload))
