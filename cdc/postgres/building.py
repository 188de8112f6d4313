"""What a copy leaves to be built: keys, indexes, constraints, triggers, statistics; several at a time.

An entry waits for those before it that are about a table of its own; indexes of one table do not wait for each other.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from graphlib import TopologicalSorter
from typing import Final

import psycopg
import structlog
from psycopg import sql

from cdc.change import TableName
from cdc.config import SinkConfig
from cdc.errors import PermanentError
from cdc.postgres.bookkeeping import ANALYZE, FOREIGN_KEY, Bookkeeping, PendingEntry
from cdc.postgres.connection import Connection, to_cdc_error, translated_errors, while_doing
from cdc.postgres.preparation import Rename, rename_relations, renames
from cdc.pulse import elsewhere

log = structlog.get_logger()

INDEX: Final = "INDEX"

_SORT_MEMORY: Final = "256MB"
"""For each build at least, or an index of some million rows is sorted on the disk: the server's default is 64 MB."""


class Builder:
    """Builds what one sink's tables wait for.

    session: connects to the target, where commits wait for the disk. jobs: how many are built at a time.
    look_again: renews what is outdated; `None`: the source cannot be asked.
    """

    def __init__(
        self,
        config: SinkConfig,
        session: Callable[[], AbstractContextManager[Connection]],
        *,
        jobs: int,
        look_again: Callable[[Connection], None] | None = None,
    ) -> None:
        self._config = config
        self._session = session
        self._jobs = jobs
        self._look_again = look_again

    def build(self, kinds: Collection[str] | None = None) -> bool:
        """Run pending entries, each in a transaction that also records that it is done. kinds: of these only.

        Returns whether all are built: what is about tables that are to follow the source waits for the stream. Raises
        the first error, once nothing is under way any more.
        """
        with ExitStack() as sessions:
            first = sessions.enter_context(self._session())
            bookkeeping = Bookkeeping(first, self._config.name)
            bookkeeping.create()  # one of an older version is completed
            try:
                return self._attempt(kinds, first, sessions)
            except _Lacking:
                if self._look_again is None:
                    raise
            # it may have another name, or be gone: altered here by hand, or before anything was noted
            with translated_errors():
                bookkeeping.outdate()
            return self._attempt(kinds, first, sessions)

    def _attempt(self, kinds: Collection[str] | None, first: Connection, sessions: ExitStack) -> bool:
        if self._look_again is not None:
            self._look_again(first)
        with translated_errors():
            pending = Bookkeeping(first, self._config.name).pending()
        wanted = [entry for entry in pending if kinds is None or entry.kind in kinds]
        entries = [entry for entry in wanted if not entry.outdated or self._look_again is None]
        if entries:
            more = range(1, min(self._jobs, len(entries)))
            self._build_in_order(entries, [first, *(sessions.enter_context(self._session()) for _ in more)])
        return len(entries) == len(wanted)

    def _build_in_order(self, entries: Collection[PendingEntry], connections: Sequence[Connection]) -> None:
        """Of those that may begin the one of the largest table first: the end should not be waiting for it alone."""
        order = build_order(entries, self._builds_alone)
        order.prepare()
        weight = self._weights(connections[0], entries)
        free, ready, built = list(connections), list[tuple[int, PendingEntry]](), 0
        running: dict[Future[float], tuple[PendingEntry, Connection]] = {}
        with elsewhere(), ThreadPoolExecutor(len(free), "build") as pool, _cancelled_on_error(connections):
            while order.is_active():
                for entry in order.get_ready():
                    heapq.heappush(ready, (-weight(entry), entry))
                while ready and free:
                    _, entry = heapq.heappop(ready)
                    connection = free.pop()
                    running[pool.submit(self._build_one, connection, entry)] = entry, connection
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    entry, connection = running.pop(future)
                    built += 1
                    self._log(entry, future.result(), n=built, of=len(entries))
                    order.done(entry)
                    free.append(connection)

    def _build_one(self, connection: Connection, entry: PendingEntry) -> float:
        """Returns how many seconds it took."""
        started = time.monotonic()
        try:
            with while_doing(f"building {entry.kind} {entry.name} on the target"), connection.transaction():
                connection.execute(_MORE_MEMORY, [_SORT_MEMORY])
                self._run(connection, entry)
                Bookkeeping(connection, self._config.name).built(entry)
        except PermanentError as exc:
            exc.hint = exc.hint or _HINT.format(sink=self._config.name, ordinal=entry.ordinal)
            raise
        return time.monotonic() - started

    def _log(self, entry: PendingEntry, seconds: float, *, n: int, of: int) -> None:
        log.info(
            "built", sink=self._config.name, kind=entry.kind, name=entry.name, seconds=round(seconds, 3), of=of, n=n
        )

    def _builds_alone(self, entry: PendingEntry) -> bool:
        return not entry.relations or bool(self._renames(entry))

    def _weights(self, connection: Connection, entries: Iterable[PendingEntry]) -> Callable[[PendingEntry], int]:
        """Bytes of the largest table that an entry is about."""
        names = {self._config.target_name(table) for entry in entries for table in entry.relations}
        with translated_errors():
            rows = connection.execute(
                _SIZES, [[name.schema for name in names], [name.name for name in names]]
            ).fetchall()
        sizes = {TableName(schema, name): size for schema, name, size in rows}

        def weight(entry: PendingEntry) -> int:
            return max((sizes.get(self._config.target_name(table), 0) for table in entry.relations), default=0)

        return weight

    def _run(self, connection: Connection, entry: PendingEntry) -> None:
        """Run SQL that has the source's names: renamed tables get those back until the end of the transaction."""
        if entry.kind == FOREIGN_KEY:
            self._restore(connection, entry)
            return
        if entry.kind == ANALYZE:
            target = sql.Identifier(*self._config.target_name(entry.relations[0]))
            connection.execute(sql.SQL("ANALYZE {}").format(target))
            return
        pairs = self._renames(entry)
        rename_relations(connection, [(target, source) for source, target in pairs])
        try:
            with connection.transaction():
                connection.execute(entry.sql.encode())
        except _NOT_THERE as exc:
            raise _Lacking(str(to_cdc_error(exc))) from exc
        except psycopg.errors.DuplicateTable:
            self._make_way(connection, entry)
            connection.execute(entry.sql.encode())
        rename_relations(connection, pairs)

    def _renames(self, entry: PendingEntry) -> list[Rename]:
        return [] if entry.kind in (ANALYZE, FOREIGN_KEY) else renames(self._config, entry.relations)

    def _make_way(self, connection: Connection, entry: PendingEntry) -> None:
        """Rename an index of a table of ours that has the entry's name: at the source it has it no longer."""
        marks = Bookkeeping(connection, self._config.name).marks()
        ours = {self._config.target_name(name) for name, mark in marks.items() if mark.made}
        for schema, table, index, oid in connection.execute(_INDEXES).fetchall():
            if TableName(schema, table) in ours and f" {entry.name}".endswith(f" {index}"):
                rename = sql.SQL("ALTER INDEX {} RENAME TO {}")
                new_name = f"{index[:40]}_{oid}"
                connection.execute(rename.format(sql.Identifier(schema, index), sql.Identifier(new_name)))
                log.info("index renamed, another has its name", sink=self._config.name, index=index, new_name=new_name)

    def _restore(self, connection: Connection, entry: PendingEntry) -> None:
        """A foreign key that was taken away. The stream can do without, and the source may have dropped it since."""
        try:
            with connection.transaction():
                connection.execute(entry.sql.encode())
        except (psycopg.ProgrammingError, psycopg.IntegrityError) as exc:
            log.warning(
                "foreign key left out: it no longer fits",
                sink=self._config.name,
                name=entry.name,
                sql=entry.sql,
                error=exc.diag.message_primary,
            )


