"""PostgreSQL as a source: the stream of a logical slot, turned into batches."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Final

import msgspec
import psycopg
import structlog

from cdc.change import Batch, Image, Table, TableName
from cdc.config import Config, SourceConfig
from cdc.errors import FatalError, TransientError
from cdc.position import Lsn, SourcePosition, as_lsn, format_position
from cdc.postgres.assembly import HEARTBEAT_PREFIX, PART_BYTES
from cdc.postgres.catalog_watch import CatalogWatch
from cdc.postgres.connection import Connection, connect, translated_errors
from cdc.postgres.dump import SchemaDump, dump_schema
from cdc.postgres.intake import Intake
from cdc.postgres.publication import Publication, captured_tables, desired_publications, is_insert_only
from cdc.postgres.publication_check import check_publications
from cdc.postgres.publication_setup import create_publications, existing_publications, extend_publications
from cdc.postgres.replication import ReplicationStream
from cdc.postgres.reread import reread
from cdc.postgres.schema import SchemaTable, read_estimates, read_tables
from cdc.postgres.sequences import SequenceValue, read_sequences
from cdc.postgres.shape import TableShape, read_shapes
from cdc.postgres.slot import (
    check_cluster,
    check_slot,
    create_slot,
    drop_lost_slot,
    identify_system,
    read_slot,
    refuse_standby,
    slot_warning,
    timeline_end,
)
from cdc.postgres.snapshot import PostgresSnapshot, open_snapshot
from cdc.preflight import require
from cdc.source import Beginning, Estimate, Facts
from cdc.stats import CaptureStats, SlotStats

log = structlog.get_logger()

IDLE_SECONDS: Final = 1.0
"""While nothing happens in the captured tables, the position moves at most so often: each move is an fsync."""

OBSERVE_SECONDS: Final = 5.0
"""How often the server is asked for the end of its log and the state of the slot."""

LOCK_SECONDS: Final = 10.0
"""So long we wait for whoever holds a table exclusively, to read what a publication has of it or to put a new one in;
then we say so, and try again."""

CATALOG_SECONDS: Final = 10.0
"""How often the source's catalog is looked at for changes of shape that no event trigger has told of."""


