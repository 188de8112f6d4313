"""Repeats on a mirror what happened to collections and databases: made, dropped, renamed, changed, indexed.

Everything may be repeated: what is done already is left alone. What was before a collection's copy began is left out,
for the copy is of what came of it. Indexes that delete by themselves (TTL) are made without that: the source's deletes
come by the stream; what they should be is remembered, and cut-over gives it to them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import bson
import msgspec
import structlog
from bson.codec_options import CodecOptions, DatetimeConversion
from bson.raw_bson import RawBSONDocument
from pymongo.errors import OperationFailure

from cdc.change import DDL, Batch, Ddl, Table, TableName, Transaction
from cdc.mongodb import walk
from cdc.mongodb.client import Client, translated_errors
from cdc.mongodb.collections import (
    NAMESPACE_EXISTS,
    NAMESPACE_NOT_FOUND,
    create_command,
    portable_index,
    read_collections,
)
from cdc.mongodb.event import uuid_of
from cdc.mongodb.moment import encode_moment, moment
from cdc.mongodb.positions import DURABLE, CollectionState, Positions
from cdc.mongodb.writes import DUPLICATE_KEY
from cdc.sink import Subject

_INDEX_NOT_FOUND: Final = 27
_OTHER_INDEX: Final = frozenset((85, 86))
"""IndexOptionsConflict, IndexKeySpecsConflict."""

_REFUSED_OPTIONS: Final = frozenset((2, 9, 14, 59, 67, 72, 115, 197, 359, 40414, 40415))
"""BadValue, FailedToParse, TypeMismatch, CommandNotFound, CannotCreateIndex, InvalidOptions, CommandNotSupported,
InvalidIndexSpecificationOption, CannotConvertIndexToUnique, a missing and an unknown field: of an older server."""

_DEFINING: Final = frozenset(("modify", "createIndexes", "dropIndexes"))

_DEFINITION: Final = b"definition"
"""No document's key: indexes and validators may be made while documents wait, in order among themselves."""

_PLAIN: Final[CodecOptions[dict[str, Any]]] = CodecOptions(
    unicode_decode_error_handler="replace", datetime_conversion=DatetimeConversion.DATETIME_AUTO
)

log = structlog.get_logger()


