"""A mirror in another PostgreSQL database: whole source transactions, in commit order, with the position.

The position is a row of `cdc.positions` in the target, locked by the first statement of every transaction and moved
by the last. How changes become statements is in `cdc.postgres.apply`; the initial copy's side in `cdc.postgres.target`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence, Set
from contextlib import contextmanager, suppress
from itertools import groupby

import msgspec
import psycopg
import structlog

from cdc.change import Batch, Change, Table, TableName
from cdc.config import SinkConfig
from cdc.errors import PermanentError, TransientError
from cdc.position import Lsn, Position, SourcePosition, as_lsn
from cdc.postgres.apply import Applier, Todo
from cdc.postgres.bookkeeping import FORGOTTEN, Bookkeeping
from cdc.postgres.connection import Connection, connect, to_cdc_error, translated_errors
from cdc.postgres.fold import FoldError
from cdc.postgres.parking import SubjectFinder, read_uniqueness, with_ends
from cdc.postgres.refresh import Refresh, Unusable
from cdc.postgres.refresh_marks import RefreshMark, RefreshMarks
from cdc.postgres.refresh_read import Part
from cdc.postgres.refresh_target import RefreshTarget
from cdc.postgres.reshape import CopyAgain, Reshaper
from cdc.postgres.roster import Plans
from cdc.postgres.settled import Settled
from cdc.postgres.staging import FIND_BY_INDEX
from cdc.postgres.steps import written_by
from cdc.postgres.target_transaction import TargetTransaction
from cdc.postgres.uncopied import Uncopied
from cdc.sink import Ahead, Applied, NeedsFilling, QuickLook, Refused, ResyncStatus, SinkContext, Subject, are_same

FEW_CHANGES = 64
"""Up to so many changes, prepared statements in one pipeline are faster than staging tables."""

log = structlog.get_logger()


class PostgresSink(RefreshTarget):
    """A mirror. Implements `cdc.sink.Mirror`, `cdc.sink.Parking` and `cdc.sink.Refreshing`."""

    all_or_nothing = True

    def __init__(self, config: SinkConfig, context: SinkContext) -> None:
        super().__init__(config, context.shapes, context.dump_schema)
        self._reread = context.reread
        self._source = context.source
        self._connection: Connection | None = None
        self._applier: Applier | None = None
        self._asked: set[int] = set()
        self._uncopied = Uncopied(config.name)
        self._finished = False
        self._subjects: tuple[Plans, SubjectFinder] | None = None
        self._ahead: Todo | None = None
        self._unrefreshed_tables: dict[TableName, RefreshMark] = {}
        self._replaying_until: Lsn | None = None
        self._refresh: Refresh | None = None
        self._refreshed_with: Plans | None = None  # the state of the mirror that a round was begun in

    def open(self) -> Position | None:
        """Connect and return the position stored in the target."""
        self.close()
        connection = connect(self.url, application_name=f"cdc sink {self.name}")
        self._connection = connection
        with translated_errors():
            connection.execute("SET synchronous_commit = on")
            connection.execute(FIND_BY_INDEX)
            self.silence_triggers(connection)
            position = self.stored_position()
            if position is None:
                return None
            transaction = TargetTransaction(connection, self.name, as_lsn(position.source))
            Bookkeeping(connection, self.name).create()  # one of an older version is completed
            reshaper = Reshaper(connection, self.config, self._source, self.read_shapes, self._asked)
            self._applier = applier = Applier(connection, transaction, reshaper, self._reread)
            if self.config.parks:
                Settled(connection, self.name).create()
                self._find_subjects(connection, applier)
            self._unrefreshed_tables = self._unrefreshed(connection)
            self._replaying_until = RefreshMarks(connection, self.name).replaying()
            self._note_refreshed()
        return position

    def prepare(self, batches: Sequence[Batch]) -> None:
        """Fold ahead what `apply` is to get next."""
        _, applier = self._opened()
        with suppress(PermanentError):  # `apply` will tell
            self._ahead = self._look_at(applier, batches)

    def apply(self, batches: Sequence[Batch], position: Position) -> Applied:
        """Apply in order; visible together with `position` when `batches` end with a complete transaction."""
        connection, applier = self._opened()
        todo, self._ahead = self._ahead, None
        if todo is None or todo.plans is not applier.plans or not are_same(todo.batches, batches):
            todo = self._look_at(applier, batches)
        if todo.few and batches[-1].complete and not applier.transaction.is_open:
            with translated_errors():
                late = self.config.parks and applier.late_keys.concern(applier.plans, todo.wanted)
                applied = None if late else self._at_once(applier, todo, position)
            if applied is not None:
                return applied
        with self._all_or_nothing(connection, applier):
            applied = self._do(connection, applier, todo)
        with translated_errors():
            if batches[-1].complete:
                applier.transaction.commit(position)
                applier.committed()
        return applied

    def ahead(self) -> Ahead | None:
        """Never: data and position are committed together."""
        return None

    def settled(self) -> Collection[tuple[SourcePosition, int]]:
        """What the target remembers."""
        connection, _ = self._opened()
        with translated_errors():
            return Settled(connection, self.name).read()

    def subject_of(self, tables: Sequence[Table], change: Change) -> Subject:
        """A row by its key, and by what it takes of other unique columns; or its table as a whole."""
        return self._finder().find(tables, change)

    def free_of(self, table: Table, keys: Set[bytes]) -> QuickLook:
        """By the same."""
        return self._finder().free_of(table, keys)

    def _find_subjects(self, connection: Connection, applier: Applier) -> None:
        """Tables may have been altered, and other columns be unique."""
        if self.config.parks and (self._subjects is None or self._subjects[0] is not applier.plans):
            mirrored = {table.name for table in applier.plans.roster if table.applied_from != FORGOTTEN}
            self._subjects = applier.plans, SubjectFinder(applier.plan, mirrored, read_uniqueness(connection))

    def _finder(self) -> SubjectFinder:
        if self._subjects is None:
            raise TransientError(f"sink {self.name} is not connected")
        return self._subjects[1]

    def apply_part(self, batches: Sequence[Batch], position: Position) -> Applied:  # noqa: ARG002 - protocol
        """Apply within the target transaction that `apply` commits."""
        connection, applier = self._opened()
        todo = self._look_at(applier, with_ends(batches, last_ends=False))
        with self._all_or_nothing(connection, applier):
            return self._do(connection, applier, todo)

    def apply_parked(self, batches: Sequence[Batch]) -> Applied:
        """Apply in a transaction that also remembers which they were; without what a later copy or resync holds."""
        connection, applier = self._opened()
        todo = self._look_at(applier, with_ends(batches, last_ends=True), parked=True)
        changes = [(as_lsn(each.position), each.first_ordinal) for batch in batches for each in batch.transactions]
        try:
            with self._all_or_nothing(connection, applier):
                applied = self._do(connection, applier, todo, late=True)
                Settled(connection, self.name).replace(changes)
                applier.transaction.end()
                applier.committed()
        except PermanentError:
            with translated_errors():
                applier.transaction.end()
            raise
        return applied

    @contextmanager
    def _all_or_nothing(self, connection: Connection, applier: Applier) -> Iterator[None]:
        """What is refused is undone, and the sink is as it was."""
        missing, healed = applier.missing, applier.healed
        try:
            with translated_errors():
                yield
        except PermanentError as exc:
            with translated_errors():
                applier.undo()
                self._find_subjects(connection, applier)
            applier.missing, applier.healed = missing, healed
            change = exc.change if isinstance(exc, Refused) else None
            raise Refused(str(exc), hint=exc.hint, change=change, undone=True) from exc

    def _do(self, connection: Connection, applier: Applier, todo: Todo, *, late: bool = False) -> Applied:
        """Apply, and leave the target transaction open.

        Where many are refused together and may be parked, the caller will find out which in pieces, set-wise: faster.
        """
        missing, healed = applier.missing, applier.healed
        failure = self._apply_fast(connection, applier, todo)
        if isinstance(failure, PermanentError) and not todo.few and self.config.parks:
            raise failure
        if failure is not None:
            self._slowly(connection, applier, todo, late=late)
        if self.config.parks:  # else they hold
            applier.late_keys.check(applier.plans, todo.wanted, without=applier.stale.tables)
        return self._done(
            todo,
            missing=applier.missing - missing,
            healed=applier.healed - healed,
            fallback=failure is not None,
            rows=written_by(todo.folded) if todo.folded is not None and failure is None else None,
        )

    def _at_once(self, applier: Applier, todo: Todo, position: Position) -> Applied | None:
        """Apply a few changes in a target transaction of their own; `None`, and nothing done, where that fails."""
        missing = applier.missing
        try:
            with applier.transaction.at_once(position) as (before, after):
                applier.few(todo.wanted, before=before, after=after)
        except (PermanentError, FoldError):
            applier.transaction.roll_back()
            return None
        applier.committed()
        return self._done(todo, missing=applier.missing - missing)

    def _done(
        self, todo: Todo, *, missing: int, healed: int = 0, fallback: bool = False, rows: int | None = None
    ) -> Applied:
        if self._refresh is not None:  # not before: what is refused comes again, in pieces
            self._refresh.observe(todo.batches)
        return Applied(
            changes=sum(batch.change_count for batch in todo.batches),
            missing_rows=missing,
            healed_rows=healed,
            fallback=fallback,
            rows=rows,
        )

    def upkeep(self, position: SourcePosition) -> None:
        """Build what has waited for all tables to be consistent with each other: unique indexes, foreign keys."""
        if not self._finished:
            finished = self.finish_copy(position)
            self.open()  # with what the catalog says now
            self._finished = finished

    def refresh(self, position: SourcePosition) -> ResyncStatus | None:
        """Write the next part of the tables that are read again; once what a copy has left to be built is built."""
        connection, applier = self._opened()
        if applier.plans is not self._refreshed_with:
            self._begin_round(connection, applier)
        if self._replaying_until is not None and self._replaying_until <= applier.transaction.position:
            RefreshMarks(connection, self.name).replayed()
            self._replaying_until = None
            self._note_refreshed()
        if not self._unrefreshed_tables or not self._finished or self._source is None:
            return None
        if self._refresh is None:
            self._refresh = Refresh(self.config, self._source, self._unrefreshed_tables)
        try:
            if (part := self._refresh.next_part(as_lsn(position))) is not None:
                self._write(connection, applier, self._refresh, part)
        except Unusable as exc:
            self._copy_again(connection, exc.tables)
            raise NeedsFilling(f"no key to resync by, or constraints that are checked late: {exc}") from exc
        self._note_refreshed()
        return self._refresh.status() if self._refresh is not None else None

    def close(self) -> None:
        """Disconnect; what was not complete is rolled back."""
        if self._refresh is not None:
            self._refresh.close()
            self._refresh = None
        if self._connection is not None:
            with suppress(psycopg.Error):
                self._connection.close()
        self._connection = self._applier = self._ahead = self._subjects = self._refreshed_with = None
        self._finished = False  # tables may be copied before it is opened again

    def _begin_round(self, connection: Connection, applier: Applier) -> None:
        """Tables may have been altered: what was read of them before does not fit, and they may have other names."""
        if self._refresh is not None:
            self._refresh.close()
            self._refresh = None
        with translated_errors():
            self._unrefreshed_tables = self._unrefreshed(connection)
        self._refreshed_with = applier.plans
        self._note_refreshed()

    def _write(self, connection: Connection, applier: Applier, refresh: Refresh, part: Part) -> None:
        """Write a part, and how far its table is, in one transaction that leaves the position as it is."""
        try:
            with translated_errors():
                applier.transaction.begin()
                mark = refresh.write(connection, part)
                applier.transaction.end()
        except PermanentError as exc:
            with translated_errors():
                applier.transaction.roll_back()
            refresh.refused(part, exc)
        else:
            refresh.wrote(mark)
            self._unrefreshed_tables = refresh.marks
            if mark.table not in refresh.marks:
                with translated_errors():
                    applier.reload()  # no earlier change of it is to be applied any more
                self._refreshed_with = applier.plans

    def _note_refreshed(self) -> None:
        _, applier = self._opened()
        self.consistent = not self._unrefreshed_tables and self._replaying_until is None
        stale = (
            self._unrefreshed_tables
            if self._replaying_until is None
            else [table.name for table in applier.plans.roster]
        )
        applier.stale.tables = {self.config.target_name(table) for table in stale}
        if not self._unrefreshed_tables and self._refresh is not None:
            self._refresh.close()
            self._refresh = None

    def _opened(self) -> tuple[Connection, Applier]:
        if self._connection is None or self._applier is None:
            raise TransientError(f"sink {self.name} is not connected")
        return self._connection, self._applier

    def _look_at(self, applier: Applier, batches: Sequence[Batch], *, parked: bool = False) -> Todo:
        wanted = [self._uncopied.of(applier.plans.roster, batch, parked=parked) for batch in batches]
        return self._todo(applier, batches, wanted)

    @staticmethod
    def _todo(applier: Applier, batches: Sequence[Batch], wanted: Sequence[Batch]) -> Todo:
        plans = applier.plans
        few = sum(batch.change_count for batch in wanted) <= FEW_CHANGES
        if not few:
            return Todo(plans, batches, wanted, few, applier.fold(wanted))
        try:
            applier.check_shapes(wanted)
        except FoldError:
            few = False
        return Todo(plans, batches, wanted, few, None)

    def _slowly(self, connection: Connection, applier: Applier, todo: Todo, *, late: bool) -> None:
        """Apply what the fast way has refused as a whole: in the runs between transactions that need care for certain.

        Only where such a run is refused as well, it goes transaction by transaction, with care for those that need it.
        Care for all, or each by itself, would take so long that the stream may never catch up.
        """
        parts = [
            msgspec.structs.replace(batch, transactions=[transaction])
            for batch in todo.wanted
            for transaction in batch.transactions
            if transaction.changes
        ]
        if todo.few or len(parts) == 1:
            self._carefully(connection, applier, todo.wanted, late=late)
            return
        with applier.transaction.as_a_whole():
            self._in_runs(connection, applier, parts, late=late)

    def _in_runs(self, connection: Connection, applier: Applier, parts: Sequence[Batch], *, late: bool) -> None:
        for needs_care, run in groupby(parts, applier.needs_care):
            together = list(run)
            whole = needs_care or len(together) == len(parts)  # which is what has been tried
            if not whole and self._apply_fast(connection, applier, self._todo(applier, together, together)) is None:
                continue
            for part in together:
                own = self._todo(applier, [part], [part])
                if needs_care or self._apply_fast(connection, applier, own) is not None:
                    self._carefully(connection, applier, own.wanted, late=late)

    def _carefully(self, connection: Connection, applier: Applier, wanted: Sequence[Batch], *, late: bool) -> None:
        try:
            applier.carefully(wanted, late=late)
            self._find_subjects(connection, applier)
        except CopyAgain as again:
            applier.transaction.roll_back()
            self._copy_again(connection, [again.table])
            log.warning("table is copied again", sink=self.name, table=str(again.table), reason=str(again))
            raise NeedsFilling(str(again)) from again

    def _apply_fast(self, connection: Connection, applier: Applier, todo: Todo) -> PermanentError | FoldError | None:
        """Try the fast way that suits. Where it does not work all of it is undone, and the reason returned."""
        failure: PermanentError | FoldError = FoldError()
        applier.transaction.begin()
        try:
            if todo.few:
                applier.few(todo.wanted)
                return None
            if todo.folded is not None:
                applier.many(todo.folded, complete=todo.wanted[-1].complete)
                return None
        except PermanentError as exc:
            failure = exc
        except psycopg.Error as exc:
            error = to_cdc_error(exc)
            if connection.closed or not isinstance(error, PermanentError):
                raise error from exc
            failure = error
        except FoldError:
            pass
        applier.undo()
        return failure
