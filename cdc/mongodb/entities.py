"""What a change of a document does to an entity. Implements `cdc.feed.event.Translator`.

An update comes with what changed, and (`updateLookup`) with the document as it was when the event was read: several
updates in a row may then carry the same, later document. So what is told is the last known document with the change
laid over it, which needs to remember one document for each entity. Where none is known, the looked-up one is told,
with the changed fields as the event has them, and marked as a lookup.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import bson
import msgspec
from bson import json_util
from bson.binary import UuidRepresentation
from bson.codec_options import CodecOptions, DatetimeConversion
from bson.errors import BSONError
from bson.objectid import ObjectId

from cdc.change import DDL, DELETE, INSERT, UPDATE, Change, Ddl, Delta, Image, Table, TableName
from cdc.errors import ConfigError, DecodeError
from cdc.feed.event import Event, Told, View, bounded, masked, masked_text
from cdc.feed.options import Entity, EntityOptions, FeedOptions
from cdc.feed.record import ALL, ChangeType, EntityState, Json
from cdc.mongodb.equality import key_bytes
from cdc.mongodb.event import renamed_to
from cdc.mongodb.overlay import Document, Unclear, changed_fields, overlaid, root
from cdc.sink import SinkContext

_OPTIONS: Final[CodecOptions[dict[str, Any]]] = CodecOptions(
    tz_aware=True,
    uuid_representation=UuidRepresentation.STANDARD,
    unicode_decode_error_handler="replace",
    datetime_conversion=DatetimeConversion.DATETIME_AUTO,
)
_RELAXED: Final = json_util.JSONOptions(
    json_mode=json_util.JSONMode.RELAXED, uuid_representation=UuidRepresentation.STANDARD
)
_encode: Final = msgspec.json.Encoder().encode


class _Known(NamedTuple):
    """The last known document, and whether it is the whole truth."""

    document: Document
    exact: bool


class EntityTranslator:
    """Translates MongoDB's changes."""

    def __init__(self, options: FeedOptions, context: SinkContext) -> None:
        """Raises `ConfigError` where a part of a field shall be hidden: all of it would be shown."""
        _check_hidden(options)
        self._options = options
        # documents as they were right after an update, and no lookups
        self._post_images = context.source is not None and context.source.full_document in _POST_IMAGES
        self._forms: dict[TableName, _Form] = {}

    def events(self, tables: Sequence[Table], change: Change) -> Sequence[Event]:
        """One event for each document; and one for all, where a collection goes away or another takes its name."""
        if change.operation == DDL:
            return self._ddl(tables, change)
        kind = _KINDS.get(change.operation)
        if kind is None or change.table < 0:
            return ()
        if change.key is None:
            raise DecodeError("a change without document key")
        table = tables[change.table].qualified
        key, entity_id = self._form(table).names(change.key)
        return (Event(table=table, change_type=kind, key=key, entity_id=entity_id),)

    def complete(self, event: Event, change: Change, state: EntityState | None, generation: int) -> Told:
        """Work out the document before and after the change."""
        if change.operation == DDL or change.key is None:
            return Told(None, None, None)
        form = self._form(event.table)
        known = form.recalled(state, generation)
        before = known if change.before is None else form.needed(_decoded(change.before))
        told_before = None if before is None else form.view(before)
        if change.operation == DELETE:
            return Told(told_before or form.key_only(change.key, state), None, None)
        description = _decoded(change.detail.description) if isinstance(change.detail, Delta) else None
        after = self._after(form, change, known, description)
        return Told(
            before=told_before,
            after=form.view(after.document),
            changed=form.changed(before, after.document, description),
            delta=None if description is None else form.delta(description),
            lookup=not after.exact,
            known=form.remembered(after.document, generation) if after.exact else None,
        )

    def _after(
        self, form: _Form, change: Change, known: Document | None, description: Mapping[str, Any] | None
    ) -> _Known:
        image = None if change.after is None else form.needed(_decoded(change.after))
        if image is not None and (description is None or self._post_images):
            return _Known(image, exact=True)
        if description is None:
            raise DecodeError("an insert or a replacement without its document")
        own = form.part_of(description, image)
        if known is not None:
            try:
                return _Known(overlaid(known, own), exact=True)
            except Unclear:
                pass
        found = image if image is not None else form.needed(_decoded(change.key or b""))
        return _Known(overlaid(found, own, strict=False), exact=False)

    def _ddl(self, tables: Sequence[Table], change: Change) -> Sequence[Event]:
        assert isinstance(change.detail, Ddl)
        if change.table < 0 or change.detail.kind not in {"drop", "rename"}:
            return ()
        events = [_all(tables[change.table], ChangeType.DELETE)]
        target = renamed_to(change.detail.description) if change.detail.kind == "rename" else None
        if target is not None:
            events.append(Event(table=target, change_type=ChangeType.CREATE, key=ALL, entity_id=ALL))
        return events

    def _form(self, table: TableName) -> _Form:
        form = self._forms.get(table)
        if form is None:
            form = self._forms[table] = _Form(table, self._options)
        return form


