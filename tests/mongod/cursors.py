"""Cursors: what `find` and `aggregate` leave behind for `getMore`, and batches made of documents' bytes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Final

from . import raw

MAX_BATCH_BYTES: Final = 16 * 1024 * 1024
FIRST_BATCH: Final = 101


class Batch:
    """Documents for one reply, bounded by number and bytes; the first always fits."""

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self.documents: list[bytes] = []
        self._bytes = 0

    @property
    def full(self) -> bool:
        """Whether the number is reached."""
        return self._limit is not None and len(self.documents) >= self._limit

    def fits(self, document: bytes) -> bool:
        """Whether the document may be added."""
        if self.full:
            return False
        return not self.documents or self._bytes + len(document) <= MAX_BATCH_BYTES

    def add(self, document: bytes) -> None:
        """Take it."""
        self.documents.append(document)
        self._bytes += len(document) + 8


class Cursor:
    """Something that fills batches."""

    is_change_stream = False
    tailable = False

    def __init__(self, namespace: str) -> None:
        self.id = random.SystemRandom().getrandbits(62) + 1
        self.namespace = namespace
        self.closed = False
        self.killed: tuple[int, str] | None = None
        """Code and message of why it was killed, for a getMore that waits."""

        self.busy = False

    async def fill(self, batch: Batch, timeout_seconds: float) -> None:
        """Put what there is into the batch, and mark the cursor closed after the last."""
        raise NotImplementedError

    def describe(self) -> bytes:
        """Elements of the reply's `cursor` after its batch."""
        return b""


class ListCursor(Cursor):
    """A cursor over documents that are found as they are asked for."""

    def __init__(self, namespace: str, documents: Iterator[bytes]) -> None:
        super().__init__(namespace)
        self._documents = documents
        self._ahead: bytes | None = None

    async def fill(self, batch: Batch, timeout_seconds: float) -> None:
        """Take documents until the batch is full or they end."""
        while not batch.full:
            document = self._ahead if self._ahead is not None else next(self._documents, None)
            self._ahead = None
            if document is None:
                self.closed = True
                return
            if not batch.fits(document):
                self._ahead = document
                return
            batch.add(document)


def reply(cursor: Cursor, name: bytes, batch: Batch) -> bytes:
    """The element `cursor` of a reply; `name` is firstBatch or nextBatch."""
    inner = raw.element(name, raw.ARRAY, raw.document_array(batch.documents)) + cursor.describe()
    inner += raw.element(b"id", raw.INT64, raw.pack_int64(0 if cursor.closed else cursor.id))
    inner += raw.string_element(b"ns", cursor.namespace)
    return raw.element(b"cursor", raw.OBJECT, raw.wrap(inner))
