"""Collections as a server describes them: options and indexes, read at the source and made on the target.

Descriptions stay the server's own BSON, but for what a mirror must not have: indexes that delete by themselves (the
source's deletes come by the stream; a mirror with a clock of its own would be ahead), and the version of a collation's
rules, which is the server's business.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, Final

import bson
import msgspec
import structlog
from bson.raw_bson import RawBSONDocument
from pymongo.errors import OperationFailure

from cdc.change import TableName
from cdc.errors import FatalError, TransientError
from cdc.mongodb import walk
from cdc.mongodb.client import RAW, Client, translated_errors

log = structlog.get_logger()

SYSTEM_DATABASES: Final = frozenset({"admin", "config", "local"})

NAMESPACE_NOT_FOUND: Final = 26
NAMESPACE_EXISTS: Final = 48
_DUPLICATE_KEY: Final = 11000

_COPIED_OPTIONS: Final = frozenset(
    (b"capped", b"size", b"max", b"validator", b"validationLevel", b"validationAction", b"collation",
     b"clusteredIndex", b"changeStreamPreAndPostImages", b"storageEngine", b"indexOptionDefaults", b"encryptedFields")
)  # fmt: skip
"""Not among them: `expireAfterSeconds` of a clustered collection, which deletes; and what is the server's own."""

_IGNORED_INDEX_FIELDS: Final = frozenset((b"v", b"ns", b"background", b"safe", b"expireAfterSeconds", b"prepareUnique"))

_SIMPLE: Final = bson.encode({"collation": {"locale": "simple"}})[4:-1]


class Index(msgspec.Struct, frozen=True):
    """A secondary index. `spec` is its description in `listIndexes`."""

    name: str
    spec: bytes
    unique: bool
    expires: bool


class CollectionInfo(msgspec.Struct, frozen=True):
    """A collection and how it was made. `options` is from `listCollections`, `kind` its `type` there.

    uuid: what it is known by inside the server: another collection of the same name has another one. Empty for a view.
    indexes: without that on `_id`.
    """

    name: TableName
    kind: str
    options: bytes
    uuid: bytes = b""
    indexes: tuple[Index, ...] = ()

    @property
    def capped(self) -> bool:
        """Whether documents leave in the order in which they came."""
        return _is_true(self.options, b"capped")

    @property
    def expires_after_seconds(self) -> int | float | None:
        """Of a clustered collection: when its documents leave by themselves."""
        value = bson.decode(self.options).get("expireAfterSeconds")
        return value if isinstance(value, (int, float)) else None

    @property
    def has_collation(self) -> bool:
        """Whether strings are compared by other rules than byte by byte."""
        return walk.find(self.options, b"collation") is not None


class Catalog(msgspec.Struct, frozen=True):
    """What `Source.dump_schema` of MongoDB returns.

    deployment: what `deployment_id` says of the source.
    """

    deployment: str
    collections: tuple[CollectionInfo, ...]


def deployment_id(client: Client) -> str:
    """What two connections have in common exactly if they lead to one deployment: its set's name and its members.

    Through a router all that is known are the routers, so there it is their address.
    """
    with translated_errors():
        hello = client.admin.command("hello")
    members = sorted(map(str, hello.get("hosts", ()))) or [f"{host}:{port}" for host, port in sorted(client.nodes)]
    return f"{hello.get('setName', '')}/{','.join(members)}"


def read_collections(
    client: Client, *, databases: Collection[str] | None, wanted: Callable[[TableName], bool]
) -> list[CollectionInfo]:
    """All that a configuration wants of these databases (`None`: of all), views and time series too, by name.

    Without the server's own collections. Indexes are not read.
    """
    with translated_errors():
        names = sorted(databases if databases is not None else client.list_database_names())
        return [
            found
            for name in names
            if name not in SYSTEM_DATABASES
            for found in sorted(_list(client, name), key=lambda found: found.name)
            if not found.name.name.startswith("system.") and wanted(found.name)
        ]


