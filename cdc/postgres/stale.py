"""Rows of a mirror that may not be right yet, and how changes that are right get past them.

While a mirror is resynced, or its stream delivered again, it may hold rows that the source has changed or deleted long
ago. A change may meet such a row: in a unique index, or at the key that it gives to another row.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from psycopg import sql

from cdc.change import UPDATE, Change, TableName
from cdc.postgres.conflicts import UniqueIndex, remove_conflicts, unique_indexes
from cdc.postgres.connection import Connection
from cdc.postgres.copy_text import copy_text
from cdc.postgres.fold import old_row
from cdc.postgres.plan import TablePlan
from cdc.postgres.prepared import execute
from cdc.postgres.row import UNCHANGED, decode_row, encode_row
from cdc.postgres.staging import copy_in
from cdc.sink import Reread


class StaleRows:
    """Finds what stale rows ask of a change, and does it, inside the target transaction that the caller began.

    tables: those of the mirror that may hold some.
    """

    def __init__(self, connection: Connection, reread: Reread | None) -> None:
        self.tables: set[TableName] = set()
        self._connection = connection
        self._reread = reread
        self._unique: dict[tuple[TableName, tuple[str, ...]], Sequence[UniqueIndex]] = {}

    def moves_in_part(self, plan: TablePlan, change: Change) -> bool:
        """Whether a row that may be stale gets another key, perhaps among rows that are right, but not all columns."""
        if plan.target.name not in self.tables or change.operation != UPDATE:
            return False
        assert change.after is not None
        return UNCHANGED in decode_row(change.after) and _moves(plan, change)

    def may_collide(self, plan: TablePlan, change: Change) -> bool:
        """Whether a stale row could be in the way: a row that keeps its key only meets others in further indexes."""
        if plan.target.name not in self.tables:
            return False
        return bool(self._unique_indexes(plan)) or (change.operation == UPDATE and _moves(plan, change))

    def complete(self, plan: TablePlan, change: Change) -> None:
        """Take the columns that did not travel as the source has them now. Gone from there, more is on its way."""
        assert change.after is not None
        image = self._reread(plan.source, change.after) if self._reread is not None else None
        if image is None:
            return
        row, now = decode_row(change.after), decode_row(image)
        patch = tuple(
            now[index] if value is UNCHANGED else value if index in plan.key else UNCHANGED
            for index, value in enumerate(row)
        )
        statement = plan.update(msgspec.structs.replace(change, key=None, before=None, after=encode_row(patch)))
        if statement is not None:
            execute(self._connection, statement)

    def give_way(self, plan: TablePlan, change: Change) -> None:
        """Delete what has the key that a row moves to, or a unique value that it gets; not the row itself."""
        assert change.after is not None
        row, old = decode_row(change.after), old_row(change)
        rows = [tuple(None if row[index] is UNCHANGED else row[index] for index in plan.columns)]
        if change.operation == UPDATE and _moves(plan, change):
            execute(self._connection, plan.delete(msgspec.structs.replace(change, key=None, before=None)))
            rows.append(tuple(old[index] if index in plan.key else None for index in plan.columns))
        self._connection.execute(plan.staging("cdc_right", plan.columns))
        stage = sql.Identifier("pg_temp", "cdc_right")
        copy_in(self._connection, sql.SQL("COPY {} FROM STDIN").format(stage), copy_text(rows))
        nulls_known = len(rows) == 1 and UNCHANGED not in row
        indexes = self._unique_indexes(plan)
        remove_conflicts(self._connection, plan.target.name, _key(plan), indexes, stage, nulls_known=nulls_known)
        self._connection.execute(sql.SQL("DROP TABLE {}").format(stage))

    def _unique_indexes(self, plan: TablePlan) -> Sequence[UniqueIndex]:
        table, key = plan.target.name, _key(plan)
        if (table, key) not in self._unique:
            self._unique[table, key] = unique_indexes(self._connection, table, key)
        return self._unique[table, key]


def _key(plan: TablePlan) -> tuple[str, ...]:
    return tuple(plan.source.columns[index].name for index in plan.key)


def _moves(plan: TablePlan, change: Change) -> bool:
    """Whether an update gives its row another key."""
    assert change.after is not None
    row, old = decode_row(change.after), old_row(change)
    return any(row[index] != old[index] for index in plan.key)