class PostgresSource:
    """Streams one slot. Implements `cdc.source.Source`."""

    def __init__(self, config: Config, source: SourceConfig, facts: Facts) -> None:
        assert source.url is not None
        self.name = source.name
        self._config = config
        self._source = source
        self._url = source.url.reveal()
        self._facts = facts
        self._intake: Intake | None = None
        self._stream: ReplicationStream | None = None
        self._walsender: Connection | None = None
        self._control: Connection | None = None
        self._anew: dict[str, str] | None = None  # while the stream begins anew: the facts of its new beginning
        self._given = Lsn(0)  # the last position that a batch carried
        self._given_at = 0.0
        self._observed_at = 0.0
        self._heartbeat_at = 0.0
        self._server_end = Lsn(0)
        self._slot = SlotStats(source.slot)
        self._insert_only: tuple[str, ...] = ()
        self._captured: frozenset[int] | None = None  # OIDs, since the start
        self._watch = CatalogWatch(source, facts)
        self._looked_at = 0.0

    def open(self, position: SourcePosition | None) -> SourcePosition:
        """Connect, check that nothing is missing since `position`, and stream."""
        self.close()
        stored = None if position is None else as_lsn(position)
        name, lock_timeout = f"cdc {self.name}", f"{LOCK_SECONDS}s"
        self._control = control = connect(self._url, application_name=name, lock_timeout=lock_timeout)
        self._walsender = walsender = connect(self._url, application_name=name, replication=True)
        refuse_standby(control)
        self._check_cluster(walsender, stored)
        publications = self._publications(control, create=stored is None)
        start = self._slot_start(control, walsender, stored)
        if self._intake is None or self._intake.position < start:
            self._intake = Intake(start, ddl_prefixes=self._watch.prefixes)
        else:
            self._intake.reset()
        self._given = Lsn(start)
        self._look_at_catalog(control, tell_all=stored is not None)
        self._stream = ReplicationStream(
            walsender,
            slot=self._source.slot,
            start=Lsn(self._intake.position),
            publications=publications,
            server_version=control.info.server_version,
            sender_timeout_seconds=_sender_timeout_seconds(control),
        )
        self._observe_server()
        return start

    def restart(self) -> Beginning:
        """Stream from now on, from a slot that is made for it if there is none, or only a lost one."""
        with connect(self._url) as control:
            if drop_lost_slot(control, self._source.slot, control.info.dbname):
                log.info("lost slot dropped", source=self.name, slot=self._source.slot)
        self._intake = None
        self._anew = {}
        try:
            return Beginning(self.open(None), self._anew)
        finally:
            self._anew = None

    def read(self, timeout_seconds: float) -> Batch | None:
        """Wait for changes; a batch without transactions moves the position while nothing happens."""
        stream, intake = self._opened()
        self._heartbeat()
        if self._control is not None and time.monotonic() - self._looked_at > CATALOG_SECONDS:
            self._look_at_catalog(self._control)
        batch = intake.take()
        if batch is None:
            intake.feed(stream.drain(max_bytes=PART_BYTES, timeout_seconds=timeout_seconds))
            batch = intake.take()
        if batch is not None:
            self._gave(batch.position)
            return batch
        return self._idle(stream, intake)

    def confirm(self, *, durable: SourcePosition, applied: SourcePosition | None) -> None:
        """Send a status update when one is due."""
        if self._stream is not None:
            flushed = as_lsn(durable)
            self._stream.send_status(flushed=flushed, applied=flushed if applied is None else as_lsn(applied))

    def observe(self, stats: CaptureStats) -> None:
        """Fill in the end of the server's log and the state of the slot."""
        if self._stream is not None and time.monotonic() - self._observed_at > OBSERVE_SECONDS:
            self._observe_server()
        stats.server_end = max(self._server_end, self._stream.received if self._stream else 0)
        stats.slot = self._slot
        stats.insert_only = self._insert_only

    def close(self) -> None:
        """Disconnect; the slot keeps the changes."""
        for connection in (self._walsender, self._control):
            if connection is not None:
                with suppress(psycopg.Error):
                    connection.close()
        self._walsender = self._control = self._stream = None

    # for the initial copy and verification, from other threads

    def tables(self) -> Sequence[TableName]:
        """The tables that are captured, by name."""
        return list(self._schema())

    def estimates(self) -> Mapping[TableName, Estimate]:
        """How large each captured table is, by the planner's statistics."""
        with connect(self._url) as connection:
            tables, found = captured_tables(self._source, read_tables(connection)), read_estimates(connection)
        return {table.name: found[table.name] for table in tables if table.name in found}

    def dump_schema(self) -> SchemaDump:
        """Describe the captured tables and what they need, by pg_dump."""
        return dump_schema(self._url, self.tables(), pg_dump=self._source.pg_dump)

    def sequences(self) -> list[SequenceValue]:
        """Where the source's sequences stand now."""
        with connect(self._url) as connection:
            return read_sequences(connection, self.tables())

    def snapshot(self) -> PostgresSnapshot:
        """Open a consistent view of all captured tables."""
        with connect(self._url) as connection:
            tables = {table.name: table for table in captured_tables(self._source, read_tables(connection))}
            # from here on their changes are sent: what is older is in the snapshot
            self._extend(connection, desired_publications(self._config, self._source, tables))
        filters = {name: where for name in tables if (where := self._config.row_filter(self.name, name)) is not None}
        return open_snapshot(self._url, tables, filters=filters)

    def primary_key(self, table: TableName) -> Sequence[str]:
        """The columns of a table's primary key."""
        found = self._schema().get(table)
        return found.primary_key if found is not None else ()

    def shapes(self, oids: Collection[int]) -> list[TableShape]:
        """The shapes that tables have now, those that are gone left out. From any thread."""
        with connect(self._url) as connection:
            return read_shapes(connection, oids)

    def reread(self, table: Table, image: Image) -> Image | None:
        """Read one row as it is now, by its key; `None` if it is gone."""
        return reread(self._url, table, image)

    def nudge(self) -> None:
        """Write a message into the log, so that the stream passes what was committed before."""
        with connect(self._url) as connection, translated_errors():
            connection.execute(_HEARTBEAT, [HEARTBEAT_PREFIX])

    # opening

    def _check_cluster(self, walsender: Connection, position: Lsn | None) -> None:
        identity = identify_system(walsender)
        if self._anew is not None:
            self._anew |= {"system_id": identity.system_id, "timeline": str(identity.timeline)}
            return
        stored_system = self._facts.get("system_id")
        stored_timeline = self._facts.get("timeline")
        forked_at = None
        if stored_system == identity.system_id and stored_timeline is not None:
            forked_at = timeline_end(walsender, int(stored_timeline), identity)
        check_cluster(stored_system, identity, position, forked_at=forked_at)
        if (stored_system, stored_timeline) != (identity.system_id, str(identity.timeline)):
            self._facts.set("system_id", identity.system_id)
            self._facts.set("timeline", str(identity.timeline))

    def _publications(self, control: Connection, *, create: bool) -> tuple[str, ...]:
        """Create what is missing (on a first start only), check that all tables are covered, and name them."""
        tables = read_tables(control)
        wanted = desired_publications(self._config, self._source, tables)
        if not wanted:
            raise FatalError(
                f"source {self.name}: no table matches {', '.join(self._source.tables.include)}",
                hint="correct `tables` in its configuration (globs over schema.table)",
            )
        if create:
            for name in create_publications(control, wanted):
                log.info("publication created", source=self.name, publication=name)
        elif self._captured is None:
            self._extend(control, wanted)
        if self._captured is None:
            self._captured = frozenset(table.oid for table in captured_tables(self._source, tables))
        # a table that was made since the start waits for the next one: a reconnect must not fail because of it
        require(check_publications(control, [_only(publication, self._captured) for publication in wanted]))
        self._insert_only = tuple(
            str(table.name)
            for table in captured_tables(self._source, tables)
            if is_insert_only(self._source, table.name)
        )
        return existing_publications(control, self._source)

    def _extend(self, control: Connection, wanted: Sequence[Publication]) -> None:
        """Publish tables that are new, if the publication is ours and exists: a missing one is a gap, not a wish."""
        existing = existing_publications(control, self._source)
        if self._source.owns_publication:
            for table in extend_publications(control, [each for each in wanted if each.name in existing]):
                log.info("table added to the publication", source=self.name, table=str(table))

    def _slot_start(self, control: Connection, walsender: Connection, position: Lsn | None) -> Lsn:
        """Where to begin. Starting below the slot's own position would silently start there: compared first."""
        slot = read_slot(control, self._source.slot)
        identity = identify_system(walsender)
        check_slot(
            slot, name=self._source.slot, database=identity.database, position=position, wal_end=identity.wal_end
        )
        if slot is None:
            start = create_slot(walsender, self._source.slot, failover=True)
            log.info("slot created", source=self.name, slot=self._source.slot)
            return start
        if position is not None:
            return position
        if slot.confirmed_flush_lsn is None:
            raise TransientError(f"slot {slot.name} is still being created", hint="by another process; wait for it")
        if self._anew is None:
            log.warning(
                "the slot is older than the queue: was the data directory lost?",
                source=self.name,
                slot=slot.name,
                position=format_position(slot.confirmed_flush_lsn),
                hint="mirrors are compared with that position; a feed in the data directory begins anew, without what "
                "it had",
            )
        return slot.confirmed_flush_lsn

    # streaming

    def _opened(self) -> tuple[ReplicationStream, Intake]:
        if self._stream is None or self._intake is None:
            raise TransientError(f"source {self.name} is not connected")
        return self._stream, self._intake

    def _idle(self, stream: ReplicationStream, intake: Intake) -> Batch | None:
        """Move the position by what was sent and held nothing for us, so that no WAL is kept for nothing."""
        if intake.in_transaction:
            return None
        passed_something = intake.pass_idle(stream.idle_end)
        due = passed_something or stream.reply_wanted or time.monotonic() - self._given_at > IDLE_SECONDS
        if intake.position <= self._given or not due:
            return None
        self._gave(intake.position)
        return Batch((), [], intake.position, 0)

    def _gave(self, position: SourcePosition) -> None:
        self._given = as_lsn(position)
        self._given_at = time.monotonic()

    def _heartbeat(self) -> None:
        seconds = self._source.heartbeat_seconds
        now = time.monotonic()
        if self._control is None or not seconds or now - self._heartbeat_at < seconds:
            return
        self._heartbeat_at = now
        with translated_errors():
            self._control.execute(_HEARTBEAT, [HEARTBEAT_PREFIX])

    def _look_at_catalog(self, control: Connection, *, tell_all: bool = False) -> None:
        """After whatever error, look again: what was told twice has no effect."""
        self._looked_at = time.monotonic()
        self._watch.look(control, tell_all=tell_all)

    def _observe_server(self) -> None:
        assert self._control is not None
        self._observed_at = time.monotonic()
        with translated_errors():
            row = self._control.execute("SELECT pg_current_wal_lsn() - '0/0'").fetchone()
        self._server_end = Lsn(int(row[0])) if row else self._server_end
        slot = read_slot(self._control, self._source.slot)
        if slot is None:
            return
        if (warning := slot_warning(slot)) is not None:
            log.warning(warning, source=self.name)
        self._slot = SlotStats(
            name=slot.name,
            active=slot.active_pid is not None,
            wal_status=slot.wal_status,
            retained_bytes=slot.retained_bytes,
            safe_bytes=slot.safe_wal_size,
            restart_lsn=slot.restart_lsn,
            confirmed_flush_lsn=slot.confirmed_flush_lsn,
        )

    def _schema(self) -> dict[TableName, SchemaTable]:
        with connect(self._url) as connection:
            return {table.name: table for table in captured_tables(self._source, read_tables(connection))}


def _only(publication: Publication, oids: Collection[int]) -> Publication:
    chosen = tuple(published for published in publication.tables if published.table.oid in oids)
    return msgspec.structs.replace(publication, tables=chosen)


def _sender_timeout_seconds(control: Connection) -> float:
    with translated_errors():
        row = control.execute("SELECT setting::int FROM pg_settings WHERE name = 'wal_sender_timeout'").fetchone()
    return row[0] / 1000 if row else 0.0


_HEARTBEAT: Final = "SELECT pg_logical_emit_message(true, %s, '')"
