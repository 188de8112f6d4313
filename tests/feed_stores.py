"""What tests of the feed's stores share: places to keep one, records, and what a reader finds."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Final

from cdc.errors import TransientError
from cdc.feed.place import Place, writer
from cdc.feed.record import PUBLISHED, ChangeType, EntityState, Record
from cdc.feed.store import FeedReader, FeedWriter, Wanted
from cdc.position import Position
from cdc.secret import Secret
from tests.processes import wait_until

START: Final = Position("q", 0, 1)
ALL: Final = Wanted()
LIMIT: Final = 1000


def place_at(url: str | None, directory: Path, table: str = "data_changes") -> Place:
    return Place(None if url is None else Secret(url), directory, table)


def numbered_from_one(place: Place) -> Place:
    """The same with an SQLite feed in it as the first versions made it: ids are 1, 2, 3 ..."""
    made = writer(place, "shop")
    made.open()
    made.close()
    with closing(sqlite3.connect(place.file)) as connection, connection:
        connection.execute("UPDATE data_changes_state SET last_id = 0")
        connection.execute("DELETE FROM data_changes_pruned")
    return place


def with_database(url: str, name: str) -> str:
    """The URL of a MongoDB server, with a database."""
    base, _, options = url.partition("?")
    return f"{base.rstrip('/')}/{name}?{options}"


def change(number: int, **fields: Any) -> Record:
    """The change of product `number`, at the position of that number."""
    given: dict[str, Any] = {
        "source": "shop",
        "position": f"0/{number:X}:0",
        "entity_type": "Product",
        "entity_id": str(number),
        "channel": "products",
        "change_type": ChangeType.CREATE,
        "version": 1,
        "changed_at": 1_763_759_000_000_000 + number,
        "after": b'{"id":%d}' % number,
    }
    return Record(**given | fields)


def event(position: str, **fields: Any) -> Record:
    """Something that is published."""
    given: dict[str, Any] = {"source": PUBLISHED, "position": position, "entity_id": "7", "entity_type": "Client"}
    return change(1, **given | {"channel": "clients"} | fields)


def state(number: int, version: int = 1, **fields: Any) -> EntityState:
    given: dict[str, Any] = {"entity_type": "Product", "key": str(number), "version": version}
    return EntityState(**given | fields)


@contextmanager
def opened(place: Place, source: str = "shop") -> Iterator[FeedWriter]:
    """A writer that has begun."""
    found = writer(place, source)
    try:
        if found.open() is None:
            found.begin(START)
        yield found
    finally:
        found.close()


def write(to: FeedWriter, *records: Record, seq: int = 1) -> None:
    """One transaction."""
    to.append(records, [state(int(each.entity_id), each.version) for each in records if each.entity_id.isdigit()])
    to.commit(Position("q", seq, seq + 1))


def patiently(action: Callable[[], Any]) -> Any:
    """Do it again as long as others have the lock, as delivery does."""

    def attempt() -> list[Any] | None:
        try:
            return [action()]
        except TransientError:
            return None

    return wait_until(attempt)[0]


def read_all(reader: FeedReader) -> list[Record]:
    return list(reader.scan(0, ALL, LIMIT).records)


class Poller(threading.Thread):
    """Reads on and on, by cursor, until it has seen enough; keeps the ids, in the order in which it saw them."""

    def __init__(self, reader: FeedReader, enough: int) -> None:
        super().__init__(daemon=True)
        self._reader = reader
        self._enough = enough
        self._over = threading.Event()
        self.seen: list[int] = []

    def run(self) -> None:
        cursor = 0
        while len(self.seen) < self._enough and not self._over.is_set():
            found = self._reader.scan(cursor, ALL, 7)
            assert all(record.id <= found.cursor for record in found.records)
            self.seen += [record.id for record in found.records]
            cursor = found.cursor

    def stop(self) -> list[int]:
        """What it has seen, once that is enough or half a minute is over."""
        self.join(30)
        self._over.set()
        return self.seen
