"""Finding a collection again that may have another name by now, and reading a document of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from bson.raw_bson import RawBSONDocument

from cdc.change import Ddl, Image, Table, TableName
from cdc.errors import FatalError, TransientError
from cdc.mongodb import walk
from cdc.mongodb.client import RAW, Client, translated_errors
from cdc.mongodb.collections import read_collections, read_indexes
from cdc.sink import TableGone

_ATTEMPTS: Final = 10


def located(client: Client, name: TableName, uuid: bytes) -> TableName | None:
    """What a collection that was called `name` is called now; `None` if it is gone. Its own name if `uuid` is empty."""
    if not uuid:
        return name
    found = read_collections(client, databases=[name.schema], wanted=lambda _: True)
    return next((each.name for each in found if each.uuid == uuid), None)


def read_again(client: Client, table: Table, image: Image) -> Image | None:
    """Read one document as it is now, by the `_id` in `image`; `None` if it is gone.

    Where `table.identity` tells the collection's UUID, it is looked for under whatever name it has now; what has its
    old name may be another one. Raises `TableGone` if there is none: dropped, or in another database.
    """
    found = walk.find(image, b"_id")
    if found is None:
        raise FatalError("a document cannot be read again without its _id")
    equal = walk.document(walk.element(found.kind, b"$eq", image[found.start : found.end]))
    by_id = RawBSONDocument(walk.document(walk.element(walk.DOCUMENT, b"_id", equal)))
    uuid = bytes.fromhex(table.identity)
    for _ in range(_ATTEMPTS):
        name = located(client, table.qualified, uuid)
        if name is None:
            raise TableGone(f"{table.qualified} is gone at the source", hint="nothing: that it is will be here")
        with translated_errors():
            document = client[name.schema].get_collection(name.name, codec_options=RAW).find_one(by_id)
        if not uuid or located(client, table.qualified, uuid) == name:
            return None if document is None else bytes(document.raw)
    raise TransientError(f"{table.qualified} changes its name as fast as it is looked for")


def made_as(client: Client, name: TableName, uuid: bytes) -> list[Ddl]:
    """What made a collection as it is, options and indexes, as its events would tell; nothing if it is gone."""
    place = located(client, name, uuid)
    made = []
    for found in read_collections(client, databases=[name.schema], wanted=lambda other: other == place):
        made.append(Ddl("create", _event(found.uuid, found.options)))
        if specs := [index.spec for index in read_indexes(client, found.name)]:
            items = (walk.element(walk.DOCUMENT, b"%d" % number, spec) for number, spec in enumerate(specs))
            indexes = walk.element(walk.ARRAY, b"indexes", walk.joined(items))
            made.append(Ddl("createIndexes", _event(found.uuid, walk.document(indexes))))
    return made


def _event(uuid: bytes, description: bytes) -> bytes:
    binary = walk.int32(len(uuid)) + b"\x04" + uuid
    return walk.document(
        walk.element(walk.BINARY, b"collectionUUID", binary),
        walk.element(walk.DOCUMENT, b"operationDescription", description),
    )


def read_all(client: Client, name: TableName, uuid: bytes) -> Iterator[bytes]:
    """Yield all documents of a collection; from the beginning again if it gets another name meanwhile."""
    while (place := located(client, name, uuid)) is not None:
        with (
            translated_errors(),
            client[place.schema].get_collection(place.name, codec_options=RAW).find() as found,
        ):
            for document in found:
                yield bytes(document.raw)
        if not uuid or located(client, name, uuid) == place:
            return
