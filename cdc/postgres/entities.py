"""What a change of a row does to an entity: pgoutput's images as JSON. Implements `cdc.feed.event.Translator`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Final

import msgspec

from cdc.change import DDL, DELETE, INSERT, MESSAGE, TRUNCATE, UPDATE, Change, Column, Table, TableName, Truncate
from cdc.errors import DecodeError
from cdc.feed.event import Event, Told, View, bounded, masked, masked_text
from cdc.feed.options import Entity, FeedOptions, Mask
from cdc.feed.record import ALL, ChangeType, EntityState, Json
from cdc.postgres.json_object import JsonObject
from cdc.postgres.json_values import Encode, encoder, text
from cdc.postgres.row import Row, Value, decode_key, decode_row, merge
from cdc.sink import SinkContext

_encode: Final = msgspec.json.Encoder().encode

_BOOL: Final = 16
_BPCHAR: Final = 1042
"""`char(n)`, which is filled up with blanks."""


class EntityTranslator:
    """Translates PostgreSQL's changes."""

    def __init__(self, options: FeedOptions, context: SinkContext) -> None:
        """Asks the source once for the primary key of a table with identity FULL: its changes do not tell."""
        self._options = options
        self._primary_key = context.primary_key
        self._shapes: dict[Table, _Shape] = {}
        self._tables: Sequence[Table] = ()  # of the batch at hand: to look for a table takes longer than for its place
        self._shapes_at: list[_Shape | None] = []

    def events(self, tables: Sequence[Table], change: Change) -> Sequence[Event]:
        """A change of a key is two events: one entity ends, and another begins."""
        operation = change.operation
        if operation == TRUNCATE:
            assert isinstance(change.detail, Truncate)
            return [_emptied(tables[index].qualified) for index in change.detail.tables]
        if operation in (MESSAGE, DDL):
            return ()
        shape = self._shape_at(tables, change.table)
        if operation == INSERT:
            return (shape.event(ChangeType.CREATE, after=_row(change.after)),)
        if operation == UPDATE:
            return shape.updated(change)
        if operation == DELETE:
            return (shape.deleted(change),)
        raise DecodeError(f"a change of an unknown kind: {operation}")

    def complete(self, event: Event, _change: Change, state: EntityState | None, _generation: int) -> Told:
        """Of a deleted row known by its key alone, the last known location and scope."""
        before = event.before
        if before is not None and not before.whole and state is not None:
            before = msgspec.structs.replace(before, location_id=state.location_id, scope=state.scope)
        return Told(before, event.after, event.changed)

    def _shape_at(self, tables: Sequence[Table], index: int) -> _Shape:
        if tables is not self._tables:
            self._tables, self._shapes_at = tables, [None] * len(tables)
        shape = self._shapes_at[index]
        if shape is None:
            shape = self._shapes_at[index] = self._shape(tables[index])
        return shape

    def _shape(self, table: Table) -> _Shape:
        shape = self._shapes.get(table)
        if shape is None:
            keys = [column.name for column in table.columns if column.is_key]
            if table.identity == "f" and self._primary_key is not None:
                keys = list(self._primary_key(table.qualified))
            shape = self._shapes[table] = _Shape(table, keys, Entity.of(table.qualified, self._options))
        return shape


class _Column(msgspec.Struct, frozen=True):
    index: int
    name: str
    prefix: bytes
    show: Encode
    mask: Mask | None

    @classmethod
    def of(cls, index: int, column: Column, mask: Mask | None) -> _Column:
        show = partial(masked, mask=mask) if mask else encoder(column.type_oid)
        return cls(index, column.name, _encode(column.name) + b":", show, mask)


