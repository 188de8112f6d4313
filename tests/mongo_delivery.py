"""Delivers a `MongoPair`'s changes as the daemon does, parks what is refused, and can be interrupted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cdc.change import Batch
from cdc.config import BatchBounds
from cdc.delivery import Delivery
from cdc.errors import TransientError
from cdc.mongodb.positions import POSITIONS, Positions
from cdc.parking import Parker, ParkingBounds
from cdc.parking_schedule import Clock
from cdc.position import Position
from cdc.queue import Queue
from cdc.stats import DeliveryStats
from sinks.mongodb import MongodbSink
from tests.beside import running
from tests.mongo_mirror import SINK, MongoPair
from tests.processes import wait_until


class Delivered:
    """A queue in a folder, whose sink parks. now: the clock, in seconds."""

    def __init__(self, pair: MongoPair, folder: Path) -> None:
        self.now = 0.0
        self.stats = DeliveryStats(SINK, "shop")
        self.queue = Queue(folder / "shop.queue", max_bytes=10**9, min_free_bytes=0)
        self._pair = pair
        self.queue.begin(pair.token)
        self.queue.register(SINK)
        pair.target.drop_collection(POSITIONS)
        Positions(pair.target.client, pair.target.name, SINK).begin(Position(self.queue.queue_id, 0, pair.token))
        clock = Clock(lambda: self.now, lambda: self.now)
        self._parker = Parker(pair.sink, self.queue, self.stats, ParkingBounds(1000, 10**7), clock)

    def deliver(self, *batches: Batch, until_healed: bool = False) -> None:
        """Deliver batches, or all that has happened."""
        for batch in batches or (self._pair.batch(),):
            self.queue.append(batch)
        assert self.queue.flush(10)
        delivery = Delivery(self._pair.sink, self.queue, self.stats, BatchBounds(), parker=self._parker)
        with running(delivery, wake=self.queue.wake):
            wait_until(
                lambda: self.stats.seq == self.queue.stats().last_seq and not (until_healed and self.stats.parked),
                what=lambda: f"delivery: {self.stats}",
            )

    def close(self) -> None:
        """Close the queue."""
        self.queue.close()


class Interrupted:
    """Raises once, before or after the n-th command of a sink that changes something."""

    def __init__(self, sink: MongodbSink) -> None:
        self.left = -1
        sink_open = sink.open

        def opened() -> Position | None:
            position = sink_open()
            connection = sink._opened()
            for holder, names in (
                (connection.positions, ("move", "move_through")),
                (connection.applier, ("folded", "in_order")),
                (connection.ddl, ("apply",)),
            ):
                for name in names:
                    setattr(holder, name, self.wrapped(getattr(holder, name)))
            return position

        sink.open = opened  # type: ignore[method-assign]

    def wrapped(self, function: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Any, **options: Any) -> None:
            self.count()
            function(*arguments, **options)
            self.count()

        return call

    def count(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise TransientError("interrupted")
