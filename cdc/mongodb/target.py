"""The mirror's side of the initial copy: collections, loading, and what is built when the stream has caught up.

The stream does not write while a collection is copied, so a copied document never meets a newer one. What the stream
has passed since is applied on top afterwards. All that must survive a crash is in the target: see
`cdc.mongodb.positions` and `cdc.mongodb.ranges`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final

import msgspec
import structlog

from cdc.change import TableName
from cdc.config import SinkConfig, SourceConfig
from cdc.errors import FatalError, TransientError
from cdc.mongodb.client import Client, connect, translated_errors
from cdc.mongodb.collections import (
    Catalog,
    CollectionInfo,
    Index,
    as_index,
    create_collection,
    create_indexes,
    deployment_id,
    read_collections,
)
from cdc.mongodb.loader import MongoLoader
from cdc.mongodb.moment import has_passed
from cdc.mongodb.positions import CollectionState, Positions
from cdc.mongodb.ranges import Ranges
from cdc.mongodb.refresh import can_stay, drop_indexes, order, overwrite, remove_gone
from cdc.mongodb.url import database_name
from cdc.position import Position, SourcePosition
from cdc.sink import Resync
from cdc.source import Chunk

log = structlog.get_logger()

DEFAULT_DATABASE: Final = "cdc"
"""Where a sink keeps what it must remember, if its URL names no database."""


class MongoCopyTarget:
    """What a MongoDB mirror does for the copy: a part of `cdc.sink.Mirror`. Every method has its own connection.

    consistent: whether the stream is known to have passed the end of every collection's copy.
    """

    keeps_parts = True

    def __init__(self, config: SinkConfig, source: SourceConfig | None = None) -> None:
        assert config.url is not None, "cdc.config derives one"
        self._source_url = source.url.reveal() if source is not None and source.url is not None else ""
        self.name = config.name
        self.config = config
        self.url = config.url.reveal()
        self.database = database_name(self.url) or DEFAULT_DATABASE
        self.consistent = False
        self._capped: set[TableName] = set()
        self._kept: set[TableName] = set()
        self._numbers: dict[Chunk, int] = {}

    def stored_position(self) -> Position | None:
        """The position in the target; `None` if it was never written to."""
        with self._positions() as positions:
            return positions.position()

    def copied(self) -> Mapping[TableName, bytes]:
        """Collections whose copy is complete, and the moment from which on the mirror has them right."""
        with self._positions() as positions:
            states = positions.collections()
        return {table: state.copied_at for table, state in states.items() if state.copied_at is not None}

    def applied_from(self) -> Mapping[TableName, bytes]:
        """Up to which moment changes of each copied collection are in its copy, and must not be applied.

        An insert would bring back what a capped collection has let go; a drop or a rename would be of another
        collection than the copied one.
        """
        with self._positions() as positions:
            states = positions.collections()
        return {
            table: state.copied_from
            for table, state in states.items()
            if state.copied_at is not None and state.copied_from is not None
        }

    def mirror_only(self, tables: Collection[TableName]) -> None:
        """Copy a collection that is not among these again if it comes back.

        What the stream still has about it is applied meanwhile: it may have been dropped at the source, and the drop be
        on its way.
        """
        with self._positions() as positions:
            positions.end_last_writer()
            states = positions.collections()
            left = [state for table, state in states.items() if table not in tables and state.copied_at is not None]
            positions.put(msgspec.structs.replace(state, copied_at=None, copied_from=None) for state in left)
        for state in left:
            log.info("collection is gone from the source, or no longer captured", collection=str(state.table))

    def adopt(self, table: TableName) -> None:
        """Remember a collection that the stream makes, before it does, or it would be taken for somebody else's."""
        with self._positions() as positions:
            if table not in positions.collections():
                positions.put([CollectionState(table=table, made=True)])

    def pending_indexes(self) -> list[TableName]:
        """Collections whose indexes wait for the stream to pass the end of the copy."""
        with self._positions() as positions:
            return sorted(table for table, state in positions.collections().items() if state.pending)

    def forget(self) -> None:
        """Forget position and collections, so that the target is no mirror of ours any more; what is in it stays."""
        with self._session() as client:
            positions = Positions(client, self.database, self.name)
            tables = list(positions.collections())
            Ranges(client, self.database, self.name).remove(tables)
            positions.remove(tables)
            positions.end()

    def want_resync(self, tables: Collection[TableName] | None, end: Position, *, anew: bool = False) -> Resync:
        """Let collections (`None`: all) be copied over what is there. anew: the mirror stands at `end` from now on."""
        with self._session() as client:
            return order(client, self.database, self.name, tables, end if anew else None)

    def rewind(self, position: Position) -> None:
        """Let the mirror stand at an earlier position: what follows it is delivered once more."""
        with self._positions() as positions:
            positions.end_last_writer()
            positions.put_back(position)

    def prepare_copy(self, tables: Sequence[TableName], start: Position, schema: object) -> None:
        """Make the collections that are missing, empty those that are not copied, store `start` if no position is.

        Raises `FatalError` where the target holds something else, or is the source.
        """
        assert isinstance(schema, Catalog)
        if gone := set(tables) - {collection.name for collection in schema.collections}:
            raise TransientError(f"no longer at the source: {', '.join(map(str, sorted(gone)))}")
        with self._session() as client:
            self._refuse_source(client, schema)
            positions = Positions(client, self.database, self.name)
            preparation = _Preparation(self, client, positions, Ranges(client, self.database, self.name))
            preparation.run(schema.collections)
            positions.begin(start)
            self._kept = {table for table, state in positions.collections().items() if state.kept}
        self._capped = {collection.name for collection in schema.collections if collection.capped}

    def column_types(self, table: TableName) -> dict[str, str]:  # noqa: ARG002 - the protocol's
        """Documents have no columns."""
        return {}

    def pending(self, table: TableName, position: SourcePosition, chunks: Callable[[], Sequence[Chunk]]) -> list[Chunk]:
        """The ranges that a killed run has not finished, or all of them."""
        assert isinstance(position, bytes)
        with self._session() as client:
            ranges = Ranges(client, self.database, self.name)
            plan = ranges.get(table)
            if plan is None:
                split = chunks()
                positions = Positions(client, self.database, self.name)
                state = positions.collections()[table]
                positions.put([msgspec.structs.replace(state, copied_from=position)])
                if table in self._kept:
                    with connect(self._source_url, application_name="cdc-copy") as source:
                        remove_gone(source, client, table, self.config.target_name(table))
                plan = ranges.put(table, split)
        numbered = dict(zip(plan.chunks(table), range(len(plan.bounds) + 1), strict=True))
        self._numbers |= numbered
        return [chunk for chunk, number in numbered.items() if number not in plan.done]

    def loader(self) -> MongoLoader:
        """Open a connection for a copy worker; from any thread."""
        client = connect(self.url, application_name=f"cdc-copy {self.name}")
        overwrites = dict.fromkeys(self._kept, overwrite)
        return MongoLoader(client, self.config.target_name, self._capped.__contains__, overwrites)

    def chunk_copied(self, chunk: Chunk, rows: int) -> None:  # noqa: ARG002 - the protocol's
        """Record durably that a range is complete."""
        with self._session() as client:
            Ranges(client, self.database, self.name).done(chunk.table, self._numbers.pop(chunk))

    def table_copied(self, table: TableName, position: SourcePosition, rows: int) -> None:
        """Record durably that a collection is complete, and right from a moment on."""
        assert isinstance(position, bytes)
        with self._session() as client:
            positions = Positions(client, self.database, self.name)
            state = positions.collections()[table]
            positions.put([msgspec.structs.replace(state, copied_at=position, rows=rows, kept=False)])
            Ranges(client, self.database, self.name).remove([table])

    def build_keys(self) -> None:
        """The index on `_id` is always there."""

    def set_sequences(self, sequences: object) -> None:
        """There are none."""

    def finish_copy(self, position: SourcePosition) -> bool:
        """Build all indexes, once the stream has passed every collection's copy; `False` until all are built.

        Unique ones could not be kept earlier: before that moment documents of different ones may be together. So they
        may later, where images were looked up: then they are tried again.
        """
        with self._session() as client:
            positions = Positions(client, self.database, self.name)
            states = positions.collections()
            ends = [state.copied_at for state in states.values() if state.copied_at is not None]
            if not all(has_passed(position, end) for end in ends):
                return False
            self.consistent = True
            present = self._present(client, states)
            complete = True
            for state in states.values():
                if state.pending:
                    exists = self.config.target_name(state.table) in present  # or a mirrored drop has taken it
                    left = self._build(client, state) if exists else []
                    positions.put([msgspec.structs.replace(state, pending=tuple(index.spec for index in left))])
                    complete &= not left
        return complete

    def _build(self, client: Client, state: CollectionState) -> list[Index]:
        """Build what is pending; return what could not be."""
        indexes = [as_index(spec) for spec in state.pending]
        name = self.config.target_name(state.table)
        log.info("building indexes", sink=self.name, collection=str(name), indexes=[index.name for index in indexes])
        plain = [index for index in indexes if not index.unique]
        groups = [plain, *([index] for index in indexes if index.unique)]
        left = [index for group in groups if not create_indexes(client, name, group) for index in group]
        if left:
            names = [index.name for index in left]
            log.warning("documents do not fit unique indexes yet", collection=str(name), indexes=names)
        return left

    def _present(self, client: Client, tables: Collection[TableName]) -> dict[TableName, CollectionInfo]:
        names = {self.config.target_name(table) for table in tables}
        databases = {name.schema for name in names}
        found = read_collections(client, databases=databases, wanted=lambda name: name in names)
        return {each.name: each for each in found}

    def _refuse_source(self, client: Client, schema: Catalog) -> None:
        """A mirror of a collection in itself, or in another one that is mirrored, would never end."""
        names = {collection.name for collection in schema.collections}
        if schema.deployment == deployment_id(client) and (own := names & set(map(self.config.target_name, names))):
            raise FatalError(
                f"sink {self.name} leads to the source's own {', '.join(map(str, sorted(own)))}",
                hint=f"let sinks.{self.name}.url name another database, or rename",
            )

    @contextmanager
    def _session(self) -> Iterator[Client]:
        with connect(self.url, application_name=f"cdc-copy {self.name}") as client:
            yield client

    @contextmanager
    def _positions(self) -> Iterator[Positions]:
        with self._session() as client:
            yield Positions(client, self.database, self.name)


