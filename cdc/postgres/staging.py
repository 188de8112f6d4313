"""Staging: many rows go by COPY into a temporary table, and from there by one statement to where they belong."""

from __future__ import annotations

from typing import Final

from psycopg import sql

from cdc.postgres.connection import Connection
from cdc.postgres.plan import TablePlan

FIND_BY_INDEX: Final = """
SET enable_seqscan = off; SET random_page_cost = 0.1; SET seq_page_cost = 0.1; SET cpu_index_tuple_cost = 0.05;
SET jit = off
"""
"""The planner knows little about temporary tables and about tables that grow: it would read a table, or all of an
index, from end to end for each batch, or, by a plan made while it was empty, for each row. (JIT: scans that are "off"
look expensive to it.)
"""


class Staging:
    """Temporary tables of the session, one for each set of columns, empty outside a target transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._names: dict[tuple[TablePlan, tuple[int, ...]], str] = {}
        self._filled: set[str] = set()

    def table(self, plan: TablePlan, columns: tuple[int, ...]) -> str:
        """An empty temporary table with these columns of the plan's table."""
        name = self._names.get((plan, columns))
        if name is None:
            name = self._names[plan, columns] = f"cdc_stage_{len(self._names)}"
            self._connection.execute(plan.staging(name, columns))
        elif name in self._filled:
            self._connection.execute(sql.SQL("TRUNCATE {}").format(sql.Identifier("pg_temp", name)))
        self._filled.add(name)
        return name

    def emptied(self) -> None:
        """The transaction has committed."""
        self._filled.clear()

    def drop(self) -> None:
        """Start over: a rollback may have undone the creation of some of them."""
        for name in self._names.values():
            self._connection.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(sql.Identifier("pg_temp", name)))
        self._names.clear()
        self._filled.clear()


def copy_in(connection: Connection, query: sql.Composed, text: bytes) -> None:
    """Run a `COPY ... FROM STDIN` with these rows."""
    with connection.cursor() as cursor, cursor.copy(query) as copy:
        copy.write(text)
