"""Reads a feed in an SQLite file: while it is written, by this process or another."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final

from cdc.feed.bell import bell_of
from cdc.feed.place import Place
from cdc.feed.record import Pruned, Record, iso_time
from cdc.feed.sqlite_file import CODEC, check_file, composed, identity, open_reading, removed, translated
from cdc.feed.store import Scan, Wanted
from cdc.feed.tables import Window, rows_to_look_at, tables_of

_POLL_SECONDS: Final = 0.02
"""How often to look for what other processes have committed."""

_QUERIES: Final = {
    "head": "SELECT last_id FROM {state}",
    "window": "SELECT count(*), max(id) FROM (SELECT id FROM {main} WHERE id > ? ORDER BY id LIMIT ?)",
    # + keeps SQLite from any other index than that of the ids: what is looked at is bounded by them
    "scan": "SELECT {columns} FROM {main} WHERE id > ? AND id <= ?{{}} ORDER BY id LIMIT ?",
    "history": """SELECT {columns} FROM {main} WHERE entity_type = ? AND entity_id = ? AND id < ?
        ORDER BY id DESC LIMIT ?""",
    "since": "WITH RECURSIVE {span} SELECT min(id) FROM {main} WHERE id >= (SELECT max(low) FROM span)",
    "pruned": "SELECT entity_type, channel, through_id, through_recorded_at, rows FROM {pruned}",
    "oldest": "SELECT min(id) FROM {main}",
}

_BEHIND_ALL: Final = 2**63 - 1


class SqliteReader:
    """`cdc.feed.store.FeedReader`."""

    def __init__(self, place: Place) -> None:
        self._tables = tables_of(place.table)
        self._path = place.file
        self._place = place
        self._idle: list[sqlite3.Connection] = []
        self._identity = identity(self._path)
        self._sql = composed(self._tables, _QUERIES)

    def open(self) -> None:
        """Check that the feed can be read. Raises `TransientError` if it is not there (yet)."""
        with self._connection() as connection:
            check_file(connection, self._path, self._tables)

    def head(self) -> int:
        """The last id that is visible, also if its record was pruned since."""
        return int(self._query("head")[0][0])

    def scan(self, after: int, wanted: Wanted, limit: int) -> Scan:
        """The first `limit` wanted records behind `after`, of the next `SCAN_ROWS` rows."""
        rows = rows_to_look_at(wanted, limit)
        with self._connection() as connection:
            count, last = connection.execute(self._sql["window"], (after, rows + 1)).fetchone()
            window = Window.of(after, last, more=count > rows)
            condition, parameters = _condition(wanted)
            query = self._sql["scan"].format(condition)
            found = connection.execute(query, (after, window.end, *parameters, limit + 1)).fetchall()
        return window.scan(list(map(CODEC.record, found)), limit)

    def history(self, entity_type: str, entity_id: str, before: int | None, limit: int) -> Sequence[Record]:
        """The newest records of one entity, newest first; with `before`, those with smaller ids."""
        bound = _BEHIND_ALL if before is None else before
        return list(map(CODEC.record, self._query("history", entity_type, entity_id, bound, limit)))

    def cursor_at(self, recorded_at: int) -> int:
        """The largest cursor behind which are all records recorded at that time (microseconds) or later."""
        head = self.head()  # first: what is committed meanwhile is behind it
        first = self._query("since", iso_time(recorded_at))[0][0]
        return head if first is None else min(first - 1, head)

    def pruned(self) -> Mapping[tuple[str, str], Pruned]:
        """By (entity_type, channel), what retention has removed."""
        return {(entity_type, channel): Pruned(*rest) for entity_type, channel, *rest in self._query("pruned")}

    def oldest(self) -> int | None:
        """The smallest id that is there."""
        found: int | None = self._query("oldest")[0][0]
        return found

    @contextmanager
    def listen(self) -> Iterator[SqliteListener]:
        """Begin to listen: what is committed from now on wakes the listener."""
        with self._connection() as connection:
            yield SqliteListener(self._place, connection)

    def close(self) -> None:
        """Disconnect. Safe to call twice."""
        while self._idle:
            with suppress(sqlite3.Error):
                self._idle.pop().close()

    def _query(self, name: str, *parameters: object) -> list[Any]:
        with self._connection() as connection:
            return connection.execute(self._sql[name], parameters).fetchall()

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """Lend a connection: there are as many as threads ever read at the same time."""
        with translated(self._path):
            found = identity(self._path)
            if found != self._identity:
                self.close()
                self._identity = found
            try:
                connection = self._idle.pop()
            except IndexError:
                connection = open_reading(self._path)
            try:
                yield connection
            except BaseException:
                connection.close()
                raise
            if found == self._identity:
                self._idle.append(connection)
            else:
                connection.close()


class SqliteListener:
    """`cdc.feed.store.Listener`: writers of this process ring, those of others are seen by the file's version."""

    def __init__(self, place: Place, connection: sqlite3.Connection) -> None:
        self._path = place.file
        self._bell = bell_of(place)
        self._connection = connection
        self._identity = identity(self._path)
        self._rung = self._bell.rung
        self._version = self._data_version()

    def wait(self, timeout_seconds: float) -> bool:
        """Return when something was committed since the last call, or after the time-out: then False."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            if identity(self._path) != self._identity:
                raise removed(self._path)
            rung, version = self._bell.rung, self._data_version()
            if (rung, version) != (self._rung, self._version):
                self._rung, self._version = rung, version
                return True
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            self._bell.wait(rung, min(left, _POLL_SECONDS))

    def _data_version(self) -> int:
        with translated(self._path):
            return int(self._connection.execute("PRAGMA data_version").fetchone()[0])


def _condition(wanted: Wanted) -> tuple[str, list[str]]:
    conditions = ""
    parameters: list[str] = []
    for column, among in (("entity_type", wanted.entity_types), ("channel", wanted.channels)):
        if among is not None:
            conditions += f" AND +{column} IN ({', '.join('?' * len(among))})"
            parameters += among
    if wanted.location_id is not None:
        conditions += " AND +location_id = ?"
        parameters.append(wanted.location_id)
    return conditions, parameters
