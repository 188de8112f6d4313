"""Replication slots: made, read, and compared with what was captured.

The checks are pure and run before streaming starts: the server does not refuse a position below the slot's own, it
silently goes on from where the slot stands.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, LiteralString

import msgspec
import psycopg
import structlog
from psycopg import errors, sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from cdc.errors import CdcError, FatalError, HistoryLost, ResyncRequired, TransientError
from cdc.position import Lsn, format_lsn, parse_lsn
from cdc.postgres.connection import Connection, to_cdc_error, translated_errors

PLUGIN: Final = "pgoutput"

WARN_ABOVE: Final = 0.8
"""Share of `max_slot_wal_keep_size` in use from which `slot_warning` speaks."""

WAIT_LOG_SECONDS = 3.0
"""How long a slot's creation may wait before the log names what it waits for."""

log = structlog.get_logger()


class SystemIdentity(msgspec.Struct, frozen=True):
    """Which cluster a connection leads to, and how far its write-ahead log is flushed."""

    system_id: str
    timeline: int
    wal_end: Lsn
    database: str


class Slot(msgspec.Struct, frozen=True):
    """A row of `pg_replication_slots`.

    safe_wal_size: bytes that may still be written before the slot is in danger; `None` where nothing limits it.
    retained_bytes: WAL that the server keeps for this slot.
    invalidation_reason: why it can never be used again (16: only that it cannot); `None` for a sound slot.
    """

    name: str
    plugin: str | None
    slot_type: str
    database: str | None
    temporary: bool
    active_pid: int | None
    active_application: str | None
    restart_lsn: Lsn | None
    confirmed_flush_lsn: Lsn | None
    wal_status: str | None
    safe_wal_size: int | None
    retained_bytes: int
    two_phase: bool
    failover: bool
    synced: bool
    invalidation_reason: str | None

    @property
    def lost(self) -> bool:
        """Whether the server no longer has what the slot needs. It never recovers from that."""
        return self.wal_status == "lost" or self.invalidation_reason is not None


class Blocker(msgspec.Struct, frozen=True):
    """A transaction that the creation of a slot waits for.

    pid: `None` for a prepared transaction, which then has a `gid`.
    age_seconds, application_name: `None` where our role may not see them.
    """

    pid: int | None
    gid: str | None
    age_seconds: float | None
    application_name: str | None


def identify_system(connection: Connection) -> SystemIdentity:
    """Ask a replication connection for its cluster, timeline and WAL end (`IDENTIFY_SYSTEM`)."""
    with translated_errors():
        row = connection.execute("IDENTIFY_SYSTEM").fetchone()
    assert row is not None
    system_id, timeline, wal_end, database = row
    return SystemIdentity(system_id, timeline, parse_lsn(wal_end), database)


def timeline_end(connection: Connection, timeline: int, identity: SystemIdentity) -> Lsn | None:
    """Where an earlier timeline was left by a promotion; `None` if the cluster is still on it.

    connection: a replication connection.
    """
    if timeline == identity.timeline:
        return None
    with translated_errors():
        row = connection.execute(sql.SQL("TIMELINE_HISTORY {}").format(identity.timeline)).fetchone()
    assert row is not None
    history = row[1].decode("utf-8", "replace") if isinstance(row[1], bytes) else row[1]  # bytea before 15
    return _switch_point(history, timeline)


def read_slot(connection: Connection, name: str) -> Slot | None:
    """Read one slot, on any supported version; `None` if there is none of that name."""
    with translated_errors():
        row = connection.execute(_SLOT, [name]).fetchone()
    if row is None:
        return None
    fields = dict(zip(Slot.__struct_fields__, row, strict=True))
    for lsn in ("restart_lsn", "confirmed_flush_lsn"):
        fields[lsn] = None if fields[lsn] is None else parse_lsn(fields[lsn])
    return Slot(**fields)


def create_slot(connection: Connection, name: str, *, failover: bool) -> Lsn:
    """Create a slot on a replication connection and return its consistent point.

    Waits for every transaction that is writing now, anywhere in the cluster; the log names those it waits for.
    failover: synchronised to standbys, where the server can (17 and later).
    """
    statement = sql.SQL("CREATE_REPLICATION_SLOT {} LOGICAL pgoutput {}").format(
        sql.Identifier(name), sql.SQL(_creation_options(connection.info.server_version, failover=failover))
    )
    with _refusals_explained(name), blockers_logged(connection, name):
        row = connection.execute(statement).fetchone()
    assert row is not None
    return parse_lsn(row[1])


def drop_slot(connection: Connection, name: str) -> None:
    """Drop a slot; without effect if it does not exist. `TransientError` while another process uses it."""
    with translated_errors():
        connection.execute(
            "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = %s", [name]
        )