class _Lacking(PermanentError):
    """What an entry names is not there."""


def build_order(
    entries: Iterable[PendingEntry], alone: Callable[[PendingEntry], bool]
) -> TopologicalSorter[PendingEntry]:
    """Which entries each has to wait for. Pure.

    Those that conflict or depend on each other are about the same table: in what order is `entries`'. alone: whether
    nothing else may be under way with an entry.
    """
    order: TopologicalSorter[PendingEntry] = TopologicalSorter()
    barrier, since = list[PendingEntry](), list[PendingEntry]()
    lanes: dict[TableName, _Lane] = {}
    for entry in entries:
        if alone(entry):
            order.add(entry, *barrier, *since)
            barrier, since, lanes = [entry], [], {}
            continue
        order.add(entry)
        since.append(entry)
        for table in entry.relations:
            lane = lanes.setdefault(table, _Lane(barrier))
            order.add(entry, *lane.enter(entry))
    return order


class _Lane:
    """What was about one table last: something that had to be alone there, and the indexes since."""

    def __init__(self, before: list[PendingEntry]) -> None:
        self._before = before
        self._indexes: list[PendingEntry] = []

    def enter(self, entry: PendingEntry) -> Iterable[PendingEntry]:
        """Whom it has to wait for."""
        if entry.kind == INDEX:  # CREATE INDEX bears others on the table, what has other kinds locks harder
            self._indexes.append(entry)
            return self._before
        waits_for = self._indexes or self._before
        self._before, self._indexes = [entry], []
        return waits_for


@contextmanager
def _cancelled_on_error(connections: Collection[Connection]) -> Iterator[None]:
    """Whoever gives up need not wait for hours of building."""
    try:
        yield
    except BaseException:
        for connection in connections:
            with suppress(psycopg.Error):
                connection.cancel_safe()
        raise


_NOT_THERE: Final = (psycopg.errors.UndefinedColumn, psycopg.errors.UndefinedTable, psycopg.errors.UndefinedObject)

_HINT: Final = (
    "correct what it finds on the mirror (its SQL is in cdc.post_data there), then `cdc resume {sink}`; to do without "
    "it: UPDATE cdc.post_data SET done = true WHERE sink = '{sink}' AND ordinal = {ordinal}"
)

_INDEXES: Final = """
SELECT n.nspname, c.relname, i.relname, i.oid::bigint
  FROM pg_index x
  JOIN pg_class i ON i.oid = x.indexrelid
  JOIN pg_class c ON c.oid = x.indrelid
  JOIN pg_namespace n ON n.oid = c.relnamespace
"""

_SIZES: Final = """
SELECT n.nspname, c.relname, pg_relation_size(c.oid)
  FROM unnest(%s::text[], %s::text[]) AS wanted (schema, name)
  JOIN pg_namespace n ON n.nspname = wanted.schema
  JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = wanted.name
 WHERE c.relkind = 'r'
"""
"""Not of all tables: it would wait for those that are locked, by a copy for another sink for instance."""

_MORE_MEMORY: Final = """
SELECT set_config('maintenance_work_mem', wanted, true)
  FROM CAST(%s AS text) AS wanted
 WHERE pg_size_bytes(wanted) > pg_size_bytes(current_setting('maintenance_work_mem'))
"""
