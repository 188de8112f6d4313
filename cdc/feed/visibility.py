"""Who sees what of the feed. One place for poll, history, WebSocket and SSE alike."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from cdc.feed.record import ALL, ChangeType, Json, Record


class Limits(msgspec.Struct, frozen=True):
    """What somebody may see of the feed. `None`: no limit of that sort.

    channels: by name.
    where: fields of the entity, and the text that each must be equal to.
    """

    channels: frozenset[str] | None = None
    where: Mapping[str, str] | None = None


def view(record: Record, limits: Limits) -> Record | None:
    """What somebody with these limits may see of a change; `None` where that is nothing.

    An entity that enters what they see is created for them, one that leaves it is deleted, and neither shows the other
    side. A scope that is not known, in whole or in the field that counts, is somebody else's.
    """
    if limits.channels is not None and record.channel not in limits.channels:
        return None
    if limits.where is None:
        return record
    before, after = _within(record.scope_before, limits.where), _within(record.scope_after, limits.where)
    ends = record.change_type is ChangeType.DELETE
    if before and (after or (ends and record.after is None)):
        return record
    if ends and not before:
        return _truncation(record)
    if after:
        return msgspec.structs.replace(
            record, change_type=_entering(record), before=None, delta=None, changed=None, scope_before=None
        )
    return _leaving(record) if before else None


def _within(scope: Json | None, where: Mapping[str, str]) -> bool:
    """Whether each field of `where` is in the scope with that text; numbers and booleans as JSON writes them."""
    if scope is None:
        return False
    fields = msgspec.json.decode(scope, type=dict[str, msgspec.Raw])
    return all(name in fields and _text(bytes(fields[name])) == wanted for name, wanted in where.items())


def _text(value: Json) -> str | None:
    """`None` for what has no text: null, and whatever is not one value."""
    if value[:1] == b'"':
        return msgspec.json.decode(value, type=str)
    return None if value[:1] in b"n{[" else value.decode()


def _entering(record: Record) -> ChangeType:
    """What was published under a name of its own keeps it: it tells of no entity that begins."""
    return ChangeType.EVENT if record.change_type is ChangeType.EVENT else ChangeType.CREATE


def _leaving(record: Record) -> Record:
    """`location_id` and `user_id` go with the later image: where the entity has moved to, and whose it is now."""
    return msgspec.structs.replace(
        record,
        change_type=ChangeType.DELETE,
        event=None,
        location_id=None,
        user_id=None,
        after=None,
        delta=None,
        changed=None,
        lookup=False,
        scope_after=None,
    )


def _truncation(record: Record) -> Record | None:
    """The end of all entities of a type is everybody's, and says nothing about anybody's."""
    if record.entity_id != ALL or record.scope_before is not None:
        return None
    return msgspec.structs.replace(record, location_id=None, before=None, delta=None, changed=None)
