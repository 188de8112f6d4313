"""Parked changes as operators see them, and what they can ask for. Times are in UTC."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from datetime import datetime
from typing import Annotated, Any, Final, Literal, NamedTuple, Protocol

import msgspec

from cdc.errors import CdcError, DecodeError

LetterState = Literal["retrying", "dead", "waiting"]
"""retrying: refused, and tried again. dead: refused, and left to a person. waiting: untried, behind another one."""

MAX_PAGE: Final = 1_000

_ID: Final = r"^([a-z][a-z0-9_]{0,39}):([0-9]{1,18})\.([0-9]{1,18})$"

LetterIdText = Annotated[str, msgspec.Meta(pattern=_ID, description="such as mirror:1207.3")]

JsonObject = Annotated[msgspec.Raw, msgspec.Meta(extra_json_schema={"type": "object"})]


class UnknownLetter(CdcError):
    """No parked change has that id: there never was one, or it is applied or discarded."""


class LetterId(NamedTuple):
    """What people call a parked change by: `mirror:1207.3` (see `cdc.queue.parked.ParkedId`)."""

    sink: str
    place: int
    ordinal: int

    def __str__(self) -> str:
        """What `parse` reads."""
        return f"{self.sink}:{self.place}.{self.ordinal}"

    @staticmethod
    def parse(text: str) -> LetterId:
        """Raises `DecodeError` for anything else."""
        found = re.fullmatch(_ID, text)
        if found is None:
            raise DecodeError(f"not the id of a parked change: {text[:60]!r}", hint="such as mirror:1207.3")
        return LetterId(found[1], int(found[2]), int(found[3]))


class Described(msgspec.Struct, frozen=True, kw_only=True):
    """A change in JSON. Each kind of database has its own way to write values, and none is lost.

    operation: insert, update, delete, truncate, message or ddl.
    key: of the row, by column, or the document's `_id`. change: what there is of it beside operation and key.
    """

    operation: str
    key: dict[str, Any] | None
    change: JsonObject


class Contents(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """All that a parked change holds.

    position, committed_at: its transaction's, by the source's clock.
    change: PostgreSQL: `before`, `after` by column, as the source writes values in text, without columns that did not
        travel. MongoDB: `before`, `after` and `delta`, or the whole event of a `ddl`, as canonical Extended JSON.
    stored: the same as cdc keeps it, down to the last byte: msgpack, in base64.
    """

    position: str
    committed_at: datetime
    change: JsonObject
    stored: bytes


class Letter(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A parked change.

    behind: the refused one that it waits for.
    tables: by their names at the source; that of a whole schema ends with a dot.
    key: of the row, if it is about one.
    error: why the last attempt failed. attempts: 0 for what waits, and for what is due now for the first time.
    next_attempt_at: null where it is not tried by itself.
    size: in bytes.
    contents: only where they were asked for.
    """

    id: str
    sink: str
    state: LetterState
    behind: str | None
    tables: tuple[str, ...]
    operation: str
    key: dict[str, Any] | None
    error: str
    attempts: int
    next_attempt_at: datetime | None
    parked_at: datetime
    size: int
    contents: Contents | msgspec.UnsetType = msgspec.UNSET


class LetterPage(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """Parked changes in the order of their sinks and sources. With `hasMore`, the last one's id is the next `after`."""

    letters: Sequence[Letter]
    has_more: bool


class LetterQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which parked changes.

    state: any of these; left out, all. after: an id. full: with contents; the page may then be shorter.
    """

    sink: str = ""
    state: Annotated[tuple[LetterState, ...], msgspec.Meta(min_length=1)] | msgspec.UnsetType = msgspec.UNSET
    after: LetterIdText | msgspec.UnsetType = msgspec.UNSET
    limit: Annotated[int, msgspec.Meta(ge=1, le=MAX_PAGE)] = 100
    full: bool = False


Fate = Literal["applied", "refused", "due", "waiting", "discarded", "unsettled", "unknown"]


class Outcome(msgspec.Struct, frozen=True):
    """What became of a parked change that somebody retried or discarded.

    fate: applied; refused again (reason); due: tried as soon as its sink delivers; waiting behind another one (reason);
        discarded; unsettled: its target may still get it from the queue, so it cannot be discarded yet; unknown.
    """

    id: str
    fate: Fate
    reason: str = ""


class Outcomes(msgspec.Struct, frozen=True):
    """What became of each."""

    outcomes: tuple[Outcome, ...]


class DeadLetters(Protocol):
    """What operators can do with parked changes: the daemon's, the data directory's, or those of a daemon over HTTP."""

    def list(self, query: LetterQuery) -> LetterPage:
        """One page of them. Raises `CdcError` for a sink that cannot park, or is not there."""
        ...

    def get(self, letter: LetterId) -> Letter:
        """One of them, with its contents. Raises `UnknownLetter`."""
        ...

    def retry(self, letters: Collection[LetterId] | None, who: str, *, sink: str = "") -> Sequence[Outcome]:
        """Make them due now, as if they had never been tried, and wait a little.

        letters: `None` for all that do not wait behind another one. sink: only those of this sink, if it is named.
        """
        ...

    def discard(self, letters: Collection[LetterId], *, reason: str, who: str) -> Sequence[Outcome]:
        """Give them up for good. Those that waited behind them are applied."""
        ...
