"""Many changes as the few steps that have the same effect, ready to be sent. Needs no connection."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from enum import Enum, auto
from typing import TYPE_CHECKING

import msgspec

from cdc.change import DDL, TRUNCATE, Batch, Change, Image, Table, TableName
from cdc.packed_rows import SUMMARY_BYTES, PackedRows, change_at
from cdc.postgres.copy_text import copy_text, plain_text
from cdc.postgres.fold import Appends, Fold, FoldError, changed_columns
from cdc.postgres.plan import TablePlan
from cdc.postgres.row import Row

if TYPE_CHECKING:
    from cdc.postgres import _fold
else:
    try:
        from cdc.postgres import _fold
    except ImportError:
        _fold = None

Tables = tuple[Table, ...]

PlanOf = Callable[[Table], TablePlan]


class Effect(Enum):
    """What the rows of a step are for."""

    DELETE = auto()
    UPDATE = auto()
    INSERT = auto()


class SetWise(msgspec.Struct, frozen=True):
    """Some columns of many rows of a table, in COPY's text format."""

    effect: Effect
    plan: TablePlan
    columns: tuple[int, ...]
    rows: int
    text: bytes


class Alone(msgspec.Struct, frozen=True):
    """A change that keeps its meaning only by itself. plan: `None` for a TRUNCATE."""

    plan: TablePlan | None
    tables: Tables
    change: Change


Step = SetWise | Alone


def written_by(found: Sequence[Step]) -> int:
    """How many rows the steps write or delete; those of a TRUNCATE count as one."""
    return sum(step.rows if isinstance(step, SetWise) else 1 for step in found)


def steps(batches: Sequence[Batch], plan_of: PlanOf) -> list[Step]:
    """Fold the changes by key, table by table. Raises `FoldError` where only their order would tell their effect."""
    lanes = _Lanes(plan_of)
    for batch in batches:
        by_index = lanes.of(batch.tables)
        for change in unplain_changes(batch, by_index):
            if change.operation < TRUNCATE:
                lane = by_index[change.table]
                if lane is None:
                    raise FoldError
                if not lane.fold.add(change):
                    lanes.flush(lane)
                    lanes.steps.append(Alone(lane.plan, batch.tables, change))
            elif change.operation == TRUNCATE:
                lanes.flush_all()
                lanes.steps.append(Alone(None, batch.tables, change))
            elif change.operation == DDL:
                raise FoldError  # what comes behind it has another shape
    lanes.flush_all()
    return lanes.steps


def unplain_changes(batch: Batch, lanes: Sequence[_Lane | None]) -> Iterator[Change]:
    """The changes of a batch, but for those rows that get into their folds by themselves, packed as they are.

    Each has to be dealt with before the next one is asked for: it may leave a lane with another fold.
    """
    transactions = batch.transactions
    if _fold is None or not isinstance(transactions, PackedRows):
        for transaction in transactions:
            yield from transaction.changes
        return
    data, at, left = transactions.data, SUMMARY_BYTES, 0
    while True:
        slots = [lane.fold.slots if lane is not None else None for lane in lanes]
        at, left = _fold.add_plain(data, at, left, slots)
        if not left:
            return
        change, at = change_at(data, at)
        left -= 1
        yield change


class _Lane:
    """What has come for one table and is not a step yet."""

    __slots__ = ("fold", "plan")

    def __init__(self, plan: TablePlan) -> None:
        self.plan = plan
        self.reset()

    def reset(self) -> None:
        self.fold: Fold | Appends = Fold(self.plan.key_of) if self.plan.key else Appends()


class _Lanes:
    """A lane for each table, and the steps that came out of them."""

    def __init__(self, plan_of: PlanOf) -> None:
        self.steps: list[Step] = []
        self._plan_of = plan_of
        self._lanes: dict[TableName, _Lane] = {}

    def of(self, tables: Tables) -> list[_Lane | None]:
        """The lanes of a batch's tables, in their order; `None` where changes of one cannot be folded."""
        if len({table.qualified for table in tables}) < len(tables):
            raise FoldError  # a table changes its shape between two changes of this batch
        return [self._lane(table) for table in tables]

    def flush_all(self) -> None:
        """Turn all that has come into steps."""
        for lane in self._lanes.values():
            self.flush(lane)

    def flush(self, lane: _Lane) -> None:
        """Turn what has come for this table into steps."""
        fold = lane.fold
        if not fold:
            return
        lane.reset()
        if isinstance(fold, Fold):
            self._delete(lane.plan, list(fold.deleted()))
            self._write(Effect.UPDATE, lane.plan, fold.updated(), fold.row)
        self._write(Effect.INSERT, lane.plan, fold.inserted(), fold.row)

    def _lane(self, table: Table) -> _Lane | None:
        lane = self._lanes.get(table.qualified)
        if lane is None or lane.plan.source != table:
            if lane is not None:  # the table has a new shape: what came in the old one goes first
                self.flush(lane)
            try:
                lane = self._lanes[table.qualified] = _Lane(self._plan_of(table))
            except FoldError:  # that of a table of which nothing is wanted does not matter
                return None
        return lane

    def _delete(self, plan: TablePlan, rows: list[Row]) -> None:
        if rows:
            self._add(Effect.DELETE, plan, plan.key, len(rows), copy_text(plan.pick(rows, plan.key)))

    def _write(
        self, effect: Effect, plan: TablePlan, images: Collection[Image], row_of: Callable[[Image], Row]
    ) -> None:
        others = images
        if plan.takes_all:
            text, others = plain_text(images, plan.width)
            self._add(effect, plan, plan.columns, len(images) - len(others), text)
        groups: dict[tuple[int, ...] | None, list[Row]] = {}
        for row in map(row_of, others):
            groups.setdefault(changed_columns(row), []).append(row)
        for changed, rows in groups.items():
            columns = plan.columns if changed is None else tuple(index for index in plan.columns if index in changed)
            if effect is Effect.INSERT and columns != plan.columns:
                raise FoldError  # only an update may leave something out
            if effect is Effect.INSERT or len(columns) > len(plan.key):  # else nothing but the key travelled
                self._add(effect, plan, columns, len(rows), copy_text(plan.pick(rows, columns)))

    def _add(self, effect: Effect, plan: TablePlan, columns: tuple[int, ...], rows: int, text: bytes) -> None:
        if rows:
            self.steps.append(SetWise(effect, plan, columns, rows, text))