def drop_lost_slot(connection: Connection, name: str, database: str) -> bool:
    """Drop a slot of ours that the server has given up; whether there was one. Raises `FatalError` for another's."""
    slot = read_slot(connection, name)
    if slot is None or not slot.lost:
        return False
    _check_kind(slot, database)
    drop_slot(connection, name)
    return True


def refuse_standby(connection: Connection) -> None:
    """Raise `FatalError` where the server is a standby: publications and slots are made on the primary."""
    with translated_errors():
        row = connection.execute("SELECT pg_is_in_recovery()").fetchone()
    if row is not None and row[0]:
        raise FatalError("the server is a standby", hint="let the source's url lead to the primary")


def check_cluster(
    stored_system_id: str | None, identity: SystemIdentity, position: Lsn | None, *, forked_at: Lsn | None = None
) -> None:
    """Raise `ResyncRequired` unless this is the cluster that the queue was captured from, with all of its history.

    forked_at: where the timeline that was captured from ended (`timeline_end`).
    """
    if stored_system_id is not None and stored_system_id != identity.system_id:
        raise ResyncRequired(
            f"another cluster: changes were captured from system {stored_system_id}, this is {identity.system_id}",
            hint="correct the url",
        )
    if position is None:
        return
    if identity.wal_end < position:
        raise ResyncRequired(
            f"the server's WAL ends at {format_lsn(identity.wal_end)}, before {format_lsn(position)}, which was already"
            " captured: it was restored from a backup, or lost its last writes",
        )
    if forked_at is not None and forked_at < position:
        raise ResyncRequired(
            f"the server was promoted at {format_lsn(forked_at)}: what was captured from there to"
            f" {format_lsn(position)} never happened on it",
        )


def check_slot(slot: Slot | None, *, name: str, database: str, position: Lsn | None, wal_end: Lsn) -> None:
    """Raise unless streaming from `position` on this slot leaves no gap and disturbs nobody.

    position: what was captured is durable up to there; `None` where nothing was captured yet.
    """
    if slot is None:
        if position is not None:
            gone = f"changes from {format_lsn(position)} to {format_lsn(wal_end)} are gone"
            raise HistoryLost(f"slot {name} is missing: {gone}")
        return
    _check_kind(slot, database)
    if slot.lost:
        reason = slot.invalidation_reason or "the server has removed WAL that it needs"
        raise HistoryLost(f"slot {name} is lost ({reason})", hint="raise max_slot_wal_keep_size")
    confirmed = slot.confirmed_flush_lsn
    if position is not None and confirmed is not None and confirmed > position:
        raise HistoryLost(
            f"slot {name} is ahead of the queue: changes between {format_lsn(position)} and {format_lsn(confirmed)}"
            " are gone (somebody else has read or recreated the slot, or the queue is an older copy)",
        )
    if slot.active_pid is not None:
        who = f" ({slot.active_application})" if slot.active_application else ""
        raise TransientError(
            f"slot {name} is in use by process {slot.active_pid}{who}",
            hint=f"stop the other reader; pg_terminate_backend({slot.active_pid}) ends one that has lost its client",
        )


def slot_warning(slot: Slot) -> str | None:
    """What an operator should know before the slot is lost; `None` while all is well."""
    if slot.lost or slot.safe_wal_size is None:
        return None
    room = max(slot.safe_wal_size, 0)
    if slot.wal_status == "unreserved":
        return f"slot {slot.name} is beyond max_slot_wal_keep_size and is lost at the next checkpoint"
    if slot.retained_bytes > WARN_ABOVE * (slot.retained_bytes + room):
        return f"slot {slot.name} retains {slot.retained_bytes} bytes of WAL and is lost after {room} more"
    return None


@contextmanager
def blockers_logged(connection: Connection, slot: str) -> Iterator[None]:
    """While the body creates a slot on `connection`, log every transaction that it has to wait for."""
    done = threading.Event()
    watcher = threading.Thread(
        target=_log_blockers,
        args=(_same_server(connection), connection.info.backend_pid, slot, done),
        name=f"slot-blockers:{slot}",
        daemon=True,
    )
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def read_blockers(connection: Connection, pid: int) -> list[Blocker]:
    """The transactions that the process `pid` waits for while it creates a slot."""
    with translated_errors():
        return [Blocker(*row) for row in connection.execute(_BLOCKERS, [pid]).fetchall()]


