"""Which parked changes a target has got last."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from cdc.position import Lsn, format_lsn, parse_lsn
from cdc.postgres.connection import Connection, table_exists, while_doing


class Settled:
    """The parked changes of a sink that were applied last, so that none is applied twice: see `cdc.sink.Parking`.

    Made where a sink parks; in transactions of the caller's.
    """

    def __init__(self, connection: Connection, sink: str) -> None:
        self._connection = connection
        self._sink = sink

    def create(self) -> None:
        """Create the table where it is not there."""
        with while_doing("creating cdc.settled on the target"), self._connection.transaction():
            self._connection.execute("SELECT pg_advisory_xact_lock(hashtextextended('cdc.bookkeeping', 0))")
            if not table_exists(self._connection, "cdc.settled"):
                self._connection.execute(_SETTLED)

    def read(self) -> list[tuple[Lsn, int]]:
        """Position and ordinal of each."""
        query = "SELECT position::text, ordinal FROM cdc.settled WHERE sink = %s"
        return [(parse_lsn(position), ordinal) for position, ordinal in self._connection.execute(query, [self._sink])]

    def forget_from(self, position: Lsn) -> None:
        """Changes from a position on come again: they may be parked once more."""
        if table_exists(self._connection, "cdc.settled"):
            query = "DELETE FROM cdc.settled WHERE sink = %s AND position >= %s"
            self._connection.execute(query, [self._sink, format_lsn(position)])

    def replace(self, changes: Iterable[tuple[Lsn, int]]) -> None:
        """Remember these, and no others any more."""
        self._connection.execute("DELETE FROM cdc.settled WHERE sink = %s", [self._sink])
        with self._connection.cursor() as cursor:
            cursor.executemany(
                "INSERT INTO cdc.settled (sink, position, ordinal) VALUES (%s, %s, %s)",
                [(self._sink, format_lsn(position), ordinal) for position, ordinal in changes],
            )


_SETTLED: Final = """
CREATE TABLE cdc.settled (
    sink text,
    position pg_lsn,
    ordinal bigint,
    PRIMARY KEY (sink, position, ordinal)
)
"""