class _Form:
    """How the documents of one collection are told of.

    A document is kept as far as it is needed: what is shown, with masks on, and what location, user and scope are in.
    """

    def __init__(self, table: TableName, options: FeedOptions) -> None:
        self._entity = entity = Entity.of(table, options)
        self._table = str(table).encode()
        self._largest = options.max_payload_bytes
        self._paths = {path for path in (entity.location, entity.user, *entity.scope) if path}
        self._roots = {path.partition(".")[0] for path in self._paths}

    def names(self, document_key: Image) -> tuple[str, str]:
        """What tells the document from others, and what it is called: with a mask on."""
        key, name = key_bytes(document_key), entity_name(_decoded(document_key).get("_id"))
        if (mask := self._entity.mask.get("_id")) is None:
            return bounded(key.hex()), bounded(name)
        return masked_text(key, "sha256"), masked_text(name.encode(), mask)

    def key_only(self, document_key: Image, state: EntityState | None) -> View:
        """Of a deleted document that was not known, what is shown of its key, and where it was last seen."""
        return View(
            shown=self.view(self.needed(_decoded(document_key))).shown,
            location_id=state.location_id if state is not None else None,
            scope=state.scope if state is not None else None,
        )

    def needed(self, document: Document) -> Document:
        """What is needed of a document as it came."""
        kept = {name: value for name, value in document.items() if self._needs(name)}
        return {name: self._masked(name, value) for name, value in kept.items()}

    def part_of(self, description: Mapping[str, Any], image: Document | None) -> dict[str, Any]:
        """What is needed of an update description; a masked field is replaced as a whole."""
        updated: dict[str, Any] = {}
        for name, value in (description.get("updatedFields") or {}).items():
            top = root(name, description)
            if top not in self._entity.mask:
                updated |= {name: value} if self._needs(top) else {}
            elif self._needs(top):
                updated[top] = self._masked(top, value) if top == name else (image or {}).get(top, "***")
        for name in self._masked_parts(description):
            updated[name] = (image or {}).get(name, "***")
        return {
            **description,
            "updatedFields": updated,
            "removedFields": [
                name for name in description.get("removedFields") or () if self._keeps(name, description)
            ],
            "truncatedArrays": [
                each
                for each in description.get("truncatedArrays") or ()
                if self._keeps(each["field"], description, whole=False)
            ],
        }

    def _masked_parts(self, description: Mapping[str, Any]) -> Iterator[str]:
        """Masked fields of which a part was removed: they are there as a whole only, and are replaced as a whole."""
        removed = [name for name in description.get("removedFields") or () if root(name, description) != name]
        for name in (*removed, *(each["field"] for each in description.get("truncatedArrays") or ())):
            top = root(name, description)
            if top in self._entity.mask and self._needs(top):
                yield top

    def view(self, document: Document) -> View:
        """How a needed document is told of."""
        scope = {path: text for path in self._entity.scope if (text := _text(_at(document, path))) is not None}
        return View(
            shown=to_json({name: value for name, value in document.items() if self._entity.shows(name)}),
            location_id=_text(_at(document, self._entity.location)),
            user_id=_text(_at(document, self._entity.user)),
            scope=_encode(scope) if self._entity.scope else None,
        )

    def delta(self, description: Mapping[str, Any]) -> Json:
        """The update description, without what is not shown, and with masks on."""
        own = self.part_of(description, None)
        shown = self._entity.shows
        return to_json(
            {
                "updatedFields": {
                    name: value for name, value in own["updatedFields"].items() if shown(root(name, description))
                },
                "removedFields": [name for name in own["removedFields"] if shown(root(name, description))],
                "truncatedArrays": [each for each in own["truncatedArrays"] if shown(root(each["field"], description))],
            }
        )

    def changed(
        self, before: Document | None, after: Document, description: Mapping[str, Any] | None
    ) -> tuple[str, ...] | None:
        """Names of changed fields that are shown."""
        shown = self._entity.shows
        if description is not None:
            tops = {name: root(name, description) for name in changed_fields(description)}
            # what is in a masked field is part of its value, names included
            names = (top if top in self._entity.mask else name for name, top in tops.items() if shown(top))
            return tuple(dict.fromkeys(names))
        if before is None:
            return None
        fields = filter(shown, dict.fromkeys((*before, *after)))
        return tuple(name for name in fields if before.get(name, _ABSENT) != after.get(name, _ABSENT))

    def remembered(self, document: Document, generation: int) -> bytes | None:
        """A needed document for `EntityState.known`; a very large one is not kept."""
        image = bson.encode(document, codec_options=_OPTIONS)
        return None if len(image) > self._largest else self._mark(generation) + image

    def recalled(self, state: EntityState | None, generation: int) -> Document | None:
        """What `remembered` kept, unless all documents were replaced since."""
        mark = self._mark(generation)
        if state is None or state.known is None or not state.known.startswith(mark):
            return None
        return _decoded(state.known[len(mark) :])

    def _mark(self, generation: int) -> bytes:
        """What a document was kept for: tables may share a type, and names may pass to other collections."""
        return b"%d:%s\0" % (generation, self._table)

    def _needs(self, name: str) -> bool:
        return self._entity.shows(name) or name in self._roots

    def _keeps(self, name: str, description: Mapping[str, Any], *, whole: bool = True) -> bool:
        """Whether it is there to be removed or shortened: a masked field is there as a whole only."""
        top = root(name, description)
        return self._needs(top) and (top not in self._entity.mask or (whole and top == name))

    def _masked(self, name: str, value: Any) -> Any:
        mask = self._entity.mask.get(name)
        if mask is None or value is None:
            return value
        return msgspec.json.decode(masked((_text(value) or "").encode(), mask))


