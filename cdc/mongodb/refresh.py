"""A resync of a MongoDB mirror: collections are copied once more, over what is there.

The stream waits meanwhile, as it does for a first copy, and what makes that one exact makes this one so (see
`cdc.mongodb.snapshot`): documents are read after a moment from which on the stream brings every change. Written is what
differs. What the source no longer has is deleted first, after the same moment: what appears there later, the copy or
the stream brings; what disappears later, the stream deletes. The mirror can be read all the time.

Unique indexes are dropped until the stream has passed the copy, since values may have passed from one document to
another. Where the source's collection is another one than was mirrored, no drop of the former will come by the stream,
as the copy is of what came after it: its indexes go here. A capped collection, or one with a collation of its own, is
emptied and copied as at the first time.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import msgspec
import structlog

from cdc.change import TableName
from cdc.errors import UnknownTable
from cdc.mongodb.client import Client, translated_errors
from cdc.mongodb.collections import CollectionInfo, differences, drop_index, is_same_index, read_indexes
from cdc.mongodb.delta import deletion, is_insertable, replacement
from cdc.mongodb.digest import lookup
from cdc.mongodb.loader import batches, insert, put_exactly
from cdc.mongodb.positions import Positions
from cdc.mongodb.ranges import Ranges
from cdc.mongodb.snapshot import find_documents, id_of
from cdc.mongodb.writes import Outcome, Writer
from cdc.position import Position
from cdc.sink import Resync

log = structlog.get_logger()


def order(
    client: Client, database: str, sink: str, tables: Collection[TableName] | None, start: Position | None
) -> Resync:
    """Note that collections (`None`: all) are to be copied over what is there. start: where the mirror stands then."""
    positions = Positions(client, database, sink)
    positions.end_last_writer()
    states = positions.collections()
    if unknown := set(tables or ()) - states.keys():
        names = ", ".join(map(str, sorted(unknown)))
        raise UnknownTable(f"sink {sink} has no collection {names}", hint="`cdc verify` lists those that it has")
    chosen = sorted(states if tables is None else tables)
    Ranges(client, database, sink).remove(chosen)
    again = [msgspec.structs.replace(states[table], copied_at=None, copied_from=None, kept=True) for table in chosen]
    positions.put(again)
    if start is not None:
        positions.put_back(start)
    return Resync((), tuple(chosen))


def can_stay(wanted: CollectionInfo, found: CollectionInfo) -> bool:
    """Whether a collection of the mirror can be put right as it is: it is made like the source's, in no odd way."""
    odd = wanted.capped or wanted.has_collation or found.capped or found.has_collation
    return not odd and not any(line.startswith("option ") for line in differences(wanted, found))


def drop_indexes(client: Client, name: TableName, wanted: CollectionInfo, *, is_another: bool) -> None:
    """Let documents have the same values for a while, and nothing stand in the way of what is to be built.

    is_another: no index of another collection than the wanted one may stay.
    """
    by_name = {index.name: index for index in wanted.indexes}
    for index in read_indexes(client, name):
        like = by_name.get(index.name)
        if index.unique or (is_another if like is None else not is_same_index(like, index)):
            drop_index(client, name, index.name)


def remove_gone(source: Client, target: Client, table: TableName, name: TableName) -> None:
    """Delete from the mirror's collection what the source does not have now."""
    removed = 0
    command = {"find": name.name, "projection": {"_id": 1}}
    for documents in find_documents(target, name.schema, command):
        ids = list(map(id_of, documents))
        present = lookup(source, table, ids)
        gone = [deletion(one) for one in ids if one not in present]
        if gone:
            with translated_errors(), target.start_session() as session:
                _done(Writer(target, session).delete(name, gone, ordered=False))
        removed += len(gone)
    log.info("removed what the source does not have", collection=str(name), documents=removed)


def overwrite(client: Client, name: TableName, block: bytes) -> int:
    """Write documents that stand end to end, where they differ; returns how many there were."""
    rows = 0
    for documents in batches(block):
        wanted = {id_of(document): document for document in documents}
        found = lookup(client, name, list(wanted))
        insert_exactly(client, name, [document for one, document in wanted.items() if one not in found])
        differing = [one for one, document in wanted.items() if one in found and found[one] != document]
        statements = [statement for one in differing for statement in replacement(one, wanted[one])]
        if statements:
            with translated_errors(), client.start_session() as session:
                _done(Writer(client, session).update(name, statements, ordered=True))
        rows += len(documents)
    return rows


def insert_exactly(client: Client, name: TableName, documents: Sequence[bytes]) -> None:
    """Insert documents, byte for byte."""
    if documents:
        insert(client, name, documents, ordered=False)
        put_exactly(client, name, [one for one in documents if not is_insertable(one)])


def _done(outcome: Outcome) -> None:
    for failure in outcome.failures:
        raise failure.error
