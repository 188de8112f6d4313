"""The mirror's side of a resync: what is to be refreshed beside the stream, and what has to be copied again."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from cdc.change import TableName
from cdc.errors import UnknownTable
from cdc.position import Position, as_lsn
from cdc.postgres.bookkeeping import FORGOTTEN, Bookkeeping, Mark
from cdc.postgres.conflicts import checked_late
from cdc.postgres.connection import Connection, translated_errors
from cdc.postgres.refresh_marks import RefreshMark, RefreshMarks
from cdc.postgres.schema import read_tables
from cdc.postgres.settled import Settled
from cdc.postgres.target import CopyTarget
from cdc.sink import Resync


class RefreshTarget(CopyTarget):
    """Adds to a mirror: `cdc.sink.Mirror.want_resync` and `rewind`. Every method has its own connection."""

    def want_resync(self, tables: Collection[TableName] | None, end: Position, *, anew: bool = False) -> Resync:
        """Let tables (`None`: all) be put right beside the stream; those without a usable key are copied again.

        anew: the mirror stands at `end` from now on, whatever it holds.
        """
        with self._session() as connection, translated_errors():
            bookkeeping = Bookkeeping(connection, self.name)
            if not bookkeeping.exists:
                return Resync((), ())
            bookkeeping.create()  # one of an older version is completed
            with connection.transaction():
                connection.execute("SELECT FROM cdc.positions WHERE sink = %s FOR UPDATE", [self.name])
                marks = bookkeeping.marks()
                refreshed, again = self._divided(connection, marks, tables)
                refreshes = RefreshMarks(connection, self.name)
                if anew:
                    refreshes.begin_anew(end)
                refreshes.want(refreshed)
                bookkeeping.retry_from(marks if anew else refreshed, as_lsn(end.source))
                refreshes.done(again)
                bookkeeping.copy_again(again)
        return Resync(tuple(refreshed), tuple(again))

    def rewind(self, position: Position) -> None:
        """Let the mirror stand at an earlier position: what follows it is delivered once more."""
        with self._session() as connection, translated_errors(), connection.transaction():
            connection.execute("SELECT FROM cdc.positions WHERE sink = %s FOR UPDATE", [self.name])
            RefreshMarks(connection, self.name).rewind(position)
            Settled(connection, self.name).forget_from(as_lsn(position.source))

    def _divided(
        self, connection: Connection, marks: Mapping[TableName, Mark], tables: Collection[TableName] | None
    ) -> tuple[list[TableName], list[TableName]]:
        """Tables that can be refreshed, and those that must be copied again. What is not complete is copied anyway."""
        mirrored = {table for table, mark in marks.items() if mark.copied_at != FORGOTTEN}
        if unknown := set(tables or ()) - mirrored:
            raise UnknownTable(
                f"sink {self.name} has no table {', '.join(map(str, sorted(unknown)))}",
                hint=f"one of: {', '.join(map(str, sorted(mirrored)))}",
            )
        present = read_tables(connection)
        refreshed: list[TableName] = []
        again: list[TableName] = []
        for table in sorted(mirrored if tables is None else tables):
            there = present.get(self.config.target_name(table))
            if marks[table].copied_at is None or there is None:
                continue
            usable = there.primary_key and not there.key_deferrable and not checked_late(connection, there.name)
            (refreshed if usable else again).append(table)
        return refreshed, again

    def _unrefreshed(self, connection: Connection) -> dict[TableName, RefreshMark]:
        return RefreshMarks(connection, self.name).read()

    def _copy_again(self, connection: Connection, tables: Collection[TableName]) -> None:
        """As it turned out, these can neither be altered nor refreshed."""
        with translated_errors(), connection.transaction():
            Bookkeeping(connection, self.name).copy_again(tables)
            RefreshMarks(connection, self.name).done(tables)
