"""Changes without what a mirror's initial copy holds already, or a resync will bring, table by table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec
import structlog

from cdc.change import DDL, Batch, Change, TableName, Transaction, Truncate
from cdc.position import Lsn, as_lsn
from cdc.postgres.roster import Mirrored, Roster

NEVER: Final = Lsn(2**64)
"""Behind every position there is."""

log = structlog.get_logger()


class Uncopied:
    """Of one sink."""

    def __init__(self, sink: str) -> None:
        self._sink = sink
        self._strangers: set[TableName] = set()

    def of(self, roster: Roster, batch: Batch, *, parked: bool = False) -> Batch:
        """What is left of a batch; of one that was `parked`, nothing that a resync reads again."""
        if not batch.transactions:
            return batch
        known = [roster.find(table) for table in batch.tables]
        self._note_strangers(batch, known)
        copied_at = [NEVER if table is None else _wanted_from(table, parked=parked) for table in known]
        if as_lsn(batch.summary.first) >= max(copied_at, default=Lsn(0)):
            return batch
        return msgspec.structs.replace(
            batch, transactions=[_uncopied(copied_at, transaction) for transaction in batch.transactions]
        )

    def _note_strangers(self, batch: Batch, known: Sequence[Mirrored | None]) -> None:
        """Say once of each table that it is not mirrored.

        The publication may be wider than the configuration, or a table newer than our last look for new ones. What
        is left out of such a table is in its copy, if it ever gets one.
        """
        strangers = {table.qualified for table, found in zip(batch.tables, known, strict=True) if found is None}
        for table in strangers - self._strangers:
            log.warning("not mirrored: copied once it is captured", sink=self._sink, table=str(table))
        self._strangers |= strangers


def _wanted_from(table: Mirrored, *, parked: bool) -> Lsn:
    return max(table.applied_from, table.retried_from) if parked else table.applied_from


def _uncopied(copied_at: Sequence[Lsn], transaction: Transaction) -> Transaction:
    position = as_lsn(transaction.position)
    copied = [position < at for at in copied_at]
    if not any(copied):
        return transaction
    changes = [kept for change in transaction.changes if (kept := _without_copied(change, copied)) is not None]
    return msgspec.structs.replace(transaction, changes=changes)


def _without_copied(change: Change, copied: Sequence[bool]) -> Change | None:
    """The change, as far as it is about tables whose copy does not hold it. Of DDL it tells itself what it is about."""
    if change.table < 0 or change.operation == DDL:
        return change
    if not isinstance(change.detail, Truncate):
        return None if copied[change.table] else change
    tables = tuple(index for index in change.detail.tables if not copied[index])
    if not tables:
        return None
    return msgspec.structs.replace(change, detail=msgspec.structs.replace(change.detail, tables=tables))
