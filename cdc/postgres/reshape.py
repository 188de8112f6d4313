"""Keeps the tables of a mirror in the shape that the source's tables have, while changes are applied.

A change of shape is known for sure, and in its place, where the source says so in the stream (`follow`: written by an
event trigger, or by the source itself that has looked into the catalog). A Relation message alone never changes the
mirror: where it describes something else, the source's catalog is asked (`settle`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NoReturn

import msgspec
import psycopg
import structlog

from cdc.change import Ddl, Table, TableName
from cdc.config import SinkConfig, SourceConfig
from cdc.errors import PermanentError
from cdc.position import Lsn
from cdc.postgres.alter import LACKING, MirrorTable, describe
from cdc.postgres.bookkeeping import FORGOTTEN, Bookkeeping
from cdc.postgres.connection import Connection
from cdc.postgres.evolution import SetKey, Step, between, evolve, is_part
from cdc.postgres.refresh_marks import RefreshMarks
from cdc.postgres.renaming import Renaming
from cdc.postgres.roster import Mirrored, Plans, Roster
from cdc.postgres.schema import read_tables
from cdc.postgres.shape import Followed, TableShape, decode
from cdc.sink import NeedsFilling

log = structlog.get_logger()

ReadShapes = Callable[[Collection[int]], Sequence[TableShape]]
"""Asks the source's catalog."""

_LIKEWISE = (
    "alter the mirror likewise, then `cdc resume {sink}`; "
    'or let cdc do it: schema_changes = "apply" for sink {sink}, and start the daemon again'
)
_ONLY_A_COPY = (
    "altering the mirror is not enough, its rows must be copied again: "
    'set schema_changes = "apply" for sink {sink}, and start the daemon again, which does that'
)


class CopyAgain(Exception):
    """A table of the mirror cannot be altered to what the source's has become: its rows are to be copied once more."""

    def __init__(self, table: TableName, reason: str) -> None:
        super().__init__(f"{table}: {reason}")
        self.table = table


