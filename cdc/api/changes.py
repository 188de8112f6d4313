"""Routes that read the feed by polling, show the history of one entity, and clean up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from cdc.api.change import (
    Change,
    Cursor,
    GapFailure,
    Name,
    Place,
    Since,
    cursor_of,
    is_place,
    moment_of,
    place_of,
    place_text,
)
from cdc.api.feed import Feed
from cdc.api.filters import Filters
from cdc.api.operation import operation
from cdc.api.principal import PRINCIPAL, Principal
from cdc.api.requests import BadRequest, read_body, read_query
from cdc.api.responses import answer
from cdc.feed.gap import Gap, find_gap, find_gap_at
from cdc.feed.record import Record, as_json, iso_time
from cdc.feed.store import FeedReader, Wanted
from cdc.feed.visibility import Limits, view

MAX_CHANGES: Final = 1_000
PRUNED_AT_ONCE: Final = 5_000
"""Rows in one transaction of a clean-up: it keeps writers waiting for milliseconds only."""

Limit = Annotated[int, msgspec.Meta(ge=1, le=MAX_CHANGES, description="How many changes at most.")]


class PollQuery(Filters, frozen=True, rename="camel", forbid_unknown_fields=True):
    """What `GET /api/changes/poll` takes. wait: seconds."""

    since: Since | msgspec.UnsetType = msgspec.UNSET
    limit: Limit = 100
    wait: Annotated[float, msgspec.Meta(ge=0, le=60, description="Seconds to wait for something.")] = 0.0


class Polled(msgspec.Struct, frozen=True, rename="camel"):
    """cursor: how far the feed was looked through; give it back as `since`. hasMore: ask again at once."""

    changes: tuple[Change, ...]
    cursor: Place
    has_more: bool
    timestamp: datetime


class HistoryQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `GET /api/changes/{entityType}/{entityId}` takes. before: the `cursor` of the page before."""

    limit: Limit = 100
    before: Cursor | msgspec.UnsetType = msgspec.UNSET


class History(msgspec.Struct, frozen=True, rename="camel"):
    """The newest first. cursor: give it back as `before` if `hasMore`; else `null`."""

    changes: tuple[Change, ...]
    cursor: Cursor | None
    has_more: bool


