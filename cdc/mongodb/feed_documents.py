"""The collections of a feed in MongoDB: created once, and how records become documents."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import bson
import msgspec
from bson.codec_options import CodecOptions, DatetimeConversion
from bson.datetime_ms import DatetimeMS
from bson.errors import BSONError
from bson.int64 import Int64
from bson.raw_bson import RawBSONDocument
from pymongo import ASCENDING, IndexModel
from pymongo.collection import Collection
from pymongo.database import Database
from pymongo.errors import CollectionInvalid, OperationFailure

from cdc.errors import FatalError
from cdc.feed.place import Place
from cdc.feed.record import Json, Record
from cdc.feed.tables import COLUMNS, FORMAT, Codec, Tables, check_format, not_ours
from cdc.mongodb.client import Client, connect, translated_errors
from cdc.mongodb.error_codes import REPLICA_SET_HINT
from cdc.mongodb.positions import DURABLE
from cdc.mongodb.url import database_name

DEFAULT_DATABASE: Final = "cdc"
"""Where a feed is kept whose URL names no database."""

STATE: Final = "feed"
"""The `_id` of the one document of the state collection."""

Document = dict[str, Any]

_NAMESPACE_EXISTS: Final = 48
_EXACT: Final = "json"
_JSON: Final = ("before", "after", "delta", "scope_before", "scope_after")
_MAX_DEPTH: Final = 90
"""Servers take 100."""

_MAX_EMBEDDED_BYTES: Final = 2 * 1024**2
"""Small numbers take six times the room as BSON. Servers take 16 MiB, and up to 8 there may be as text beside it."""

_INDEXES: Final = (
    IndexModel([("source", ASCENDING), ("position", ASCENDING)], name="source", unique=True),
    IndexModel([("entity_type", ASCENDING), ("entity_id", ASCENDING), ("_id", ASCENDING)], name="history"),
    IndexModel([("entity_type", ASCENDING), ("_id", ASCENDING)], name="types"),
    IndexModel([("recorded_at", ASCENDING), ("_id", ASCENDING)], name="recorded"),
)

_OPTIONS: Final[CodecOptions[Document]] = CodecOptions(datetime_conversion=DatetimeConversion.DATETIME_MS)

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)

_decode_json: Final = msgspec.json.Decoder().decode
_encode_json: Final = msgspec.json.Encoder(enc_hook=int).encode  # Int64 is not quite an int


class Collections:
    """A feed's collections, and the client that they belong to."""

    def __init__(self, place: Place, tables: Tables, **options: Any) -> None:
        assert place.url is not None
        url = place.url.reveal()
        self.client: Client = connect(url, application_name="cdc feed", **options)
        self.tables = tables
        self._database: Database[Document] = self.client.get_database(  # type: ignore[assignment]
            database_name(url) or DEFAULT_DATABASE, codec_options=_OPTIONS, write_concern=DURABLE
        )
        self.main = self._database[tables.main]
        self.entities = self._database[tables.entities]
        self.positions = self._database[tables.positions]
        self.pruned = self._database[tables.pruned]
        self.state = self._database[tables.state]

    def create(self) -> None:
        """Create what is missing.

        Raises `FatalError` for what no feed has made, or one of another version, and for a server without transactions.
        """
        with translated_errors():
            self.check_server()
            if not self.is_there():
                self._claim()
            for collection in (self.main, self.entities, self.positions, self.pruned):
                self._create(collection)
            self.main.create_indexes(list(_INDEXES))

    def check_server(self) -> None:
        """Raise `FatalError` for a server without transactions."""
        hello = self.client.admin.command("hello")
        if hello.get("setName") is None and hello.get("msg") != "isdbgrid":
            raise FatalError("a standalone server cannot hold a feed: no transactions", hint=REPLICA_SET_HINT)

    def is_there(self) -> bool:
        """Whether the feed is there. Raises `FatalError` for another version's."""
        state = self.state.find_one({"_id": STATE})
        if state is not None:
            check_format(state.get("format"), self.main.full_name)
        return state is not None

    def _claim(self) -> None:
        """Write the state first: who is killed behind this finds it, and creates the rest."""
        for collection in (self.main, self.entities, self.positions, self.pruned, self.state):
            if collection.find_one({}, {"_id": 1}) is not None and not self.is_there():
                raise not_ours(f"collection {collection.full_name}")
        first = {"format": FORMAT, "last_id": Int64(0), "recorded_at": DatetimeMS(0), "turns": Int64(0)}
        self.state.update_one({"_id": STATE}, {"$setOnInsert": first}, upsert=True)

    def _create(self, collection: Collection[Document]) -> None:
        """Servers before 4.4 create no collection within a transaction."""
        try:
            self._database.create_collection(collection.name, check_exists=False)
        except CollectionInvalid:
            return
        except OperationFailure as exc:
            if exc.code != _NAMESPACE_EXISTS:
                raise


