"""Writes as raw commands: documents and statements go as the bytes they are, within the server's bounds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import bson
import msgspec
from bson.raw_bson import RawBSONDocument
from pymongo.client_session import ClientSession
from pymongo.errors import OperationFailure

from cdc.change import TableName
from cdc.errors import CdcError, TransientError
from cdc.mongodb import walk
from cdc.mongodb.client import RAW, Client, server_error
from cdc.mongodb.positions import DURABLE

MAX_STATEMENTS: Final = 100_000
"""The server's `maxWriteBatchSize`."""

MAX_BYTES: Final = 47_000_000
"""Of a command's statements; the server's `maxMessageSizeBytes` is 48,000,000."""

DUPLICATE_KEY: Final = frozenset((11000, 11001, 12582))
IMMUTABLE_FIELD: Final = 66
_UNAUTHORIZED: Final = 13

_ITEMS: Final = {"insert": "documents", "update": "updates", "delete": "deletes"}


class Failure(msgspec.Struct, frozen=True):
    """A statement that the server refused. `reply` is what it said about it, as BSON."""

    index: int
    code: int
    reply: bytes

    @property
    def error(self) -> CdcError:
        """As an error to raise."""
        message = walk.find(self.reply, b"errmsg")
        text = "" if message is None else walk.string_at(self.reply, message.start, message.end)
        return server_error(self.code, text, write=True)


class _Documents(RawBSONDocument):
    """Documents one behind the other, as a message has them: to PyMongo one document, whose bytes it copies.

    An object for each would cost more than all else that is done with them.
    """

    def __init__(self, documents: Sequence[bytes]) -> None:
        self._joined = b"".join(documents)

    @property
    def raw(self) -> bytes:
        """All of them."""
        return self._joined


class Outcome(msgspec.Struct):
    """What a command did. n: documents inserted, matched, upserted or deleted."""

    n: int = 0
    upserted: int = 0
    failures: list[Failure] = []


class Writer:
    """Writes in one session, majority and journaled; in the session's transaction, while it has one."""

    def __init__(self, client: Client, session: ClientSession) -> None:
        self._client = client
        self._session = session
        self._bypass = True

    def insert(self, table: TableName, documents: Sequence[bytes], *, ordered: bool) -> Outcome:
        """Insert documents as they are."""
        return self._write("insert", table, documents, ordered=ordered)

    def update(self, table: TableName, statements: Sequence[bytes], *, ordered: bool) -> Outcome:
        """Execute statements of the `update` command."""
        return self._write("update", table, statements, ordered=ordered)

    def delete(self, table: TableName, statements: Sequence[bytes], *, ordered: bool) -> Outcome:
        """Execute statements of the `delete` command."""
        return self._write("delete", table, statements, ordered=ordered)

    def _write(self, name: str, table: TableName, items: Sequence[bytes], *, ordered: bool) -> Outcome:
        """Ordered: stops at the first failure. Raises what is not about a single statement."""
        total = Outcome(failures=[])
        done = 0
        for chunk in _chunks(items):
            reply = self._run(name, table, chunk, ordered=ordered)
            _add(total, reply, done)
            done += len(chunk)
            if ordered and total.failures:
                break
        return total

    def _run(self, name: str, table: TableName, items: Sequence[bytes], *, ordered: bool) -> bytes:
        command: dict[str, Any] = {name: table.name, "ordered": ordered}
        if self._bypass and name != "delete":  # the source has what its validator would refuse today
            command["bypassDocumentValidation"] = True
        if not self._session.in_transaction:
            command["writeConcern"] = DURABLE.document
        command[_ITEMS[name]] = [_Documents(items)]
        try:
            reply = self._client[table.schema].command(command, codec_options=RAW, session=self._session)
        except OperationFailure as exc:
            if exc.code == _UNAUTHORIZED and self._bypass and not self._session.in_transaction:
                self._bypass = False
                return self._run(name, table, items, ordered=ordered)
            raise
        return bytes(reply.raw)


def _chunks(items: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
    if len(items) <= MAX_STATEMENTS and sum(map(len, items)) <= MAX_BYTES:
        if items:
            yield items
        return
    begin = size = 0
    for index, item in enumerate(items):
        if size + len(item) > MAX_BYTES or index - begin == MAX_STATEMENTS:
            yield items[begin:index]
            begin, size = index, 0
        size += len(item)
    if begin < len(items):
        yield items[begin:] if begin else items


def _add(total: Outcome, reply: bytes, done: int) -> None:
    fields = walk.fields(reply)
    if b"writeConcernError" in fields:
        _, start, end = fields[b"writeConcernError"]
        error = bson.decode(reply[start:end])
        raise TransientError(f"not written to a majority: {error.get('errmsg', '')} ({error.get('code')})")
    _, start, end = fields[b"n"]
    total.n += int.from_bytes(reply[start:end], "little", signed=True)
    if b"upserted" in fields:
        total.upserted += sum(1 for _ in walk.elements(reply, fields[b"upserted"][1]))
    if b"writeErrors" in fields:
        for item in walk.array_items(reply, fields[b"writeErrors"][1]):
            index, code = (walk.find(item, name) for name in (b"index", b"code"))
            assert index is not None
            assert code is not None
            numbers = (int.from_bytes(item[each.start : each.end], "little", signed=True) for each in (index, code))
            total.failures.append(Failure(next(numbers) + done, next(numbers), item))