def _log_blockers(conninfo: str, pid: int, slot: str, done: threading.Event) -> None:
    if done.wait(WAIT_LOG_SECONDS):
        return
    named: set[tuple[int | None, str | None]] = set()
    try:
        # not `cdc.postgres.connection.connect`: the conninfo already holds every setting that it would add
        with translated_errors(), psycopg.connect(conninfo, autocommit=True) as connection:
            while not done.is_set():
                for blocker in read_blockers(connection, pid):
                    if (who := (blocker.pid, blocker.gid)) not in named:
                        named.add(who)
                        log.warning(
                            "slot creation waits for a transaction", slot=slot, **msgspec.structs.asdict(blocker)
                        )
                done.wait(WAIT_LOG_SECONDS)
    except CdcError as exc:
        log.warning("cannot tell what slot creation waits for", slot=slot, error=str(exc))


def _same_server(connection: Connection) -> str:
    """Parameters of an ordinary connection to the server (of possibly several in the url) of a replication one."""
    info = connection.info
    parameters: dict[str, Any] = conninfo_to_dict(info.dsn)
    parameters |= {"host": info.host, "hostaddr": info.hostaddr, "port": info.port, "password": info.password}
    parameters.pop("replication")
    return make_conninfo("", **{name: value for name, value in parameters.items() if value})


def _creation_options(server_version: int, *, failover: bool) -> LiteralString:
    if server_version < 150000:
        return "NOEXPORT_SNAPSHOT"
    return "(SNAPSHOT 'nothing', FAILOVER true)" if failover and server_version >= 170000 else "(SNAPSHOT 'nothing')"


@contextmanager
def _refusals_explained(slot: str) -> Iterator[None]:
    try:
        yield
    except psycopg.Error as exc:
        if (hint := _REFUSALS.get(type(exc))) is None:
            raise to_cdc_error(exc) from exc
        raise FatalError(f"slot {slot} cannot be created: {exc.diag.message_primary}", hint=hint) from exc


def _check_kind(slot: Slot, database: str) -> None:
    """Raise `FatalError` for a slot that was made for something else."""
    if slot.slot_type != "logical" or slot.plugin != PLUGIN:
        found = f"uses the plugin {slot.plugin}" if slot.plugin else "is a physical one"
        reason = f"{found}, not {PLUGIN}"
    elif slot.database != database:
        reason = f"belongs to the database {slot.database}, not {database}"
    elif slot.temporary:
        reason = "is temporary: it goes away with the connection that made it"
    elif slot.two_phase:
        reason = "decodes prepared transactions before they commit (two_phase)"
    else:
        return
    raise FatalError(f"slot {slot.name} {reason}", hint="configure another name for the slot, or drop this one")


def _switch_point(history: str, timeline: int) -> Lsn | None:
    """Find in a timeline history file (lines of: timeline, LSN at which it was left, reason) where one ended."""
    for line in history.splitlines():
        fields = line.split(None, 2)
        if len(fields) >= 2 and fields[0] == str(timeline):
            return parse_lsn(fields[1])
    return Lsn(0)  # not among the ancestors: no common history at all


_REFUSALS: Final[dict[type[psycopg.Error], str]] = {
    errors.ConfigurationLimitExceeded: "no replication slot is free: raise max_replication_slots and restart the"
    " server, or drop one that is not used (select * from pg_replication_slots)",
    errors.ObjectNotInPrerequisiteState: "set wal_level = logical and restart the server",
}

# what newer versions added is read through JSON: one query serves them all
_SLOT: Final = """
SELECT s.slot_name::text, s.plugin::text, s.slot_type, s.database::text, s.temporary, s.active_pid, a.application_name,
       s.restart_lsn::text, s.confirmed_flush_lsn::text, s.wal_status, s.safe_wal_size,
       coalesce(CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END
                - s.restart_lsn, 0)::bigint,
       s.two_phase, coalesce((j.slot ->> 'failover')::boolean, false), coalesce((j.slot ->> 'synced')::boolean, false),
       coalesce(j.slot ->> 'invalidation_reason', CASE WHEN (j.slot ->> 'conflicting')::boolean THEN 'invalidated' END)
  FROM pg_replication_slots s
 CROSS JOIN LATERAL to_jsonb(s) AS j(slot)
  LEFT JOIN pg_stat_activity a ON a.pid = s.active_pid
 WHERE s.slot_name = %s
"""

_BLOCKERS: Final = """
SELECT holder.pid, prepared.gid,
       extract(epoch FROM clock_timestamp() - coalesce(activity.xact_start, prepared.prepared))::float8,
       activity.application_name
  FROM pg_locks waiting
  LEFT JOIN pg_locks holder ON holder.locktype = 'transactionid' AND holder.transactionid = waiting.transactionid
                           AND holder.granted
  LEFT JOIN pg_stat_activity activity ON activity.pid = holder.pid
  LEFT JOIN pg_prepared_xacts prepared ON prepared.transaction = waiting.transactionid
 WHERE waiting.pid = %s AND waiting.locktype = 'transactionid' AND NOT waiting.granted
"""
