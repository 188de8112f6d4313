"""A feed in a PostgreSQL database: its writers.

The lock of all writers is the row of the state table, held to commit. Commits are synchronous and notify the channel
that has the table's name.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from typing import Any, Final

import msgspec
import psycopg

from cdc.feed.cache import Key
from cdc.feed.place import Place
from cdc.feed.record import EntityState, Record
from cdc.feed.tables import COLUMNS, LOCK_SECONDS, given, tables_of
from cdc.feed.writer import Locked, Session, StoreWriter
from cdc.position import Position, format_position, parse_position
from cdc.postgres.connection import connect, translated_errors
from cdc.postgres.copy_fields import Fields, copy_data, copy_fields, text
from cdc.postgres.feed_reader import PostgresReader as Reader
from cdc.postgres.feed_tables import (
    adapt,
    check_tables,
    composed,
    copy_query,
    create_tables,
    moment,
    schema_of,
)
from cdc.preflight import Finding

__all__ = ["Reader", "Writer", "check"]

SETTINGS: Final = {
    "synchronous_commit": "on",
    "lock_timeout": f"{LOCK_SECONDS}s",
    # a daemon whose machine has died must not hold the lock for the two hours that TCP takes to notice by itself
    "tcp_keepalives_idle": "30",
    "tcp_keepalives_interval": "10",
    "tcp_keepalives_count": "3",
    # all is found by index: the planner would rather read tables that grow from end to end
    "enable_seqscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "jit": "off",
}

_MAY_CREATE: Final = """SELECT CASE WHEN EXISTS (SELECT FROM pg_namespace WHERE nspname = %(schema)s)
    THEN has_schema_privilege(%(schema)s, 'CREATE') ELSE has_database_privilege(current_database(), 'CREATE') END,
    format(CASE WHEN EXISTS (SELECT FROM pg_namespace WHERE nspname = %(schema)s)
    THEN 'GRANT CREATE ON SCHEMA %%I TO %%I' ELSE 'CREATE SCHEMA %%I AUTHORIZATION %%I' END,
    %(schema)s, current_user)"""
"""Whether the feed's tables can be made, and the statement that puts it right."""

_QUERIES: Final = {
    "lock": "SELECT last_id, recorded_at FROM {state} FOR UPDATE",
    "position": "SELECT queue_id, seq, position FROM {positions} WHERE source = %s",
    "now": "SELECT clock_timestamp()",
    "move": """INSERT INTO {positions} VALUES (%s, %s, %s, %s) ON CONFLICT (source)
        DO UPDATE SET queue_id = excluded.queue_id, seq = excluded.seq, position = excluded.position""",
    "forget": """WITH doubted AS (
            UPDATE {entities} SET known = NULL WHERE source = %(source)s AND known IS NOT NULL)
        DELETE FROM {positions} WHERE source = %(source)s""",
    # OFFSET 0: a look-up for each, whatever is believed of the table. Joined, all of a source may be read for each
    "states": """SELECT entity_type, key, version, location_id, scope, known
        FROM unnest(%b::text[], %b::bytea[]) AS wanted (entity_type, key)
        CROSS JOIN LATERAL (SELECT version, location_id, scope, known FROM {entities} AS it
            WHERE it.source = %s AND it.entity_type = wanted.entity_type AND it.key = wanted.key OFFSET 0) AS found""",
    "put_states": """INSERT INTO {entities} SELECT %s, *
        FROM unnest(%b::text[], %b::bytea[], %b::bigint[], %b::text[], %b::text[], %b::bytea[])
        ON CONFLICT (source, entity_type, key) DO UPDATE SET version = excluded.version,
        location_id = excluded.location_id, scope = excluded.scope, known = excluded.known""",
    "existing": "SELECT position FROM {main} WHERE source = %s AND position = ANY (%s)",
    "commit": "UPDATE {state} SET last_id = %s, recorded_at = %s",
    "notify": "SELECT pg_notify(%s, %s)",
    "types": """WITH RECURSIVE found (entity_type) AS (
        (SELECT min(entity_type) FROM {main}) UNION ALL
        SELECT (SELECT min(entity_type) FROM {main} WHERE entity_type > found.entity_type) FROM found
            WHERE entity_type IS NOT NULL)
        SELECT entity_type FROM found WHERE entity_type IS NOT NULL""",
    "prune": """WITH RECURSIVE {span}, doomed AS MATERIALIZED (
            SELECT id FROM {main} WHERE id < (SELECT max(low) FROM span)
                AND (%(entity_type)s::text IS NULL OR entity_type = %(entity_type)s::text)
                AND (%(sources)s::text[] IS NULL OR source = ANY (%(sources)s::text[]))
            ORDER BY id LIMIT %(rows)s FOR UPDATE SKIP LOCKED),
        removed AS (
            DELETE FROM {main} USING doomed WHERE {main}.id = doomed.id
            RETURNING {main}.id, entity_type, channel, recorded_at),
        noted AS (
            INSERT INTO {pruned} SELECT entity_type, channel, max(id), max(recorded_at), count(*) FROM removed
            GROUP BY 1, 2 ORDER BY 1, 2 ON CONFLICT (entity_type, channel) DO UPDATE SET
            through_id = greatest({pruned}.through_id, excluded.through_id),
            through_recorded_at = greatest({pruned}.through_recorded_at, excluded.through_recorded_at),
            rows = {pruned}.rows + excluded.rows)
        SELECT count(*) FROM removed""",
}


