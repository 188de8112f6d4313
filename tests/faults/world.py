"""A daemon between two servers under load, a network and a disk that can be broken, and what must hold all the time."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import ClassVar, Final, Protocol, Self

import psutil

from tests.beside import Threads
from tests.faults.daemon import Daemon
from tests.faults.feed_check import Counter, FeedCheck
from tests.faults.interposer import AVAILABLE, Interposer
from tests.faults.proxy import Proxy

MEMORY_LIMIT_BYTES: Final = 250 * 1024**2

CATCH_UP_SECONDS: Final = 120
"""Within this time what was committed last has arrived, whatever was broken before, or something is wrong."""

RESYNC_SECONDS: Final = 300

FREE_BYTES: Final = 500_000_000
"""`min_free_bytes`: more than the queue's file ever has inside it."""

_FEED: Final = """
[sinks.changes]
kind = "data_changes"
from = "shop"
retention = "never"
"""

BEGINS_ANEW: Final = "the stream begins anew"
"""In the log: history was lost, which is so only where a fault says it."""

_LOOK_SECONDS: Final = 2.0
"""How often a wait looks whether a pipeline has failed."""


class Violation(Exception):
    """Something that must never be; the message says what."""


class Load(Protocol):
    """Clients at work. transactions: how many they have done."""

    transactions: int

    def resting(self) -> AbstractContextManager[None]:
        """Nothing is written meanwhile."""
        ...

    def stop(self) -> None:
        """End; raises what went wrong."""
        ...


