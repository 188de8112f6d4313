"""Change streams: where they start, which entries concern them, and their cursors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import bson

from . import events, mock, raw, tokens
from .cursors import Batch, Cursor
from .errors import CommandError
from .events import Event, EventOptions
from .oplog import Entry, from_timestamp
from .projections import project
from .versions import Version

if TYPE_CHECKING:
    from .state import State

_FIELDS: Final = {
    "fullDocument", "fullDocumentBeforeChange", "resumeAfter", "startAfter", "startAtOperationTime",
    "allChangesForCluster", "showExpandedEvents", "showSystemEvents", "showRawUpdateDescription",
}  # fmt: skip
_IMAGES: Final = ("default", "updateLookup", "whenAvailable", "required")
_QUICK: Final = frozenset(("operationType", "ns", "ns.db", "ns.coll"))
_HIDDEN_DATABASES: Final = frozenset(("admin", "config", "local"))
_LOST: Final = "Resume of change stream was not possible, as the resume point may no longer be in the oplog."


@dataclass(slots=True)
class Watched:
    """What a stream looks at: a collection, a database (no collection), or everything (neither)."""

    db: str
    coll: str

    def concerns(self, entry: Entry, *, expanded: bool) -> bool:
        """Whether the entry is an event of this stream."""
        if entry.operation in events.EXPANDED and not expanded:
            return False
        return self._names(entry.db, entry.coll) or (entry.to is not None and self._names(*entry.to))

    def _names(self, db: str, coll: str) -> bool:
        if db in _HIDDEN_DATABASES or coll.startswith("system."):
            return False
        if self.coll:
            return db == self.db and coll == self.coll
        return not self.db or db == self.db

    def ends_with(self, entry: Entry) -> bool:
        """Whether the stream is invalidated by this entry."""
        if self.coll:
            return entry.operation in {"drop", "rename"}
        return bool(self.db) and entry.operation == "dropDatabase"


@dataclass(slots=True)
class Stages:
    """The stages after `$changeStream`."""

    steps: list[Callable[[Event], bool]] = field(default_factory=list)
    splits: bool = False

    def apply(self, event: Event) -> bool:
        """Whether the event passes; it is changed by projections."""
        return all(step(event) for step in self.steps)


class ChangeStreamCursor(Cursor):
    """An open stream: the number of the next oplog entry, and the token up to which everything was delivered."""

    is_change_stream = True
    tailable = True

    def __init__(self, state: State, namespace: str, watched: Watched, options: EventOptions, stages: Stages) -> None:
        super().__init__(namespace)
        self._state = state
        self._watched = watched
        self._options = options
        self._stages = stages
        self.next = 0
        self.token = ""
        self.skip_through = ""
        """Events of the first entry up to this token were delivered before."""

        self.skip_invalidate_at = -1
        self._pending: list[tuple[str, bytes]] = []
        self._ended = False

    async def fill(self, batch: Batch, timeout_seconds: float) -> None:
        """Put what there is into the batch; wait for the first event, but not longer than asked."""
        loop_time = self._state.loop_time
        deadline = loop_time() + timeout_seconds
        while True:
            self._advance(batch)
            remaining = deadline - loop_time()
            if batch.documents or self.closed or remaining <= 0 or self.killed:
                return
            await self._state.oplog.wait(remaining)
            if self.killed:
                raise CommandError(self.killed[0], self.killed[1])

    def _advance(self, batch: Batch) -> None:
        oplog = self._state.oplog
        if self.next < oplog.first:
            raise CommandError(136, "CollectionScan died due to position in capped collection being deleted.")
        while not self._ended or self._pending:
            while self._pending:
                if not batch.fits(self._pending[0][1]):
                    return
                token, document = self._pending.pop(0)
                batch.add(document)
                self.token = token
            if self._ended:
                break
            if self.next >= oplog.majority[0]:
                self._note_idle()
                return
            if batch.full:
                return
            if not self._read_next(batch):
                return
        self.closed = True

    def _read_next(self, batch: Batch) -> bool:
        """Read one entry. An error waits until the events before it have been delivered; False then."""
        try:
            self._read(self._state.oplog.entry(self.next))
        except CommandError:
            if not batch.documents:
                raise
            return False
        self.next += 1
        return True

    def _note_idle(self) -> None:
        mark = tokens.high_water_mark(self._state.oplog.majority[1], self._options.version.token_version)
        self.token = max(self.token, mark)

    def _read(self, entry: Entry) -> None:
        if not self._watched.concerns(entry, expanded=self._options.expanded):
            return
        for event in self._events(entry):
            if self.skip_through and event.token <= self.skip_through and not self._resumes_within(event):
                continue
            if self._stages.apply(event):
                self._deliver(event)

    def _events(self, entry: Entry) -> Iterator[Event]:
        ends = self._watched.ends_with(entry) and entry.timestamp != self.skip_invalidate_at
        yield events.build(entry, self._options, self._state.catalog)
        if ends:
            self._ended = True
            yield events.build_invalidate(entry, self._options)

    def _resumes_within(self, event: Event) -> bool:
        """Whether the stream was resumed from a fragment of this event."""
        return (
            self._stages.splits and self.skip_through.startswith(event.token[:-2]) and self.skip_through != event.token
        )

    def _deliver(self, event: Event) -> None:
        limit = self._state.max_event_bytes
        if self._stages.splits and len(event.document) > limit:
            for number, part in enumerate(events.split(event.token, event.document, limit)):
                token = tokens.fragment(event.token, number)
                if not self.skip_through.startswith(event.token[:-2]) or token > self.skip_through:
                    self._pending.append((token, part))
            return
        if len(event.document) > limit:
            size = len(event.document)
            raise CommandError(
                10334,
                f"BSONObj size: {size} (0x{size:X}) is invalid. Size must be between 0 and {limit}(16MB) First "
                f'element: _id: {{ _data: "{event.token}" }}',
            )
        self._check_id(event)
        self._pending.append((event.token, event.document))

    def _check_id(self, event: Event) -> None:
        found = raw.find_value(event.document, b"_id")
        if found is None or found[1] != raw.wrap(raw.string_element(b"_data", event.token)):
            raise CommandError(
                280,
                "Encountered an event whose _id field, which contains the resume token, was modified by the pipeline. "
                "Modifying the _id field of an event makes it impossible to resume the stream from that point. Only "
                "transformations that retain the unmodified _id field are allowed.",
            )

    def describe(self) -> bytes:
        """The reply's `postBatchResumeToken`."""
        return raw.element(b"postBatchResumeToken", raw.OBJECT, raw.wrap(raw.string_element(b"_data", self.token)))


