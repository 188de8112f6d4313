"""Change events become transactions and batches. Pure: what comes in are the bytes of events, in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from cdc.change import DDL, INSERT, Batch, Change, Ddl, Table, TableName, Transaction
from cdc.errors import DecodeError
from cdc.mongodb import walk
from cdc.mongodb.equality import id_only
from cdc.mongodb.event import Event, decode, fragment, join, namespace, quick, renamed_to
from cdc.mongodb.moment import moment
from cdc.mongodb.plain_events import PlainEvents
from cdc.mongodb.scope import Scope
from cdc.packed import Packed

PART_BYTES: Final = 1024 * 1024
"""About so much goes into one batch: decoding it keeps other threads waiting."""

_NO_TABLE: Final = -1
_ELSEWHERE: Final = -2
"""In place of a table's index: it is about none, or about one that is not captured."""


class Assembler:
    """Collects the changes of events until `take`.

    Events of one multi-document transaction come one after the other, and so make up one `Transaction`; its last one is
    held back until it is known that no more follow. Large ones are given out in parts.
    """

    def __init__(self, scope: Scope, token: bytes) -> None:
        """token: the resume token after which events come."""
        self._scope = scope
        self.token = token
        self.invalidated = False
        self.moved_in: tuple[TableName, Event] | None = None
        self.position = token
        self._fragments: list[bytes] = []
        self._open: list[Event] = []
        self._open_bytes = 0
        self._ordinal = 0
        self._transactions: list[Transaction] = []  # and behind them the plain ones
        self._plain = PlainEvents()
        self._tables: list[Table] = []
        self._table_of: dict[bytes, int] = {}
        self._size = 0

    # position: up to where everything was given out.
    # token: to resume after it: that of the last whole event.
    # invalidated: it is an invalidate event's, after which a stream must be started, not resumed.
    # moved_in: a collection got a captured name by this rename; nothing else is fed before it was read.

    def feed(self, events: Sequence[bytes], at: int) -> int:
        """Take events from index `at` on, until they are a batch's worth; returns the index to go on from."""
        while at < len(events):
            before = at
            within = self._open or self._fragments
            if not within:
                room = max(PART_BYTES - self._size, 1)
                at, size, token = self._plain.take(events, at, room, self._table_of)
                self._size += size
                if token is not None:
                    self.token, self.invalidated = token, False
            if at == before and (within or not self._meets_new_table(events[at])):
                self._thoroughly(events[at])
                at += 1
            if self._size >= PART_BYTES or self.moved_in:
                break
        return at

    def exhausted(self, post_batch_token: bytes | None, *, empty: bool) -> None:
        """A reply was used up. empty: it held no event, so the server had nothing more for now.

        An open transaction is over then, unless the server has only passed events of it that are not captured; or if
        the reply ended at a later moment than its last event.
        """
        if self._fragments:
            return
        beyond = post_batch_token is not None and post_batch_token != self.token
        over = empty
        if post_batch_token is not None and beyond:
            over = _is_later(post_batch_token, self.token)
        if over:
            self._close_transaction()
        if post_batch_token is not None and beyond:
            self.token = post_batch_token
            self.invalidated = False

    def take(self) -> Batch | None:
        """The transactions so far, and what an open one has too much; `None` if there are none."""
        if self._open and self._open_bytes >= PART_BYTES:
            self._flush_part()
        plain = self._plain.drain()
        transactions = [*self._transactions, *plain] if self._transactions else plain
        if not transactions:
            return None
        self.position = _end(transactions)
        batch = Batch(tuple(self._tables), transactions, self.position, self._size)
        self._start_batch()
        return batch

    def idle(self) -> bytes | None:
        """A token that the position may move to, as nothing is open or waiting to be taken."""
        busy = self._open or self._fragments or self._transactions or self._plain or self.moved_in
        if busy or self.token == self.position:
            return None
        self.position = self.token
        return self.token

    def forget_unfinished(self) -> None:
        """The stream starts again after `token`: fragments come again from the first one."""
        self._fragments.clear()

    def moved_batch(self, made: Sequence[Ddl], documents: Sequence[bytes], *, complete: bool) -> Batch:
        """A part of what was in the collection that was `moved_in`; complete: the last one. made: how it is made."""
        assert self.moved_in is not None
        name, event = self.moved_in
        changes: list[Change] = []
        if not self._ordinal:
            ddl = [Ddl("drop", _description(event)), *made]
            changes += [Change(DDL, 0, None, None, None, each) for each in ddl]
        # `{_id: value}` is what an event of it would carry as its `documentKey`, where no shard key belongs to it
        changes += [Change(INSERT, 0, id_only(document), None, document) for document in documents]
        transaction = Transaction(event.token, event.token, event.commit_time, 0, self._ordinal, complete, changes)
        self._ordinal += len(changes)
        if complete:
            self._ordinal = 0
            self.moved_in = None
            self.position = event.token
        return Batch((_table(name),), [transaction], event.token, sum(map(len, documents)))

    def _meets_new_table(self, raw: bytes) -> bool:
        """Whether an event is plain, and only its table was not known in this batch; it is from here on."""
        event = quick(raw)
        if event is None or event.namespace in self._table_of:
            return False
        self._add_table(event.namespace)
        return True

    # one event that is not a plain insert, update, replace or delete

    def _thoroughly(self, raw: bytes) -> None:
        found = walk.fields(raw)
        if b"splitEvent" in found and (part := fragment(raw, found)) is not None:
            self._fragments.append(raw)
            number, count = part
            if number != len(self._fragments) or number > count:
                raise DecodeError(f"fragment {number} of {count} of a large event is out of order")
            if number < count:
                return
            raw = join(self._fragments)
            self._fragments.clear()
            found = walk.fields(raw)
        elif self._fragments:
            raise DecodeError("a large event lacks its last fragments")
        event = decode(raw, found)
        if not event.transaction or (self._open and event.transaction != self._open[-1].transaction):
            self._close_transaction()
        self.token = event.token
        self.invalidated = event.operation == DDL and _kind(event) == "invalidate"
        scoped = self._scoped(event)
        if scoped is None:
            return
        if scoped.transaction:
            self._open.append(scoped)
            self._open_bytes += len(raw)
        else:
            self._append([scoped], complete=True)
        self._size += len(raw)

    def _scoped(self, event: Event) -> Event | None:
        """The event as it is for those who see captured collections only; `None` if it is nothing to them."""
        if event.operation != DDL:
            return event if self._index(event.namespace) >= 0 else None
        if not event.namespace:
            return event
        name = namespace(event.namespace)
        if not name.name:
            return event if self._scope.match_database(name.schema) else None
        captured = self._scope.match(name)
        if _kind(event) == "rename":
            target = renamed_to(_description(event))
            arrives = target is not None and self._scope.match(target)
            if arrives and not captured:
                assert target is not None
                self.moved_in = (target, event)
                return None
            if captured and not arrives:  # to those who see only captured collections it is gone
                return msgspec.structs.replace(event, detail=Ddl("drop", _description(event)))
        return event if captured and not (_kind(event) == "create" and _is_derived(_description(event))) else None

    def _append(self, events: Sequence[Event], *, complete: bool) -> None:
        changes = [event.change(self._index(event.namespace)) for event in events]
        last = events[-1]
        self._transactions += self._plain.drain()
        self._transactions.append(
            Transaction(last.token, last.token, last.commit_time, 0, self._ordinal, complete, changes)
        )
        self._ordinal = 0 if complete else self._ordinal + len(changes)

    def _close_transaction(self) -> None:
        if self._open:
            self._append(self._open, complete=True)
            self._open, self._open_bytes = [], 0

    def _flush_part(self) -> None:
        """Give out all of an open transaction but its last event, with which it may end."""
        if len(self._open) > 1:
            self._append(self._open[:-1], complete=False)
            self._open, self._open_bytes = self._open[-1:], 0

    # tables

    def _start_batch(self) -> None:
        self._transactions, self._tables, self._table_of, self._size = [], [], {}, 0

    def _index(self, ns: bytes) -> int:
        table = self._table_of.get(ns)
        return self._add_table(ns) if table is None else table

    def _add_table(self, ns: bytes) -> int:
        name = namespace(ns) if ns else TableName("", "")
        index = _ELSEWHERE if name.name else _NO_TABLE
        if name.name and self._scope.match(name):
            index = len(self._tables)
            self._tables.append(_table(name))
        self._table_of[ns] = index
        return index


def _is_derived(created: bytes) -> bool:
    """Whether a create event is about a view or a time series: they have no events of their own."""
    found = walk.fields(created)
    if (place := found.get(b"nsType")) is not None:  # from 8.1
        return walk.string_at(created, place[1], place[2]) != "collection"
    description = walk.get_document(created, b"operationDescription")
    return description is not None and not {b"viewOn", b"timeseries"}.isdisjoint(walk.fields(description))


def _is_later(token: bytes, other: bytes) -> bool:
    """Whether it is of another moment: all events of a transaction are of one. Tokens that tell none are later."""
    try:
        return moment(token) != moment(other)
    except DecodeError:
        return True


def _table(name: TableName) -> Table:
    return Table(name.schema, name.name, (), "")


def _end(transactions: Sequence[Transaction]) -> bytes:
    """The resume token behind them."""
    last = transactions.summary.last if isinstance(transactions, Packed) else transactions[-1].end
    assert isinstance(last, bytes)
    return last


def _kind(event: Event) -> str:
    return event.detail.kind if isinstance(event.detail, Ddl) else ""


def _description(event: Event) -> bytes:
    assert event.detail is not None
    return event.detail.description
