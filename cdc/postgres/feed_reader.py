"""Reads a feed in a PostgreSQL database."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final

import psycopg
from psycopg import sql
from psycopg_pool import ConnectionPool, PoolClosed

from cdc.errors import TransientError
from cdc.feed.place import Place
from cdc.feed.record import Pruned, Record
from cdc.feed.store import Scan, Wanted
from cdc.feed.tables import Window, rows_to_look_at, tables_of
from cdc.postgres.connection import Connection, connect, connect_arguments, lift_later_timeouts, translated_errors
from cdc.postgres.copy_fields import text
from cdc.postgres.feed_tables import CODEC, adapt, check_tables, composed, moment

_SETTINGS: Final = {
    "default_transaction_read_only": "on",
    "statement_timeout": "30s",
    # row by row, in the order of an index, up to the limit: the planner would rather read a table that was empty a
    # moment ago from end to end, or gather and sort all the rows that are to be looked at
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "jit": "off",
}
_CONNECTIONS: Final = 16
_WAIT_SECONDS: Final = 5.0

_QUERIES: Final = {
    "head": "SELECT last_id FROM {state}",
    "window": "SELECT count(*), max(id) FROM (SELECT id FROM {main} WHERE id > %s ORDER BY id LIMIT %s) AS looked_at",
    # OFFSET 0 keeps the planner from any other index than that of the ids: what is looked at is bounded by them
    "scan": """SELECT {columns} FROM (
            SELECT * FROM {main} WHERE id > %(after)s AND id <= %(end)s ORDER BY id OFFSET 0) AS looked_at
        WHERE (%(types)s::text[] IS NULL OR entity_type = ANY (%(types)s::text[]))
            AND (%(channels)s::text[] IS NULL OR channel = ANY (%(channels)s::text[]))
            AND (%(location)s::text IS NULL OR location_id = %(location)s::text)
        ORDER BY id LIMIT %(limit)s""",
    "history": """SELECT {columns} FROM {main} WHERE entity_type = %s AND entity_id = %s AND id < %s
        ORDER BY id DESC LIMIT %s""",
    # a query of its own: the planner takes min() from the index only where there is no WITH beside it
    "since": """WITH RECURSIVE {span}
        SELECT (SELECT min(id) FROM {main} WHERE id >= (SELECT max(low) FROM span))""",
    "pruned": "SELECT entity_type, channel, through_id, through_recorded_at, rows FROM {pruned}",
    "oldest": "SELECT min(id) FROM {main}",
}

_BEHIND_ALL: Final = 2**63 - 1


class PostgresReader:
    """`cdc.feed.store.FeedReader`."""

    def __init__(self, place: Place) -> None:
        assert place.url is not None
        self._url = place.url.reveal()
        self._tables = tables_of(place.table, schemas=True)
        self._sql = composed(self._tables, _QUERIES)
        self._pool: ConnectionPool[Connection] | None = None

    def open(self) -> None:
        """Check that the feed can be read. Raises `TransientError` if it is not there (yet)."""
        with connect(self._url, application_name="cdc feed") as connection, translated_errors():
            if not check_tables(connection, self._tables):
                raise _absent()
        self.close()
        conninfo, arguments = connect_arguments(self._url, "cdc feed", **_SETTINGS)
        self._pool = ConnectionPool(
            conninfo,
            kwargs=arguments,
            min_size=0,
            max_size=_CONNECTIONS,
            timeout=_WAIT_SECONDS,
            reconnect_timeout=1.0,  # who asks next makes it try again
            check=ConnectionPool.check_connection,
            configure=_configure,
            num_workers=1,
            open=True,
        )

    def head(self) -> int:
        """The last id that is visible, also if its record was pruned since."""
        return int(self._query("head")[0][0])

    def scan(self, after: int, wanted: Wanted, limit: int) -> Scan:
        """The first `limit` wanted records behind `after`, of the next `SCAN_ROWS` rows."""
        rows = rows_to_look_at(wanted, limit)
        with self._connection() as connection:
            ((count, last),) = connection.execute(self._sql["window"], [after, rows + 1]).fetchall()
            window = Window.of(after, last, more=count > rows)
            parameters = _parameters(wanted) | {"after": after, "end": window.end, "limit": limit + 1}
            found = connection.execute(self._sql["scan"], parameters, binary=True).fetchall()
        return window.scan(list(map(CODEC.record, found)), limit)

    def history(self, entity_type: str, entity_id: str, before: int | None, limit: int) -> Sequence[Record]:
        """The newest records of one entity, newest first; with `before`, those with smaller ids."""
        bound = _BEHIND_ALL if before is None else before
        return list(map(CODEC.record, self._query("history", text(entity_type), text(entity_id), bound, limit)))

    def cursor_at(self, recorded_at: int) -> int:
        """The largest cursor behind which are all records recorded at that time (microseconds) or later."""
        head = self.head()  # first: what is committed meanwhile is behind it
        ((first,),) = self._query("since", at=moment(recorded_at))
        return head if first is None else min(first - 1, head)

    def pruned(self) -> Mapping[tuple[str, str], Pruned]:
        """By (entity_type, channel), what retention has removed."""
        return {(entity_type, channel): Pruned(*rest) for entity_type, channel, *rest in self._query("pruned")}

    def oldest(self) -> int | None:
        """The smallest id that is there."""
        found: int | None = self._query("oldest")[0][0]
        return found

    @contextmanager
    def listen(self) -> Iterator[PostgresListener]:
        """Begin to listen: what is committed from now on wakes the listener."""
        listener = PostgresListener(self._url, self._tables.main)
        try:
            yield listener
        finally:
            listener.close()

    def close(self) -> None:
        """Disconnect. Safe to call twice."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()

    def _query(self, name: str, *parameters: object, **named: object) -> list[Any]:
        with self._connection() as connection:
            return connection.execute(self._sql[name], named or parameters, binary=True).fetchall()

    @contextmanager
    def _connection(self) -> Iterator[Connection]:
        if self._pool is None:
            raise TransientError("the feed is not open for reading")
        with translated_errors():
            try:
                with self._pool.connection() as connection:
                    yield connection
            except psycopg.errors.UndefinedTable as exc:
                raise _absent() from exc
            except PoolClosed as exc:
                raise TransientError("the feed is no longer open for reading") from exc