def check(place: Place) -> Iterator[Finding]:
    """Whether the feed is there, or this role may make it."""
    assert place.url is not None
    tables = tables_of(place.table, schemas=True)
    with connect(place.url.reveal(), application_name="cdc check") as connection, translated_errors():
        if check_tables(connection, tables):
            yield Finding("ok", "feed", f"{place.table} is there")
            return
        schema = schema_of(tables)
        row = connection.execute(_MAY_CREATE, {"schema": schema}).fetchone()
    assert row is not None
    may_create, statement = row
    if may_create:
        yield Finding("ok", "feed", f"{place.table} can be made")
    else:
        yield Finding("error", "feed", f"this role may not make tables in {schema}", f"as an owner: {statement}")


class Writer(StoreWriter):
    """`cdc.feed.store.FeedWriter`."""

    def _connect(self) -> Session:
        return _Session(self._place)


class _Session:
    """One connection. Implements `cdc.feed.writer.Session`."""

    def __init__(self, place: Place) -> None:
        assert place.url is not None
        tables = tables_of(place.table, schemas=True)
        self._tables = tables
        self._channel = tables.main
        self._unique = f"{tables.main}_source"
        self._sql = composed(tables, _QUERIES)
        self._connection = connect(place.url.reveal(), application_name="cdc feed", replication=False, **SETTINGS)
        try:
            create_tables(self._connection, tables)
        except BaseException:
            self._connection.close()
            raise
        adapt(self._connection)

    def alive(self) -> bool:
        """Whether the server answers."""
        try:
            self._connection.execute("SELECT 1")
        except psycopg.Error:
            return False
        return True

    def take_over(self, source: str) -> Position | None:
        """The stored position of a source."""
        with translated_errors():
            row = self._connection.execute(self._sql["position"], [source]).fetchone()
        return None if row is None else Position(row[0], row[1], parse_position(row[2]))

    def lock(self, source: str) -> Locked:
        """Begin a transaction, and lock the state."""
        with translated_errors(), self._connection.pipeline():
            # the statements after the lock must see what was committed while it was waited for
            self._connection.execute("BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE")
            state = self._connection.execute(self._sql["lock"], binary=True)
            now = self._connection.execute(self._sql["now"], binary=True)
            position = self._connection.execute(self._sql["position"], [source])
        ((head, recorded_at),), ((clock,),), row = state.fetchall(), now.fetchall(), position.fetchone()
        return Locked(
            head, recorded_at, clock, None if row is None else Position(row[0], row[1], parse_position(row[2]))
        )

    def states(self, source: str, keys: Sequence[Key]) -> Sequence[EntityState]:
        """Those of the states that are there."""
        types, names = [text(entity_type) for entity_type, _ in keys], [key.encode() for _, key in keys]
        with translated_errors():
            rows = self._connection.execute(self._sql["states"], [types, names, source], binary=True).fetchall()
        return [
            EntityState(
                entity_type=entity_type,
                key=key.decode(),
                version=version,
                location_id=location_id,
                scope=None if scope is None else scope.encode(),
                known=known,
            )
            for entity_type, key, version, location_id, scope, known in rows
        ]

    def existing(self, source: str, positions: Sequence[str]) -> set[str]:
        """Those of the positions of which there are records."""
        wanted = {text(position): position for position in positions}
        with translated_errors():
            rows = self._connection.execute(self._sql["existing"], [source, list(wanted)]).fetchall()
        return {wanted[position] for (position,) in rows}

    def encoded(self, records: Sequence[Record]) -> Fields:
        """By column, for COPY."""
        return copy_fields(given(COLUMNS, map(msgspec.structs.astuple, records)))

    def insert(self, encoded: Fields, first_id: int, recorded_at: int) -> bool:
        """Insert records; False, and none of them is there, if the (source, position) of one was there before."""
        count = len(encoded["id"])
        numbers = copy_fields({"id": range(first_id, first_id + count), "recorded_at": [recorded_at] * count})
        with translated_errors():
            self._connection.execute("SAVEPOINT records")
            try:
                self._copy("main", {**encoded, **numbers})
            except psycopg.errors.UniqueViolation as exc:
                if exc.diag.constraint_name != self._unique:
                    raise
                self._connection.execute("ROLLBACK TO SAVEPOINT records")
                return False
            self._connection.execute("RELEASE SAVEPOINT records")
        return True

    def _copy(self, table: str, fields: Fields) -> None:
        with self._connection.cursor() as cursor, cursor.copy(copy_query(self._tables, table, fields)) as copy:
            copy.write(copy_data(fields))

    def put_states(self, source: str, states: Sequence[EntityState], *, new: bool = False) -> None:
        """Insert states, or replace those that are there: that is slower, since the server looks for each."""
        columns: dict[str, list[Any]] = {
            "entity_type": [text(state.entity_type) for state in states],
            "key": [state.key.encode() for state in states],
            "version": [state.version for state in states],
            "location_id": [None if state.location_id is None else text(state.location_id) for state in states],
            "scope": [None if state.scope is None else state.scope.decode() for state in states],
            "known": [state.known for state in states],
        }
        with translated_errors():
            if new:
                self._copy("entities", copy_fields({"source": [source] * len(states), **columns}))
            else:
                self._connection.execute(self._sql["put_states"], [source, *columns.values()])

    def move(self, source: str, position: Position) -> None:
        """Store a position."""
        row = [source, position.queue_id, position.seq, format_position(position.source)]
        with translated_errors():
            self._connection.execute(self._sql["move"], row)

    def commit(self, head: int, recorded_at: int) -> None:
        """Store both, commit durably, and notify."""
        with translated_errors(), self._connection.pipeline():
            self._connection.execute(self._sql["commit"], [head, moment(recorded_at)])
            self._connection.execute(self._sql["notify"], [self._channel, str(head)])
            self._connection.execute("COMMIT")

    def rollback(self) -> None:
        """End the transaction without effect."""
        with translated_errors():
            self._connection.execute("ROLLBACK")

    def prune(
        self, entity_type: str | None, recorded_before: int, rows: int, sources: Collection[str] | None = None
    ) -> int:
        """Remove the oldest, and note it, in one statement."""
        name = None if entity_type is None else text(entity_type)
        parameters = {
            "entity_type": name,
            "at": moment(recorded_before),
            "rows": rows,
            "sources": None if sources is None else list(sources),
        }
        with translated_errors():
            ((removed,),) = self._connection.execute(self._sql["prune"], parameters).fetchall()
        return int(removed)

    def entity_types(self) -> Sequence[str]:
        """All types of which there are records: a jump in the index for each."""
        with translated_errors():
            return [name for (name,) in self._connection.execute(self._sql["types"]).fetchall()]

    def forget(self, source: str) -> None:
        """Remove a source's position, and the documents that are known of it."""
        with translated_errors():
            self._connection.execute(self._sql["forget"], {"source": source})

    def close(self) -> None:
        """Disconnect."""
        with suppress(psycopg.Error):
            self._connection.close()