def document_of(record: Record) -> Document:
    """A record as a document.

    JSON objects become embedded documents, so that they can be queried. Where such a one is not exactly the same as the
    JSON (1.10 is 1.1 then), or impossible, the JSON is there too, as text.
    """
    values = dict(zip(COLUMNS, _CODEC.row(record), strict=True))
    document: Document = {"_id": Int64(values.pop("id")), **values}
    exact = {}
    for name in _JSON:
        if (text := values[name]) is not None:
            document[name], same = _embedded(text)
            if not same:
                exact[name] = text.decode()
    if exact:
        document[_EXACT] = exact
    if rest := record.changed_at % 1000:
        document["changed_at_micros"] = rest  # a date has milliseconds only
    return document


def number(document: Document, id_: int, recorded_at: int) -> None:
    """Set what a record is given when it is stored."""
    document["_id"], document["recorded_at"] = Int64(id_), date(recorded_at)


def record_of(document: Mapping[str, Any]) -> Record:
    """The record of a document."""
    exact = document.get(_EXACT, {})
    values = {name: document.get(name) for name in COLUMNS} | {"id": int(document["_id"])}
    for name in _JSON:
        if name in exact:
            values[name] = exact[name].encode()
        elif values[name] is not None:
            values[name] = _encode_json(values[name])
    record = _CODEC.record(values.values())
    rest = document.get("changed_at_micros", 0)
    return msgspec.structs.replace(record, changed_at=record.changed_at + rest) if rest else record


def date(microseconds: int) -> DatetimeMS:
    """A time as a date, which has milliseconds only: the next one."""
    return DatetimeMS(-(-microseconds // 1000))


def microseconds(moment: DatetimeMS | datetime) -> int:
    """What a date says."""
    if isinstance(moment, datetime):
        return (moment.replace(tzinfo=UTC) - _EPOCH) // timedelta(milliseconds=1) * 1000
    return int(moment) * 1000


def _embedded(text: Json) -> tuple[RawBSONDocument | None, bool]:
    """A JSON object as a document, `None` where that cannot be; and whether the JSON can be made of it again."""
    if b'"$' in text or text.count(b"{") + text.count(b"[") > _MAX_DEPTH:  # older servers refuse such names
        return None, False
    try:
        value = _decode_json(text)
        document = RawBSONDocument(bson.encode(value))
    except (msgspec.DecodeError, BSONError, TypeError, OverflowError, ValueError):
        return None, False
    if len(document.raw) > _MAX_EMBEDDED_BYTES:
        return None, False
    return document, _encode_json(value) == text


_CODEC: Final = Codec(
    kept={
        "changed_at": lambda time: DatetimeMS(time // 1000),
        "recorded_at": lambda time: DatetimeMS(time // 1000),
        "change_type": str,
        "changed": list,
        "version": Int64,
    },
    read={"changed_at": microseconds, "recorded_at": microseconds, "changed": tuple, "version": int},
)
