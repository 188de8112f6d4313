"""The feed: every change as a row of one table, in commit order, for applications that poll or listen.

The table is in PostgreSQL, MongoDB, or SQLite inside the data directory (without a url). Rows, the entities' states and
the position are committed together, in whole source transactions. How changes become rows is in `cdc.feed.composer`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Final

import msgspec
import structlog

from cdc.change import Batch
from cdc.config import SinkConfig
from cdc.errors import TransientError
from cdc.feed.composer import Composer, Draft, Drafter, keys_of
from cdc.feed.event import translator
from cdc.feed.options import FeedOptions
from cdc.feed.place import check, place_of, writer
from cdc.feed.retention import Retention, remove
from cdc.position import Position, SourcePosition
from cdc.preflight import Finding
from cdc.sink import Applied, SinkContext

PRUNE_SECONDS: Final = 0.5
"""How long the stream waits for retention at a time."""

DRAFTS_AT_ONCE: Final = 1_000
"""So many changes are in memory as objects, of which there are several for each on the way to a store."""

log = structlog.get_logger()


class DataChangesSink:
    """Writes the changes of one source. Implements `cdc.sink.StreamSink`."""

    Options = FeedOptions
    consistent = True

    def __init__(self, config: SinkConfig, context: SinkContext) -> None:
        options = config.options if isinstance(config.options, FeedOptions) else FeedOptions()
        scope = tuple(dict.fromkeys((*options.scope, *context.row_limits)))
        options = msgspec.structs.replace(options, scope=scope)
        assert context.data_dir is not None
        self.name = config.name
        self._place = place_of(config, context.data_dir)
        self._source = config.source
        self._writer = writer(self._place, config.source)
        translate = translator(options, context)
        self._drafter = Drafter(options, translate)
        self._composer = Composer(config.source, options, translate)
        self._retention = Retention(config.source, options)
        self._is_open = self._may_repeat = False

    def open(self) -> Position | None:
        """Connect, and return the position stored beside the records."""
        self.close()
        position = self._writer.open()
        self._is_open = self._may_repeat = True
        return position

    def prepare(self, batches: Sequence[Batch]) -> None:
        """Do nothing: as objects changes weigh much more than in batches."""

    def apply(self, batches: Sequence[Batch], position: Position) -> Applied:
        """Append in order; visible together with `position` when `batches` end with a complete transaction."""
        if not self._is_open:
            raise TransientError(f"sink {self.name} is not connected")
        drafts = self._drafter.drafts(batches)
        while some := list(islice(drafts, DRAFTS_AT_ONCE)):
            self._write(some)
        if batches[-1].complete:
            self._writer.commit(position)
        return Applied(changes=sum(batch.change_count for batch in batches))

    def upkeep(self, position: SourcePosition) -> None:  # noqa: ARG002 - retention goes by time
        """Remove what is older than its retention."""
        self._retention.enforce(self._writer, seconds=PRUNE_SECONDS)

    def adjust(self, config: SinkConfig) -> None:
        """Only retention may change."""
        assert isinstance(config.options, FeedOptions)
        self._retention = Retention(self._source, config.options)

    def close(self) -> None:
        """Disconnect; what was not complete is rolled back."""
        self._is_open = False
        self._drafter.forget()
        self._writer.close()

    def prune(self, seconds_to_keep: float | None, entity_type: str | None) -> int:
        """Remove records now, beside a running daemon or without one; returns how many.

        seconds_to_keep: of all sources, whatever retention says; `None` to do what retention says.
        """
        try:
            self._writer.open()
            if seconds_to_keep is None:
                return self._retention.enforce(self._writer)
            return remove(self._writer, entity_type, int((time.time() - seconds_to_keep) * 1e6))
        finally:
            self._writer.close()

    def stored_position(self) -> Position | None:
        """The position stored beside the records."""
        try:
            return self._writer.open()
        finally:
            self._writer.close()

    def begin(self, position: Position) -> None:
        """Store where it begins, and create the tables."""
        try:
            self._writer.open()
            self._writer.begin(position)
        finally:
            self._writer.close()
        log.info("feed begins", sink=self.name, source=self._source, table=self._place.table)

    def forget(self) -> None:
        """Remove the position; the records stay."""
        try:
            self._writer.open()
            self._writer.forget()
        finally:
            self._writer.close()

    def check(self) -> Iterator[Finding]:
        """Look whether the feed can be reached."""
        yield from check(self._place)

    def _write(self, drafts: Sequence[Draft]) -> None:
        new = self._new(drafts)
        self._writer.append(*self._composer.compose(new, self._writer.states(keys_of(new))))

    def _new(self, drafts: Sequence[Draft]) -> Sequence[Draft]:
        """Without what is told already: a feed that was dropped begins with what the queue still has.

        Told twice it would count versions twice. Everything is in order: what follows the first news is news.
        """
        if not self._may_repeat or not drafts:
            return drafts
        known = self._writer.known([draft.position for draft in drafts])
        new = [draft for draft in drafts if draft.position not in known]
        self._may_repeat = not new
        return new