def _check_hidden(options: FeedOptions) -> None:
    for table, entity in options.entities.items():
        if isinstance(entity, EntityOptions):
            for name in (*entity.exclude, *entity.mask, *(entity.columns or ())):
                if "." in name:
                    raise ConfigError(
                        f'entities."{table}": {name!r} is only a part of a field', hint=f"name {root(name, {})!r}"
                    )


_POST_IMAGES: Final = ("whenAvailable", "required")
_ABSENT: Final = object()

_KINDS: Final = {INSERT: ChangeType.CREATE, UPDATE: ChangeType.UPDATE, DELETE: ChangeType.DELETE}


def to_json(value: Any) -> Json:
    """Relaxed Extended JSON: plain JSON but for the types that it has not."""
    return json_util.dumps(value, json_options=_RELAXED, ensure_ascii=False, separators=(",", ":")).encode(
        "utf-8", "replace"
    )


def entity_name(identifier: Any) -> str:
    """An `_id` as people write it: the digits of an ObjectId, a string as it is, anything else as Extended JSON."""
    return _text(identifier) or ""


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, ObjectId):
        return str(value)
    return to_json(value).decode()


def _at(document: Document, path: str) -> Any:
    """The value at a dotted path; `None` where there is none."""
    value: Any = document
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _decoded(image: Image) -> Document:
    try:
        return bson.decode(image, codec_options=_OPTIONS)
    except (BSONError, ValueError, OverflowError) as exc:
        raise DecodeError(f"a document cannot be read: {exc}") from exc


def _all(table: Table, kind: ChangeType) -> Event:
    return Event(table=table.qualified, change_type=kind, key=ALL, entity_id=ALL)
