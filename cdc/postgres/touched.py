"""Which rows the stream has touched since a snapshot was taken, by their keys. Pure: no I/O.

A row that was touched is right on the mirror because of the stream, but for columns that no change carried (unchanged
TOAST): those are as the snapshot has them, maybe under the key that the row had then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, NamedTuple

from cdc.change import DDL, DELETE, INSERT, MESSAGE, TRUNCATE, Batch, Change, Image, Table, TableName, Truncate
from cdc.position import Lsn, as_lsn
from cdc.postgres.row import UNCHANGED, Row, Value, decode_key, decode_row

Key = tuple[Value, ...]
"""A row's key, as the texts that the source wrote."""

WHOLE: Final[frozenset[str]] = frozenset()


class Touch(NamedTuple):
    """What became of a row.

    origin: its key in the snapshot. missing: its columns that no change carried.
    """

    origin: Key
    missing: frozenset[str]


class _Event(NamedTuple):
    """A change, as far as it matters here. No key at all: it touched the whole table, or nobody can tell what."""

    position: Lsn
    table: TableName
    old: Key | None
    new: Key | None
    missing: frozenset[str]


class Touched:
    """Collects, from a moment before the snapshot is taken on; which changes it holds is known once it has begun.

    keys: the columns that name a row, of each table that is watched.
    """

    def __init__(self, keys: Mapping[TableName, Sequence[str]]) -> None:
        self.rows: dict[TableName, dict[Key, Touch]] = {table: {} for table in keys}
        self.void: set[TableName] = set()
        self._keys = keys
        self._events: list[_Event] = []
        self._since = Lsn(0)
        self._pickers: dict[Table, Callable[[Row], Key] | None] = {}

    def __len__(self) -> int:
        """About as many keys as are kept."""
        return len(self._events) + sum(map(len, self.rows.values()))

    def begin(self, since: Lsn) -> None:
        """The snapshot is of this position: what commits before it is forgotten, and no longer looked at."""
        self._since = since
        self.fold()

    def observe(self, batches: Iterable[Batch]) -> None:
        """Take note of changes that are applied, each of them once."""
        for batch in batches:
            watched = [table.qualified in self._keys for table in batch.tables]
            if not any(watched):
                continue
            for transaction in batch.transactions:
                position = as_lsn(transaction.position)
                if position < self._since:
                    continue
                for change in transaction.changes:
                    if change.operation == TRUNCATE or (change.table >= 0 and watched[change.table]):
                        self._events += self._events_of(batch.tables, change, position)

    def fold(self) -> None:
        """Sort what was observed into `rows` and `void`, without what commits before the snapshot."""
        events, self._events = self._events, []
        for event in events:
            if event.position < self._since or event.table not in self.rows:
                continue
            if event.old is None and event.new is None:
                self.void.add(event.table)
            else:
                _add(self.rows[event.table], event)

    def _events_of(self, tables: tuple[Table, ...], change: Change, position: Lsn) -> Iterable[_Event]:
        if isinstance(change.detail, Truncate):
            return [_Event(position, tables[index].qualified, None, None, WHOLE) for index in change.detail.tables]
        if change.operation in (MESSAGE, DDL):
            return ()
        table = tables[change.table]
        name, pick = table.qualified, self._picker(table)
        if pick is None:
            return [_Event(position, name, None, None, WHOLE)]
        if change.operation == DELETE:
            return [_Event(position, name, pick(_old(change)), None, WHOLE)]
        assert change.after is not None
        row = decode_row(change.after)
        if change.operation == INSERT:
            return [_Event(position, name, None, pick(row), WHOLE)]
        missing = frozenset(column.name for column, value in zip(table.columns, row, strict=True) if value is UNCHANGED)
        old = pick(row if change.before is None and change.key is None else _old(change))
        return [_Event(position, name, old, pick(row), missing)]

    def _picker(self, table: Table) -> Callable[[Row], Key] | None:
        """Reads the key of a row; `None` where the source does not send all of it with every change."""
        if table not in self._pickers:
            index_of = {column.name: n for n, column in enumerate(table.columns) if column.is_key}
            wanted = self._keys[table.qualified]
            indexes = [index_of[name] for name in wanted if name in index_of]
            complete = len(indexes) == len(wanted)
            self._pickers[table] = (lambda row: tuple(row[n] for n in indexes)) if complete else None
        return self._pickers[table]


def _old(change: Change) -> Row:
    image: Image | None = change.before or change.key
    assert image is not None
    return decode_row(image) if change.before is not None else decode_key(image)


def _add(rows: dict[Key, Touch], event: _Event) -> None:
    old, new = event.old, event.new
    if old is None or new is None:
        key = new if old is None else old
        assert key is not None
        rows[key] = Touch(key, WHOLE)
        return
    before = rows.get(old)
    missing = event.missing if before is None else event.missing & before.missing
    if old != new:
        rows[old] = Touch(old, WHOLE)
    rows[new] = Touch(old if before is None else before.origin, missing)
