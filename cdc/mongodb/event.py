"""Change events: the bytes of one become a `Change`, without decoding a value. Pure; raises nothing but `DecodeError`.

(MongoDB manual, "Change Events"; every field that is read here has been there since 3.6, unless said otherwise.)
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

import msgspec

from cdc.change import DDL, DELETE, INSERT, UPDATE, Change, Ddl, Delta, TableName
from cdc.errors import DecodeError
from cdc.mongodb import walk
from cdc.mongodb.walk import DATE, DOCUMENT, INT32, NULL, STRING, TIMESTAMP

Fields = dict[bytes, tuple[int, int, int]]
"""Where an event's fields are: `(kind, start, end)` by name."""


class Event(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One change event, for as long as it has not found its table.

    token: the resume token, as BSON.
    namespace: the `ns` document; empty where the event is about no namespace.
    commit_time: microseconds since 1970-01-01 UTC.
    transaction: names the multi-document transaction that it belongs to; empty outside of any.
    operation, key, before, after, detail: as in `Change`.
    """

    token: bytes
    namespace: bytes
    commit_time: int
    transaction: bytes
    operation: int
    key: bytes | None
    before: bytes | None
    after: bytes | None
    detail: Delta | Ddl | None

    def change(self, table: int) -> Change:
        """The change, in a batch where its table has this index."""
        return Change(self.operation, table, self.key, self.before, self.after, self.detail)


_REPLACE: Final = -1
_OPERATIONS: Final = {
    walk.string("insert"): INSERT,
    walk.string("update"): UPDATE,
    walk.string("replace"): _REPLACE,
    walk.string("delete"): DELETE,
}
"""By the bytes of `operationType`. Everything else happens to a collection or database, or is not known yet."""


_HEAD, _HEAD_END = b"\x02operationType\x00", b"\x11clusterTime\x00"
_HEADS: Final = {
    _HEAD + walk.string(name) + _HEAD_END: operation
    for name, operation in (("insert", INSERT), ("update", UPDATE), ("delete", DELETE))
}
"""From the end of `_id` to the value of `clusterTime`; all of one size, but for that of a replacement."""

_REPLACE_HEAD: Final = _HEAD + walk.string("replace") + _HEAD_END
_HEAD_SIZE: Final = len(_REPLACE_HEAD) - 1

_size: Final = struct.Struct("<I").unpack_from
_date: Final = struct.Struct("<q").unpack_from


def quick(raw: bytes) -> Event | None:  # noqa: C901, PLR0912
    """Read an event of the kind that comes by the million; `None` where it must be looked at more closely.

    Fields are expected in the order in which servers write them, so none has to be searched for or named. Every step
    goes forward, so if the last one ends where the event does, none was out of bounds. (Its length wants a reason:
    each call that it does not make is worth a tenth of the time.)
    """
    try:
        if raw[4:9] != b"\x03_id\x00":
            return None
        at = 9 + _size(raw, 9)[0]
        token = raw[9:at]
        operation = _HEADS.get(raw[at : at + _HEAD_SIZE])
        if operation is None:
            if raw[at : at + _HEAD_SIZE + 1] != _REPLACE_HEAD:
                return None
            operation = _REPLACE
            at += 1
        seconds_at = at + _HEAD_SIZE + 4
        at = seconds_at + 4
        if raw[at : at + 16] == b"\x05collectionUUID\x00":  # with showExpandedEvents
            at += 16 + 5 + _size(raw, at + 16)[0]
        if raw[at : at + 10] == b"\x09wallTime\x00":
            commit_time = _date(raw, at + 10)[0] * 1000
            at += 18
        else:
            commit_time = _size(raw, seconds_at)[0] * 1_000_000
        after = detail = None
        if raw[at : at + 14] == b"\x03fullDocument\x00":
            start = at + 14
            at = start + _size(raw, start)[0]
            after = raw[start:at]
        elif raw[at : at + 14] == b"\x0afullDocument\x00":
            at += 14
        if raw[at : at + 4] != b"\x03ns\x00":
            return None
        start = at + 4
        at = start + _size(raw, start)[0]
        ns = raw[start:at]
        if raw[at : at + 13] != b"\x03documentKey\x00":
            return None
        start = at + 13
        at = start + _size(raw, start)[0]
        key = raw[start:at]
        if operation == UPDATE and raw[at : at + 19] == b"\x03updateDescription\x00":
            start = at + 19
            at = start + _size(raw, start)[0]
            detail = Delta(raw[start:at])
    except struct.error:
        return None
    if at != len(raw) - 1 or (detail is None and operation == UPDATE) or (after is None and operation <= INSERT):
        return None
    if operation == _REPLACE:
        operation = UPDATE
    return Event(token, ns, commit_time, b"", operation, key, None, after, detail)


def decode(raw: bytes, found: Fields | None = None) -> Event:
    """Read one whole event. found: `walk.fields(raw)`, where the caller has it already."""
    if found is None:
        found = walk.fields(raw)
    try:
        kind, start, end = found[b"operationType"]
        token_kind, token_start, token_end = found[b"_id"]
    except KeyError as exc:
        raise DecodeError(f"a change event has no {exc.args[0].decode()}") from None
    if kind != STRING or token_kind != DOCUMENT:
        raise DecodeError("a change event's _id or operationType is of a wrong type")
    operation = _OPERATIONS.get(raw[start:end])
    namespace = _document(raw, found, b"ns")
    transaction = _transaction(raw, found) if b"txnNumber" in found else b""
    token, time = raw[token_start:token_end], _commit_time(raw, found)
    if operation is None:
        ddl = Ddl(walk.string_at(raw, start, end), raw)
        return Event(token, namespace or b"", time, transaction, DDL, None, None, None, ddl)
    key, after = _document(raw, found, b"documentKey"), _document(raw, found, b"fullDocument")
    if key is None or namespace is None:
        raise DecodeError("a change event has no documentKey, or no ns")
    before = _document(raw, found, b"fullDocumentBeforeChange") if b"fullDocumentBeforeChange" in found else None
    detail = None
    if operation == UPDATE:
        description = _document(raw, found, b"updateDescription")
        if description is None:
            raise DecodeError("an update event has no updateDescription")
        detail = Delta(description)
    elif operation != DELETE and after is None:
        raise DecodeError("an insert or replace event has no fullDocument")
    return Event(
        token, namespace, time, transaction, UPDATE if operation == _REPLACE else operation, key, before, after, detail
    )


def fragment(raw: bytes, found: Fields) -> tuple[int, int] | None:
    """Number and count, where this is a part of a large event (`$changeStreamSplitLargeEvent`); else `None`."""
    split = _document(raw, found, b"splitEvent")
    if split is None:
        return None
    parts = walk.fields(split)
    numbers = [parts.get(name, (NULL, 0, 0)) for name in (b"fragment", b"of")]
    if any(kind != INT32 for kind, _, _ in numbers):
        raise DecodeError("a change event's splitEvent is not understood")
    number, count = (walk.int32_at(split, start) for _, start, _ in numbers)
    return number, count


def join(fragments: Sequence[bytes]) -> bytes:
    """Put a large event together again. Its token is the last fragment's."""
    parts: list[bytes] = []
    for number, raw in enumerate(fragments, 1):
        for element in walk.elements(raw):
            if element.name == b"splitEvent" or (element.name == b"_id" and number < len(fragments)):
                continue
            parts.append(raw[element.at : element.end])
    return walk.joined(parts)


def namespace(ns: bytes) -> TableName:
    """The database and collection of an `ns` (or `to`) document; the name is empty where it is about a database."""
    found = walk.fields(ns)
    texts = []
    for name in (b"db", b"coll"):
        kind, start, end = found.get(name, (NULL, 0, 0))
        if kind not in (STRING, NULL):
            raise DecodeError("a change event's namespace is no text")
        texts.append(walk.string_at(ns, start, end) if kind == STRING else "")
    return TableName(*texts)


def renamed_to(raw: bytes) -> TableName | None:
    """Where a rename event leads to."""
    target = walk.get_document(raw, b"to")
    return None if target is None else namespace(target)


def uuid_of(raw: bytes) -> bytes:
    """What the server knows the event's collection by; empty where it does not tell (without `showExpandedEvents`)."""
    found = walk.find(raw, b"collectionUUID")
    return b"" if found is None or found.kind != walk.BINARY else raw[found.start + 5 : found.end]


def _document(raw: bytes, found: Fields, name: bytes) -> bytes | None:
    place = found.get(name)
    if place is None:
        return None
    kind, start, end = place
    if kind == DOCUMENT:
        return raw[start:end]
    if kind == NULL:
        return None
    raise DecodeError(f"a change event's {name.decode()} is not a document but of type 0x{kind:02x}")


def _commit_time(raw: bytes, found: Fields) -> int:
    """By `wallTime`, which comes from 6.0 on, or by the seconds of `clusterTime`."""
    place = found.get(b"wallTime")
    if place is not None and place[0] == DATE:
        return walk.int64_at(raw, place[1]) * 1000
    place = found.get(b"clusterTime")
    if place is not None and place[0] == TIMESTAMP:
        return walk.timestamp_at(raw, place[1])[0] * 1_000_000
    raise DecodeError("a change event has neither wallTime nor clusterTime")


def _transaction(raw: bytes, found: Fields) -> bytes:
    _, start, end = found[b"txnNumber"]
    _, session_start, session_end = found.get(b"lsid", (NULL, 0, 0))
    return raw[session_start:session_end] + raw[start:end]
