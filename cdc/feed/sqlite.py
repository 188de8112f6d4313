"""A feed in an SQLite file, the embedded store: its writers.

The lock of all writers is SQLite's own, taken by BEGIN IMMEDIATE. Commits are fsynced.
"""

from __future__ import annotations

import sqlite3
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from itertools import chain
from typing import Any, Final

import msgspec

from cdc.feed.bell import bell_of
from cdc.feed.cache import Key
from cdc.feed.place import Place
from cdc.feed.record import EntityState, Record, iso_time, numbered
from cdc.feed.sqlite_file import (
    CODEC,
    check_file,
    composed,
    identity,
    microseconds,
    open_reading,
    open_writing,
    removed,
    translated,
)
from cdc.feed.sqlite_reader import SqliteReader as Reader
from cdc.feed.tables import given, tables_of
from cdc.feed.writer import Locked, Session, StoreWriter
from cdc.position import Position, format_position, parse_position
from cdc.preflight import Finding

__all__ = ["Reader", "Writer", "check"]

_QUERIES: Final = {
    "head": "SELECT last_id, recorded_at FROM {state}",
    "position": "SELECT queue_id, seq, position FROM {positions} WHERE source = ?",
    "move": """INSERT INTO {positions} VALUES (?, ?, ?, ?) ON CONFLICT (source)
        DO UPDATE SET queue_id = excluded.queue_id, seq = excluded.seq, position = excluded.position""",
    "forget": "DELETE FROM {positions} WHERE source = ?",
    "doubt": "UPDATE {entities} SET known = NULL WHERE source = ? AND known IS NOT NULL",
    # a look-up for each, in one statement: the interpreter is given away and waited for once, not for every entity
    "states": """WITH wanted (entity_type, key) AS (VALUES {{wanted}})
        SELECT it.entity_type, it.key, version, location_id, scope, known FROM wanted CROSS JOIN {entities} AS it
        WHERE it.source = ? AND it.entity_type = wanted.entity_type AND it.key = wanted.key""",
    "add_states": "INSERT INTO {entities} ({{columns}}) VALUES ({{places}})",
    "put_states": """INSERT INTO {entities} ({{columns}}) VALUES ({{places}}) ON CONFLICT (source, entity_type, key)
        DO UPDATE SET version = excluded.version, location_id = excluded.location_id, scope = excluded.scope,
        known = excluded.known""",
    "exists": "SELECT 1 FROM {main} WHERE source = ? AND position = ?",
    "insert": "INSERT INTO {main} ({{columns}}) VALUES ({{places}})",
    "commit": "UPDATE {state} SET last_id = ?, recorded_at = ?",
    "types": """WITH RECURSIVE found (entity_type) AS (
        SELECT min(entity_type) FROM {main} UNION ALL
        SELECT (SELECT min(entity_type) FROM {main} WHERE entity_type > found.entity_type) FROM found
            WHERE entity_type IS NOT NULL)
        SELECT entity_type FROM found WHERE entity_type IS NOT NULL""",
    "old": "WITH RECURSIVE {span} SELECT max(low) - 1 FROM span",
    "doomed": """SELECT id, entity_type, channel, recorded_at FROM {main} WHERE id <= ?
        AND (? IS NULL OR source IN (SELECT value FROM json_each(?))) ORDER BY id LIMIT ?""",
    "doomed_of_type": """SELECT id, entity_type, channel, recorded_at FROM {main} WHERE entity_type = ? AND id <= ?
        AND (? IS NULL OR source IN (SELECT value FROM json_each(?))) ORDER BY id LIMIT ?""",
    "delete": "DELETE FROM {main} WHERE id = ?",
    "pruned": """INSERT INTO {pruned} VALUES (?, ?, ?, ?, ?) ON CONFLICT (entity_type, channel)
        DO UPDATE SET through_id = max(through_id, excluded.through_id), rows = rows + excluded.rows,
        through_recorded_at = max(through_recorded_at, excluded.through_recorded_at)""",
}


_STATE_COLUMNS: Final = ("source", *EntityState.__struct_fields__)

_KEYS_AT_ONCE: Final = 1_024
"""How many a statement looks up. A power of two: so many different statements there are at most, by its exponent."""


def check(place: Place) -> Iterator[Finding]:
    """Whether the file is there; its folder is looked at with the rest of the data directory."""
    if not place.file.exists():
        yield Finding("ok", "feed", f"{place.file} can be made")
        return
    with translated(place.file), closing(open_reading(place.file)) as connection:
        check_file(connection, place.file, tables_of(place.table))
    yield Finding("ok", "feed", f"{place.file} is there")


class Writer(StoreWriter):
    """`cdc.feed.store.FeedWriter`."""

    is_remote = False

    def _connect(self) -> Session:
        return _Session(self._place)


