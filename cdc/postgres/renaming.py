"""A table that has another name at the source: so it has on the mirror, with all that is kept about it."""

from __future__ import annotations

import structlog

from cdc.change import TableName
from cdc.config import SinkConfig
from cdc.postgres.bookkeeping import Bookkeeping
from cdc.postgres.connection import Connection
from cdc.postgres.preparation import rename_relations
from cdc.postgres.refresh_marks import RefreshMarks
from cdc.postgres.schema import read_tables

log = structlog.get_logger()


class Renaming:
    """One renaming, from and to a name at the source; within a transaction of the caller's."""

    def __init__(self, connection: Connection, config: SinkConfig, old: TableName, new: TableName) -> None:
        self._connection = connection
        self._config = config
        self._old, self._new = old, new
        self._bookkeeping = Bookkeeping(connection, config.name)
        present = read_tables(connection)
        self._targets = config.target_name(old), config.target_name(new)
        self._old_there, self._new_there = (name in present for name in self._targets)

    @property
    def done(self) -> bool:
        """Whether the mirror's table has its new name already."""
        return self._new_there and (self._targets[0] == self._targets[1] or not self._old_there)

    @property
    def possible(self) -> bool:
        """Whether nobody has the new name, and the table's options stay."""
        same_options = self._config.table(self._old) == self._config.table(self._new)
        return same_options and (self.done or not self._new_there)

    def carry_out(self) -> None:
        """Rename, if it is possible."""
        if not self.done:
            rename_relations(self._connection, [self._targets])
        self._bookkeeping.rename(self._old, self._new)
        RefreshMarks(self._connection, self._config.name).rename(self._old, self._new)
        log.info("table renamed", sink=self._config.name, table=str(self._old), to=str(self._new))
