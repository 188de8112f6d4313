"""A mirror inside the test process: source, queue and sink as the daemon runs them, each half in its thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cdc.capture import Capture
from cdc.change import TableName
from cdc.config_file import parse
from cdc.delivery import Delivery
from cdc.filling import fill
from cdc.parking import Parker, ParkingBounds
from cdc.parking_schedule import Clock
from cdc.position import Position
from cdc.postgres.source import PostgresSource
from cdc.queue import Queue
from cdc.sink import Resync, SinkContext
from cdc.stats import CaptureStats, DeliveryStats, State
from cdc.wishes import end_of
from sinks.postgres import PostgresSink
from tests.processes import wait_until
from tests.servers import Database

TIMEOUT_SECONDS = 60


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    """Wait until the condition is true, and return its value."""
    return wait_until(condition, what=what)


class Mirror:
    """A source database, a target database, and what runs between them.

    error: what the capture or the delivery stopped with. clock: of what is parked.
    fillings: how often it was filled again in mid-stream.
    """

    def __init__(self, source_db: Database, target_db: Database, folder: Path, pg_dump: Path, **options: Any) -> None:
        self.source_db, self.target_db = source_db, target_db
        self.config = parse(
            {
                "sources": {"shop": {"url": source_db.url, "pg_dump": str(pg_dump), **options.pop("source", {})}},
                "sinks": {"mirror": {"from": "shop", "url": target_db.url, **options.pop("sink", {})}},
            },
            {},
        )
        self.queue = Queue(
            folder / "shop.queue",
            max_bytes=options.pop("max_bytes", 10**9),
            min_free_bytes=0,
            keep_seconds=options.pop("keep_seconds", 0.0),
        )
        self.error: BaseException | None = None
        self.clock: Clock | None = options.pop("clock", None)
        self.fillings = 0
        self._threads: list[threading.Thread] = []
        self._stop = threading.Event()
        self._make()

    def _make(self) -> None:
        self.source = PostgresSource(self.config, self.config.sources["shop"], self.queue)
        self.sink = PostgresSink(self.config.sinks["mirror"], self._context())
        self.capture_stats = CaptureStats("shop")
        self.delivery_stats = DeliveryStats("mirror", "shop")
        self.capture = Capture(
            self.source, self.queue, self.capture_stats, applied=lambda: self.delivery_stats.position
        )
        sink = self.config.sinks["mirror"]
        bounds = ParkingBounds(sink.max_parked, sink.max_parked_bytes)
        parks = sink.on_error == "park"
        self.parker = Parker(self.sink, self.queue, self.delivery_stats, bounds, self.clock) if parks else None
        self.delivery = Delivery(self.sink, self.queue, self.delivery_stats, sink.batch, parker=self.parker)

    def _context(self) -> SinkContext:
        return SinkContext(
            source=self.config.sources["shop"],
            reread=self.source.reread,
            shapes=self.source.shapes,
            dump_schema=self.source.dump_schema,
        )

    def prepare(self) -> None:
        """Create publication, slot and the mirror's tables; all tables must be empty."""
        start = self.source.open(self.queue.position)
        self.source.close()
        self.queue.begin(start)
        self.queue.register("mirror")
        tables = self.source.tables()
        self.sink.prepare_copy(tables, Position(self.queue.queue_id, 0, start), self.source.dump_schema())
        for table in tables:
            self.sink.table_copied(table, start, 0)
        self.sink.finish_copy(start)

    def fill(self) -> None:
        """Capture, and copy what was never copied, as the daemon does at its start; no delivery yet."""
        self.queue.register("mirror")
        self.start(delivery=False)
        wait_for(lambda: self.error or self.queue.position is not None, "the stream to begin")
        if self.error is not None:
            raise self.error
        self._fill()

    def _fill(self) -> None:
        reader = PostgresSource(self.config, self.config.sources["shop"], self.queue)
        options = self.config.sinks["mirror"].copy
        fill(reader, self.sink, self.queue, stats=self.delivery_stats, options=options, stop=self._stop)

    def refill(self) -> None:
        """Go on after `stop`: what is to be copied again is copied, and all is streamed."""
        self.delivery_stats.state = State.STARTING
        self.fill()
        self.deliver()

    def want_resync(self, *tables: str) -> Resync:
        """Order that tables of schema `public` (or all) are put right, while nothing is delivered."""
        names = [TableName("public", table) for table in tables]
        return self.sink.want_resync(names or None, end_of(self.queue))

    def deliver(self) -> None:
        """Deliver what is captured, after `fill`."""
        capture = self._threads
        self.start(capture=False)
        self._threads += capture

    def start(self, *, capture: bool = True, delivery: bool = True) -> None:
        """Run what is wanted."""
        self._stop.clear()
        self.error = None
        parts = [self.capture] * capture + [self.delivery] * delivery
        self._threads = [threading.Thread(target=self._run, args=(part,)) for part in parts]
        for thread in self._threads:
            thread.start()

    def _run(self, part: Capture | Delivery) -> None:
        try:
            while part.run(self._stop):  # to be filled again
                self._fill()
                self.fillings += 1
        except BaseException as exc:  # noqa: BLE001 - kept for the test
            self.error = exc

    def stop(self) -> None:
        """End both threads in order; nothing is closed but connections."""
        self._stop.set()
        self.queue.wake()
        self.delivery.release()
        for thread in self._threads:
            thread.join(TIMEOUT_SECONDS)
            assert not thread.is_alive()
        self._threads = []

    def restart(self) -> None:
        """Stop, forget all in memory but the queue's file, and start again."""
        self.stop()
        path, max_bytes = self.queue._path, self.queue.max_bytes
        self.queue.close()
        self.queue = Queue(path, max_bytes=max_bytes, min_free_bytes=0)
        self._make()
        self.start()

    def sync(self) -> None:
        """Wait until all that is committed now is applied."""
        end = self.source_db.value("SELECT pg_current_wal_lsn() - '0/0'")
        self.source.nudge()
        wait_for(lambda: self.error or (self.delivery_stats.position or 0) >= end, f"{self.delivery_stats}")
        if self.error is not None:
            raise self.error

    def failure(self) -> BaseException:
        """Wait for one of the halves to give up, and return why."""
        error = wait_for(lambda: self.error, "a failure")
        assert isinstance(error, BaseException)
        return error

    def rows(self, table: str) -> tuple[list[str], list[str]]:
        """All rows as text, sorted, on both sides."""
        query = f"SELECT t::text FROM {table} AS t ORDER BY 1"
        return [row for (row,) in self.source_db.execute(query)], [row for (row,) in self.target_db.execute(query)]

    def assert_equal(self, *tables: str) -> None:
        """Wait until the mirror has caught up, then compare."""
        self.sync()
        for table in tables:
            source, target = self.rows(table)
            missing, extra = sorted(set(source) - set(target)), sorted(set(target) - set(source))
            assert source == target, f"{table} differs: missing {missing[:5]}, not at the source {extra[:5]}"

    def close(self) -> None:
        self.stop()
        self.queue.close()


@contextmanager
def running_mirror(
    source_db: Database, target_db: Database, folder: Path, pg_dump: Path, *schema: str, **options: Any
) -> Iterator[Mirror]:
    """Create the schema at the source, an empty mirror of it, and run."""
    for statement in schema:
        source_db.execute(statement)
    mirror = Mirror(source_db, target_db, folder, pg_dump, **options)
    try:
        mirror.prepare()
        mirror.start()
        yield mirror
    finally:
        mirror.close()


@contextmanager
def filled_mirror(
    source_db: Database, target_db: Database, folder: Path, pg_dump: Path, **options: Any
) -> Iterator[Mirror]:
    """Run a daemon's life with one configuration: what was never copied is copied, then all is streamed."""
    mirror = Mirror(source_db, target_db, folder, pg_dump, **options)
    try:
        mirror.fill()
        mirror.deliver()
        yield mirror
    finally:
        mirror.close()