def read_catalog(client: Client, tables: Iterable[TableName]) -> Catalog:
    """Describe collections, indexes included. Raises `TransientError` if one has gone, `FatalError` for no collection.

    (What has gone may be back, or no longer be asked for, when the caller tries again.)
    """
    wanted = set(tables)
    found = read_collections(client, databases={table.schema for table in wanted}, wanted=lambda table: table in wanted)
    if gone := wanted - {collection.name for collection in found}:
        raise TransientError(f"no longer at the source: {', '.join(map(str, sorted(gone)))}")
    refused = [f"{each.name} is a {_KINDS.get(each.kind, each.kind)}" for each in found if each.kind != "collection"]
    if refused:
        raise FatalError(
            f"{'; '.join(refused)}: change streams do not carry that", hint="leave it out: `tables.exclude`"
        )
    with_indexes = (msgspec.structs.replace(each, indexes=read_indexes(client, each.name)) for each in found)
    return Catalog(deployment_id(client), tuple(with_indexes))


def mirrored(collections: Iterable[CollectionInfo]) -> list[CollectionInfo]:
    """Leave out what has no change events, and say so of each."""
    kept = []
    for each in collections:
        if each.kind == "collection":
            kept.append(each)
        else:
            kind = _KINDS.get(each.kind, each.kind)
            log.warning("not mirrored: change streams do not carry it", collection=str(each.name), kind=kind)
    return kept


def read_indexes(client: Client, table: TableName) -> tuple[Index, ...]:
    """The secondary indexes; none where there is no collection."""
    with translated_errors():
        specs = list(_cursor(client, table.schema, {"listIndexes": table.name}))
    return tuple(as_index(spec) for spec in specs if not _is_on_id(spec))


def create_collection(client: Client, name: TableName, like: CollectionInfo) -> None:
    """Make an empty collection with the options of another. Raises what the server says, `PermanentError` mostly."""
    with translated_errors():
        client[name.schema].command(create_command(name, like.options))


def create_command(name: TableName, options: bytes) -> dict[str, Any]:
    """The `create` command for a mirror of a collection with these options."""
    command: dict[str, Any] = {"create": name.name}
    for part in portable_options(options):
        document = RawBSONDocument(walk.document(part))
        command.update(document.items())
    return command


def portable_options(options: bytes) -> Iterator[bytes]:
    """The options that a mirror has too, each an element; from `listCollections`, or from an event."""
    for element in walk.elements(options):
        if element.name == b"collation" and element.kind == walk.DOCUMENT:
            collation = _without(options[element.start : element.end], frozenset((b"version",)))
            yield walk.element(walk.DOCUMENT, b"collation", collation)
        elif element.name in _COPIED_OPTIONS:
            yield options[element.at : element.end]


def portable_index(spec: bytes) -> bytes:
    """An index's description for a mirror: it deletes nothing, and inherits no collation."""
    parts = []
    for element in walk.elements(spec):
        if element.name == b"collation" and element.kind == walk.DOCUMENT:
            collation = _without(spec[element.start : element.end], frozenset((b"version",)))
            parts.append(walk.element(walk.DOCUMENT, b"collation", collation))
        elif element.name not in _IGNORED_INDEX_FIELDS:
            parts.append(spec[element.at : element.end])
    if walk.find(spec, b"collation") is None:
        parts.append(_SIMPLE)
    return walk.joined(parts)


def create_indexes(client: Client, name: TableName, indexes: Sequence[Index]) -> bool:
    """Build indexes as a mirror has them. What is there already is left alone, so that it may be repeated.

    False, and none of them is built, where documents do not fit a unique one.
    """
    if not indexes:
        return True
    command = {
        "createIndexes": name.name,
        "indexes": [RawBSONDocument(portable_index(index.spec)) for index in indexes],
    }
    with translated_errors():
        try:
            client[name.schema].command(command)
        except OperationFailure as exc:
            if exc.code != _DUPLICATE_KEY:
                raise
            return False
    return True


def drop_index(client: Client, name: TableName, index: str) -> None:
    """Drop an index."""
    with translated_errors():
        client[name.schema].command({"dropIndexes": name.name, "index": index})


def differences(source: CollectionInfo, target: CollectionInfo) -> Iterator[str]:
    """How the mirror's collection is made in another way than a mirror is, a line each."""
    left, right = (_comparable(portable_options(each.options)) for each in (source, target))
    for option in sorted(left.keys() | right.keys()):
        if left.get(option) != right.get(option):
            yield f"option {option} is {_shown(left.get(option))}, on the mirror {_shown(right.get(option))}"
    wanted, found = ({index.name: index for index in each.indexes} for each in (source, target))
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found:
            yield f"index {name} is missing on the mirror"
        elif name not in wanted:
            yield f"index {name} is not at the source"
        elif not is_same_index(wanted[name], found[name]):
            yield f"index {name} differs"
    yield from (f"index {index.name} would delete on the mirror" for index in target.indexes if index.expires)


