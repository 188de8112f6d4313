"""Digests of MongoDB collections, equal where the documents are equal byte for byte.

A server cannot hash documents as they are (its expressions see values: 1 and 1.0 are the same to them, and so are
documents that differ in a field's type), so they travel, and are hashed here: the documents of a range, in the order of
`_id`, as one stream of bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from itertools import count
from typing import Final, NamedTuple

import bson
from bson.errors import BSONError
from bson.json_util import RELAXED_JSON_OPTIONS, dumps
from bson.raw_bson import RawBSONDocument

from cdc.change import TableName
from cdc.errors import TransientError
from cdc.mongodb import walk
from cdc.mongodb.client import Client
from cdc.mongodb.snapshot import (
    IdRange,
    estimate_size,
    find_command,
    find_documents,
    id_of,
    now,
    ranges_between,
    read_concern,
    split_points,
)

RANGE_ROWS: Final = 20_000
"""About so many documents make a range: what differs is held in memory, a range at a time."""

MAX_RANGES: Final = 2_000

_LOOKUP: Final = 1_000
_ATTEMPTS: Final = 5


class Digest(NamedTuple):
    """What a range holds: equal digests mean equal documents in the same order."""

    rows: int
    hash: bytes


Hashes = dict[bytes, bytes]
"""`{_id: value}` as BSON -> hash of the document."""


class CollectionDigest:
    """One collection on one server. From any thread."""

    def __init__(self, client: Client, table: TableName) -> None:
        self.table = table
        self._client = client
        self._since = now(client)

    def split(self) -> list[IdRange]:
        """Ranges of about equal size, which together hold every `_id` there may be."""
        parts = min(estimate_size(self._client, self.table).rows // RANGE_ROWS + 1, MAX_RANGES)
        return ranges_between(split_points(self._client, self.table, parts) if parts > 1 else [])

    def digest(self, ids: IdRange) -> Digest:
        """Count and hash the documents of a range."""
        for attempt in count(1):
            rows, hashed = 0, blake2b(digest_size=16)
            try:
                for documents in self._read(ids):
                    rows += len(documents)
                    hashed.update(b"".join(documents))
                break
            except TransientError:
                if attempt == _ATTEMPTS:
                    raise
        return Digest(rows, hashed.digest())

    def hashes(self, ids: IdRange) -> Hashes:
        """Each document of a range."""
        for attempt in count(1):
            try:
                return _hashed(self._read(ids))
            except TransientError:
                if attempt == _ATTEMPTS:
                    raise
        raise AssertionError("unreachable")

    def lookup(self, ids: Iterable[bytes]) -> Hashes:
        """Those documents of `ids` that are there now."""
        found = lookup(self._client, self.table, list(ids))
        return {one: blake2b(document, digest_size=16).digest() for one, document in found.items()}

    def now(self) -> int:
        """A moment: what was returned by then is no younger."""
        return now(self._client)

    def _read(self, ids: IdRange) -> Iterator[list[bytes]]:
        return find_documents(self._client, self.table.schema, find_command(self.table, self._since, ids))


def lookup(client: Client, table: TableName, ids: Sequence[bytes]) -> dict[bytes, bytes]:
    """The documents of these `_id`s (each `{_id: value}` as BSON) that are there now, with the same bytes in it."""
    found: dict[bytes, bytes] = {}
    for start in range(0, len(ids), _LOOKUP):
        command = {
            "find": table.name,
            "filter": RawBSONDocument(ids_filter(ids[start : start + _LOOKUP])),
            "readConcern": read_concern(now(client)),
        }
        for documents in find_documents(client, table.schema, command):
            found |= {id_of(document): document for document in documents}
    return {one: found[one] for one in ids if one in found}


def shown_id(document: bytes) -> str:
    """An `_id` for people: Extended JSON, or hexadecimal where even that cannot show it."""
    try:
        return dumps(bson.decode(document)["_id"], json_options=RELAXED_JSON_OPTIONS)
    except (BSONError, ValueError, OverflowError):
        return document.hex()


def ids_filter(ids: Sequence[bytes]) -> bytes:
    """A filter for documents by `_id`, each given as `{_id: value}`; the values as they are."""
    elements = (next(walk.elements(one)) for one in ids)
    items = [
        walk.element(found.kind, b"%d" % number, one[found.start : found.end])
        for number, (one, found) in enumerate(zip(ids, elements, strict=True))
    ]
    condition = walk.document(walk.element(walk.ARRAY, b"$in", walk.joined(items)))
    return walk.document(walk.element(walk.DOCUMENT, b"_id", condition))


def _hashed(blocks: Iterable[list[bytes]]) -> Hashes:
    return {
        id_of(document): blake2b(document, digest_size=16).digest() for documents in blocks for document in documents
    }
