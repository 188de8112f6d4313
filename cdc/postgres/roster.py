"""The tables of a mirror, and how changes of the source's tables become statements for them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import msgspec

from cdc.change import Table, TableName
from cdc.config import SinkConfig
from cdc.errors import PermanentError
from cdc.position import Lsn
from cdc.postgres.fold import FoldError
from cdc.postgres.plan import TablePlan
from cdc.postgres.schema import SchemaTable
from cdc.postgres.shape import Followed


class Mirrored(msgspec.Struct, frozen=True):
    """A table that is mirrored.

    name: at the source, as the bookkeeping has it. applied_from: the position from which on changes are applied.
    followed: the shape of the source's table that it has followed; `None` where none was kept (an old mirror).
    retried_from: the same for changes that were parked: a resync reads again what earlier ones were about.
    """

    name: TableName
    applied_from: Lsn
    followed: Followed | None = None
    retried_from: Lsn = Lsn(0)


class Roster:
    """All tables of a mirror. Told apart by OID; by name where a change or the bookkeeping has none."""

    def __init__(self, tables: Iterable[Mirrored] = ()) -> None:
        self._by_name = {table.name: table for table in tables}
        self._by_oid = {table.followed.shape.oid: table for table in self._by_name.values() if table.followed}

    def __iter__(self) -> Iterator[Mirrored]:
        """All of them."""
        return iter(self._by_name.values())

    def find(self, table: Table) -> Mirrored | None:
        """The mirrored table that a change is about."""
        return self._by_oid.get(table.oid) or self._by_name.get(table.qualified)

    def by_oid(self, oid: int) -> Mirrored | None:
        """The mirrored table whose shape has this OID."""
        return self._by_oid.get(oid)

    def by_name(self, name: TableName) -> Mirrored | None:
        """The mirrored table with this name at the source."""
        return self._by_name.get(name)

    def replaced(self, old: Mirrored, new: Mirrored) -> Roster:
        """The same with another entry."""
        return Roster([*(each for each in self if each.name not in (old.name, new.name)), new])


class Unfit(FoldError):
    """A table is described in a shape that its mirror has not followed: only the careful way may look into that."""


class Plans:
    """One state of a mirror: its tables, their columns, and the plans made for them. Never changes its answers.

    So another thread may prepare with it what is applied later, if it is still the state then.
    """

    def __init__(self, config: SinkConfig, roster: Roster, target: Mapping[TableName, SchemaTable]) -> None:
        self.roster = roster
        self.target = target
        self._config = config
        self._plans: dict[Table, TablePlan] = {}

    def of(self, table: Table) -> TablePlan:
        """The plan for a table in a shape. Raises `Unfit` where the mirror's table is not known to have it."""
        plan = self._plans.get(table)
        if plan is None:
            mirrored = self.roster.find(table)
            if mirrored is None or not self._fits(mirrored, table):
                raise Unfit
            plan = self._plans[table] = self._plan(mirrored, table, self._config.table(mirrored.name).columns)
        return plan

    def accept(self, table: Table, *, strict: bool) -> None:
        """Take changes in this shape from now on; unless `strict`, as far as the mirror's table has such columns."""
        mirrored = self._mirrored(table)
        if strict:
            self._plans[table] = self._plan(mirrored, table, self._config.table(mirrored.name).columns)
            return
        there = {column.name for column in self._target(mirrored.name).columns if not column.generated}
        wanted = self._config.table(mirrored.name).columns
        names = [name for name in (wanted or (column.name for column in table.columns)) if name in there]
        self._plans[table] = self._plan(mirrored, table, names)

    def target_name(self, table: Table) -> TableName:
        """Where a table is mirrored to."""
        return self._config.target_name(self._mirrored(table).name)

    def _mirrored(self, table: Table) -> Mirrored:
        found = self.roster.find(table)
        if found is None:
            raise PermanentError(
                f"table {table.qualified} was never copied to the mirror",
                hint=f"`cdc resume {self._config.name}`: it then copies tables that are new",
            )
        return found

    def _target(self, name: TableName) -> SchemaTable:
        found = self.target.get(self._config.target_name(name))
        if found is None:
            raise PermanentError(
                f"table {name} was never copied to the mirror",
                hint=f"`cdc resume {self._config.name}`: it then copies tables that are new",
            )
        return found

    def _fits(self, mirrored: Mirrored, table: Table) -> bool:
        target = self._target(mirrored.name)
        if mirrored.followed is None:
            there = {column.name for column in target.columns if not column.generated}
            return all(column.name in there for column in table.columns)
        shape = mirrored.followed.shape
        same = [(column.name, column.type_oid) for column in shape.described().columns]
        if table.oid not in (0, shape.oid) or [(column.name, column.type_oid) for column in table.columns] != same:
            return False
        # a deferrable key is none that the source sends
        return table.primary_key in {None, frozenset(() if target.key_deferrable else shape.primary_key)}

    def _plan(self, mirrored: Mirrored, table: Table, columns: Iterable[str] | None) -> TablePlan:
        return TablePlan(table, self._target(mirrored.name), None if columns is None else tuple(columns))
