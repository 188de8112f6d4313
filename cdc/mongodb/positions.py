"""What must survive a crash, in `cdc_positions` of the target database: where a sink stands, and its collections.

A document a sink: its position, and the fence, a number that grows with every writer. A writer with an older number
cannot move the position any more. Beside it a document for each collection that the sink mirrors. All of it is written
with {w: majority, j: true}, kept when a mirrored dropDatabase empties the database, and never captured or verified.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, Final, cast
from uuid import UUID

import msgspec
import structlog
from bson.binary import STANDARD, Binary
from bson.codec_options import CodecOptions
from bson.int64 import Int64
from pymongo.client_session import ClientSession
from pymongo.collection import Collection
from pymongo.errors import OperationFailure
from pymongo.read_concern import ReadConcern
from pymongo.write_concern import WriteConcern

from cdc.change import TableName
from cdc.errors import FatalError, TransientError
from cdc.failpoints import failpoint
from cdc.mongodb.client import Client, translated_errors
from cdc.position import Position

POSITIONS: Final = "cdc_positions"
"""The collection's name. It begins like all names that are cdc's own: they are left out of everything."""

OWN_PREFIX: Final = "cdc_"

FORMAT: Final = 1
"""Of a sink's documents. A later version whose documents would mislead this one puts a higher `format` into the first.
"""

DURABLE: Final = WriteConcern(w="majority", j=True, wtimeout=60_000)
"""A write that a majority does not confirm in a minute is an error that is tried again: status must not look fine."""

log = structlog.get_logger()


class CollectionState(msgspec.Struct, frozen=True, kw_only=True):
    """What a sink knows of a collection that it mirrors, by its name at the source.

    copied_at: the position (or moment) that its copy is complete as of; `None` until it is.
    copied_from: the moment that its copy began after: what happened until then is in it.
    uuid: of the source's collection that was copied.
    renamed_at: the moment of the rename that it has its name by; `None` without one.
    made: whether the sink made the collection, and builds its indexes.
    kept: whether it is to be copied over what is there.
    pending: descriptions of indexes that are yet to be built, as on the source.
    expiring: descriptions of indexes that delete by themselves, as on the source. On the mirror they are built without
        `expireAfterSeconds`, so that they delete nothing; cut-over gives it back by `collMod`.
    """

    table: TableName
    copied_at: bytes | None = None
    copied_from: bytes | None = None
    uuid: bytes = b""
    rows: int = 0
    renamed_at: bytes | None = None
    made: bool = False
    kept: bool = False
    pending: tuple[bytes, ...] = ()
    expiring: tuple[bytes, ...] = ()


class Standing(msgspec.Struct, frozen=True):
    """Where a sink stands, as its newest writer finds it.

    through: where it is behind `position`, the position of a transaction at or before the batch `through_seq`: all up
        to it is applied too, and must not be again (a rename, for one, would replace what it made by what came later).
    """

    position: Position
    through: bytes | None
    through_seq: int


class Positions:
    """One sink's documents."""

    def __init__(self, client: Client, database: str, sink: str) -> None:
        self._client = client
        self._sink = sink
        self._fence = 0
        collection = client.get_database(database).get_collection(
            POSITIONS,
            codec_options=CodecOptions(uuid_representation=STANDARD),
            write_concern=DURABLE,
            read_concern=ReadConcern("majority"),
        )
        self._collection = cast("Collection[dict[str, Any]]", collection)

    def position(self) -> Position | None:
        """Where the sink stands; `None` if it never wrote anything. Raises `FatalError` for a later version's."""
        with translated_errors():
            found = self._collection.find_one({"_id": self._sink})
        return None if found is None else _position(found)

    def begin(self, start: Position) -> None:
        """Store `start`, unless a position is stored."""
        fields = {**_fields(start), "fence": Int64(0)}
        with translated_errors():
            self._collection.update_one({"_id": self._sink}, {"$setOnInsert": fields}, upsert=True)

    def take_over(self, session: UUID) -> Standing | None:
        """Become the only writer: nobody who came before can move the position, and what they still write is ended.

        session: the logical session of all writes that follow. `None` if there is no position.
        """
        self.end_last_writer()
        change = {"$inc": {"fence": Int64(1)}, "$set": {"session": Binary.from_uuid(session, STANDARD)}}
        with translated_errors():
            found = self._collection.find_one_and_update({"_id": self._sink}, change)
        if found is None:
            return None
        self._end_session(found.get("session"))
        self._fence = int(found["fence"]) + 1
        position, seq = _position(found), int(found.get("through_seq", 0))
        return Standing(position, found.get("through") if seq > position.seq else None, seq)

    def end_last_writer(self) -> None:
        """End what a killed writer has left open: a transaction would hold up whatever is written from now on."""
        with translated_errors():
            found = self._collection.find_one({"_id": self._sink}, {"session": 1})
        if found is not None:
            self._end_session(found.get("session"))

    def check(self) -> None:
        """Raise `TransientError` if another writer has taken over. A position is moved by nobody else either."""
        with translated_errors():
            if self._collection.find_one(self._mine, {"_id": 1}) is None:
                raise self._lost()

    def move(self, position: Position, session: ClientSession | None = None, *, passes: bool = True) -> None:
        """Store a position, in the transaction of `session` if it has one. Raises `TransientError` as `check` does.

        passes: it is at or behind what `move_through` was told last (whose batch may be an earlier one than was said).
        """
        through = {"$min": {"through_seq": Int64(position.seq)}} if passes else {}
        failpoint("target.commit.before")
        self._change({"$set": _fields(position), **through}, session)
        failpoint("target.commit.after")

    def move_through(self, through: bytes, seq: int) -> None:
        """Store that everything up to a transaction is applied, that one included; the position stays.

        seq: of a batch at or after the one that holds it. It is kept for good: it counts again where the position is
        set back.
        """
        self._change({"$set": {"through": through, "through_seq": Int64(seq)}}, None)

    def put_back(self, position: Position) -> None:
        """Let the sink stand at a position, wherever it stood. Nobody may be writing."""
        with translated_errors():
            self._collection.update_one({"_id": self._sink}, {"$set": _fields(position)}, upsert=True)

    def end(self) -> None:
        """Forget where the sink stands."""
        with translated_errors():
            self._collection.delete_one({"_id": self._sink})

    # collections

    def collections(self) -> dict[TableName, CollectionState]:
        """The collections of this sink, by their names at the source."""
        with translated_errors():
            found = list(self._collection.find({"sink": self._sink}))
        states = (msgspec.convert(each, CollectionState, strict=False) for each in found)
        return {state.table: state for state in states}

    def put(self, states: Iterable[CollectionState]) -> None:
        """Store what is known of collections, in place of what was."""
        with translated_errors():
            for state in states:
                document = {"sink": self._sink, **msgspec.structs.asdict(state), "table": list(state.table)}
                self._collection.replace_one({"_id": self._id(state.table)}, document, upsert=True)

    def remove(self, tables: Iterable[TableName]) -> None:
        """Forget collections."""
        with translated_errors():
            self._collection.delete_many({"_id": {"$in": [self._id(table) for table in tables]}})

    def _id(self, table: TableName) -> dict[str, str]:
        return {"sink": self._sink, "database": table.schema, "collection": table.name}

    @property
    def _mine(self) -> dict[str, Any]:
        return {"_id": self._sink, "fence": Int64(self._fence)}

    def _change(self, change: Mapping[str, Any], session: ClientSession | None) -> None:
        collection = self._collection
        if session is not None and session.in_transaction:
            collection = collection.with_options(write_concern=WriteConcern(), read_concern=ReadConcern())
        with translated_errors():
            if not collection.update_one(self._mine, change, session=session).matched_count:
                raise self._lost()

    def _lost(self) -> TransientError:
        return TransientError(f"sink {self._sink}: the position is gone, or someone else writes to this target")

    def _end_session(self, session: UUID | None) -> None:
        """What an earlier writer sent may still be executed: end it, or it could undo what is written from now on."""
        if session is None:
            return
        with translated_errors():
            try:
                self._client.admin.command({"killSessions": [{"id": Binary.from_uuid(session, STANDARD)}]})
            except OperationFailure as exc:
                log.warning("cannot end what an earlier writer left", sink=self._sink, code=exc.code)


def _fields(position: Position) -> dict[str, Any]:
    assert isinstance(position.source, bytes)
    return {
        "queue_id": position.queue_id,
        "seq": Int64(position.seq),
        "token": position.source,
        "updated_at": datetime.now(UTC),
    }


def _position(found: Mapping[str, Any]) -> Position:
    if (written := found.get("format", FORMAT)) != FORMAT:
        raise FatalError(
            f"{POSITIONS} of the target has format {written}, this version of cdc knows format {FORMAT}",
            hint="run the version of cdc that wrote it",
        )
    return Position(found["queue_id"], int(found["seq"]), bytes(found["token"]))