class World(ABC):
    """A context manager. On entry the servers are up and the load is at work; the daemon is yet to be started.

    lines: the network to `source` and `target`. interposer: disk and clock of the daemon, where there is a compiler.
    rate: transactions a second, where the load can tell. patience_seconds: what a wait may take.
    """

    kind: ClassVar[str]
    counters: ClassVar[Mapping[str, Counter]]
    load: Load
    daemon: Daemon
    lines: Mapping[str, Proxy]

    def __init__(self, folder: Path, *, seed: int, rate: float = 60.0) -> None:
        self.folder = folder
        self.seed = seed
        self.rate = rate
        self.feed = FeedCheck(folder / "data" / "data_changes.sqlite", self.counters, self.is_versioned)
        self.interposer = Interposer(folder, folder / "data") if AVAILABLE else None
        self.stack = ExitStack()
        self.patience_seconds: float = CATCH_UP_SECONDS
        self._counted_before: Mapping[str, Mapping[str, int]] = {}
        self._gaps = 0

    def __enter__(self) -> Self:
        with ExitStack() as on_error:
            on_error.push(self.stack)
            self.begin()
            self.memory = self.stack.enter_context(MemoryWatch(self.daemon))
            on_error.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    @abstractmethod
    def begin(self) -> None:
        """Start everything; what is to be ended goes onto `stack`."""

    @abstractmethod
    def mark(self) -> str:
        """Commit something at the source; returns what it is known by. Tries again while the server is away."""

    @abstractmethod
    def has_arrived(self, mark: str) -> bool:
        """Whether the mirror has it; False, too, while its server is away."""

    @abstractmethod
    def differences(self) -> list[str]:
        """Of a mirror at rest."""

    @abstractmethod
    def counted(self) -> Mapping[str, Mapping[str, int]]:
        """What has counted its own changes, as the source says: by entity type and id."""

    @abstractmethod
    def is_versioned(self, entity_type: str) -> bool:
        """Whether the feed holds all versions of such entities, under one name."""

    def seen(self) -> Sequence[str]:
        """What was seen in passing that must never be."""
        return ()

    def make_daemon(self, source: str, target: str, *, pg_dump: Path | None = None, options: str = "") -> Daemon:
        """The daemon, with a mirror and a feed."""
        environment = self.interposer.environment if self.interposer else {}
        retention = f'[sinks.changes.entities."{self.bulk_table}"]\nretention = "20s"\n'
        return self.stack.enter_context(
            _Unstarted(
                self.folder,
                source=source,
                target=target,
                pg_dump=pg_dump,
                source_options=options,
                sink_options='on_error = "park"\nretry = {max = 2.0}',
                more=_FEED + retention,
                min_free_bytes=FREE_BYTES,
                environment=environment,
            )
        )

    bulk_table: ClassVar[str]

    # waiting

    def rest(self, seconds: float) -> None:
        """Let time pass: how much is a fault's matter."""
        threading.Event().wait(seconds)

    def arrive(self) -> float:
        """Wait until what is committed now is in the mirror; returns how many seconds that took."""
        begin = time.monotonic()
        mark = self.mark()
        self.wait(lambda: self.has_arrived(mark), "the mirror to catch up")
        self._counted_before = self._counted_before or self.counted()  # the feed has begun before the copy was complete
        return time.monotonic() - begin

    def wait(self, condition: Callable[[], bool], what: str, *, patience_seconds: float | None = None) -> None:
        """Wait for something that a healthy daemon does. Raises `Violation` where it does not."""
        patience_seconds = patience_seconds or self.patience_seconds
        begin = looked = time.monotonic()
        while not condition():
            self.check()
            now = time.monotonic()
            if now - looked > _LOOK_SECONDS:
                looked = now
                self._check_pipelines()
            if now - begin > patience_seconds:
                status = self.daemon.ask("status").stdout
                raise Violation(f"waited {patience_seconds:.0f} s for {what}\n{status}\n{self.daemon.log_tail()}")
            self.rest(0.02)

    def check(self) -> None:
        """Raise `Violation` if the daemon ended by itself, or something was seen that must not be."""
        if self.seen():
            raise Violation(f"seen in the mirror: {'; '.join(self.seen())}")
        if not self.daemon.running:
            raise Violation(f"the daemon ended by itself; its log ends:\n{self.daemon.log_tail()}")

    def _check_pipelines(self) -> None:
        status = self.daemon.told() or {}
        pipelines = status.get("sources", {}) | status.get("sinks", {})
        if any(pipeline["state"] == "failed" for pipeline in pipelines.values()):
            raise Violation(f"a pipeline has failed:\n{status}\n{self.daemon.log_tail()}")

    def pass_gap(self, strike: Callable[[], object]) -> None:
        """Let history be lost, and the stream begin anew by itself; then the feed must not lack anything again."""
        self._gaps += 1
        self.feed.gaps += 1
        strike()
        self.wait(lambda: self.logged(BEGINS_ANEW) == self._gaps, "the stream to begin anew")
        self._counted_before = self.counted()
        self.await_resync()

    def await_resync(self) -> None:
        """Wait until the mirror is right again. Meanwhile changes of stale rows come one by one: that takes time."""
        self.wait(lambda: self.is_resynced, "the mirror to be resynced", patience_seconds=RESYNC_SECONDS)

    def logged(self, text: str) -> int:
        """How often the daemon has logged this in all of its lives."""
        return self.daemon.log_file.read_text(errors="replace").count(text)

    @property
    def is_resynced(self) -> bool:
        """Whether the daemon says that nothing of the mirror is to be made right any more; False while it begins."""
        status = self.daemon.told()
        sink = status["sinks"]["mirror"] if status else {"state": "unknown", "resync": None}
        return bool(sink["state"] == "running" and sink["resync"] is None)

    # the check

    def settle(self) -> list[str]:
        """Let the load rest, and everything arrive; then say what is wrong."""
        with self.load.resting():
            self.arrive()
            self.wait(self._feed_is_through, "the feed to catch up")
            self.wait(lambda: not self.parked, "parked changes to be applied")
            problems = [*self.differences(), *self.feed.problems()]
            if (found := self.logged(BEGINS_ANEW)) != self._gaps:
                problems.append(f"the stream began anew {found} times, and was made to do so {self._gaps} times")
            for kind, at_source in self.counted().items():
                problems += self.feed.missing(kind, self._counted_before[kind], at_source)
            verified = self.daemon.ask("verify")
            if verified.returncode:
                problems.append(f"cdc verify: {verified.stdout}{verified.stderr}")
        if self.memory.peak_bytes > MEMORY_LIMIT_BYTES:
            problems.append(f"the daemon had {self.memory.peak_bytes / 1024**2:.0f} MB of memory")
        return problems

    @property
    def parked(self) -> int:
        """How many changes the mirror has refused, or wait behind such."""
        return int(self.daemon.status()["sinks"]["mirror"]["parked"])

    def _feed_is_through(self) -> bool:
        sinks = self.daemon.status()["sinks"]
        return bool(sinks["changes"]["position"] == sinks["mirror"]["position"] and sinks["changes"]["position"])


class MemoryWatch(Threads):
    """peak_bytes: the most physical memory that the daemon ever had, whichever of its lives it was in."""

    def __init__(self, daemon: Daemon) -> None:
        super().__init__("memory", self._watch)
        self.peak_bytes = 0
        self._daemon = daemon

    def _watch(self, stopping: threading.Event) -> None:
        while not stopping.wait(0.2):
            try:
                if self._daemon.running:
                    self.peak_bytes = max(self.peak_bytes, self._daemon.peak_memory_bytes)
            except (OSError, ValueError, psutil.Error):  # it was just killed
                continue


class _Unstarted(Daemon):
    """Ended on exit, but not started on entry."""

    def __enter__(self) -> Self:
        return self