def open_stream(state: State, db: str, coll: str, pipeline: list[dict[str, Any]]) -> ChangeStreamCursor:
    """The cursor of a pipeline that begins with `$changeStream`; `CommandError` for options that a server refuses."""
    if state.standalone:
        raise CommandError(40573, "The $changeStream stage is only supported on replica sets")
    spec = pipeline[0]["$changeStream"]
    options = _options(spec, state.version)
    if spec.get("allChangesForCluster"):
        if db != "admin":
            raise CommandError(
                72, "A $changeStream with 'allChangesForCluster:true' may only be opened on the 'admin' database"
            )
        watched, namespace = Watched("", ""), "admin.$cmd.aggregate"
    else:
        if db in _HIDDEN_DATABASES:
            raise CommandError(73, f"$changeStream may not be opened on the internal {db} database")
        watched, namespace = Watched(db, coll), f"{db}.{coll or '$cmd.aggregate'}"
    cursor = ChangeStreamCursor(state, namespace, watched, options, _stages(pipeline[1:], state.version))
    _position(cursor, spec, state)
    return cursor


def _options(spec: dict[str, Any], version: Version) -> EventOptions:
    known = _FIELDS if version.has_expanded_events else _FIELDS - {"showExpandedEvents", "showSystemEvents"}
    for name in spec:
        if name not in known:
            raise CommandError(40415, f"BSON field '$changeStream.{name}' is an unknown field.")
    full = spec.get("fullDocument", "default")
    images = _IMAGES if version.has_expanded_events else _IMAGES[:2]
    if full not in images:
        raise CommandError(
            2, f"Enumeration value '{full}' for field '$changeStream.fullDocument' is not a valid value."
        )
    before = spec.get("fullDocumentBeforeChange", "off")
    if before not in {"off", "whenAvailable", "required"}:
        raise CommandError(
            2, f"Enumeration value '{before}' for field '$changeStream.fullDocumentBeforeChange' is not a valid value."
        )
    return EventOptions(version, full, before, bool(spec.get("showExpandedEvents")))


