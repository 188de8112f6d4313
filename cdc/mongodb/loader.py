"""Writing copied documents: as they are, many at once, never over one that is there already."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from bson.raw_bson import RawBSONDocument

from cdc.change import TableName
from cdc.mongodb import walk
from cdc.mongodb.client import Client, server_error, translated_errors
from cdc.mongodb.delta import is_insertable, replacement
from cdc.mongodb.snapshot import id_of
from cdc.mongodb.writes import Writer

MAX_DOCUMENTS: Final = 10_000
MAX_BYTES: Final = 12 * 1024**2

_DUPLICATE_KEY: Final = 11000


Overwrite = Callable[[Client, TableName, bytes], int]
"""Write a block's documents over what a collection has; returns how many there were."""


class MongoLoader:
    """A `cdc.sink.Loader`.

    A document whose `_id` is there already was written by an earlier attempt. It may be older than this one, and stays:
    the stream begins before the first attempt, and brings all that changed since.
    """

    def __init__(
        self,
        client: Client,
        target_name: Callable[[TableName], TableName],
        in_order: Callable[[TableName], bool],
        overwrites: Mapping[TableName, Overwrite],
    ) -> None:
        """Load; `overwrites` tells how, for collections that keep what they hold."""
        self._client = client
        self._target_name = target_name
        self._in_order = in_order
        self._overwrites = overwrites

    def load(self, table: TableName, blocks: Iterable[bytes], *, binary: bool, whole: bool) -> int:  # noqa: ARG002
        """Write documents that stand end to end; return how many there were. Durable on return."""
        rows = 0
        if (overwrite := self._overwrites.get(table)) is not None:
            return sum(overwrite(self._client, self._target_name(table), block) for block in blocks)
        name, ordered = self._target_name(table), self._in_order(table)
        for block in blocks:
            for documents in batches(block):
                insert(self._client, name, documents, ordered=ordered)
                put_exactly(self._client, name, [one for one in documents if not is_insertable(one)])
                rows += len(documents)
        return rows

    def close(self) -> None:
        """Disconnect. Safe to call twice."""
        self._client.close()


def batches(block: bytes) -> Iterable[list[bytes]]:
    """The documents of a block, as many together as one command may have."""
    documents: list[bytes] = []
    at = start = 0
    while at < len(block):
        end = walk.document_end(block, at)
        if documents and (len(documents) == MAX_DOCUMENTS or end - start > MAX_BYTES):
            yield documents
            documents, start = [], at
        documents.append(block[at:end])
        at = end
    if documents:
        yield documents


def insert(client: Client, name: TableName, documents: Sequence[bytes], *, ordered: bool) -> None:
    """Insert documents, but for those that are there. Whatever the collection's validator says: the source has them."""
    remaining = list(documents)
    while remaining:
        command = {
            "insert": name.name,
            "documents": [RawBSONDocument(document) for document in remaining],
            "ordered": ordered,
            "bypassDocumentValidation": True,
            "writeConcern": {"w": "majority", "j": True},
        }
        with translated_errors():
            reply = client[name.schema].command(command)
        failed = reply.get("writeErrors", ())
        _check(failed, reply.get("writeConcernError"))
        if not (ordered and failed):
            return
        del remaining[: failed[-1]["index"] + 1]  # an ordered insert ends with its first error


def put_exactly(client: Client, name: TableName, documents: Sequence[bytes]) -> None:
    """Put right what an insert changes: it puts the time into top-level timestamps of zero."""
    if not documents:
        return
    statements = [statement for one in documents for statement in replacement(id_of(one), one)]
    with translated_errors(), client.start_session() as session:
        for failure in Writer(client, session).update(name, statements, ordered=True).failures:
            raise failure.error


def _check(failed: Sequence[Mapping[str, Any]], concern: Mapping[str, Any] | None) -> None:
    for error in failed:
        if not _is_there_already(error):
            raise server_error(error.get("code"), str(error.get("errmsg")), write=True)
    if concern is not None:
        raise server_error(concern.get("code"), str(concern.get("errmsg")))


def _is_there_already(error: Mapping[str, Any]) -> bool:
    if error.get("code") != _DUPLICATE_KEY:
        return False
    pattern = error.get("keyPattern")
    return list(pattern) == ["_id"] if pattern is not None else "index: _id_" in str(error.get("errmsg"))
