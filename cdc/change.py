"""The values that flow from a source through the queue to the sinks.

Rows and documents stay as the source wrote them: for PostgreSQL the bytes of pgoutput, for MongoDB the raw BSON. Only
a sink that needs another form decodes, and only what it needs.

All types are array-like in msgpack: a batch in the queue holds no field names.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from enum import IntEnum
from itertools import chain
from operator import attrgetter
from typing import Final, NamedTuple

import msgspec

from cdc.position import SourcePosition

Image = bytes
"""A row or document as its source wrote it (PostgreSQL: `cdc.postgres.row`; MongoDB: BSON)."""


class Operation(IntEnum):
    """What a change does."""

    INSERT = 0
    UPDATE = 1
    DELETE = 2
    TRUNCATE = 3
    MESSAGE = 4
    DDL = 5


INSERT: Final = 0
UPDATE: Final = 1
DELETE: Final = 2
TRUNCATE: Final = 3
MESSAGE: Final = 4
DDL: Final = 5
"""Plain integers beside `Operation`: comparing enum members costs more than decoding a column."""


class TableName(NamedTuple):
    """A table's name at the source; `database` and `collection` for MongoDB."""

    schema: str
    name: str

    def __str__(self) -> str:
        """`schema.name`, as in configuration and messages (not quoted)."""
        return f"{self.schema}.{self.name}"


def table_name(text: str) -> TableName:
    """What `str` of a table's name has written."""
    schema, _, name = text.partition(".")
    return TableName(schema, name)


class Column(msgspec.Struct, frozen=True, array_like=True):
    """A column as the source describes it. `type_oid` is the source's and may mean nothing elsewhere."""

    name: str
    type_oid: int
    is_key: bool


class Table(msgspec.Struct, frozen=True, array_like=True):
    """A table (or collection) in one version of its shape. Two versions of a table are unequal.

    identity: PostgreSQL's replica identity: `d`efault, `i`ndex, `f`ull, `n`othing. Where a document of MongoDB is to be
        read again: its collection's UUID in hexadecimal, if that is known.
    oid: what PostgreSQL knows the table by, whatever it is called; 0 where that is not known.
    """

    schema: str
    name: str
    columns: tuple[Column, ...]
    identity: str = "d"
    oid: int = 0

    @property
    def qualified(self) -> TableName:
        """The name alone, without columns."""
        return TableName(self.schema, self.name)

    @property
    def primary_key(self) -> frozenset[str] | None:
        """Names of the primary key's columns, where that is what identifies a row (and not deferrable); else `None`."""
        return frozenset(column.name for column in self.columns if column.is_key) if self.identity == "d" else None


class Truncate(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """Detail of a TRUNCATE: all tables that one statement emptied, as indexes into `Batch.tables`."""

    tables: tuple[int, ...]
    cascade: bool
    restart_identity: bool


class Message(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """Detail of a logical message (`pg_logical_emit_message`) written inside a transaction."""

    prefix: str
    content: bytes


class Delta(msgspec.Struct, frozen=True, array_like=True, tag=3, gc=False):
    """Detail of an UPDATE that MongoDB sent as what changed: its `updateDescription`, as BSON.

    `Change.after` is then the document as it was looked up later, or `None`; a replacement has no delta.
    """

    description: Image


class Ddl(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """Detail of a DDL: what happened to the table itself, in the source's words (MongoDB: `operationType`).

    description: what the source tells about it (MongoDB: the whole event, as BSON; PostgreSQL: the table's shape from
        here on, as JSON).
    """

    kind: str
    description: Image


class Change(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One change of one row.

    operation: an `Operation`, as a plain integer.
    table: index into `Batch.tables`; -1 for a MESSAGE.
    key: what identified the row before the change; `None` where `before` or `after` tell it.
    before: the whole old row, where the source sends it (identity FULL); else `None`.
    after: the new row of an INSERT or UPDATE; an UPDATE may leave out what it did not change.
    detail: what only some operations have.
    """

    operation: int
    table: int
    key: Image | None
    before: Image | None
    after: Image | None
    detail: Truncate | Message | Delta | Ddl | None = None


class Transaction(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The changes of one source transaction, or a part of it that continues an earlier batch's.

    position: where it commits (PostgreSQL: the LSN at which the commit record starts). With the ordinal of a
        change it is that change's key: several changes may share an LSN.
    end: the position to go on from when it is done (PostgreSQL: the end of the commit record).
    commit_time: microseconds since 1970-01-01 UTC, by the source's clock.
    first_ordinal: ordinal of `changes[0]`; above 0 where earlier batches hold the beginning.
    complete: False where later batches hold the rest. Only the last transaction of a batch may be incomplete.
    """

    position: SourcePosition
    end: SourcePosition
    commit_time: int
    xid: int
    first_ordinal: int
    complete: bool
    changes: list[Change]


class Summary(NamedTuple):
    """What can be told of the transactions of a batch without looking into them.

    complete: how many of them end here; `ended`: whether the last one does.
    counts: changes by operation, as `Operation` numbers them.
    first, last: the positions of the first and the last one. commit_time: of the last.
    """

    complete: int
    ended: bool
    counts: Sequence[int]
    first: SourcePosition
    last: SourcePosition
    commit_time: int


class Summarized(Sequence[Transaction]):
    """Transactions that know their summary, and are taken apart only for who looks at them (see `cdc.packed`)."""

    __slots__ = ()

    @property
    @abstractmethod
    def summary(self) -> Summary:
        """Costs nothing."""

    @abstractmethod
    def once(self) -> Sequence[Transaction]:
        """The transactions, for who goes through them once: what was taken apart for that is not kept."""


class Batch(msgspec.Struct, frozen=True, array_like=True):
    """What a source hands to the queue at once, and the queue to a sink. Can be read alone.

    position: all that the source said up to here is in this batch or in earlier ones.
    size: bytes that it weighs for bounds and progress (the size on the wire, not in memory).
    A batch without transactions only moves the position.
    """

    tables: tuple[Table, ...]
    transactions: Sequence[Transaction]
    position: SourcePosition
    size: int

    @property
    def complete(self) -> bool:
        """Whether it ends between two transactions."""
        transactions = self.transactions
        if isinstance(transactions, Summarized):
            return transactions.summary.ended
        return not transactions or transactions[-1].complete

    @property
    def change_count(self) -> int:
        """Number of changes in all transactions."""
        return count_changes(self.transactions)

    def once(self) -> Sequence[Transaction]:
        """The transactions, for who goes through them once."""
        transactions = self.transactions
        return transactions.once() if isinstance(transactions, Summarized) else transactions

    @property
    def has_ddl(self) -> bool:
        """Whether there are changes of tables as such."""
        return bool(self.transactions) and self.summary.counts[DDL] > 0

    @property
    def summary(self) -> Summary:
        """Of its transactions, of which there must be some."""
        transactions = self.transactions
        if isinstance(transactions, Summarized):
            return transactions.summary
        operations = bytes(map(_OPERATION, chain.from_iterable(map(_CHANGES, transactions))))
        last = transactions[-1]
        return Summary(
            complete=len(transactions) - (not last.complete),
            ended=last.complete,
            counts=[operations.count(operation) for operation in Operation],
            first=transactions[0].position,
            last=last.position,
            commit_time=last.commit_time,
        )


def count_changes(transactions: Sequence[Transaction]) -> int:
    """Number of changes in all of them."""
    if isinstance(transactions, Summarized):
        return sum(transactions.summary.counts)
    return sum(map(len, map(_CHANGES, transactions)))


_OPERATION: Final = attrgetter("operation")
_CHANGES: Final = attrgetter("changes")
