"""A seeded workload that does to a database all that users do, and a comparison of its mirror that trusts nobody."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import bson
import pymongo
from bson import Int64
from bson.codec_options import CodecOptions
from bson.decimal128 import Decimal128
from bson.raw_bson import RawBSONDocument
from bson.timestamp import Timestamp
from pymongo.client_session import ClientSession
from pymongo.errors import OperationFailure, PyMongoError

from cdc.mongodb.collections import portable_index, portable_options

RAW: CodecOptions[RawBSONDocument] = CodecOptions(document_class=RawBSONDocument)

NAMES = ("orders", "items", "people", "x_out", "x_other")
"""Of collections. Those that begin with `x_` are not to be captured."""

KEYS = ("a", "b", "c", "list", "tree", "u", "0", "7")
NUMBERS: tuple[Callable[[int], Any], ...] = (int, Int64, float, lambda number: Decimal128(str(number)))

Client = pymongo.MongoClient[dict[str, Any]]


class Workload:
    """Random commands against one database. Whatever the server refuses is passed over."""

    def __init__(
        self,
        client: Client,
        database: str,
        seed: int,
        *,
        ddl: bool = True,
        moves: bool = True,
        drops_database: bool = True,
        thins_capped: bool = True,
    ) -> None:
        """moves: also what puts a field that was there to the end, of which no delta tells.

        thins_capped: also deletes and replaces in capped collections, which ends otherwise where it is applied twice.
        """
        self._client = client
        self._database = client[database]
        self._chance = random.Random(seed)
        self._moves = moves
        self._thins_capped = thins_capped
        self._operations: list[tuple[Callable[[], object], float]] = [
            (self._insert, 12), (self._replace, 6), (self._update, 30), (self._pipeline, 4), (self._delete, 6),
            (self._transaction, 4), (self._swap, 4),
        ]  # fmt: skip
        if ddl:
            self._operations += [
                (self._rename, 2), (self._drop, 1), (self._create, 2), (self._index, 2), (self._drop_index, 1),
                (self._modify, 1), (self._drop_database, 0.3 if drops_database else 0),
            ]  # fmt: skip

    def run(self, count: int) -> None:
        """Do so much."""
        doings, weights = zip(*self._operations, strict=True)
        for doing in self._chance.choices(doings, weights, k=count):
            try:
                doing()
            except PyMongoError:
                continue

    # values

    def _id(self) -> Any:
        number = self._chance.randrange(12)
        kind = self._chance.randrange(8)
        if kind < 6:
            return self._chance.choice(NUMBERS)(number)
        return {"n": self._chance.choice(NUMBERS)(number % 3)} if kind == 6 else "abc"[number % 3]

    def _value(self, depth: int = 0) -> Any:
        kind = self._chance.randrange(7 if depth < 3 else 4)
        if kind < 3:
            return self._chance.choice((None, True, "text", "\0", 0.0, -0.0, Timestamp(0, 0), 1, Int64(1), 1.0))
        if kind == 3:
            return self._chance.choice(NUMBERS)(self._chance.randrange(100))
        if kind == 4:
            return [self._value(depth + 1) for _ in range(self._chance.randrange(6))]
        return {self._chance.choice(KEYS): self._value(depth + 1) for _ in range(self._chance.randrange(4))}

    def _document(self) -> dict[str, Any]:
        document: dict[str, Any] = {"_id": self._id()}
        for _ in range(self._chance.randrange(5)):
            document[self._chance.choice((*KEYS, "x.y", "a.b"))] = self._value()
        document["u"] = self._chance.randrange(10**9)
        return document

    def _path(self) -> str:
        return ".".join(
            self._chance.choice((*KEYS, "list", "tree", "list")) for _ in range(self._chance.choice((1, 1, 2, 3)))
        )

    def _collection(self) -> Any:
        return self._database[self._chance.choice(NAMES)]

    def _thinned(self) -> Any:
        """One that documents may be taken from, or one that nobody captures."""
        collection = self._collection()
        kept = not self._thins_capped and collection.options().get("capped")
        return self._database.x_out if kept else collection

    # documents

    def _insert(self, session: ClientSession | None = None) -> None:
        document = self._document()
        if self._chance.random() < 0.1:  # a name twice, as drivers do not write it
            raw = bson.encode(document)
            self._collection().insert_one(RawBSONDocument(_doubled(raw)), session=session)
        else:
            self._collection().insert_one(document, session=session)

    def _replace(self, session: ClientSession | None = None) -> None:
        document = self._document()
        upsert = self._chance.random() < 0.3
        del document["_id"]
        self._thinned().replace_one({"_id": self._id()}, document, upsert=upsert, session=session)

    def _update(self, session: ClientSession | None = None) -> None:
        pick = self._chance.choice
        selector: dict[str, Any] = {"_id": self._id()}
        update: dict[str, dict[str, Any]] = {}
        for _ in range(pick((1, 1, 2, 3))):
            operator = pick(("$set", "$set", "$unset", "$inc", "$push", "$push", "$pop", "$pull", "$rename", "$mul",
                             "$min", "$addToSet", "$slice"))  # fmt: skip
            path = self._path()
            argument: Any = self._value()
            if operator == "$slice":
                operator, argument = (
                    "$push",
                    {"$each": [self._value()] * pick((0, 1, 3)), "$slice": pick((1, 2, -2, 0))},
                )
            elif operator in {"$inc", "$mul"}:
                argument = pick(NUMBERS)(pick((1, 2, 3)))
            elif operator == "$pop":
                argument = pick((1, -1))
            elif operator == "$rename":
                argument = self._path() if self._moves else "renamed"
                if not self._moves:  # a name that is there would go to the end, and so would one set before it
                    selector["renamed"] = {"$exists": False}
                    update = {operator: {path: argument}}
                    break
            update.setdefault(operator, {})[path] = argument
        upsert = self._chance.random() < 0.1
        self._collection().update_one(selector, update, upsert=upsert, session=session)

    def _pipeline(self, session: ClientSession | None = None) -> None:
        # a document in the place of another moves the fields that both have, and no delta tells of that either
        value = self._value() if self._moves else self._chance.choice(NUMBERS)(self._chance.randrange(100))
        stages = [
            {"$set": {self._chance.choice(KEYS): {"$literal": value}}},
            {"$unset": self._chance.choice(KEYS)},
            {"$replaceWith": {"$literal": {key: value for key, value in self._document().items() if key != "_id"}}},
        ]
        chosen = self._chance.sample(stages, 2) if self._moves else [self._chance.choice(stages[:2])]
        self._collection().update_one({"_id": self._id()}, chosen, session=session)

    def _delete(self, session: ClientSession | None = None) -> None:
        self._thinned().delete_one({"_id": self._id()}, session=session)

    def _swap(self, session: ClientSession | None = None) -> None:
        """Two documents exchange a value that a unique index may be on."""
        collection = self._collection()
        found = list(collection.find({"u": {"$type": "int"}}, limit=2, session=session))
        if len(found) < 2:
            return
        one, other = found
        for document, value in ((one, -1), (other, one["u"]), (one, other["u"])):
            collection.update_one({"_id": document["_id"]}, {"$set": {"u": value}}, session=session)

    def _transaction(self) -> None:
        doings = (self._insert, self._replace, self._update, self._delete, self._update)
        size = self._chance.choice((2, 5, 5, 20))
        with self._client.start_session() as session, session.start_transaction():
            for _ in range(size):
                self._chance.choice(doings)(session)
            if self._chance.random() < 0.2:
                session.abort_transaction()

    # collections

    def _rename(self) -> None:
        self._collection().rename(self._chance.choice(NAMES), dropTarget=self._chance.random() < 0.7)

    def _drop(self) -> None:
        self._collection().drop()

    def _drop_database(self) -> None:
        self._client.drop_database(self._database.name)

    def _create(self) -> None:
        options: dict[str, Any] = self._chance.choice((
            {}, {"validator": {"u": {"$exists": True}}, "validationLevel": "moderate"},
            {"collation": {"locale": "en", "strength": 2}},
            {"capped": True, "size": 10**6, "max": 10},
        ))  # fmt: skip
        name = self._chance.choice(NAMES)
        if self._chance.random() < 0.5:
            self._database.drop_collection(name)
        self._database.create_collection(name, **options)

    def _index(self) -> None:
        field, unique = self._chance.choice((("a", False), ("b", False), ("u", True)))
        options: dict[str, Any] = {"expireAfterSeconds": 10**6} if self._chance.random() < 0.3 else {}
        self._collection().create_index(field, unique=unique, **options)

    def _drop_index(self) -> None:
        self._collection().drop_index(self._chance.choice(("a_1", "b_1", "u_1")))

    def _modify(self) -> None:
        name = self._chance.choice(NAMES)
        self._database.command("collMod", name, validator={"c": {"$exists": self._chance.random() < 0.5}})


def _doubled(document: bytes) -> bytes:
    body = document[4:-1] + b"".join(bson.encode({"twice": number})[4:-1] for number in (1, 2))
    return (len(body) + 5).to_bytes(4, "little") + body + b"\0"


def differences(source: Any, target: Any) -> list[str]:
    """How a mirror differs from what of its source is captured: collections, options, indexes, bytes."""
    found = []
    left, right = _collections(source), _collections(target)
    for name in sorted(left.keys() | right.keys()):
        if name not in left or name not in right:
            found.append(f"{name}: only {'at the source' if name in left else 'on the mirror'}")
            continue
        for what, one, other in zip(("options", "indexes"), left[name], right[name], strict=True):
            if one != other:
                found.append(f"{name}: {what} {one} {other}")
        ours, theirs = _documents(source, name), _documents(target, name)
        pairs = ((ours.get(one), theirs.get(one)) for one in sorted(ours.keys() | theirs.keys()))
        found += [f"{name}: {_shown(one)} {_shown(other)}" for one, other in pairs if one != other]
    return found


def _shown(document: bytes | None) -> str:
    return "-" if document is None else str(bson.decode(document))


def _collections(database: Any) -> dict[str, tuple[Any, Any]]:
    found = {}
    for raw in database.command("listCollections", codec_options=RAW)["cursor"]["firstBatch"]:
        name = raw["name"]
        if name.startswith(("x_", "cdc_", "system.")):
            continue
        options = sorted(portable_options(bytes(raw["options"].raw)))
        try:
            reply = database.command("listIndexes", name, codec_options=RAW)
        except OperationFailure:  # dropped since
            continue
        indexes = {
            each["name"]: sorted(bson.decode(portable_index(bytes(each.raw))).items(), key=str)
            for each in reply["cursor"]["firstBatch"]
        }
        found[name] = (options, indexes)
    return found


def _documents(database: Any, name: str) -> dict[bytes, bytes]:
    found = database.get_collection(name, codec_options=RAW).find({})
    return {bson.encode({"_id": document["_id"]}): bytes(document.raw) for document in found}
