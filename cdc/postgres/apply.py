"""Three ways to apply changes to a mirror: a few in one round trip, many set-wise, or carefully one by one.

All three run inside a target transaction that the caller began, and leave it open. The first two are fast and give
up on anything unusual (`FoldError`, or the server's error); the third is always right.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import msgspec
import psycopg
from psycopg import pq, sql
from psycopg.abc import Buffer
from psycopg.adapt import Dumper

from cdc.change import (
    DDL,
    DELETE,
    INSERT,
    MESSAGE,
    TRUNCATE,
    UPDATE,
    Batch,
    Change,
    Ddl,
    Image,
    Operation,
    Table,
    Transaction,
    Truncate,
)
from cdc.errors import PermanentError
from cdc.position import Lsn, as_lsn, format_position
from cdc.postgres.connection import Connection, to_cdc_error
from cdc.postgres.fold import FoldError
from cdc.postgres.late_keys import LateKeys
from cdc.postgres.plan import TablePlan, truncate
from cdc.postgres.prepared import Statement, execute, strict
from cdc.postgres.reshape import Reshaper
from cdc.postgres.roster import Plans, Unfit
from cdc.postgres.row import UNCHANGED, decode_row
from cdc.postgres.staging import Staging, copy_in
from cdc.postgres.stale import StaleRows
from cdc.postgres.steps import Effect, SetWise, Step, Tables, steps
from cdc.postgres.target_transaction import TargetTransaction
from cdc.sink import Refused, Reread

_CHECK_DEFERRED: Final[Statement] = b"SET CONSTRAINTS ALL IMMEDIATE", ()


class Todo(msgspec.Struct, frozen=True):
    """What a sink has to apply at once.

    plans: the state of the mirror that it was made for. wanted: the batches without what the initial copy holds.
    few: send them one by one, in a pipeline. folded: else do this; `None` where only the careful way will do.
    """

    plans: Plans
    batches: Sequence[Batch]
    wanted: Sequence[Batch]
    few: bool
    folded: Sequence[Step] | None


class Applier:
    """Applies changes on one connection.

    stale: rows of the mirror that the source may have no longer: these give way to others.
    late_keys: for the caller to check, where some changes are left out.
    missing: updates and deletes whose row was not there; healed: rows put right. Both only grow.
    """

    def __init__(
        self,
        connection: Connection,
        transaction: TargetTransaction,
        reshaper: Reshaper,
        reread: Reread | None,
    ) -> None:
        self.missing = 0
        self.healed = 0
        self.transaction = transaction
        self._connection = connection
        self._reshaper = reshaper
        self._reread = reread
        self.stale = StaleRows(connection, reread)
        self.late_keys = LateKeys(connection)
        self._staging = Staging(connection)
        connection.adapters.register_dumper(bytes, _TextDumper)
        self._deferrable = bool(
            connection.execute("SELECT EXISTS (SELECT FROM pg_catalog.pg_constraint WHERE condeferrable)").fetchall()[
                0
            ][0]
        )

    @property
    def plans(self) -> Plans:
        """The mirror as it is. What was prepared with another one must not be used."""
        return self._reshaper.plans

    def check_shapes(self, batches: Sequence[Batch]) -> None:
        """Raise `FoldError` where the mirror has to follow a change of shape first. From any thread."""
        plans = self.plans
        for batch in batches:
            for transaction in batch.transactions:
                for change in transaction.changes:
                    if change.operation == DDL:
                        raise Unfit
                    if change.operation < TRUNCATE:
                        plans.of(batch.tables[change.table])

    def few(
        self, batches: Sequence[Batch], *, before: Sequence[Statement] = (), after: Sequence[Statement] = ()
    ) -> None:
        """Send every change, and what comes before and after them, in one round trip. What is refused is not undone.

        Raises `PermanentError` also if a row was not there for its update: it is healed the careful way.
        """
        if self._move_in_part(batches):
            raise FoldError
        planned = [
            (change.operation, strict(statement) if change.operation == UPDATE else statement)
            for batch in batches
            for transaction in batch.transactions
            for change in transaction.changes
            if (statement := self._statement(batch.tables, change)) is not None
        ]
        checks = [_CHECK_DEFERRED] if self._deferrable and batches[-1].complete else []
        counts = self.transaction.prepared.run([*before, *(statement for _, statement in planned), *checks, *after])
        found = zip(planned, counts[len(before) :], strict=False)
        self.missing += sum(operation == DELETE and not touched for (operation, _), touched in found)

    def fold(self, batches: Sequence[Batch]) -> list[Step] | None:
        """What `many` is to do; `None` where only `carefully` will do. Needs no connection, from whatever thread."""
        try:
            return steps(batches, self.plan)
        except FoldError:
            return None

    def many(self, folded: Sequence[Step], *, complete: bool) -> None:
        """Write each table's net effect in a few statements. Raises `FoldError` if a row was not there.

        complete: whether they end with a source transaction.
        """
        alone = [step for step in folded if not isinstance(step, SetWise)]
        if any(step.plan is not None and self.stale.moves_in_part(step.plan, step.change) for step in alone):
            raise FoldError
        for step in folded:
            if isinstance(step, SetWise):
                self._set_wise(step)
            elif step.plan is None:
                execute(self._connection, self._truncate(step.tables, step.change))
            else:
                self._alone(step.plan, step.change)
        self._check_deferred(complete=complete)

    def carefully(self, batches: Sequence[Batch], *, late: bool) -> None:
        """Apply one change at a time, constraints deferred within each source transaction; heal missing rows.

        late: whether they were parked, and others of their transactions are applied already.
        """
        self._reshaper.late = late
        for batch in batches:
            for transaction in batch.transactions:
                self._transaction(batch.tables, transaction)

    def reload(self) -> None:
        """Note that the bookkeeping has changed."""
        self._reshaper.reload()

    def needs_care(self, batch: Batch) -> bool:
        """Whether it is certain that only `carefully` will do."""
        try:
            return self._move_in_part([batch])
        except FoldError:
            return False

    def undo(self) -> None:
        """Go back to the savepoint, and behind what cleaning up after that takes: it is not to be undone as well."""
        self.transaction.undo()
        self._staging.drop()
        self.transaction.prepared.forget()
        self._reshaper.rolled_back()
        self.transaction.keep()

    def committed(self) -> None:
        """Note that the target transaction has ended: staging tables are empty again."""
        self._staging.emptied()
        self._reshaper.committed()

    # statements

    def plan(self, table: Table) -> TablePlan:
        """How changes of a table become statements. `FoldError` where a change of shape has to be followed first."""
        return self.plans.of(table)

    def _statement(self, tables: Tables, change: Change) -> Statement | None:
        if change.operation == TRUNCATE:
            return self._truncate(tables, change)
        if change.operation == MESSAGE:
            return None
        plan = self.plan(tables[change.table])
        if change.operation == INSERT:
            assert change.after is not None
            return plan.insert(change.after)
        return plan.update(change) if change.operation == UPDATE else plan.delete(change)

    def _truncate(self, tables: Tables, change: Change) -> Statement:
        detail = change.detail
        assert isinstance(detail, Truncate)
        names = [self.plans.target_name(tables[index]) for index in detail.tables]
        return truncate(names, restart_identity=detail.restart_identity).as_bytes(), ()

    def _check_deferred(self, *, complete: bool) -> None:
        """Check what would otherwise fail at COMMIT, outside the savepoint."""
        if self._deferrable and complete:
            execute(self._connection, _CHECK_DEFERRED)

    # set-wise

    def _set_wise(self, step: SetWise) -> None:
        plan = step.plan
        if step.effect is Effect.INSERT:
            copy_in(self._connection, plan.copy_in(), step.text)
            return
        name = self._staging.table(plan, step.columns)
        copy_in(
            self._connection,
            sql.SQL("COPY {} ({}) FROM STDIN").format(sql.Identifier("pg_temp", name), plan.names(step.columns)),
            step.text,
        )
        if step.effect is Effect.DELETE:
            self.missing += step.rows - self._connection.execute(plan.delete_staged(name)).rowcount
        elif self._connection.execute(plan.update_staged(name, step.columns)).rowcount != step.rows:
            raise FoldError

    def _planned(self, batches: Sequence[Batch]) -> Iterator[tuple[TablePlan, Change]]:
        for batch in batches:
            for transaction in batch.transactions:
                for change in transaction.changes:
                    if change.operation == UPDATE:
                        yield self.plan(batch.tables[change.table]), change

    def _move_in_part(self, batches: Sequence[Batch]) -> bool:
        return bool(self.stale.tables) and any(self.stale.moves_in_part(*each) for each in self._planned(batches))

    def _alone(self, plan: TablePlan, change: Change) -> None:
        statement = plan.update(change) if change.operation == UPDATE else plan.delete(change)
        if statement is not None and execute(self._connection, statement).rowcount == 0:
            raise FoldError

    # one by one

    def _transaction(self, tables: Tables, transaction: Transaction) -> None:
        if self._deferrable:
            self._connection.execute("SET CONSTRAINTS ALL DEFERRED")
        for index, change in enumerate(transaction.changes):
            try:
                self._fit(tables, change, as_lsn(transaction.position))
                if self._is_wanted(tables, change, as_lsn(transaction.position)):
                    self._one_of_stale(tables, change)
            except psycopg.Error as exc:
                raise _refused(exc, tables, transaction, index) from exc
        self._check_deferred(complete=transaction.complete)

    def _one_of_stale(self, tables: Tables, change: Change) -> None:
        """Where a stale row of the mirror has the unique value that a right one gets, that one goes first.

        And what a row that moves does not bring along is read again.
        """
        plan = self.plan(tables[change.table]) if change.table >= 0 and change.after is not None else None
        if plan is None or not self.stale.may_collide(plan, change):
            self._one(tables, change)
            return
        self._connection.execute("SAVEPOINT one")
        try:
            self._one(tables, change)
        except psycopg.errors.UniqueViolation:
            self._connection.execute("ROLLBACK TO SAVEPOINT one")
            self.stale.give_way(plan, change)
            self._one(tables, change)
        self._connection.execute("RELEASE SAVEPOINT one")
        if self.stale.moves_in_part(plan, change):
            self.stale.complete(plan, change)

    def _fit(self, tables: Tables, change: Change, position: Lsn) -> None:
        """Let the mirror's table follow what has happened to the source's, before the change."""
        plans = self.plans
        if isinstance(change.detail, Ddl):
            self._reshaper.follow(change.detail, position)
        elif change.operation < TRUNCATE:
            try:
                plans.of(tables[change.table])
            except Unfit:
                self._reshaper.settle(tables[change.table], position)
        if self.plans is not plans:
            self._staging.drop()

    def _is_wanted(self, tables: Tables, change: Change, position: Lsn) -> bool:
        """False where a change of shape before it has ended the mirroring of its table."""
        if change.operation >= TRUNCATE:
            return change.operation == TRUNCATE
        mirrored = self.plans.roster.find(tables[change.table])
        return mirrored is None or mirrored.applied_from <= position

    def _one(self, tables: Tables, change: Change) -> None:
        if change.operation == INSERT:
            assert change.after is not None
            self._put(self.plan(tables[change.table]), change.after)
            return
        statement = self._statement(tables, change)
        if statement is None or execute(self._connection, statement).rowcount != 0 or change.operation == TRUNCATE:
            return
        self.missing += 1
        if change.operation == UPDATE:
            self._heal(self.plan(tables[change.table]), change)

    def _heal(self, plan: TablePlan, change: Change) -> None:
        """Write a row that should have been there: from the change, or as the source has it now.

        Gone from the source as well, its DELETE is on its way.
        """
        image = change.after
        assert image is not None
        row = decode_row(image)
        if any(row[index] is UNCHANGED for index in plan.columns):
            if self._reread is None:
                raise PermanentError(
                    f"a row of {plan.target.name} is missing, and its update does not carry all columns",
                    hint="something else wrote to the mirror: find the rows with `cdc verify`",
                )
            image = self._reread(plan.source, image)
        if image is not None:
            whole = msgspec.structs.replace(change, operation=INSERT, after=image)
            if self.stale.may_collide(plan, whole):
                self.stale.give_way(plan, whole)
            self._put(plan, image)
            self.healed += 1

    def _put(self, plan: TablePlan, image: Image) -> None:
        """Insert a row, or write it over the one that has its key: it may be there already."""
        if plan.can_upsert:
            execute(self._connection, plan.insert(image, upsert=True))
        elif not plan.key or execute(self._connection, plan.overwrite(image)).rowcount == 0:
            execute(self._connection, plan.insert(image))


class _TextDumper(Dumper):
    """Sends a value's text as it is, and lets the server find its type from the column."""

    format = pq.Format.TEXT
    oid = 0

    def dump(self, obj: Buffer) -> Buffer:
        return obj


def _refused(error: psycopg.Error, tables: Tables, transaction: Transaction, index: int) -> Exception:
    """Say which change the target refuses; its values belong to no log."""
    translated = to_cdc_error(error)
    if not isinstance(translated, PermanentError):
        return translated
    change = transaction.changes[index]
    return Refused(
        f"{Operation(change.operation).name} of {tables[change.table].qualified} "
        f"(change {transaction.first_ordinal + index} of the transaction at {format_position(transaction.position)}) "
        f"is refused by the mirror: {translated}",
        hint="put the mirror's table right (schema, or rows that something else wrote); then `cdc resume`",
        change=change,
    )
