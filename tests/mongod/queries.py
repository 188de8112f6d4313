"""Finding documents: by `_id` through its index and the server's own order, by everything else through mongomock."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator
from typing import Any, Final

from . import mock, raw
from .errors import CommandError
from .keys import HIGHEST, LOWEST, NUMBER, Key, key_of
from .raw import ARRAY, OBJECT, Value
from .storage import Collection, Overlay, scan

_NAN: Final[Key] = (NUMBER, 0)
_UNBRACKETED: Final = frozenset((-1, 127))
"""MinKey and MaxKey: compared with values of all types."""

_RANGES: Final[dict[bytes, Callable[[Key, Key], bool]]] = {
    b"$gt": lambda key, bound: key > bound,
    b"$gte": lambda key, bound: key >= bound,
    b"$lt": lambda key, bound: key < bound,
    b"$lte": lambda key, bound: key <= bound,
}
_ID_OPERATORS: Final = frozenset((b"$eq", b"$in", b"$ne", b"$nin", b"$exists", *_RANGES))


class Query:
    """A filter: what it says about `_id`, and the rest."""

    def __init__(self, condition: bytes, collection: Collection) -> None:
        self._collection = collection
        self.decoded = raw.decode(condition)
        self._keys: list[Key] | None = None
        self._tests: list[Callable[[Key], bool]] = []
        self._low: Key = LOWEST
        self._high: Key = HIGHEST
        if "_id" in self.decoded:
            value = raw.find_value(condition, b"_id")
            if value is not None and self._take(value):
                self.rest = {name: inner for name, inner in self.decoded.items() if name != "_id"}
                return
        self.rest = self.decoded

    def _take(self, value: Value) -> bool:
        """Understand the condition on `_id`; False if mongomock has to."""
        kind, payload = value
        if kind == 0x0B:
            return False
        if kind != OBJECT or not raw.has_operators(payload):
            self._keys = [self._collection.key(value)]
            return True
        clauses = list(raw.elements(payload))
        if not all(name in _ID_OPERATORS for name, _, _ in clauses):
            return False
        for name, inner_kind, inner in clauses:
            self._clause(name, (inner_kind, inner))
        return True

    def _clause(self, name: bytes, value: Value) -> None:
        key = self._collection.key
        if name in {b"$in", b"$nin"}:
            if value[0] != ARRAY:
                raise CommandError(2, f"{name.decode()} needs an array")
            keys = list(dict.fromkeys(key((kind, payload)) for _, kind, payload in raw.elements(value[1])))
            if name == b"$in":
                self._keys = keys if self._keys is None else [one for one in self._keys if one in keys]
            else:
                self._tests.append(lambda one: one not in keys)
        elif name == b"$eq":
            self._keys = [key(value)]
        elif name == b"$ne":
            unwanted = key(value)
            self._tests.append(lambda one: one != unwanted)
        elif name == b"$exists":
            wanted = bool(raw.decode_value(value))
            self._tests.append(lambda _one: wanted)
        else:
            self._range(name, key(value))

    def _range(self, name: bytes, bound: Key) -> None:
        compare = _RANGES[name]
        rank = bound[0]
        if rank in _UNBRACKETED:
            self._tests.append(lambda key: compare(key, bound))
            return
        self._tests.append(lambda key: key[0] == rank and (key == _NAN) == (bound == _NAN) and compare(key, bound))
        self._low = max(self._low, bound if name in {b"$gt", b"$gte"} else (rank,))
        self._high = min(self._high, (*bound, HIGHEST) if name in {b"$lt", b"$lte"} else (rank + 0.5,))

    @property
    def exact(self) -> list[Key] | None:
        """The only keys that can match, if the filter says so."""
        return self._keys

    def select(
        self, overlay: Overlay | None, *, by_id: int = 0, low: Key | None = None, high: Key | None = None
    ) -> Iterator[tuple[Key, bytes]]:
        """Keys and documents that match; `by_id` 1 or -1 gives them in the order of `_id`, 0 in natural order.

        `low` (included) and `high` (not included) are `min` and `max` of a find: they do not care for types.
        """
        for key, document in scan(self._collection, overlay, self._candidates(overlay, by_id, low, high)):
            if all(test(key) for test in self._tests) and mock.matches_raw(self.rest, document):
                yield key, document

    def _candidates(self, overlay: Overlay | None, by_id: int, low: Key | None, high: Key | None) -> list[Key] | None:
        if self._keys is not None:
            keys = sorted(self._keys)
        elif not by_id and low is None and high is None and (self._low, self._high) == (LOWEST, HIGHEST):
            return None
        elif overlay:
            keys = sorted({*self._collection.documents, *overlay})
        else:
            keys = self._collection.sorted_keys()
        start = bisect.bisect_left(keys, max(self._low, low or LOWEST))
        end = bisect.bisect_left(keys, min(self._high, high or HIGHEST))
        keys = keys[start:end]
        return keys[::-1] if by_id < 0 else keys


def sort_documents(documents: list[bytes], order: dict[str, Any]) -> list[bytes]:
    """Sort as the server does: the smallest element of an array counts ascending, the largest descending."""
    for name, direction in reversed(order.items()):
        path = name.encode().split(b".")
        descending = isinstance(direction, (int, float)) and direction < 0
        documents = sorted(documents, key=lambda one: _sort_key(one, path, descending), reverse=descending)
    return documents


def _sort_key(document: bytes, path: list[bytes], descending: bool) -> Key:
    keys = []
    for value in raw.values_at(document, path):
        keys += [key_of((k, p)) for _, k, p in raw.elements(value[1])] if value[0] == ARRAY else [key_of(value)]
    if not keys:
        return key_of(raw.NULL_VALUE)
    return max(keys) if descending else min(keys)