class Reshaper:
    """Alters tables inside the target transactions that changes are applied in, and remembers what they have followed.

    plans: the mirror as it is now. After a rollback that takes back what was altered: `reload`.
    late: whether changes are applied that were parked: they follow others of their transaction.
    """

    def __init__(
        self,
        connection: Connection,
        config: SinkConfig,
        source: SourceConfig | None,
        read_shapes: ReadShapes | None,
        asked: set[int],
    ) -> None:
        """asked: OIDs of new tables that a copy was asked for: once only, since they may be gone by now."""
        self._connection = connection
        self._config = config
        self._source = source
        self._read_shapes = read_shapes
        self._bookkeeping = Bookkeeping(connection, config.name)
        self._refreshes = RefreshMarks(connection, config.name)
        self._asked = asked
        self._following: set[int] = set()  # OIDs, in the open target transaction
        self._changed = False
        self.late = False
        self.reload()

    def reload(self) -> None:
        """Read the mirror's own catalog and bookkeeping."""
        followed, retried_from = self._bookkeeping.followed(), self._bookkeeping.retried_from()
        self._made = {name for name, mark in self._bookkeeping.marks().items() if mark.made}
        self.plans = Plans(
            self._config,
            Roster(
                Mirrored(name, mark.copied_at, followed.get(name), retried_from.get(name, Lsn(0)))
                for name, mark in self._bookkeeping.marks().items()
                if mark.copied_at is not None
            ),
            read_tables(self._connection),
        )
        self._changed = False

    def committed(self) -> None:
        """What was altered since the last call is durable."""
        self._changed = False
        self._following.clear()

    def rolled_back(self) -> None:
        """What was altered since the savepoint has been undone."""
        if self._changed:
            self.reload()

    def follow(self, change: Ddl, position: Lsn) -> None:
        """A table has this shape from here on. Raises `CopyAgain`, `NeedsFilling`, or what the mirror refuses."""
        shape = decode(change.description, TableShape)
        mirrored = self.plans.roster.by_oid(shape.oid)
        if mirrored is None or mirrored.applied_from == FORGOTTEN:
            self._unknown(shape, position)
            return
        again = self._is_past(mirrored, position) and not (self.late and self._is_of(mirrored, position))
        if again or position < mirrored.applied_from:
            return
        if shape.dropped:
            self._forget(mirrored, "dropped at the source")
            return
        if shape.qualified != mirrored.name:
            renamed = self._rename(mirrored, shape.qualified)
            if renamed is None:
                return
            mirrored = renamed
        assert mirrored.followed is not None
        self._evolve(mirrored, mirrored.followed.shape, shape)
        self._store(mirrored, Followed(shape, position))

    def settle(self, table: Table, position: Lsn) -> None:
        """A change comes in a shape that the mirror has not followed: find out what to do, and do it.

        On return `plans` has a plan for it. Raises `CopyAgain`, or `PermanentError` where it cannot be followed.
        """
        mirrored = self.plans.roster.find(table)
        if mirrored is None or self._read_shapes is None or not table.oid:
            self.plans.accept(table, strict=True)
            return
        followed = mirrored.followed
        if followed is not None and self._is_past(mirrored, position):
            if not is_part(table, followed.shape):
                raise CopyAgain(mirrored.name, "rows of an older shape were delivered again")
            log.warning("an older shape, delivered again", sink=self._config.name, table=str(mirrored.name))
            self.plans.accept(table, strict=False)
            return
        if followed is not None and followed.shape.oid != table.oid:
            self._copy_again(mirrored.name, "it was dropped and created again")
        current = next(iter(self._read_shapes([table.oid])), None)
        if current is None:
            self._copy_again(mirrored.name, "it is gone from the source, and nothing tells what it was before")
        if followed is None:
            self._adopt(mirrored, table, current, position)
            return
        shape = between(followed.shape, table, current)
        if shape is None:
            self._copy_again(mirrored.name, "the source's table has changed more than once since")
        if shape.qualified != mirrored.name and shape.qualified == current.qualified:
            mirrored = self._rename(mirrored, shape.qualified) or mirrored
        self._evolve(mirrored, followed.shape, shape)
        # whether rows were rewritten on the rest of the way is still to be seen
        self._store(mirrored, Followed(msgspec.structs.replace(shape, filenode=followed.shape.filenode), position))
        self.plans.accept(table, strict=True)

    def _is_past(self, mirrored: Mirrored, position: Lsn) -> bool:
        """Whether a transaction comes once more, after which the table has followed something: the stream was set back.

        Within the transaction that is being applied, each shape follows the one before.
        """
        if mirrored.followed is None or mirrored.followed.shape.oid in self._following:
            return False
        return position <= mirrored.followed.position

    def _is_of(self, mirrored: Mirrored, position: Lsn) -> bool:
        """Whether the transaction has brought the shape that the table has followed."""
        return mirrored.followed is not None and position == mirrored.followed.position

    def _adopt(self, mirrored: Mirrored, table: Table, current: TableShape, position: Lsn) -> None:
        """A mirror that was made before shapes were kept: take the source's, if it is what the mirror has."""
        shape = between(current, table, current)
        steps = [] if shape is None else evolve(msgspec.structs.replace(current, columns=()), current).steps
        if shape is None or self._table(mirrored).left_to_do(steps, bearable=True):
            self._copy_again(mirrored.name, "it has changed since it was copied, and nothing tells how")
        self._store(mirrored, Followed(shape, position))
        self.plans.accept(table, strict=True)

    def _unknown(self, shape: TableShape, position: Lsn) -> None:
        """The shape of a table that is not mirrored: one that comes new, or again, or none of ours."""
        if shape.dropped or self._source is None or not self._source.tables.match(shape.qualified):
            return
        mirrored = self.plans.roster.by_name(shape.qualified)
        if mirrored is not None and mirrored.applied_from != FORGOTTEN:
            if position < mirrored.applied_from:
                return
            if mirrored.followed is not None:
                self._copy_again(mirrored.name, "another table has its name now")
            self._adopt(mirrored, shape.described(), shape, position)
        elif shape.oid not in self._asked:
            self._asked.add(shape.oid)
            if mirrored is not None:
                raise CopyAgain(mirrored.name, "it is captured again")
            raise NeedsFilling(f"table {shape.qualified} is new")

    def _rename(self, mirrored: Mirrored, name: TableName) -> Mirrored | None:
        """Follow a table to its new name. `None` where that is not captured: the mirror then keeps what it has."""
        if self._source is not None and not self._source.tables.match(name):
            self._forget(mirrored, f"{name} now, and not captured")
            return None
        renaming = Renaming(self._connection, self._config, mirrored.name, name)
        if self._config.schema_changes == "stop" and not renaming.done:
            raise self._stopped(mirrored.name, f"it is called {name} now", _LIKEWISE)
        if not renaming.possible:
            self._copy_again(name, f"{mirrored.name} has this name now")
        renaming.carry_out()
        renamed = msgspec.structs.replace(mirrored, name=name)
        if mirrored.name in self._made:
            self._made.add(name)
        self._replan(mirrored, renamed)
        return renamed

    def _forget(self, mirrored: Mirrored, reason: str) -> None:
        log.warning(
            "table no longer mirrored; what it holds stays",
            sink=self._config.name,
            table=str(mirrored.name),
            reason=reason,
        )
        self._bookkeeping.forget([mirrored.name])
        self._refreshes.done([mirrored.name])
        self._replan(mirrored, msgspec.structs.replace(mirrored, applied_from=FORGOTTEN))

    def _evolve(self, mirrored: Mirrored, old: TableShape, new: TableShape) -> None:
        evolution = evolve(old, new)
        if evolution.copy_because:
            self._copy_again(mirrored.name, evolution.copy_because)
        steps = evolution.steps
        if steps:
            self._bookkeeping.outdate([mirrored.name])
        if any(isinstance(step, SetKey) for step in steps):
            self._refreshes.restart(mirrored.name)
        if self._config.schema_changes == "stop":
            if left := self._table(mirrored).left_to_do(steps, bearable=True):
                raise self._stopped(mirrored.name, "; ".join(map(describe, left)), _LIKEWISE)
            return
        self._carry_out(mirrored, steps)

    def _carry_out(self, mirrored: Mirrored, steps: Sequence[Step]) -> None:
        try:
            self._table(mirrored).carry_out(steps)
        except LACKING as exc:
            self._copy_again(mirrored.name, f"it needs what the mirror has not: {exc.diag.message_primary}")
        except psycopg.errors.DependentObjectsStillExist as exc:
            raise PermanentError(
                f"schema change of {mirrored.name} ({'; '.join(map(describe, steps))}) is refused by the mirror: "
                f"{exc.diag.message_primary}",
                hint=f"drop what depends on it there, then `cdc resume {self._config.name}`: "
                f"{exc.diag.message_detail or ''}",
            ) from exc

    def _table(self, mirrored: Mirrored) -> MirrorTable:
        return MirrorTable(
            self._connection,
            self._config.name,
            self._config.target_name(mirrored.name),
            made=mirrored.name in self._made,
            written=self._config.table(mirrored.name).columns,
        )

    def _copy_again(self, table: TableName, reason: str) -> NoReturn:
        if self._config.schema_changes == "stop":
            raise self._stopped(table, reason, _ONLY_A_COPY)
        raise CopyAgain(table, reason)

    def _stopped(self, table: TableName, change: str, remedy: str) -> PermanentError:
        return PermanentError(
            f'table {table} has changed at the source: {change} (and schema_changes = "stop")',
            hint=remedy.format(sink=self._config.name),
        )

    def _store(self, mirrored: Mirrored, followed: Followed) -> None:
        self._bookkeeping.follow(mirrored.name, followed)
        self._following.add(followed.shape.oid)
        self._replan(mirrored, msgspec.structs.replace(mirrored, followed=followed))

    def _replan(self, old: Mirrored, new: Mirrored) -> None:
        """Nothing that was planned with the old state holds any longer."""
        self._changed = True
        roster = self.plans.roster.replaced(old, new)
        self.plans = Plans(self._config, roster, read_tables(self._connection))
