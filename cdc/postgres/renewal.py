"""What is left to build of tables that have changed since it was written down: looked up at the source again.

SQL of the source fits the mirror when its tables have the same shape on both sides. Where the source is ahead, what is
left to build waits for the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import structlog

from cdc.change import TableName
from cdc.config import SinkConfig
from cdc.errors import TransientError
from cdc.postgres.bookkeeping import FORGOTTEN, Bookkeeping, PendingEntry, key_of
from cdc.postgres.connection import Connection, translated_errors
from cdc.postgres.dump import SchemaDump, SchemaEntry
from cdc.postgres.shape import TableShape
from cdc.pulse import elsewhere

log = structlog.get_logger()


class LookAgain:
    """Renews what is outdated, by asking the source.

    read_shapes: of tables by OID. dump_schema: of all captured tables; only taken when it is of use.
    """

    def __init__(
        self,
        config: SinkConfig,
        read_shapes: Callable[[Collection[int]], Sequence[TableShape]],
        dump_schema: Callable[[], SchemaDump],
    ) -> None:
        self._sink = config.name
        self._read_shapes = read_shapes
        self._dump_schema = dump_schema
        self._waiting = False

    def __call__(self, connection: Connection) -> None:
        """Renew what can be, in a transaction. What waits for the stream, or for the source to be there, stays."""
        bookkeeping = Bookkeeping(connection, self._sink)
        with translated_errors():
            outdated = [entry for entry in bookkeeping.pending() if entry.outdated]
            followed = _followed(bookkeeping)
        if not outdated:
            return
        try:
            now = self._read_shapes([shape.oid for shape in followed.values()])
            fit = any(_fits(entry, followed, _agreeing(followed, now)) for entry in outdated)
            with elsewhere():  # a program reads it
                schema = self._dump_schema() if fit else None
        except TransientError as exc:
            log.warning("cannot ask the source what is left to build", sink=self._sink, error=str(exc))
            return
        if schema is not None:
            with translated_errors(), connection.transaction():
                renew(bookkeeping, schema, sink=self._sink)
        elif not self._waiting:
            log.info("the source is ahead: what is left to build waits", sink=self._sink, entries=len(outdated))
        self._waiting = schema is None


def renew(bookkeeping: Bookkeeping, schema: SchemaDump, *, sink: str) -> None:
    """Give outdated entries the SQL that they have in a dump, in a transaction of the caller's.

    One that the source no longer has is left out. One about tables of another shape than the mirror's stays outdated.
    """
    followed = _followed(bookkeeping)
    agreeing = _agreeing(followed, schema.shapes)
    objects = {entry.object_id: entry for entry in schema.post_data if entry.object_id[1]}
    names = {key_of(entry): entry for entry in schema.post_data}
    for entry in bookkeeping.pending():
        if not entry.outdated or not _fits(entry, followed, agreeing):
            continue
        found: SchemaEntry | None = objects.get(entry.object_id) or names.get((entry.kind, entry.name, entry.table))
        if found is not None:
            bookkeeping.renew(entry, found)
            continue
        log.warning("left out: the source no longer has it", sink=sink, kind=entry.kind, name=entry.name)
        bookkeeping.leave_out(entry)


def _followed(bookkeeping: Bookkeeping) -> dict[TableName, TableShape]:
    """The shapes of the mirror's tables, as far as they are known."""
    marks = bookkeeping.marks()
    return {name: each.shape for name, each in bookkeeping.followed().items() if marks[name].copied_at != FORGOTTEN}


def _agreeing(followed: Mapping[TableName, TableShape], shapes: Iterable[TableShape]) -> set[TableName]:
    """The mirror's tables that have the same columns, by the same name, as the source's have now."""
    now = {shape.qualified: _columns(shape) for shape in shapes}
    return {name for name, shape in followed.items() if now.get(name) == _columns(shape)}


def _columns(shape: TableShape) -> tuple[int, list[tuple[int, str, str]]]:
    return shape.oid, [(column.attnum, column.name, column.type) for column in shape.columns]


def _fits(entry: PendingEntry, followed: Mapping[TableName, TableShape], agreeing: Collection[TableName]) -> bool:
    """Whether the source's SQL of an entry fits the mirror. Of a partition nothing is followed: so all has to agree."""
    known = [name for name in entry.relations if name in followed]
    tables = known if len(known) == len(entry.relations) else followed
    return all(name in agreeing for name in tables)
