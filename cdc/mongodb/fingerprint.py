"""A resume token is only good for the stream that it came from, and the server does not notice: it skips in silence."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from cdc.config import SourceConfig, TableGlobs
from cdc.errors import ResyncRequired
from cdc.mongodb.deployment import Deployment
from cdc.mongodb.scope import covers

FACT = "mongodb_stream"
"""Where it is kept, beside the queue with the token."""


class Fingerprint(msgspec.Struct, frozen=True):
    """What a stream was opened with, and on which deployment."""

    identity: dict[str, str]
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    full_document: str
    full_document_before_change: str
    expanded_events: bool
    split_events: bool


def fingerprint(source: SourceConfig, deployment: Deployment) -> Fingerprint:
    """Of the stream that this configuration opens on this deployment."""
    return Fingerprint(
        identity=deployment.identity,
        include=tuple(sorted(source.tables.include)),
        exclude=tuple(sorted(source.tables.exclude)),
        full_document=source.full_document,
        full_document_before_change=source.full_document_before_change,
        expanded_events=source.show_expanded_events and deployment.has_images,
        split_events=source.split_large_events and deployment.can_split_events,
    )


def check(stored: str | None, current: Fingerprint) -> None:
    """Raise `ResyncRequired` where the stored token belongs to another stream; says what has changed.

    Allowed is what takes nothing away: more collections (they are copied), more kinds of events.
    """
    if stored is None:
        return
    changed = list(_differences(msgspec.json.decode(stored, type=Fingerprint), current))
    if changed:
        raise ResyncRequired(
            f"the stored resume token belongs to another change stream: {'; '.join(changed)}",
            hint="change it back",
        )


def encode(current: Fingerprint) -> str:
    """As it is stored."""
    return msgspec.json.encode(current).decode()


def _differences(stored: Fingerprint, current: Fingerprint) -> Iterator[str]:
    for name in stored.identity.keys() & current.identity.keys():
        if stored.identity[name] != current.identity[name]:
            yield f"the {name} of the deployment was {stored.identity[name]!r} and is {current.identity[name]!r}"
    was, now = (TableGlobs(include=each.include, exclude=each.exclude) for each in (stored, current))
    if not covers(now, was):
        yield (
            f"tables was include {list(was.include)}, exclude {list(was.exclude)} and is narrower now: "
            f"include {list(now.include)}, exclude {list(now.exclude)}"
        )
    for name in ("full_document", "full_document_before_change"):
        if getattr(stored, name) != getattr(current, name):
            yield f"{name} was {getattr(stored, name)!r} and is {getattr(current, name)!r}"
    if stored.expanded_events and not current.expanded_events:
        yield "show_expanded_events was on and is off (or the server no longer has it)"
    if stored.split_events and not current.split_events:
        yield "split_large_events was on and is off (or the server no longer has it)"
