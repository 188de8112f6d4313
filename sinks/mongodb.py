"""A mirror in another MongoDB database, or on another server: final states a batch, with the position behind them.

The position is in `cdc_positions` in the target (see `cdc.mongodb.positions`). Where a batch comes down to whole
documents it is stored after them: applied again, they are what they are. Where deltas are needed, data and position are
one transaction, if the target has such. How changes become writes is in `cdc.mongodb.apply`; the initial copy's side in
`cdc.mongodb.target`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, suppress
from typing import Final

import msgspec
import structlog
from pymongo.client_session import ClientSession
from pymongo.errors import PyMongoError

from cdc.change import DDL, INSERT, Batch, Change, Ddl, Table, TableName
from cdc.config import SinkConfig
from cdc.errors import PermanentError, ResyncRequired, TransientError
from cdc.mongodb.apply import Applier, Misfit
from cdc.mongodb.client import Client, connect, translated_errors
from cdc.mongodb.ddl import DdlApplier, ddl_subject
from cdc.mongodb.equality import key_bytes
from cdc.mongodb.fold import Segment, fold, is_through, segments
from cdc.mongodb.folded import Folded
from cdc.mongodb.moment import moment
from cdc.mongodb.positions import CollectionState, Positions, Standing
from cdc.mongodb.target import MongoCopyTarget
from cdc.mongodb.target_transaction import counting, target_transaction
from cdc.position import Position, SourcePosition
from cdc.sink import NEVER_FREE, Ahead, Applied, Halted, QuickLook, SinkContext, Subject, are_same

Work = Mapping[TableName, Folded | list[Change]]

MAX_IN_TRANSACTION: Final = 10_000
"""Changes in source order that may be one transaction: servers end one after a minute."""

log = structlog.get_logger()


class _Todo(msgspec.Struct, frozen=True):
    """What `apply` has to do: folded segments, and for which batches and which collections in order they are."""

    batches: Sequence[Batch]
    in_order: frozenset[TableName]
    steps: Sequence[tuple[Segment, Work]]

    def is_about(self, batches: Sequence[Batch], in_order: set[TableName]) -> bool:
        """Whether these very batches were looked at, under the same conditions."""
        return are_same(self.batches, batches) and in_order == self.in_order

    def work(self, in_order: set[TableName]) -> Iterator[tuple[Segment, Work]]:
        """What there is to do, one after the other; the DDL among it may change what has to be in order."""
        for segment, folded in self.steps:
            yield segment, folded if in_order == self.in_order else fold(segment, in_order)


class _Connection(msgspec.Struct):
    """All that lives from `open` to `close`.

    latest: the newest moment that a copy holds: changes up to it may have to be left out.
    """

    client: Client
    session: ClientSession
    positions: Positions
    applier: Applier
    ddl: DdlApplier
    standing: Standing
    transactions: bool
    latest: int

    def transaction(self, final: Position | None) -> AbstractContextManager[None]:
        """The target transaction of a segment. final: the position to store with it, if it ends with one."""
        return target_transaction(self.session, self.positions, self.applier, final)


class MongodbSink(MongoCopyTarget):
    """A mirror. Implements `cdc.sink.Mirror` and `cdc.sink.Parking`."""

    all_or_nothing = False

    def __init__(self, config: SinkConfig, context: SinkContext) -> None:
        super().__init__(config, context.source)
        self._reread = context.reread
        self._connection: _Connection | None = None
        self._through: bytes | None = None
        self._ahead: _Todo | None = None

    def open(self) -> Position | None:
        """Connect, become the only writer, and return the position stored in the target."""
        self.close()
        client = connect(self.url, application_name=f"cdc sink {self.name}")
        try:
            with translated_errors():
                self._connection = self._connect(client)
        finally:
            if self._connection is None:
                client.close()
        if self._connection is None:
            return None
        self._through = self._connection.standing.through
        return self._connection.standing.position

    def prepare(self, batches: Sequence[Batch]) -> None:
        """Fold ahead what `apply` is to get next."""
        connection = self._opened()
        if self._through is None and not connection.latest:
            self._ahead = _look_at(batches, batches, None, frozenset(connection.ddl.in_order))

    def apply(self, batches: Sequence[Batch], position: Position) -> Applied:
        """Apply in order; then store `position`, if `batches` end with a complete transaction."""
        connection = self._opened()
        with translated_errors():
            connection.positions.check()
            todo = self._todo(connection, batches, position)
            final = position if batches[-1].complete else None
            steps = todo.work(connection.ddl.in_order) if todo else ()
            return self._do(connection, batches, steps, final, position.seq)

    def ahead(self) -> Ahead | None:
        """What is marked around changes of collections as such."""
        standing = self._opened().standing
        return None if standing.through is None else Ahead(standing.through, standing.through_seq)

    def settled(self) -> Collection[tuple[SourcePosition, int]]:
        """Documents are what they are, however often they are written."""
        return ()

    def subject_of(self, tables: Sequence[Table], change: Change) -> Subject:
        """A document by its `_id`. Collections by name, as far as their documents are concerned."""
        if change.operation == DDL:
            assert isinstance(change.detail, Ddl)
            return ddl_subject(change.detail, tables[change.table].qualified if change.table >= 0 else None)
        if change.table < 0:
            return Subject((), None)
        name = tables[change.table].qualified
        return Subject((name,), None if self._keeps_order(name) else (_key(change),))

    def free_of(self, table: Table, keys: Set[bytes]) -> QuickLook:
        """By its `_id`."""
        if self._keeps_order(table.qualified):
            return NEVER_FREE
        return QuickLook(lambda change: _key(change) not in keys)

    def _keeps_order(self, name: TableName) -> bool:
        """A collation may take more `_id`s for the same; capped collections keep the order of all documents."""
        return name in self._opened().ddl.in_order

    def apply_part(self, batches: Sequence[Batch], position: Position) -> Applied:
        """Apply, and leave the position where it is."""
        connection = self._opened()
        with translated_errors():
            connection.positions.check()
            todo = _look_at(batches, _uncopied(connection, batches), None, frozenset(connection.ddl.in_order))
            return self._do(connection, batches, todo.work(connection.ddl.in_order), None, position.seq, folds=False)

    def apply_parked(self, batches: Sequence[Batch]) -> Applied:
        """Apply what the position has passed; what a later copy holds is left out."""
        connection = self._opened()
        with translated_errors():
            connection.positions.check()
            todo = _look_at(batches, connection.ddl.never_copied(batches), None, frozenset(connection.ddl.in_order))
            return self._do(connection, batches, todo.work(connection.ddl.in_order), None, None)

    def _do(
        self,
        connection: _Connection,
        batches: Sequence[Batch],
        steps: Iterable[tuple[Segment, Work]],
        final: Position | None,
        seq: int | None,
        *,
        folds: bool = True,
    ) -> Applied:
        """Apply segments, then store `final`, or raise `Halted`. seq: what to mark DDL with, if it is to be."""
        applier = connection.applier
        fallback = stored = False
        for segment, work in steps:
            if folds:
                fell_back, stored = self._apply(connection, segment, work, None if segment.ddl else final)
                fallback |= fell_back
            else:
                _adopt(connection, segment, work)
                applier.in_order(segment.changes(), halts=True)
            if segment.ddl is not None:
                _apply_ddl(connection, segment, seq)
        if final is not None and not stored:
            connection.positions.move(final, passes=self._through is None)
        missing, healed = applier.missing, applier.healed
        applier.missing = applier.healed = 0  # also of what was applied before a change that was refused
        changes = sum(batch.change_count for batch in batches)
        return Applied(changes=changes, missing_rows=missing, healed_rows=healed, fallback=fallback)

    def upkeep(self, position: SourcePosition) -> None:
        """Build what has waited for all collections to be of one moment: indexes."""
        connection = self._opened()
        waiting = not self.consistent or any(state.pending for state in connection.ddl.collections.values())
        if waiting:
            self.finish_copy(position)
            connection.ddl.collections = connection.positions.collections()

    def close(self) -> None:
        """Disconnect; a transaction that was open is aborted."""
        if self._connection is not None:
            with suppress(PyMongoError):
                self._connection.session.end_session()
            with suppress(PyMongoError):
                self._connection.client.close()
        self._connection = self._ahead = None

    def _connect(self, client: Client) -> _Connection | None:
        hello = client.admin.command("hello")
        session = client.start_session(causal_consistency=False)
        positions = Positions(client, self.database, self.name)
        standing = positions.take_over(session.session_id["id"].as_uuid())
        if standing is None:
            return None
        ddl = DdlApplier(client, positions, self.config.target_name)
        present = self._present(client, ddl.collections)
        for table in ddl.collections:
            found = present.get(self.config.target_name(table))
            if found is not None and (found.capped or found.has_collation):
                ddl.in_order.add(table)
        transactions = "setName" in hello or hello.get("msg") == "isdbgrid"
        copies = (state.copied_from for state in ddl.collections.values())
        return _Connection(
            client=client,
            session=session,
            positions=positions,
            applier=Applier(
                client,
                session,
                self.config.target_name,
                ddl.uuid,
                self._reread,
                transactions=transactions,
                parks=self.config.parks,
            ),
            ddl=ddl,
            standing=standing,
            transactions=transactions,
            latest=max((moment(copy) for copy in copies if copy is not None), default=0),
        )

    def _opened(self) -> _Connection:
        if self._connection is None:
            raise TransientError(f"sink {self.name} is not connected")
        return self._connection

    def _todo(self, connection: _Connection, batches: Sequence[Batch], position: Position) -> _Todo | None:
        """What there is to do; `None` where all of it was done before the sink was opened."""
        todo, self._ahead = self._ahead, None
        through = self._through
        if through is not None:
            if not any(is_through(each, through) for batch in batches for each in batch.transactions):
                if position.seq >= connection.standing.through_seq:
                    name = self.name
                    raise ResyncRequired(
                        f"resync required: sink {name}: its target is ahead of its position, "
                        "by changes that do not come again",
                        hint=f"`cdc resync {name} --yes`: it is copied again",
                    )
                return None
            self._through = None
        if todo is None or not todo.is_about(batches, connection.ddl.in_order):
            todo = _look_at(batches, _uncopied(connection, batches), through, frozenset(connection.ddl.in_order))
        return todo

    def _apply(
        self, connection: _Connection, segment: Segment, work: Work, final: Position | None
    ) -> tuple[bool, bool]:
        """Apply a segment; True where the folded way failed, and where `final` is stored with it.

        Some final states without the others may be in the way of changes in order. Those are mended by the source's
        documents as they are now; but beside a change that is parked these are in the way, too. So where changes may be
        parked, what does not fit is undone, if that can be.
        """
        _adopt(connection, segment, work)
        applier = connection.applier
        folded = {table: effect for table, effect in work.items() if isinstance(effect, Folded)}
        if len(folded) < len(work):
            final = None  # transactions cannot write to capped collections
        deltas = any(effect.deltas for effect in folded.values())
        undoable = connection.transactions and (deltas or (self.config.parks and _may_be_in_the_way(segment, folded)))
        try:
            if deltas and not undoable:
                raise Misfit
            with connection.transaction(final) if undoable else counting(applier):
                applier.folded(folded)
        except Misfit:
            stored = self._in_order(connection, segment, final, again=not (undoable or deltas))
            return undoable or not deltas, stored
        if len(folded) == len(work):
            return False, undoable and final is not None
        try:
            applier.in_order((table, change) for table, change in segment.changes() if table not in folded)
        except Halted as exc:
            raise Halted(str(exc), hint=exc.hint, change=exc.change, ahead=folded.keys()) from exc
        return False, undoable and final is not None

    def _in_order(self, connection: _Connection, segment: Segment, final: Position | None, *, again: bool) -> bool:
        """Apply one change after the other; whether `final` is stored with them."""
        if final is not None and connection.transactions and segment.size <= MAX_IN_TRANSACTION:
            with suppress(Misfit), connection.transaction(final):
                connection.applier.in_order(segment.changes(), again=again)
                return True
        connection.applier.in_order(segment.changes(), again=again)
        return False


def _key(change: Change) -> bytes:
    assert change.key is not None
    return key_bytes(change.key)


def _may_be_in_the_way(segment: Segment, folded: Mapping[TableName, Folded]) -> bool:
    """Whether a document may want a value of a unique index that another gives up: not where all of them are new."""
    return sum(len(effect.inserts) for effect in folded.values()) < segment.size <= MAX_IN_TRANSACTION


def _apply_ddl(connection: _Connection, segment: Segment, seq: int | None) -> None:
    """Store before it and after it where we are: done again after what follows, it could destroy that.

    seq: `None` where it is parked: then what follows is too.
    """
    detail = segment.ddl.detail if segment.ddl is not None else None
    assert isinstance(detail, Ddl)
    whole = segment.whole and seq is not None
    if whole and segment.through is not None:
        connection.positions.move_through(segment.through, seq)  # type: ignore[arg-type]
    try:
        connection.ddl.apply(detail.kind, detail.description, segment.position, segment.table)
    except PermanentError as exc:
        if segment.ddl is None or not segment.whole:
            raise
        raise Halted(str(exc), hint=exc.hint, change=segment.ddl) from exc
    if whole:
        connection.positions.move_through(segment.position, seq)  # type: ignore[arg-type]


def _look_at(
    batches: Sequence[Batch], uncopied: Sequence[Batch], through: bytes | None, in_order: frozenset[TableName]
) -> _Todo:
    return _Todo(batches, in_order, [(segment, fold(segment, in_order)) for segment in segments(uncopied, through)])


def _adopt(connection: _Connection, segment: Segment, work: Work) -> None:
    """Collections that appear in the stream are mirrored: what begins with an insert is new, and wholly in it."""
    strangers = work.keys() - connection.ddl.collections.keys()
    if not strangers:
        return
    each = ((tables, transaction) for tables, transactions in segment.work for transaction in transactions)
    for tables, transaction in each:
        for change in transaction.changes:
            table = tables[change.table].qualified
            if table in strangers:
                strangers.remove(table)
                position = transaction.position
                assert isinstance(position, bytes)
                if change.operation == INSERT:
                    connection.ddl.adopt(table, position)
                else:
                    log.warning("not copied yet: at the next start, if it is captured", collection=str(table))
                    connection.ddl.collections[table] = CollectionState(table=table)


def _uncopied(connection: _Connection, batches: Sequence[Batch]) -> Sequence[Batch]:
    """Without what the copies hold for certain; DDL is looked at when its turn comes."""
    if not connection.latest:
        return batches
    kept = connection.ddl.never_copied(batches)
    last = next((batch.transactions[-1] for batch in reversed(batches) if batch.transactions), None)
    if last is not None and isinstance(last.position, bytes) and moment(last.position) > connection.latest:
        connection.latest = 0
    return kept
