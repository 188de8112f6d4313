"""A service for the browser's tests, in a process that can be killed: the real application on a feed in SQLite.

`python -m tests.browser.server DIRECTORY PORT TOKEN daemon|gateway`. The daemon behind it is played: it counts, and can
be paused. An empty TOKEN is none.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import mkdtemp

from cdc.api.app import create_app
from cdc.api.backend import UnknownName
from cdc.api.feed import Feed
from cdc.api.server import Server
from cdc.config import LogLevel
from cdc.dead_letters import Box, Office
from cdc.feed.place import Place
from cdc.http_config import Http, TokenConfig
from cdc.letter import DeadLetters
from cdc.position import SourcePosition
from cdc.queue import QueueStats
from cdc.secret import Token
from cdc.stats import CaptureStats, CopyStatus, DeliveryStats, SlotStats, State
from cdc.status import DaemonStatus, snapshot
from cdc.steering import Ordered, Replayed
from tests.unit.test_api_letters import poisoned

HOSTILE = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>'


class PlayedDaemon:
    """A source `shop` with two sinks; `mirror` has parked changes, `archive` is being copied."""

    def __init__(self, directory: Path) -> None:
        queue = poisoned(directory)
        self.dead_letters: DeadLetters = Office(lambda: {"mirror": Box("mirror", "mongodb", queue, queue)})
        self._started = time.time()
        self._shop = CaptureStats("shop", State.RUNNING, received=500, server_end=500, confirmed=500)
        self._shop.slot = SlotStats("cdc_shop", True, "reserved", 4096, None)
        self._mirror = DeliveryStats("mirror", "shop", State.RUNNING, position=500, seq=9, parked=7, dead=2)
        self._mirror.parked_oldest_at = self._started - 60
        self._archive = DeliveryStats("archive", "shop", State.COPYING, error=HOSTILE, hint=HOSTILE)
        self._archive.copy = lambda: CopyStatus(3, 12, 1_000, 4_000, 250_000, 1_000_000, 90.0)

    def status(self) -> DaemonStatus:
        now = time.time()
        for stats in (self._shop, self._mirror):
            if stats.state is State.RUNNING:
                stats.changes = {**stats.changes, "insert": int((now - self._started) * 100)}
                stats.last_commit_time = stats.caught_up_at = now
        queue = QueueStats(3, 5_000_000, 1.5, 9, 2, 10_000_000, 80_000_000_000, full=False)
        return snapshot(
            version="9.9.9",
            started_at=self._started,
            sources=[(self._shop, queue)],
            sinks=[self._mirror, self._archive],
        )

    def set_log_level(self, level: LogLevel) -> None:
        raise UnknownName(level)

    def pause(self, name: str) -> None:
        self._named(name).state = State.PAUSED

    def resume(self, name: str) -> None:
        self._named(name).state = State.RUNNING

    def hold(self, name: str, until: SourcePosition | None, seconds: float) -> SourcePosition:
        raise UnknownName(name)

    def resync(self, name: str, tables: Sequence[str], *, yes: bool) -> Ordered:
        raise UnknownName(name)

    def replay(self, name: str, since: str, *, dry_run: bool) -> Replayed:
        raise UnknownName(name)

    def release(self, name: str) -> None:
        raise UnknownName(name)

    def _named(self, name: str) -> CaptureStats | DeliveryStats:
        found = {stats.name: stats for stats in (self._shop, self._mirror, self._archive)}
        if name not in found:
            raise UnknownName(name)
        return found[name]


async def serve(directory: Path, port: int, token: str, *, daemon: bool) -> None:
    feed = Feed.at(Place(None, directory))
    tokens = (TokenConfig(name="test", token=Token(token), scopes=("admin",)),) if token else ()
    app = create_app(PlayedDaemon(Path(mkdtemp(dir=directory))) if daemon else None, Http(tokens=tokens), feed)
    server = Server(app, ("127.0.0.1", port))
    feed.start()
    await server.serve()


def main(directory: str, port: str, token: str, daemon: str) -> None:
    asyncio.run(serve(Path(directory), int(port), token, daemon=daemon == "daemon"))


if __name__ == "__main__":
    main(*sys.argv[1:])