def _position(cursor: ChangeStreamCursor, spec: dict[str, Any], state: State) -> None:
    chosen = [name for name in ("resumeAfter", "startAfter", "startAtOperationTime") if name in spec]
    if len(chosen) > 1:
        raise CommandError(40674, "Only one type of resume option is allowed, but multiple were found.")
    oplog = state.oplog
    if not chosen:
        cursor.next = oplog.end
        cursor.token = tokens.high_water_mark(oplog.last_timestamp + 1, state.version.token_version)
        return
    value = spec[chosen[0]]
    if chosen[0] == "startAtOperationTime":
        if not isinstance(value, bson.Timestamp):
            raise CommandError(
                14, "BSON field '$changeStream.startAtOperationTime' is the wrong type, expected 'timestamp'"
            )
        token = tokens.Token(from_timestamp(value), high_water_mark=True)
    else:
        token = tokens.parse(value)
    if token.from_invalidate and chosen[0] == "resumeAfter":
        raise CommandError(
            260,
            "Attempting to resume a change stream using 'resumeAfter' is not allowed from an invalidate notification.",
        )
    if oplog.truncated and token.timestamp < oplog.oldest_timestamp:
        raise CommandError(286, _LOST, labels=("NonResumableChangeStreamError",))
    cursor.next = oplog.find(token.timestamp, token.index)
    cursor.token = token.text or tokens.high_water_mark(token.timestamp, state.version.token_version)
    cursor.skip_through = token.text
    if token.from_invalidate:
        cursor.skip_invalidate_at = token.timestamp


def _stages(pipeline: list[dict[str, Any]], version: Version) -> Stages:
    stages = Stages()
    for at, stage in enumerate(pipeline):
        name, argument = next(iter(stage.items()))
        if name == "$match":
            stages.steps.append(_matcher(argument))
        elif name in {"$project", "$unset"}:
            stages.steps.append(_projector(name, argument))
        elif name == "$changeStreamSplitLargeEvent" and version.has_split_events:
            if at != len(pipeline) - 1:
                raise CommandError(7182802, "$changeStreamSplitLargeEvent must be the last stage in the pipeline")
            stages.splits = True
        elif name in {"$group", "$sort", "$limit", "$skip", "$out", "$lookup", "$unwind", "$count"}:
            raise CommandError(20, f"{name} is not permitted in a $changeStream pipeline")
        else:
            raise CommandError(40324, f"Unrecognized pipeline stage name: '{name}'")
    return stages


def _matcher(condition: dict[str, Any]) -> Callable[[Event], bool]:
    if not _paths(condition) <= _QUICK:
        return lambda event: mock.matches_raw(condition, event.document)
    known: dict[tuple[str, str, str], bool] = {}

    def decide(event: Event) -> bool:
        seen = (event.operation, event.db, event.coll)
        if seen not in known:
            if len(known) > 10_000:
                known.clear()
            subject = raw.decode(event.document) if event.operation == "invalidate" else events.quick_fields(event)
            known[seen] = mock.matches(condition, subject)
        return known[seen]

    return decide


def _paths(condition: dict[str, Any]) -> set[str]:
    found: set[str] = set()
    for name, value in condition.items():
        if name in {"$and", "$or", "$nor"}:
            found = found.union(*[_paths(inner) for inner in value])
        else:
            found.add(name)
    return found


def _projector(name: str, argument: Any) -> Callable[[Event], bool]:
    if name == "$unset":
        argument = dict.fromkeys(argument if isinstance(argument, list) else [argument], 0)

    def apply(event: Event) -> bool:
        event.document = project(event.document, argument)
        return True

    return apply


def has_change_stream(pipeline: Any) -> bool:
    """Whether a pipeline begins with `$changeStream`."""
    return bool(pipeline) and isinstance(pipeline[0], dict) and "$changeStream" in pipeline[0]
