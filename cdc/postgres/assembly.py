"""Puts pgoutput messages together to batches of whole transactions. Pure: no I/O."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from struct import Struct
from typing import Final

from cdc.change import (
    DDL,
    DELETE,
    INSERT,
    MESSAGE,
    TRUNCATE,
    UPDATE,
    Batch,
    Change,
    Ddl,
    Image,
    Message,
    Table,
    Transaction,
    Truncate,
)
from cdc.errors import DecodeError, ResyncRequired
from cdc.position import format_lsn
from cdc.postgres import pgoutput
from cdc.postgres.row import UNCHANGED, decode_row, encode_row, merge
from cdc.postgres.shape import TableShape, decode

_NEW_ROW: Final = {ord("I"): INSERT, ord("U"): UPDATE}
_NEW: Final = ord("N")
_BEGIN, _COMMIT = b"BC"
_RELATION: Final = Struct(">I").unpack_from
_ROW_AT: Final = 6
"""Where the new row starts in an Insert, or in an Update that has no old one."""

HEARTBEAT_PREFIX: Final = "cdc.heartbeat"
"""Logical messages that only move the position."""

PART_BYTES: Final = 1024**2
"""A transaction is cut into batches above this size; a decode never holds the interpreter for much longer."""


class Assembler:
    """Collects messages and gives out batches.

    position: transactions that commit below it have been given out (or were not wanted); the stream can begin there.
    pending_bytes: size of all that was not given out.
    """

    def __init__(self, position: int, *, ddl_prefixes: Collection[str] = ()) -> None:
        """ddl_prefixes: of the logical messages that tell a table's shape (see `cdc.postgres.ddl_capture`)."""
        self.position = position
        self._ddl_prefixes = ddl_prefixes
        self._end = position  # of the last transaction that came, given out or not
        self.pending_bytes = 0
        self._relations: dict[int, Table] = {}
        self._tables: list[Table] = []
        self._indexes: dict[int, int] = {}  # relation OID -> index into _tables
        self._transactions: list[Transaction] = []
        self._begin: pgoutput.Begin | None = None
        self._open_from = 0  # pending_bytes when it began
        self._plain = False  # inside a transaction of which nothing is to be skipped
        self._skip_transaction = False
        self._changes: list[Change] = []
        self._ordinal = 0  # of _changes[0]
        self._given: tuple[int, int] | None = (
            None  # commit LSN and ordinal up to which an open transaction was given out
        )
        self._skip_changes = 0
        self._passed_empty = False

    @property
    def open_bytes(self) -> int:
        """Size of what has come of the transaction that is open."""
        return self.pending_bytes - self._open_from if self._begin is not None else 0

    @property
    def in_transaction(self) -> bool:
        """Whether the last message was inside a transaction."""
        return self._begin is not None

    @property
    def relations(self) -> dict[int, Table]:
        """The tables that were described, by the OIDs that their rows carry."""
        return self._relations

    @property
    def is_clean(self) -> bool:
        """Whether everything that came was given out, in whole transactions: what comes next may pass it by."""
        return self._begin is None and not self._transactions and self._given is None

    @property
    def is_clean_inside(self) -> bool:
        """The same inside a transaction, of which nothing is to be skipped."""
        return self._plain and not self._transactions and not self._changes

    @property
    def end(self) -> int:
        """What commits below it has come, given out or not."""
        return self._end

    def passed(self, end: int, *, empty: bool) -> None:
        """Transactions up to `end` have passed it by. empty: they had no changes."""
        self.position = self._end = max(self._end, end)
        self._passed_empty |= empty

    def passed_part(self, changes: int) -> Transaction:
        """So many changes of the open transaction have passed it by; returns their transaction, without them."""
        assert self._begin is not None
        begin = self._begin
        part = self._cut(begin, end=self._end, complete=False)
        self._ordinal += changes
        self._given = (begin.commit_lsn, self._ordinal)
        self.position = self._end
        return part

    def reset(self) -> None:
        """Forget what was not given out: the stream begins again at `position`, with Relation messages."""
        given = self._given
        self.__init__(self.position, ddl_prefixes=self._ddl_prefixes)  # type: ignore[misc]
        self._given = given

    def feed(self, messages: Iterable[bytes], at: int = 0) -> None:
        """Take messages; each starts at byte `at`. Raises `DecodeError` on what cannot be understood.

        One loop on purpose: nine of ten messages are a new row, and never leave it.
        """
        indexes = self._indexes
        for data in messages:
            size = len(data) - at
            self.pending_bytes += size
            kind = data[at]
            operation = _NEW_ROW.get(kind)
            if operation is not None and size > _ROW_AT and data[at + _ROW_AT - 1] == _NEW:
                relation = _RELATION(data, at + 1)[0]
                index = indexes.get(relation)
                if index is None:
                    index = self._table(relation)
                change = Change(operation, index, None, None, data[at + _ROW_AT :])
                if self._plain:
                    self._changes.append(change)
                else:
                    self._add(change)
            elif kind == _BEGIN and size == pgoutput.BEGIN_BYTES:
                self._start(pgoutput.begin_body(data, at + 1)[0])
            elif kind == _COMMIT and size == pgoutput.COMMIT_BYTES:
                self._commit(pgoutput.commit_body(data, at + 1)[0])
            else:
                self._feed_other(pgoutput.decode(data, at))

    def _feed_other(self, message: pgoutput.PgMessage) -> None:
        if isinstance(message, pgoutput.Update):
            self._update(message)
        elif isinstance(message, pgoutput.Delete):
            self._add(Change(DELETE, self._table(message.relation), message.key, message.before, None))
        elif isinstance(message, pgoutput.Insert):
            self._add(Change(INSERT, self._table(message.relation), None, None, message.after))
        else:
            self._feed_rare(message)

    def take(self, *, part: bool = False) -> Batch | None:
        """Give out the finished transactions, and with `part` also what has come of the open one."""
        transactions = self._transactions
        tables = tuple(self._tables)
        if part and self._begin is not None and self._changes:
            begin = self._begin
            transactions.append(self._cut(begin, end=self._end, complete=False))
            self._given = (begin.commit_lsn, self._ordinal)
        if not transactions:
            return None
        kept = 0 if part else self.open_bytes
        size = self.pending_bytes - kept
        self.pending_bytes = kept
        self._open_from = 0
        self._transactions = []
        if not self._changes:  # else the open transaction's changes refer to these tables
            self._tables = []
            self._indexes = {}
        self.position = self._end
        return Batch(tables, transactions, self.position, size)

    def pass_idle(self, position: int) -> bool:
        """Move on by what holds nothing for us: everything below `position` came, and `take` has nothing more.

        Returns whether a transaction without changes for us was among it.
        """
        if self._begin is None and not self._transactions:
            self.position = self._end = max(self._end, position)
        passed, self._passed_empty = self._passed_empty, False
        return passed

    def _feed_rare(self, message: pgoutput.PgMessage) -> None:
        match message:
            case pgoutput.Relation(oid=oid, table=table):
                if self._relations.get(oid) != table:  # it is described again after every TRUNCATE, ANALYZE, ...
                    self._relations[oid] = table
                    self._indexes.pop(oid, None)
            case pgoutput.Truncate(relations=relations, cascade=cascade, restart_identity=restart):
                tables = tuple(self._table(relation) for relation in relations)
                self._add(Change(TRUNCATE, tables[0], None, None, None, Truncate(tables, cascade, restart)))
            case pgoutput.LogicalMessage(transactional=True, prefix=prefix, content=content):
                if prefix in self._ddl_prefixes:
                    shape = decode(content, TableShape)
                    self._add(Change(DDL, self._index(shape.described()), None, None, None, Ddl("shape", content)))
                elif prefix != HEARTBEAT_PREFIX:
                    self._add(Change(MESSAGE, -1, None, None, None, Message(prefix, content)))
            case _:  # names of types, origins, and messages outside transactions say nothing about rows
                pass

    def _start(self, begin: pgoutput.Begin) -> None:
        if self._begin is not None:
            raise DecodeError("pgoutput: transaction begins inside another")
        self._begin = begin
        self._open_from = self.pending_bytes
        # the server sends again what it does not know to be confirmed
        self._skip_transaction = begin.commit_lsn < self._end
        if self._given is not None and not self._skip_transaction:
            lsn, ordinal = self._given
            if lsn != begin.commit_lsn:
                raise ResyncRequired(
                    f"the source began to send the transaction at {format_lsn(lsn)}, "
                    f"and after a reconnect goes on with {format_lsn(begin.commit_lsn)}",
                    hint="it is not the server it was, or was restored",
                )
            self._skip_changes = ordinal
        self._plain = not self._skip_transaction and not self._skip_changes

    def _commit(self, commit: pgoutput.Commit) -> None:
        begin = self._begin
        if begin is None:
            raise DecodeError("pgoutput: commit outside a transaction")
        if not self._skip_transaction:
            self._end = max(self._end, commit.end_lsn)
            if self._changes or self._given is not None:
                self._transactions.append(self._cut(begin, end=commit.end_lsn, complete=True))
                self._given = None
            else:
                self._passed_empty = True
            self._ordinal = self._skip_changes = 0
        self._begin = None
        self._plain = False

    def _cut(self, begin: pgoutput.Begin, *, end: int, complete: bool) -> Transaction:
        changes, self._changes = self._changes, []
        first = self._ordinal
        self._ordinal += len(changes)
        return Transaction(begin.commit_lsn, end, begin.commit_time, begin.xid, first, complete, changes)

    def _add(self, change: Change) -> None:
        if self._begin is None:
            raise DecodeError("pgoutput: change outside a transaction")
        if self._skip_transaction:
            return
        if self._skip_changes:
            self._skip_changes -= 1
            self._ordinal += 1
            return
        self._changes.append(change)

    def _update(self, message: pgoutput.Update) -> None:
        after = message.after
        if message.before is not None:
            after = _filled(after, message.before)
        self._add(Change(UPDATE, self._table(message.relation), message.key, message.before, after))

    def _table(self, relation: int) -> int:
        index = self._indexes.get(relation)
        if index is None:
            table = self._relations.get(relation)
            if table is None:
                raise DecodeError(f"pgoutput: change of relation {relation}, which was not described")
            index = self._indexes[relation] = self._index(table)
        return index

    def _index(self, table: Table) -> int:
        self._tables.append(table)
        return len(self._tables) - 1


def _filled(after: Image, before: Image) -> Image:
    """With identity FULL an unchanged TOAST value is in the old row."""
    row = decode_row(after)
    return encode_row(merge(row, decode_row(before))) if UNCHANGED in row else after