def is_same_index(source: Index, target: Index) -> bool:
    """Whether an index is what a mirror has of the source's."""
    return _index_parts(source) == _index_parts(target)


def _list(client: Client, database: str) -> Iterator[CollectionInfo]:
    for found in _cursor(client, database, {"listCollections": 1, "authorizedCollections": True}):
        fields = walk.fields(found)
        options = walk.get_document(found, b"options") or walk.EMPTY
        name, kind = (_string(found, fields.get(key)) for key in (b"name", b"type"))
        info = walk.get_document(found, b"info") or walk.EMPTY
        uuid = walk.find(info, b"uuid")
        identity = b"" if uuid is None else info[uuid.start + 5 : uuid.end]
        yield CollectionInfo(TableName(database, name), kind or "collection", options, identity)


def _cursor(client: Client, database: str, command: dict[str, Any]) -> Iterator[bytes]:
    """All documents of a command's cursor, raw. Nothing for a namespace that is not there."""
    try:
        with client[database].cursor_command(command, codec_options=RAW) as cursor:
            yield from (bytes(document.raw) for document in cursor)
    except OperationFailure as exc:
        if exc.code != NAMESPACE_NOT_FOUND:
            raise


def as_index(spec: bytes) -> Index:
    """Read a description."""
    name = walk.find(spec, b"name")
    return Index(
        name=walk.string_at(spec, name.start, name.end) if name else "",
        spec=spec,
        unique=_is_true(spec, b"unique"),
        expires=walk.find(spec, b"expireAfterSeconds") is not None,
    )


def _is_on_id(spec: bytes) -> bool:
    """Whether it is the index that every collection has (of a clustered one: that is the collection)."""
    name = walk.find(spec, b"name")
    named = name is not None and walk.string_at(spec, name.start, name.end) == "_id_"
    return named or _is_true(spec, b"clustered")


def _index_parts(index: Index) -> dict[str, bytes]:
    """What is compared of an index: the order of its fields tells nothing, but for the key's own."""
    spec = portable_index(index.spec)
    return _comparable(spec[each.at : each.end] for each in walk.elements(spec))


def _comparable(parts: Iterable[bytes]) -> dict[str, bytes]:
    """By name; numbers of one value are the same whatever their type, as servers and shells write them differently."""
    compared = {}
    for part in parts:
        document = walk.document(part)
        name = next(walk.elements(document)).name.decode("utf-8", "replace")
        compared[name] = _normalized(document)
    return compared


def _normalized(document: bytes) -> bytes:
    parts = []
    for element in walk.elements(document):
        value = document[element.start : element.end]
        if element.kind == walk.INT32:
            parts.append(walk.element(walk.DOUBLE, element.name, _double(walk.int32_at(document, element.start))))
        elif element.kind == walk.INT64:
            parts.append(walk.element(walk.DOUBLE, element.name, _double(walk.int64_at(document, element.start))))
        elif element.kind in {walk.DOCUMENT, walk.ARRAY}:
            parts.append(walk.element(element.kind, element.name, _normalized(value)))
        else:
            parts.append(document[element.at : element.end])
    return walk.joined(parts)


def _double(number: int) -> bytes:
    return bson.encode({"": float(number)})[6:-1]


def _shown(option: bytes | None) -> str:
    if option is None:
        return "not set"
    text = str(next(iter(bson.decode(option).values())))
    return text if len(text) <= 80 else f"{text[:80]}..."


def _without(document: bytes, names: frozenset[bytes]) -> bytes:
    return walk.joined(document[e.at : e.end] for e in walk.elements(document) if e.name not in names)


def _is_true(document: bytes, name: bytes) -> bool:
    """As the server reads a flag: anything that is true or not zero."""
    element = walk.find(document, name)
    if element is None:
        return False
    value = next(iter(bson.decode(walk.document(document[element.at : element.end])).values()))
    return bool(value)


def _string(document: bytes, found: tuple[int, int, int] | None) -> str:
    return "" if found is None else walk.string_at(document, found[1], found[2])


_KINDS: Final = {"view": "view", "timeseries": "time-series collection"}
