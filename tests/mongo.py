"""Documents of every kind, and two databases to mirror between."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import bson
from bson import Int64
from bson.binary import Binary
from bson.code import Code
from bson.datetime_ms import DatetimeMS
from bson.decimal128 import Decimal128
from bson.max_key import MaxKey
from bson.min_key import MinKey
from bson.objectid import ObjectId
from bson.raw_bson import RawBSONDocument
from bson.regex import Regex
from bson.timestamp import Timestamp

from cdc.change import TableName
from cdc.config import SinkConfig
from cdc.mongodb import walk
from cdc.mongodb.client import RAW, connect
from cdc.mongodb.collections import Catalog, read_catalog
from cdc.mongodb.snapshot import MongoSnapshot, estimate_size
from cdc.secret import Secret
from cdc.source import Estimate
from tests.mongod.fixture import MongoDatabase

VALUES: tuple[Any, ...] = (
    1.5, float("inf"), -0.0, "text", "", "\0", {"a": 1, "b": [1, {"c": None}]}, {}, [], [1, [2]], Binary(b"x", 0),
    Binary(b"y" * 16, 4), Binary(b"z", 128), ObjectId("0123456789abcdef01234567"), True, False,
    dt.datetime(2024, 2, 29, 1, 2, 3, 4000, tzinfo=dt.UTC), DatetimeMS(-(2**62)), DatetimeMS(2**62), None,
    Regex("^a", "i"), Code("f()"), Code("f()", {"x": 1}), 7, 2**31 - 1, Timestamp(5, 6), Int64(1), Int64(2**63 - 1),
    Decimal128("1.10"), Decimal128("NaN"), Decimal128("-Infinity"), MinKey(), MaxKey(),
)  # fmt: skip
"""One or more of each type."""

IDS: tuple[Any, ...] = (
    MinKey(), None, float("nan"), float("-inf"), -1, 0, 1.5, 2, Int64(2**40), Decimal128("1E+6000"), "", "a", "b",
    {"a": 1}, {"a": 1, "b": 2}, {}, Binary(b"", 0), Binary(b"x", 4 + 124), ObjectId("0123456789abcdef01234567"),
    False, True, DatetimeMS(-(2**62)), dt.datetime(2024, 1, 1, tzinfo=dt.UTC), Timestamp(1, 2), Code("f()"), MaxKey(),
)  # fmt: skip
"""`_id`s of every type that may be one, in the server's order but for code (stand-ins may differ there)."""


def _odd(name: str, *parts: tuple[int, bytes]) -> bytes:
    fields = [walk.element(kind, b"a", value) for kind, value in parts]
    return walk.document(walk.element(walk.STRING, b"_id", walk.string(name)), *fields)


ODD: tuple[bytes, ...] = (
    _odd("duplicate names", (walk.INT32, walk.int32(1)), (walk.INT32, walk.int32(2))),
    _odd("not UTF-8", (walk.STRING, walk.int32(3) + b"\xff\xfe\0")),
    _odd("symbol", (walk.SYMBOL, walk.string("s"))),
    _odd("undefined", (walk.UNDEFINED, b"")),
    _odd("DBPointer", (walk.DB_POINTER, walk.string("db.c") + b"123456789012")),
)
"""What drivers no longer write, and servers still keep."""


def corpus() -> list[bytes]:
    """Documents with every type as value and as `_id`."""
    values = [bson.encode({"_id": f"value {number}", "z": 1, "v": value}) for number, value in enumerate(VALUES)]
    return [*values, *(bson.encode({"_id": one, "n": number}) for number, one in enumerate(IDS)), *ODD]


def insert_raw(database: MongoDatabase, name: str, documents: Iterable[bytes]) -> None:
    """Insert documents as they are."""
    command = {"insert": name, "documents": [RawBSONDocument(document, RAW) for document in documents]}
    reply = database.command(command)
    assert not reply.get("writeErrors"), reply["writeErrors"]


def raw_documents(database: MongoDatabase, name: str) -> list[bytes]:
    """All documents of a collection as bytes, in the order of `_id`."""
    found: Any = database.get_collection(name, codec_options=cast("Any", RAW)).find(hint=[("_id", 1)]).sort("_id", 1)
    return [bytes(document.raw) for document in found]


def at(url: str, database: str, *more: str) -> str:
    """The URL with a database in its path, and more options."""
    before, _, options = url.partition("?")
    return f"{before.rstrip('/')}/{database}?{'&'.join(filter(None, (options, *more)))}"


def sink_config(url: str, source: MongoDatabase, target: MongoDatabase, **options: Any) -> SinkConfig:
    """A sink that mirrors one database in another."""
    return SinkConfig(
        name="mirror", source="shop", url=Secret(at(url, target.name)), rename={source.name: target.name}, **options
    )


class CollectionSource:
    """The copying half of a source: all collections of a database, or some."""

    def __init__(self, url: str, database: MongoDatabase, names: Sequence[str] = ()) -> None:
        self.url = url
        self._database = database
        self._names = names

    def tables(self) -> Sequence[TableName]:
        found = self._names or [
            name for name in sorted(self._database.list_collection_names()) if name[:7] != "system."
        ]
        return [TableName(self._database.name, name) for name in found]

    def estimates(self) -> Mapping[TableName, Estimate]:
        with connect(self.url) as client:
            return {table: estimate_size(client, table) for table in self.tables()}

    def dump_schema(self) -> Catalog:
        with connect(self.url) as client:
            return read_catalog(client, self.tables())

    def sequences(self) -> None:
        return None

    def snapshot(self) -> MongoSnapshot:
        return MongoSnapshot(self.url, self.tables())
