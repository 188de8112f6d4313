"""What one change does to one entity, as far as the change itself tells; and what translates changes into that."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Final, Protocol, cast

import msgspec

from cdc.change import Change, Table, TableName
from cdc.feed.options import FeedOptions, Mask
from cdc.feed.record import ALL, ChangeType, EntityState, Json
from cdc.sink import SinkContext

MAX_NAME_BYTES: Final = 1_500
BEGINNING: Final = 200


class View(msgspec.Struct, frozen=True, gc=False):
    """An entity as it is told of.

    shown: JSON object of what may be shown. location_id, user_id: `None` where it has none.
    scope: JSON object of the fields that decide who may see it, as text; `None` where there are no such fields.
    whole: False where little more than the key is known, and so neither location nor scope.
    """

    shown: Json
    location_id: str | None = None
    user_id: str | None = None
    scope: Json | None = None
    whole: bool = True


class Event(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """What one change does to one entity.

    key: unambiguous among the entities of its table; entity_id: for people and programs, usually the same.
    before, after: as the change tells them; `None` where it does not.
    changed: names of changed fields; `None` where nobody can tell.
    """

    table: TableName
    change_type: ChangeType
    key: str
    entity_id: str
    before: View | None = None
    after: View | None = None
    changed: tuple[str, ...] | None = None


class Told(msgspec.Struct, frozen=True, gc=False):
    """An event, completed by what was known of its entity before.

    known: what to remember, for the next event.
    """

    before: View | None
    after: View | None
    changed: tuple[str, ...] | None
    delta: Json | None = None
    lookup: bool = False
    known: bytes | None = None


class Translator(Protocol):
    """Translates the changes of one kind of source. Pure: no I/O. Keeps what it worked out for a table."""

    def events(self, tables: Sequence[Table], change: Change) -> Sequence[Event]:
        """What a change does to entities: usually one event. Raises `DecodeError` for a change that cannot be read."""
        ...

    def complete(self, event: Event, change: Change, state: EntityState | None, generation: int) -> Told:
        """Fill in what was known before. generation: how often all entities of the type were replaced at once."""
        ...


def translator(options: FeedOptions, context: SinkContext) -> Translator:
    """The translator of a sink's source: `EntityTranslator` in `entities.py` of its folder."""
    assert context.source is not None
    found = import_module(f"cdc.{context.source.kind}.entities").EntityTranslator
    return cast("Callable[[FeedOptions, SinkContext], Translator]", found)(options, context)


def masked(text: bytes, mask: Mask) -> Json:
    """What is shown of a masked value, by its text: a digest, equal for equal values; or nothing of it."""
    return b'"%s"' % masked_text(text, mask).encode()


def masked_text(text: bytes, mask: Mask) -> str:
    """The same as plain text."""
    return "***" if mask == "redact" else f"sha256:{hashlib.sha256(text).hexdigest()}"


def bounded(name: str) -> str:
    """A name that every store can index (PostgreSQL to 2,704 bytes in all): of a longer one a digest of it, too.

    And none that means all entities.
    """
    if name == ALL:
        return f'"{ALL}"'
    if len(name) * 4 <= MAX_NAME_BYTES or len(name.encode()) <= MAX_NAME_BYTES:
        return name
    return f"{name[:BEGINNING]}... sha256:{hashlib.sha256(name.encode()).hexdigest()}"