class _Shape:
    """One version of a table: where its values are, and how they are shown."""

    def __init__(self, table: Table, keys: Sequence[str], entity: Entity) -> None:
        at = {column.name: index for index, column in enumerate(table.columns)}
        self._table = table.qualified
        self._columns = [
            _Column.of(index, each, entity.mask.get(each.name))
            for index, each in enumerate(table.columns)
            if entity.shows(each.name)
        ]
        self._object = JsonObject([(column.index, column.prefix, column.show) for column in self._columns])
        self._keys = [(at[name], entity.mask.get(name)) for name in keys if name in at]
        self._has_masked_key = any(mask for _, mask in self._keys)
        if not self._keys:  # named by what is shown of it: all else is nobody's to see
            self._keys = [(column.index, column.mask) for column in self._columns]
        self._key = self._keys[0][0] if [mask for _, mask in self._keys] == [None] else None  # alone, and shown
        self._location, self._user = at.get(entity.location), at.get(entity.user)
        oids = {column.name: column.type_oid for column in table.columns}
        self._scope = [(_encode(name) + b":", at[name], oids[name]) for name in entity.scope if name in at]

    def event(self, kind: ChangeType, *, before: Row | None = None, after: Row | None = None) -> Event:
        """An event about the row that is given."""
        row = after if after is not None else before
        assert row is not None
        key, entity_id = self._names(row)
        return Event(
            table=self._table,
            change_type=kind,
            key=key,
            entity_id=entity_id,
            before=None if before is None else self._view(before),
            after=None if after is None else self._view(after),
        )

    def updated(self, change: Change) -> Sequence[Event]:
        """An UPDATE, or the end of one entity and the beginning of another."""
        after = _row(change.after)
        before = None if change.before is None else decode_row(change.before)
        if before is not None:
            after = merge(after, before)
        old = before if before is not None or change.key is None else decode_key(change.key)
        if old is None or self._names(old) == self._names(after):
            event = self.event(ChangeType.UPDATE, before=before, after=after)
            if before is not None:
                event = msgspec.structs.replace(event, changed=self._changed(before, after))
            return (event,)
        ended = self._ended(old, whole=before is not None)
        return (ended, self.event(ChangeType.CREATE, after=after))

    def deleted(self, change: Change) -> Event:
        """A DELETE: with identity FULL the whole row is known, else its key."""
        if change.before is not None:
            return self._ended(decode_row(change.before), whole=True)
        if change.key is None:
            raise DecodeError(f"{self._table}: a DELETE without key")
        return self._ended(decode_key(change.key), whole=False)

    def _ended(self, row: Row, *, whole: bool) -> Event:
        event = self.event(ChangeType.DELETE, before=row)
        if whole or event.before is None:
            return event
        return msgspec.structs.replace(event, before=View(event.before.shown, whole=False))

    def _names(self, row: Row) -> tuple[str, str]:
        """What tells the entity from others, and what it is called: with masks on, which may be one name for all."""
        if self._key is not None and isinstance(value := row[self._key], bytes):
            shown = bounded(value.decode("utf-8", "replace"))
            return shown, shown
        shown = _joined([_masked(row[index], mask) for index, mask in self._keys])
        if not self._has_masked_key:
            return shown, shown
        return masked_text(_joined([row[index] for index, _ in self._keys]).encode(), "sha256"), shown

    def _view(self, row: Row) -> View:
        return View(
            shown=self._object.of(row),
            location_id=_text(row, self._location),
            user_id=_text(row, self._user),
            scope=b"{%s}" % b",".join([name + _plain(row[index], type_oid) for name, index, type_oid in self._scope])
            if self._scope
            else None,
        )

    def _changed(self, before: Row, after: Row) -> tuple[str, ...]:
        return tuple(column.name for column in self._columns if before[column.index] != after[column.index])


def _emptied(table: TableName) -> Event:
    return Event(table=table, change_type=ChangeType.DELETE, key=ALL, entity_id=ALL)


def _row(image: bytes | None) -> Row:
    if image is None:
        raise DecodeError("a change without its row")
    return decode_row(image)


def _text(row: Row, index: int | None) -> str | None:
    value = row[index] if index is not None else None
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else None


def _masked(value: Value, mask: Mask | None) -> Value:
    return masked_text(value, mask).encode() if mask and isinstance(value, bytes) else value


def _joined(values: Sequence[Value]) -> str:
    """One value as text; several (or NULL) as a JSON array of texts."""
    texts = [value.decode("utf-8", "replace") if isinstance(value, bytes) else value for value in values]
    return bounded(texts[0] if len(texts) == 1 and isinstance(texts[0], str) else _encode(texts).decode())


def _plain(value: Value, type_oid: int) -> Json:
    """A value as a person writes it who limits a token to it: as a JSON string."""
    if not isinstance(value, bytes):
        return b"null"
    if type_oid == _BOOL:
        return b'"true"' if value == b"t" else b'"false"'
    return text(value.rstrip(b" ") if type_oid == _BPCHAR else value)