class _Preparation:
    """Makes the target ready, collection by collection. May be killed anywhere, and begun again."""

    def __init__(self, target: MongoCopyTarget, client: Client, positions: Positions, ranges: Ranges) -> None:
        self._target = target
        self._client = client
        self._positions = positions
        self._ranges = ranges
        self._states = positions.collections()

    def run(self, collections: Sequence[CollectionInfo]) -> None:
        todo = [each for each in collections if not self._is_complete(each.name)]
        present = self._target._present(self._client, [each.name for each in todo])  # noqa: SLF001 - one class in two
        self._check(todo, present)
        for each in todo:
            self._prepare(each, present.get(self._name(each)))

    def _check(self, todo: Sequence[CollectionInfo], present: Mapping[TableName, CollectionInfo]) -> None:
        """What is there and not ours must be an empty collection: nothing else is ours to remove."""
        for each in todo:
            found = present.get(self._name(each))
            if found is None or each.name in self._states:
                continue
            if found.kind != "collection":
                raise FatalError(
                    f"{found.name} on the target is a {found.kind}", hint="drop it, or rename the mirror's"
                )
            if not self._is_empty(found.name):
                raise FatalError(
                    f"{found.name} on the target has documents that this sink did not copy",
                    hint="drop it if they may go, or mirror into another database",
                )

    def _prepare(self, wanted: CollectionInfo, found: CollectionInfo | None) -> None:
        state = self._states.get(wanted.name)
        plan = None if wanted.capped else self._ranges.get(wanted.name)  # which is copied in order, or anew
        if state is not None and found is not None and plan is not None and plan.uuid == wanted.uuid == state.uuid:
            return  # a copy that was killed: it goes on
        self._ranges.remove([wanted.name])
        if state is not None and state.kept and found is not None and can_stay(wanted, found):
            self._keep(wanted, state)
            return
        made = found is None or (state is not None and state.made)
        indexes = tuple(index.spec for index in wanted.indexes)
        expiring = tuple(index.spec for index in wanted.indexes if index.expires)
        self._positions.put([
            CollectionState(table=wanted.name, uuid=wanted.uuid, made=made, pending=indexes, expiring=expiring)
        ])  # fmt: skip
        name = self._name(wanted)
        if found is not None and made:
            with translated_errors():
                self._client[name.schema].drop_collection(name.name)
        if made:
            create_collection(self._client, name, wanted)
        elif state is not None:
            with translated_errors():
                self._client[name.schema][name.name].delete_many({})

    def _keep(self, wanted: CollectionInfo, state: CollectionState) -> None:
        """Leave what is there, but for some indexes; all that are missing are built at the end."""
        is_another = state.uuid not in {b"", wanted.uuid}
        drop_indexes(self._client, self._name(wanted), wanted, is_another=is_another)
        indexes = tuple(index.spec for index in wanted.indexes)
        expiring = tuple(index.spec for index in wanted.indexes if index.expires)
        kept = msgspec.structs.replace(state, uuid=wanted.uuid, pending=indexes, expiring=expiring, renamed_at=None)
        self._positions.put([kept])

    def _is_complete(self, table: TableName) -> bool:
        state = self._states.get(table)
        return state is not None and state.copied_at is not None

    def _is_empty(self, name: TableName) -> bool:
        with translated_errors():
            return self._client[name.schema][name.name].find_one({}, {"_id": 1}) is None

    def _name(self, collection: CollectionInfo) -> TableName:
        return self._target.config.target_name(collection.name)