class CleanupRequest(msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    """What to remove: all that was recorded earlier; of one entity type, or of all."""

    hours_to_keep: Annotated[float, msgspec.Meta(ge=0, le=1_000_000)]
    entity_type: Name | msgspec.UnsetType = msgspec.UNSET


class Removed(msgspec.Struct, frozen=True):
    """How many changes."""

    removed: int


class _Page(msgspec.Struct, frozen=True):
    """Changes as JSON, and the id up to (or, backwards, down to) which was looked.

    forgiven: up to here the reader knows already that something is missing.
    """

    changes: tuple[msgspec.Raw, ...]
    cursor: int
    more: bool
    forgiven: int = 0


class _Missed(msgspec.Struct, frozen=True):
    """A gap, and the cursor behind which it was found."""

    gap: Gap
    cursor: int


class Changes:
    """The feed, by request and answer."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed

    def routes(self) -> list[BaseRoute]:
        """The routes of this group."""
        return [
            Route("/api/changes/poll", self.poll),
            Route("/api/changes/poll/cleanup", self.cleanup, methods=["POST"]),
            Route("/api/changes/{entityType}/{entityId:path}", self.history),
        ]

    @operation("read", {200: Polled, 410: GapFailure}, query=PollQuery)
    async def poll(self, request: Request) -> Response:
        """Changes behind a cursor, in order; with `wait`, as soon as there are some."""
        query = read_query(request, PollQuery)
        principal: Principal = request.scope[PRINCIPAL]
        search = _Search(self._feed.reader, query.wanted(principal.limits), query.limit, principal.limits)
        deadline, ends = time.monotonic() + query.wait, self._feed.ends
        head = self._feed.ring.head
        found = await self._feed.call(search.first, query.since or "")
        while (
            isinstance(found, _Page)
            and not found.changes
            and await self._go_on(request, found, head, deadline=deadline, ends=ends)
        ):
            head = self._feed.ring.head
            found = await self._feed.call(search.behind, found.cursor, found.forgiven)
        return _gone(found) if isinstance(found, _Missed) else _polled(found)

    async def _go_on(self, request: Request, found: _Page, head: int, *, deadline: float, ends: int) -> bool:
        """Whether there is something more to look at in time, for somebody who still waits for it.

        head: of the feed when it was looked at last. The page's cursor may be behind it, where all else was removed.
        ends: of the feed when the request came.
        """
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            return False
        if found.more:
            return not await request.is_disconnected()
        tasks = [
            asyncio.create_task(self._feed.news(max(found.cursor, head), remaining, ends), name="news"),
            asyncio.create_task(_disconnected(request), name="disconnected"),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return all(task.result() for task in done)
        finally:
            for task in tasks:
                task.cancel()

    @operation("admin", {200: Removed}, body=CleanupRequest)
    async def cleanup(self, request: Request) -> Response:
        """Remove old changes now, whatever retention says."""
        wanted = await read_body(request, CleanupRequest)
        before = time.time_ns() // 1_000 - round(wanted.hours_to_keep * 3_600_000_000)
        removed = 0
        while gone := await self._feed.prune(wanted.entity_type or None, before, PRUNED_AT_ONCE):
            removed += gone
            if await request.is_disconnected():
                break
        return answer(Removed(removed))

    @operation("read", {200: History}, query=HistoryQuery)
    async def history(self, request: Request) -> Response:
        """The changes of one entity that are kept, the newest first."""
        query = read_query(request, HistoryQuery)
        entity_type, entity_id = (_checked(request, name) for name in ("entityType", "entityId"))
        entity = _Entity(self._feed.reader, entity_type, entity_id, request.scope[PRINCIPAL].limits)
        page = await self._feed.call(entity.page, cursor_of(query.before) if query.before else None, query.limit)
        cursor = str(page.cursor) if page.more else None
        return answer({"changes": page.changes, "cursor": cursor, "hasMore": page.more})


class _Search(msgspec.Struct, frozen=True):
    """What somebody polls for. Its methods block."""

    reader: FeedReader
    wanted: Wanted
    limit: int
    limits: Limits

    def first(self, since: str) -> _Page | _Missed:
        """Look from where the client says. Raises `BadRequest` where that cannot be understood."""
        if not since:
            return self._from_oldest()
        if since == "now":
            return _Page((), self.reader.head(), more=False)
        if is_place(since):
            return self.behind(*place_of(since))
        recorded_at = moment_of("since", since)
        cursor = self.reader.cursor_at(recorded_at)
        page = self._look(cursor)
        gap = find_gap_at(self.reader, recorded_at, self.wanted)
        return page if gap is None else _Missed(gap, cursor)

    def _from_oldest(self) -> _Page:
        """Whatever is kept: nothing can be missing. What was removed behind the last is passed over, too."""
        head = self.reader.head()  # first: what is committed or removed after the look is not to be skipped
        page = self._look(0)
        if not page.more:
            return msgspec.structs.replace(page, cursor=max(page.cursor, head))
        gap = find_gap(self.reader, 0, self.wanted)
        return page if gap is None else msgspec.structs.replace(page, forgiven=gap.cursor)

    def behind(self, cursor: int, forgiven: int) -> _Page | _Missed:
        """Look behind a cursor, and then whether something was removed before it could be seen."""
        page = self._look(cursor)
        gap = find_gap(self.reader, max(cursor, forgiven), self.wanted)
        return _Missed(gap, cursor) if gap is not None else msgspec.structs.replace(page, forgiven=forgiven)

    def _look(self, cursor: int) -> _Page:
        scan = self.reader.scan(cursor, self.wanted, self.limit)
        return _Page(_encoded(scan.records, self.limits), scan.cursor, scan.more)


class _Entity(msgspec.Struct, frozen=True):
    """Whose history is asked for. Its method blocks."""

    reader: FeedReader
    entity_type: str
    entity_id: str
    limits: Limits

    def page(self, before: int | None, limit: int) -> _Page:
        """The newest changes, or the newest behind `before`."""
        records = self.reader.history(self.entity_type, self.entity_id, before, limit + 1)
        shown = records[:limit]
        return _Page(_encoded(shown, self.limits), shown[-1].id if shown else 0, more=len(records) > limit)


def _encoded(records: Sequence[Record], limits: Limits) -> tuple[msgspec.Raw, ...]:
    """What may be seen, as JSON; made in the feed's thread, where it keeps nobody waiting."""
    seen = (view(record, limits) for record in records)
    return tuple(msgspec.Raw(msgspec.json.encode(as_json(record))) for record in seen if record is not None)


def _polled(page: _Page) -> Response:
    now = iso_time(time.time_ns() // 1_000)
    return answer(
        {
            "changes": page.changes,
            "cursor": place_text(page.cursor, page.forgiven),
            "hasMore": page.more,
            "timestamp": now,
        }
    )


def _gone(missed: _Missed) -> Response:
    gap = missed.gap
    return answer(
        GapFailure(
            "changes behind this cursor are not kept any more, or it is of another feed",
            "read the entities anew, and go on with `cursor`, or with `resume` to see what is left in between",
            str(gap.oldest),
            str(gap.cursor),
            place_text(min(missed.cursor, gap.cursor), gap.cursor),
        ),
        410,
    )


def _checked(request: Request, name: str) -> str:
    """A part of the path. No store knows the character NUL, and some do not even want to hear it."""
    text: str = request.path_params[name]
    if not text or "\0" in text:
        raise BadRequest(f"{name}: empty, or with a NUL character")
    return text


async def _disconnected(request: Request) -> bool:
    """Return False when the client is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    return False
