"""Putting single documents right on a mirror, in order with the stream.

Positions of a MongoDB source have no order to stand at, and no document can be read as it was. But a document that did
not change at the source between two reads has one image only, whenever it is looked at. So each round

1. reads the documents from the source, and then its clock;
2. waits until the mirror has passed that moment: everything that made the first image is applied;
3. makes the mirror stand still, between two transactions;
4. reads the documents from the source again: where one is still the same, no change to it lies between the first read
   and now, so there is none in the queue. The mirror's document is compared with this image, and put right;
5. lets the mirror go on.

Nothing is overtaken, since the queue held nothing about the document, and what comes later is applied on top as always.
A document that is not the same is taken into the next round; one that is written all the time is left to the stream.
(One that was changed and changed back in between has both changes in the queue, and ends as it is here.)

Where no daemon runs, the mirror stands still by itself, behind the source. What it has yet to apply then comes on top
of these images as it does on those of a copy: see `cdc.mongodb.snapshot`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import bson
from bson.errors import BSONError, InvalidId
from bson.json_util import loads
from bson.objectid import ObjectId
from bson.raw_bson import RawBSONDocument

from cdc.barrier import Barrier
from cdc.change import TableName
from cdc.config import SinkConfig, SourceConfig
from cdc.errors import FatalError, TransientError
from cdc.mongodb.client import Client, connect, translated_errors
from cdc.mongodb.comparison import CatchUp
from cdc.mongodb.delta import deletion, replacement
from cdc.mongodb.digest import lookup, shown_id
from cdc.mongodb.snapshot import find_documents, id_of, now, read_concern
from cdc.mongodb.writes import Outcome, Writer
from cdc.resync import MAX_ROWS, Action, ResyncReport, SyncedRow, Wanted

ROUNDS: Final = 8
HOLD_SECONDS: Final = 30.0
_MARGIN_SECONDS: Final = 5.0
"""A hold that is this near to its end is not written in."""

Documents = Mapping[bytes, bytes]
"""`{_id: value}` as BSON -> the document."""


class Resync:
    """Puts documents of one collection right. catch_up: `None` where no daemon runs."""

    def __init__(self, source: SourceConfig, sink: SinkConfig, table: TableName) -> None:
        assert source.url is not None
        assert sink.url is not None
        self._urls = source.url.reveal(), sink.url.reveal()
        self._table = table
        self._mirrored = sink.target_name(table)

    def run(self, wanted: Wanted, barrier: Barrier, catch_up: CatchUp | None, *, dry_run: bool) -> ResyncReport:
        """Look at every document that is asked for, and put right what differs.

        Raises `FatalError` for a condition that cannot be read, `TransientError` where the mirror is too far behind.
        """
        with ExitStack() as stack:
            source, target = (stack.enter_context(connect(url, application_name="cdc-sync")) for url in self._urls)
            ids, absent = self._find(source, target, wanted)
            actions = dict.fromkeys(absent, Action.ABSENT)
            for _ in range(ROUNDS):
                left = [one for one in ids if one not in actions]
                if not left:
                    break
                actions |= self._round(source, target, left, barrier, catch_up, dry_run=dry_run)
        rows = tuple(SyncedRow(shown_id(one), actions.get(one, Action.CHANGING)) for one in (*ids, *absent))
        return ResyncReport(str(self._table), rows, dry_run)

    def _find(self, source: Client, target: Client, wanted: Wanted) -> tuple[list[bytes], list[bytes]]:
        """The `_id`s that are asked for by value, and those of all documents on either side that a filter finds.

        Then those of `wanted.ids` that are on neither; of what such a text may mean, the first.
        """
        sides = ((source, self._table), (target, self._mirrored))
        found: list[bytes] = []
        absent: list[bytes] = []
        for text in wanted.ids:
            candidates = list(map(id_document, parse_id(text)))
            here = [one for client, name in sides for one in lookup(client, name, candidates)]
            found += here
            absent += [] if here else candidates[:1]
        if wanted.where is not None:
            condition = parse_filter(wanted.where)
            for client, name in sides:
                found += _matching(client, name, condition)
        ids = list(dict.fromkeys(found))
        if len(ids) > MAX_ROWS:
            raise FatalError(
                f"more than {MAX_ROWS:,} documents of {self._table} are meant",
                hint="name fewer of them, or copy the collection again",
            )
        return ids, list(dict.fromkeys(absent))

    def _round(
        self,
        source: Client,
        target: Client,
        ids: Sequence[bytes],
        barrier: Barrier,
        catch_up: CatchUp | None,
        *,
        dry_run: bool,
    ) -> dict[bytes, Action]:
        before = lookup(source, self._table, ids)
        if catch_up is not None and not catch_up(now(source)):
            raise TransientError("the mirror does not catch up with the source", hint="see `cdc status`")
        with _held(barrier) as deadline:
            images = lookup(source, self._table, ids)
            mirrored = lookup(target, self._mirrored, ids)
            actions = {one: _action(images, mirrored, one) for one in ids if before.get(one) == images.get(one)}
            if not dry_run:
                self._write(target, images, actions, deadline)
        return actions

    def _write(self, target: Client, images: Documents, actions: Mapping[bytes, Action], deadline: float) -> None:
        with translated_errors(), target.start_session() as session:
            writer = Writer(target, session)
            for one, action in actions.items():
                if action is Action.EQUAL:
                    continue
                if time.monotonic() > deadline:
                    raise TransientError("the mirror may move on any moment", hint="sync fewer documents at a time")
                if action is Action.DELETED:
                    _done(writer.delete(self._mirrored, [deletion(one)], ordered=True))
                else:
                    _done(writer.update(self._mirrored, replacement(one, images[one]), ordered=True))


def parse_filter(text: str) -> bytes:
    """A filter in Extended JSON, as BSON. Raises `FatalError` for anything else."""
    try:
        condition = loads(text)
        if not isinstance(condition, dict):
            raise TypeError
        return bson.encode(condition)
    except (ValueError, TypeError, BSONError) as exc:
        raise FatalError(f"not a filter: {text[:80]!r}", hint="""as in --where '{"orderNo": "ORDER123"}'""") from exc


def parse_id(text: str) -> list[Any]:
    """What a person may mean by an `_id`: a value in Extended JSON, else a string, or an ObjectId without its marks."""
    try:
        return [loads(text)]
    except (ValueError, TypeError, BSONError, InvalidId):
        return [text, ObjectId(text)] if re.fullmatch("[0-9a-fA-F]{24}", text) else [text]


def id_document(value: object) -> bytes:
    """`{_id: value}` as BSON."""
    return bson.encode({"_id": value})


def _matching(client: Client, table: TableName, condition: bytes) -> Iterator[bytes]:
    command = {
        "find": table.name,
        "filter": RawBSONDocument(condition),
        "projection": {"_id": 1},
        "limit": MAX_ROWS + 1,
        "readConcern": read_concern(now(client)),
    }
    for documents in find_documents(client, table.schema, command):
        yield from map(id_of, documents)


def _action(images: Documents, mirrored: Documents, one: bytes) -> Action:
    image, found = images.get(one), mirrored.get(one)
    if image == found:
        return Action.EQUAL
    if image is None:
        return Action.DELETED
    return Action.INSERTED if found is None else Action.REPLACED


@contextmanager
def _held(barrier: Barrier) -> Iterator[float]:
    """The mirror stands still; yields until when, by the monotonic clock, it surely does."""
    deadline = time.monotonic() + HOLD_SECONDS - _MARGIN_SECONDS
    try:
        barrier.hold(None, HOLD_SECONDS)
        yield deadline
    finally:
        barrier.release()


def _done(outcome: Outcome) -> None:
    for failure in outcome.failures:
        raise failure.error
