"""Secondary indexes: their definitions, and the keys of unique ones."""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from . import mock, raw
from .errors import CommandError
from .keys import Key, fold_of, key_of

if TYPE_CHECKING:
    from .storage import Overlay


class Index:
    """An index. Only unique ones keep entries: the others are definitions, and speed up nothing."""

    def __init__(self, spec: bytes) -> None:
        self.spec = spec
        """The definition as `listIndexes` shows it."""

        self.settings = raw.decode(spec)
        self.name: str = self.settings["name"]
        self.key: dict[str, Any] = self.settings["key"]
        self.unique = bool(self.settings.get("unique"))
        self._paths = [name.encode().split(b".") for name in self.key]
        self._fold = fold_of(self.settings.get("collation"))
        self._partial: dict[str, Any] = self.settings.get("partialFilterExpression") or {}
        self._entries: dict[tuple[Key, ...], Key] = {}
        # a transaction looks at all that it has written for each document that it writes
        self.known_keys_of = lru_cache(20_000)(lambda document: frozenset(self.keys_of(document)))

    def keys_of(self, document: bytes) -> list[tuple[Key, ...]]:
        """The document's keys in this index: several for arrays, none if the index leaves it out."""
        if self._partial and not mock.matches_raw(self._partial, document):
            return []
        columns = [self._column(document, path) for path in self._paths]
        if self.settings.get("sparse") and not any(columns):
            return []
        null = [key_of(raw.NULL_VALUE)]
        return list(itertools.product(*[column or null for column in columns]))

    def _column(self, document: bytes, path: list[bytes]) -> list[Key]:
        values = []
        for kind, payload in raw.values_at(document, path):
            inner = list(raw.elements(payload)) if kind == raw.ARRAY else []
            values += [(k, p) for _, k, p in inner] or [(kind, payload)]
        return [key_of(value, self._fold) for value in values]

    def replace(self, key: Key, before: bytes | None, after: bytes | None) -> None:
        """Follow a write."""
        if before is not None:
            for entry in self.keys_of(before):
                self._entries.pop(entry, None)
        if after is not None:
            for entry in self.keys_of(after):
                self._entries[entry] = key

    def conflict(self, key: Key, document: bytes, overlay: Overlay | None) -> bytes | None:
        """The document, if another has one of its keys."""
        wanted = self.known_keys_of(document)
        for entry in wanted:
            owner = self._entries.get(entry)
            if owner is not None and owner != key and not (overlay and owner in overlay):
                return document
        for owner, other in (overlay or {}).items():
            if other is not None and owner != key and not wanted.isdisjoint(self.known_keys_of(other)):
                return document
        return None

    def fill(self, documents: dict[Key, bytes], namespace: str) -> None:
        """Index what is there; `CommandError` 11000 if it is not unique."""
        for key, document in documents.items():
            if self.conflict(key, document, None) is not None:
                raise self.error(namespace, document)
            self.replace(key, None, document)

    def error(self, namespace: str, document: bytes) -> CommandError:
        """The duplicate key error for a document."""
        shown = {}
        for name, path in zip(self.key, self._paths, strict=True):
            found = next(raw.values_at(document, path), raw.NULL_VALUE)
            shown[name] = raw.decode_value(found)
        inner = ", ".join(f"{name}: {_show(value)}" for name, value in shown.items())
        return CommandError(
            11000,
            f"E11000 duplicate key error collection: {namespace} index: {self.name} dup key: {{ {inner} }}",
            extra={"keyPattern": self.key, "keyValue": shown},
        )


def _show(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else "null" if value is None else str(value)