class PostgresListener:
    """`cdc.feed.store.Listener`, on a connection of its own."""

    def __init__(self, url: str, channel: str) -> None:
        self._url = url
        self._listen = sql.SQL("LISTEN {}").format(sql.Identifier(channel))
        self._connection: Connection | None = None
        self._connect()

    def wait(self, timeout_seconds: float) -> bool:
        """Return when something was committed since the last call, or after the time-out: then False."""
        if self._connection is None:
            self._connect()
            return True  # nobody knows what was missed
        try:
            return any(True for _ in self._connection.notifies(timeout=timeout_seconds, stop_after=1))
        except psycopg.OperationalError:
            self.close()
        self._connect()
        return True

    def close(self) -> None:
        """Disconnect. Safe to call twice."""
        if self._connection is not None:
            with suppress(psycopg.Error):
                self._connection.close()
        self._connection = None

    def _connect(self) -> None:
        connection = connect(self._url, application_name="cdc feed listener")
        try:
            with translated_errors():
                connection.execute(self._listen)
        except BaseException:
            connection.close()
            raise
        self._connection = connection


def _configure(connection: Connection) -> None:
    lift_later_timeouts(connection)
    adapt(connection)


def _parameters(wanted: Wanted) -> dict[str, Any]:
    return {
        "types": None if wanted.entity_types is None else list(map(text, wanted.entity_types)),
        "channels": None if wanted.channels is None else list(map(text, wanted.channels)),
        "location": None if wanted.location_id is None else text(wanted.location_id),
    }


def _absent() -> TransientError:
    return TransientError("the feed is not there yet", hint="the daemon makes it when it begins to write")