class DdlApplier:
    """Applies DDL to the collections of one target.

    collections: what is known of them, by their names at the source; kept up to date here and in `positions`.
    in_order: collections whose changes must not be folded: capped ones, and those with a collation.
    """

    def __init__(self, client: Client, positions: Positions, target_name: Callable[[TableName], TableName]) -> None:
        self.collections: dict[TableName, CollectionState] = positions.collections()
        self.in_order: set[TableName] = set()
        self._client = client
        self._positions = positions
        self._target_name = target_name
        self._kinds: Mapping[str, Callable[[TableName, bytes, int], None]] = {
            "create": self._create,
            "drop": self._drop,
            "rename": self._rename,
            "dropDatabase": self._drop_database,
            "modify": self._modify,
            "createIndexes": self._create_indexes,
            "dropIndexes": self._drop_indexes,
        }

    def apply(self, kind: str, event: bytes, position: bytes, table: TableName | None) -> None:
        """Do what an event tells. Kinds that mean nothing for a mirror, or are not known, do nothing.

        table: what it is about, if that is a collection; the event's own words may be about another one (which is gone
        for those who do not see what it was renamed to).
        """
        found = self._kinds.get(kind)
        if found is None:
            if kind != "invalidate":
                log.info("nothing to mirror", kind=kind)
            return
        table = table or _namespace(event, b"ns")
        if kind != "rename" and self.is_copied_later(table, position) and not self._is_again(kind, event, table):
            return  # the copy is of what came after
        log.info("mirroring", kind=kind, collection=str(table))
        with translated_errors():
            found(table, event, moment(position))

    def is_copied_later(self, table: TableName, position: bytes) -> bool:
        """Whether a collection's copy holds what happened at a position, for certain."""
        return self._holds(table, moment(position))

    def never_copied(self, batches: Sequence[Batch]) -> list[Batch]:
        """Without the changes that the copies hold for certain; DDL is looked at when its turn comes."""
        return [
            msgspec.structs.replace(
                batch, transactions=[self._never_copied(batch.tables, each) for each in batch.transactions]
            )
            for batch in batches
        ]

    def _never_copied(self, tables: Sequence[Table], transaction: Transaction) -> Transaction:
        position = transaction.position
        assert isinstance(position, bytes)
        held = [self.is_copied_later(table.qualified, position) for table in tables]
        if not any(held):
            return transaction
        kept = [change for change in transaction.changes if change.operation == DDL or not held[change.table]]
        return msgspec.structs.replace(transaction, changes=kept)

    def uuid(self, table: TableName) -> bytes:
        """What the source knows a collection by; empty if that is not known."""
        state = self.collections.get(table)
        return b"" if state is None else state.uuid

    def adopt(self, table: TableName, position: bytes) -> None:
        """Remember that a collection is new, and that all of it comes by the stream."""
        if table not in self.collections:
            self._made(table, moment(position), walk.EMPTY)

    def _is_again(self, kind: str, event: bytes, table: TableName) -> bool:
        """Whether it is a change of the copied collection: its description was read a little before the moment.

        All of them lead to what is described, those that it holds too.
        """
        return kind in _DEFINING and uuid_of(event) == self.uuid(table) != b""

    def _holds(self, table: TableName, when: int) -> bool:
        state = self.collections.get(table)
        return state is not None and state.copied_from is not None and moment(state.copied_from) >= when

    def _put(self, state: CollectionState) -> None:
        self._positions.put([state])
        self.collections[state.table] = state

    def _made(self, table: TableName, when: int, event: bytes) -> None:
        """From here on the stream has all of it: nothing must be copied."""
        from_here = encode_moment(when - 1)
        self._put(
            CollectionState(table=table, copied_at=from_here, copied_from=from_here, uuid=uuid_of(event), made=True)
        )

    def _gone(self, table: TableName) -> None:
        """What has this name from now on is another collection."""
        state = self.collections.get(table)
        if state is not None and (state.pending or state.expiring or state.uuid):
            self._put(msgspec.structs.replace(state, pending=(), expiring=(), uuid=b""))

    def _create(self, table: TableName, event: bytes, when: int) -> None:
        options = walk.get_document(event, b"operationDescription") or walk.EMPTY
        for name, what in ((b"viewOn", "a view"), (b"timeseries", "a time-series collection")):
            if walk.find(options, name) is not None:
                log.warning("not mirrored: change streams do not carry it", collection=str(table), kind=what)
                return
        target = self._target_name(table)
        self._made(table, when, event)
        self._run(target.schema, create_command(target, options), harmless=NAMESPACE_EXISTS)
        self.in_order.discard(table)
        if any(walk.find(options, name) is not None for name in (b"capped", b"collation")):
            self.in_order.add(table)

    def _drop(self, table: TableName, event: bytes, when: int) -> None:  # noqa: ARG002 - one signature for all
        target = self._target_name(table)
        self._run(target.schema, {"drop": target.name}, harmless=NAMESPACE_NOT_FOUND)
        self.in_order.discard(table)
        self._gone(table)

    def _drop_database(self, table: TableName, event: bytes, when: int) -> None:
        """One by one, and only what is mirrored: our own collection is there too."""
        for each in list(self.collections):
            if each.schema == table.schema and not self._holds(each, when):
                self._drop(each, event, when)

    def _rename(self, table: TableName, event: bytes, when: int) -> None:
        to = _namespace(event, b"to")
        old, new = self._target_name(table), self._target_name(to)
        state = self.collections.get(table)
        if self._holds(to, when):  # and so it is no longer what has this name now
            if not self._holds(table, when):
                self._drop(table, event, when)
            return
        if state is None or self._holds(table, when):
            log.warning("renamed from what is not mirrored: copied at the next start", collection=str(to))
            self._put(CollectionState(table=to, uuid=uuid_of(event), made=True))
            return
        if not self._is_present(old):
            done = to in self.collections and self.collections[to].renamed_at == encode_moment(when)
            if not done:  # an empty one, that was never made here
                self._drop(to, event, when)
            self._gone(table)
            return
        if table in self.in_order:
            self.in_order.add(to)
        else:
            self.in_order.discard(to)
        self._put(msgspec.structs.replace(state, table=to, renamed_at=encode_moment(when)))
        command = {"renameCollection": f"{old.schema}.{old.name}", "to": f"{new.schema}.{new.name}", "dropTarget": True}
        self._run("admin", command, harmless=NAMESPACE_NOT_FOUND)
        self._gone(table)
        self.in_order.discard(table)

    def _is_present(self, name: TableName) -> bool:
        return bool(read_collections(self._client, databases=[name.schema], wanted=name.__eq__))

    def _modify(self, table: TableName, event: bytes, when: int) -> None:  # noqa: ARG002 - one signature for all
        options = dict(_description(event).items())
        target = self._target_name(table)
        options.pop("expireAfterSeconds", None)
        index = options.get("index")
        if index is not None:
            own = bson.decode(index.raw, _PLAIN)
            if (seconds := own.pop("expireAfterSeconds", None)) is not None:
                self._expires(table, own, seconds)
            options["index"] = own
            if not own.keys() - {"name", "keyPattern"}:
                del options["index"]
        if options:
            self._run(target.schema, {"collMod": target.name, **options}, harmless=NAMESPACE_NOT_FOUND)

    def _expires(self, table: TableName, index: Mapping[str, Any], seconds: object) -> None:
        """Remember when an index would delete at the source."""
        state = self.collections.get(table, CollectionState(table=table))
        by_name = {str(bson.decode(spec, _PLAIN).get("name")): spec for spec in state.expiring}
        name = str(index.get("name", ""))
        spec = bson.decode(by_name[name], _PLAIN) if name in by_name else dict(index)
        by_name[name] = bson.encode({**spec, "expireAfterSeconds": seconds})
        self._put(msgspec.structs.replace(state, expiring=tuple(by_name.values())))

    def _create_indexes(self, table: TableName, event: bytes, when: int) -> None:  # noqa: ARG002
        description = walk.get_document(event, b"operationDescription") or walk.EMPTY
        found = walk.find(description, b"indexes")
        if found is None:
            return
        for spec in walk.array_items(description, found.start):
            if walk.find(spec, b"expireAfterSeconds") is not None:
                named = bson.decode(spec, _PLAIN)
                self._expires(table, named, named["expireAfterSeconds"])
            self._create_index(table, spec)

    def _create_index(self, table: TableName, spec: bytes) -> None:
        target = self._target_name(table)
        command = {
            "createIndexes": target.name,
            "indexes": [RawBSONDocument(portable_index(spec))],
            "writeConcern": DURABLE.document,
        }
        try:
            self._client[target.schema].command(command)
        except OperationFailure as exc:
            if exc.code in DUPLICATE_KEY:  # documents of several moments: unique again when the stream has gone on
                state = self.collections.get(table, CollectionState(table=table))
                self._put(msgspec.structs.replace(state, pending=(*state.pending, spec)))
            elif exc.code in _OTHER_INDEX:
                self._drop_index(table, str(bson.decode(spec, _PLAIN).get("name")))
                self._client[target.schema].command(command)
            else:
                self._refused(exc, "createIndexes", str(target))

    def _drop_indexes(self, table: TableName, event: bytes, when: int) -> None:  # noqa: ARG002 - one signature for all
        for spec in _description(event).get("indexes", ()):
            self._drop_index(table, str(spec["name"]))

    def _drop_index(self, table: TableName, name: str) -> None:
        target = self._target_name(table)
        self._run(
            target.schema, {"dropIndexes": target.name, "index": name}, harmless=(_INDEX_NOT_FOUND, NAMESPACE_NOT_FOUND)
        )
        state = self.collections.get(table)
        if state is not None and (state.pending or state.expiring):
            pending, expiring = (
                tuple(spec for spec in specs if bson.decode(spec, _PLAIN).get("name") != name)
                for specs in (state.pending, state.expiring)
            )
            self._put(msgspec.structs.replace(state, pending=pending, expiring=expiring))

    def _run(self, database: str, command: Mapping[str, Any], *, harmless: int | tuple[int, ...]) -> None:
        codes = (harmless,) if isinstance(harmless, int) else harmless
        try:
            self._client[database].command({**command, "writeConcern": DURABLE.document})
        except OperationFailure as exc:
            if exc.code not in codes:
                self._refused(exc, next(iter(command)), str(next(iter(command.values()))))

    @staticmethod
    def _refused(error: OperationFailure, command: str, name: str) -> None:
        """Options that this server does not know change no document: say so, and go on."""
        if error.code not in _REFUSED_OPTIONS:
            raise error
        log.warning("the target refuses options of a collection", command=command, collection=name, code=error.code)


def ddl_subject(ddl: Ddl, table: TableName | None) -> Subject:
    """Which documents it is about: all of those that are dropped, or renamed from or to; else none."""
    if ddl.kind == "dropDatabase":
        return Subject((TableName(_namespace(ddl.description, b"ns").schema, ""),), None)
    names = [table or _namespace(ddl.description, b"ns")]
    if ddl.kind == "rename":
        names.append(_namespace(ddl.description, b"to"))
    about = tuple(name for name in names if name.name)
    return Subject(about, None if ddl.kind in {"drop", "rename"} else (_DEFINITION,))


def _namespace(event: bytes, name: bytes) -> TableName:
    found = walk.get_document(event, name) or walk.EMPTY
    parts = [walk.find(found, part) for part in (b"db", b"coll")]
    database, collection = ("" if part is None else walk.string_at(found, part.start, part.end) for part in parts)
    return TableName(database, collection)


def _description(event: bytes) -> RawBSONDocument:
    """`operationDescription`; empty where the stream was opened without `showExpandedEvents`."""
    return RawBSONDocument(walk.get_document(event, b"operationDescription") or walk.EMPTY)
