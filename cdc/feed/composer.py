"""Changes become records: each entity's versions are counted, and what a change leaves out is taken from what is known.

Two steps: `drafts` needs only the changes, so that it can be done ahead; `Composer.compose` needs the entities' states,
and goes in order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Final

import msgspec
import structlog

from cdc.change import MESSAGE, Batch, Change, Message, TableName, Transaction
from cdc.feed.event import Event, Told, Translator
from cdc.feed.options import Entity, FeedOptions
from cdc.feed.record import ALL, ChangeType, EntityState, Record
from cdc.position import format_position

CONTEXT_PREFIX: Final = "cdc.context"
"""Of the logical message by which an application says on whose behalf a transaction is made."""

log = structlog.get_logger()

Key = tuple[str, str]
"""Of an entity's state: (entity_type, key)."""


class Context(msgspec.Struct, frozen=True, rename="camel"):
    """What a `cdc.context` message holds, as JSON: `{"userId": "u5", "locationId": "north"}`."""

    user_id: str | int | None = None
    location_id: str | int | None = None


NO_CONTEXT: Final = Context()


class Draft(msgspec.Struct, frozen=True, gc=False):
    """An event, with what its transaction tells. key: of its entity's state."""

    key: Key
    event: Event
    change: Change
    entity: Entity
    position: str
    changed_at: int
    context: Context


class Drafter:
    """Translates batches, in order, and looks for what applications say about their transactions."""

    def __init__(self, options: FeedOptions, translator: Translator) -> None:
        self._options = options
        self._translator = translator
        self._entities: dict[TableName, Entity] = {}
        self._context = NO_CONTEXT

    def drafts(self, batches: Iterable[Batch]) -> Iterator[Draft]:
        """All events of the batches, one after the other: as objects changes weigh much more than in batches.

        A transaction that goes on in the next batches keeps its context.
        """
        for batch in batches:
            for transaction in batch.once():
                if transaction.first_ordinal == 0:
                    self._context = NO_CONTEXT
                yield from self._transaction(batch, transaction)

    def forget(self) -> None:
        """Begin anew: what comes next is no continuation."""
        self._context = NO_CONTEXT

    def _transaction(self, batch: Batch, transaction: Transaction) -> Iterator[Draft]:
        """A message speaks for what follows it, and the first one also for what came before."""
        changes = transaction.changes
        told = [said for change in changes if change.operation == MESSAGE and (said := _context(change)) is not None]
        if told and self._context is NO_CONTEXT:
            self._context = told[0]
        position, changed_at = format_position(transaction.position), transaction.commit_time
        for ordinal, change in enumerate(changes, transaction.first_ordinal):
            if change.operation == MESSAGE:
                self._context = _context(change) or self._context
                continue
            events = self._translator.events(batch.tables, change)
            for part, event in enumerate(events):
                place = f"{position}:{ordinal}" if len(events) == 1 else f"{position}:{ordinal}.{part}"
                entity = self._entity(event.table)
                yield Draft((entity.type, event.key), event, change, entity, place, changed_at, self._context)

    def _entity(self, table: TableName) -> Entity:
        entity = self._entities.get(table)
        if entity is None:
            entity = self._entities[table] = Entity.of(table, self._options)
        return entity


class Composer:
    """Turns drafts into the records of one source."""

    def __init__(self, source: str, options: FeedOptions, translator: Translator) -> None:
        self._source = source
        self._largest = options.max_payload_bytes
        self._translator = translator

    def compose(
        self, drafts: Iterable[Draft], states: Mapping[Key, EntityState]
    ) -> tuple[list[Record], list[EntityState]]:
        """The records, in order, and the states that they leave behind.

        states: of all that `keys_of` names, as far as there are any.
        """
        current = dict(states)
        touched: dict[Key, EntityState] = {}
        records = []
        for draft in drafts:
            key = draft.key
            before, group = current.get(key), current.get((key[0], ALL))
            told = self._translator.complete(draft.event, draft.change, before, group.version if group else 0)
            record = self._record(draft, told, before)
            records.append(record)
            current[key] = touched[key] = _state(draft, record, told)
        return records, list(touched.values())

    def _record(self, draft: Draft, told: Told, state: EntityState | None) -> Record:
        event, entity, context = draft.event, draft.entity, draft.context
        deleted = event.change_type == ChangeType.DELETE
        view = told.before if deleted else told.after
        location = view.location_id if view else None
        user = view.user_id if view and not deleted else None
        if context is not NO_CONTEXT:
            location, user = _said(context.location_id) or location, _said(context.user_id) or user
        if location is None and state is not None and (deleted or not entity.location):
            location = state.location_id
        record = Record(
            source=self._source,
            position=draft.position,
            entity_type=entity.type,
            entity_id=event.entity_id,
            channel=entity.channel,
            change_type=event.change_type,
            version=state.version + 1 if state else 1,
            changed_at=draft.changed_at,
            location_id=location,
            user_id=user,
            before=told.before.shown if told.before else None,
            after=told.after.shown if told.after else None,
            changed=told.changed,
            delta=told.delta,
            lookup=told.lookup,
            scope_before=None if event.change_type == ChangeType.CREATE else _scope_before(told, state),
            scope_after=told.after.scope if told.after else None,
        )
        return record if _size(record) <= self._largest else _without_payload(record)


def keys_of(drafts: Iterable[Draft]) -> set[Key]:
    """The states that `Composer.compose` needs: of the entities, and of all entities of their types."""
    keys = {draft.key for draft in drafts}
    return keys | {(entity_type, ALL) for entity_type in {entity_type for entity_type, _ in keys}}


def _state(draft: Draft, record: Record, told: Told) -> EntityState:
    return EntityState(
        entity_type=record.entity_type,
        key=draft.event.key,
        version=record.version,
        location_id=record.location_id,
        scope=record.scope_after or record.scope_before,
        known=told.known,
    )


def _scope_before(told: Told, state: EntityState | None) -> bytes | None:
    """What the change does not tell is as it was last known."""
    if told.before is not None and told.before.whole:
        return told.before.scope
    return state.scope if state is not None else None


def _size(record: Record) -> int:
    return len(record.before or b"") + len(record.after or b"") + len(record.delta or b"")


def _without_payload(record: Record) -> Record:
    return msgspec.structs.replace(record, before=None, after=None, delta=None, truncated=True)


def _said(value: str | int | None) -> str | None:
    return None if value is None else str(value)


def _context(change: Change) -> Context | None:
    detail = change.detail
    if not isinstance(detail, Message) or detail.prefix != CONTEXT_PREFIX:
        return None
    try:
        return msgspec.json.decode(detail.content, type=Context)
    except msgspec.DecodeError as exc:
        log.warning("a cdc.context message cannot be read", error=str(exc))
        return None