class _Session:
    """One connection. Implements `cdc.feed.writer.Session`."""

    def __init__(self, place: Place) -> None:
        tables = tables_of(place.table)
        self._path = place.file
        self._bell = bell_of(place)
        self._sql = composed(tables, _QUERIES)
        self._connection = open_writing(self._path, tables)
        self._identity = identity(self._path)

    def alive(self) -> bool:
        """Whether the file is still the one that readers find."""
        return identity(self._path) == self._identity

    def take_over(self, source: str) -> Position | None:
        """The stored position of a source."""
        with translated(self._path):
            row = self._connection.execute(self._sql["position"], [source]).fetchone()
        return None if row is None else Position(row[0], row[1], parse_position(row[2]))

    def lock(self, source: str) -> Locked:
        """Begin a transaction that may write."""
        if not self.alive():  # nobody would ever read what goes there
            raise removed(self._path)
        with translated(self._path):
            self._connection.execute("BEGIN IMMEDIATE")
            head, recorded_at = self._connection.execute(self._sql["head"]).fetchone()
        return Locked(head, recorded_at, _now(), self.take_over(source))

    def states(self, source: str, keys: Sequence[Key]) -> Sequence[EntityState]:
        """Those of the states that are there."""
        found: list[EntityState] = []
        for some in (keys[start : start + _KEYS_AT_ONCE] for start in range(0, len(keys), _KEYS_AT_ONCE)):
            places = 1 << (len(some) - 1).bit_length()  # few different statements: they are kept, and large
            query = self._sql["states"].format(wanted=", ".join(["(?, ?)"] * places))
            nothing = (None, None) * (places - len(some))
            with translated(self._path):
                rows = self._connection.execute(query, (*chain.from_iterable(some), *nothing, source)).fetchall()
            found += map(_state, rows)
        return found

    def existing(self, source: str, positions: Sequence[str]) -> set[str]:
        """Those of the positions of which there are records."""
        query, execute = self._sql["exists"], self._connection.execute
        with translated(self._path):
            return {position for position in positions if execute(query, (source, position)).fetchone()}

    def encoded(self, records: Sequence[Record]) -> Sequence[Record]:
        """As they are: nobody has anything else to do meanwhile."""
        return records

    def insert(self, encoded: Sequence[Record], first_id: int, recorded_at: int) -> bool:
        """Insert records; False, and none of them is there, if the (source, position) of one was there before."""
        with translated(self._path):
            self._connection.execute("SAVEPOINT records")
            try:
                self._insert_columns("insert", CODEC.columns(numbered(encoded, first_id, recorded_at)))
            except sqlite3.IntegrityError as exc:
                if exc.sqlite_errorcode != sqlite3.SQLITE_CONSTRAINT_UNIQUE:
                    raise
                self._connection.execute("ROLLBACK TO records")
                self._connection.execute("RELEASE records")
                return False
            # not after other errors: a full disk has ended the whole transaction, and there is no savepoint left
            self._connection.execute("RELEASE records")
        return True

    def put_states(self, source: str, states: Sequence[EntityState], *, new: bool = False) -> None:
        """Insert states, or replace those that are there."""
        columns = given(_STATE_COLUMNS, ((source, *_state_row(state)) for state in states))
        with translated(self._path):
            self._insert_columns("add_states" if new else "put_states", columns)

    def move(self, source: str, position: Position) -> None:
        """Store a position."""
        row = (source, position.queue_id, position.seq, format_position(position.source))
        with translated(self._path):
            self._connection.execute(self._sql["move"], row)

    def commit(self, head: int, recorded_at: int) -> None:
        """Store both, commit durably, and wake the readers."""
        with translated(self._path):
            self._connection.execute(self._sql["commit"], (head, recorded_at))
            self._connection.execute("COMMIT")
        self._bell.ring()

    def rollback(self) -> None:
        """End the transaction without effect."""
        with translated(self._path):
            self._connection.execute("ROLLBACK")

    def prune(
        self, entity_type: str | None, recorded_before: int, rows: int, sources: Collection[str] | None = None
    ) -> int:
        """Remove the oldest, and note it."""
        execute = self._connection.execute
        with translated(self._path):
            execute("BEGIN IMMEDIATE")
            ((old,),) = execute(self._sql["old"], [iso_time(recorded_before)])
            names = None if sources is None else msgspec.json.encode(list(sources)).decode()
            if entity_type is None:
                doomed = execute(self._sql["doomed"], (old, names, names, rows)).fetchall()
            else:
                doomed = execute(self._sql["doomed_of_type"], (entity_type, old, names, names, rows)).fetchall()
            self._connection.executemany(self._sql["delete"], ((id_,) for id_, *_ in doomed))
            latest = {(name, channel): (id_, microseconds(at)) for id_, name, channel, at in doomed}
            counts = Counter((name, channel) for _, name, channel, _ in doomed)
            for kind, (id_, recorded_at) in latest.items():
                execute(self._sql["pruned"], (*kind, id_, recorded_at, counts[kind]))
            execute("COMMIT")
        return len(doomed)

    def entity_types(self) -> Sequence[str]:
        """All types of which there are records: a jump in the index for each."""
        with translated(self._path):
            return [name for (name,) in self._connection.execute(self._sql["types"])]

    def forget(self, source: str) -> None:
        """Remove a source's position, and the documents that are known of it."""
        with translated(self._path):
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.execute(self._sql["doubt"], [source])
            self._connection.execute(self._sql["forget"], [source])
            self._connection.execute("COMMIT")

    def close(self) -> None:
        """Disconnect."""
        with suppress(sqlite3.Error):
            self._connection.close()

    def _insert_columns(self, query: str, columns: Mapping[str, Sequence[Any]]) -> None:
        """Insert rows by their columns; those that are not given are NULL."""
        names, places = ", ".join(f'"{name}"' for name in columns), ", ".join("?" * len(columns))
        rows = zip(*columns.values(), strict=True)
        self._connection.executemany(self._sql[query].format(columns=names, places=places), rows)


def _state(row: Sequence[Any]) -> EntityState:
    entity_type, key, version, location_id, scope, known = row
    return EntityState(
        entity_type=entity_type,
        key=key,
        version=version,
        location_id=location_id,
        scope=None if scope is None else scope.encode(),
        known=known,
    )


def _state_row(state: EntityState) -> tuple[str, str, int, str | None, str | None, bytes | None]:
    scope = None if state.scope is None else state.scope.decode()
    return state.entity_type, state.key, state.version, state.location_id, scope, state.known


def _now() -> int:
    """This machine's clock, in microseconds."""
    return time.time_ns() // 1000
