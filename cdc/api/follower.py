"""The thread that follows a feed: reads what is new once, for everybody, and hands it to the event loop."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from threading import Event, Thread
from typing import Final, ParamSpec, TypeVar

import structlog

from cdc.errors import CdcError, TransientError
from cdc.feed.record import Record
from cdc.feed.store import FeedReader, Listener, Wanted

READ_RECORDS: Final = 1_000
"""At a time; the event loop has taken them before more are read."""

PACE_SECONDS: Final = 0.02
"""Between two reads while something is new: what arrives meanwhile travels together."""

TIMER_SECONDS: Final = 1.0
"""The feed is read so often, even if nobody says that there is news: a notification may be lost."""

_LISTEN_SECONDS: Final = 0.25
"""How long `stop` may have to wait."""

_MAX_BACKOFF_SECONDS: Final = 5.0

P = ParamSpec("P")
T = TypeVar("T")

log = structlog.get_logger()


class Follower(Thread):
    """Listens before its first read, so that nothing falls between the two, and then reads by cursor alone.

    located: whether the feed was reached at least once. connected: whether it answered when it was last asked.
    """

    def __init__(
        self,
        reader: FeedReader,
        loop: asyncio.AbstractEventLoop,
        restart: Callable[[int], None],
        take: Callable[[Sequence[Record], int], None],
        skip: Callable[[int], bool],
    ) -> None:
        """restart: called in the event loop with the head to go on from, first of all and when the place was lost.

        take: called in the event loop with all records behind the last head, and the new one.
        skip: called in the event loop with a new head alone: whether that is enough, since nobody waits for records.
        """
        super().__init__(name="feed-follower", daemon=True)
        self.located = False
        self.connected = False
        self._reader = reader
        self._loop = loop
        self._restart = restart
        self._take = take
        self._skip = skip
        self._cursor = 0
        self._ending = Event()

    def stop(self) -> None:
        """Let the thread end, in a moment."""
        self._ending.set()

    def run(self) -> None:
        """Follow until `stop`; a store that is away is tried again, with backoff."""
        attempts = 0
        while not self._ending.is_set():
            try:
                self._follow()
            except TransientError as exc:
                attempts = 1 if self.connected else attempts + 1
                self._wait(exc, attempts)
            except Exception as exc:
                attempts += 1
                log.error("following the feed failed", exc_info=not isinstance(exc, CdcError), error=str(exc))
                self._wait(exc, attempts)

    def _wait(self, error: Exception, attempts: int) -> None:
        self.connected = False
        seconds = min(0.1 * 2 ** min(attempts, 10), _MAX_BACKOFF_SECONDS) * random.uniform(0.8, 1)  # noqa: S311
        tell = log.warning if self.located else log.info  # at a first start, the sink has yet to make it
        tell("the feed is away", error=str(error), retry_seconds=round(seconds, 1))
        self._ending.wait(seconds)

    def _follow(self) -> None:
        self._reader.open()
        with self._reader.listen() as listener:
            self._locate()
            self.connected = True
            while not self._ending.is_set():
                self._read()
                self._ending.wait(PACE_SECONDS)
                self._listen(listener)

    def _locate(self) -> None:
        """Find the place to go on from: at first, the head."""
        head = self._reader.head()
        if not self.located:
            self._hand_over(self._restart, head)
            self._cursor = head
            self.located = True
        elif head < self._cursor or self._was_removed():
            self._lose_place(head)

    def _read(self) -> None:
        head = self._reader.head()
        if head > self._cursor and self._hand_over(self._skip, head):
            self._cursor = head
            return
        more = True
        while more and not self._ending.is_set():
            found = self._reader.scan(self._cursor, Wanted(), READ_RECORDS)
            if self._was_removed():  # asked after the scan: that may have found what is left
                self._lose_place(self._reader.head())
                return
            if found.cursor > self._cursor:
                self._hand_over(self._take, found.records, found.cursor)
                self._cursor = found.cursor
            more = found.more

    def _was_removed(self) -> bool:
        """Whether something new is not there any more."""
        return any(each.through_id > self._cursor for each in self._reader.pruned().values())

    def _lose_place(self, head: int) -> None:
        log.warning("the feed was replaced, or pruned before it was read", cursor=self._cursor, head=head)
        self._hand_over(self._restart, head)
        self._cursor = head

    def _listen(self, listener: Listener) -> None:
        until = time.monotonic() + TIMER_SECONDS
        while not self._ending.is_set() and time.monotonic() < until:
            if listener.wait(_LISTEN_SECONDS):
                return

    def _hand_over(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call it in the event loop and wait until it is done: the loop is never handed more than it takes."""

        async def call() -> T:
            return function(*args, **kwargs)

        return asyncio.run_coroutine_threadsafe(call(), self._loop).result()
