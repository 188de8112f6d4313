"""Slots on real servers: what creation promises, what reading tells, and what is refused."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import psycopg
import pytest
from structlog.testing import capture_logs

from cdc.errors import FatalError, ResyncRequired, TransientError
from cdc.position import Lsn
from cdc.postgres import slot as slots
from cdc.postgres.connection import Connection, connect
from cdc.postgres.slot import (
    check_cluster,
    check_slot,
    create_slot,
    drop_slot,
    identify_system,
    read_slot,
    refuse_standby,
    slot_warning,
    timeline_end,
)
from tests.conftest import NewDatabase
from tests.processes import wait_until
from tests.servers import Database, PostgresServer

SLOT = "slot_under_test"


@contextmanager
def ordinary_role(database: Database, attributes: str = "") -> Iterator[str]:
    """A role that may log in and nothing else; its url."""
    role = f"{database.name}_role"
    database.execute(f"CREATE ROLE {role} LOGIN {attributes}")
    try:
        yield database.server.url(database.name, user=role)
    finally:
        database.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


def make_slot(database: Database, *, failover: bool = True) -> Lsn:
    with connect(database.url, replication=True) as replication:
        return create_slot(replication, SLOT, failover=failover)


def check(database: Database, position: Lsn | None) -> None:
    with connect(database.url) as connection, connect(database.url, replication=True) as replication:
        slot, wal_end = read_slot(connection, SLOT), identify_system(replication).wal_end
        check_slot(slot, name=SLOT, database=database.name, position=position, wal_end=wal_end)


def test_identify_system(postgres: PostgresServer, source_db: Database) -> None:
    with connect(source_db.url, replication=True) as replication:
        identity = identify_system(replication)
    assert identity.system_id == str(source_db.value("SELECT system_identifier FROM pg_control_system()"))
    assert identity.database == source_db.name
    assert identity.timeline == 1
    assert identity.wal_end > 0


def test_created_slot_is_read_back(postgres: PostgresServer, source_db: Database) -> None:
    consistent_point = make_slot(source_db)
    with connect(source_db.url) as connection:
        slot = read_slot(connection, SLOT)
    assert slot is not None
    assert (slot.name, slot.plugin, slot.slot_type, slot.database) == (SLOT, "pgoutput", "logical", source_db.name)
    assert slot.confirmed_flush_lsn == consistent_point
    assert slot.restart_lsn is not None
    assert slot.restart_lsn <= consistent_point
    assert slot.failover is (postgres.version >= 17)
    assert [slot.temporary, slot.two_phase, slot.synced, slot.lost] == [False] * 4
    assert (slot.active_pid, slot.invalidation_reason, slot.wal_status) == (None, None, "reserved")
    check(source_db, consistent_point)
    check(source_db, None)


def test_slot_without_failover(source_db: Database) -> None:
    make_slot(source_db, failover=False)
    assert source_db.value("SELECT failover FROM pg_replication_slots WHERE slot_name = %s", [SLOT]) is False


def test_drop_is_idempotent(postgres: PostgresServer, source_db: Database) -> None:
    make_slot(source_db)
    with connect(source_db.url) as connection:
        drop_slot(connection, SLOT)
        assert read_slot(connection, SLOT) is None
        drop_slot(connection, SLOT)


def test_f6_slot_ahead_of_the_queue(postgres: PostgresServer, source_db: Database) -> None:
    captured = make_slot(source_db)
    source_db.execute("CREATE TABLE t ()")
    source_db.execute("SELECT pg_replication_slot_advance(%s, pg_current_wal_lsn())", [SLOT])
    with pytest.raises(ResyncRequired, match=r"ahead of the queue: changes between \S+ and \S+ are gone"):
        check(source_db, captured)


def test_f8_missing_slot(source_db: Database) -> None:
    check(source_db, None)
    with pytest.raises(ResyncRequired, match=f"slot {SLOT} is missing: changes from 0/10 to .* are gone"):
        check(source_db, Lsn(16))


def test_f8_recreated_slot(postgres: PostgresServer, source_db: Database) -> None:
    captured = make_slot(source_db)
    source_db.execute(f"SELECT pg_drop_replication_slot('{SLOT}')")
    make_slot(source_db)
    with pytest.raises(ResyncRequired, match="recreated"):
        check(source_db, captured)


@pytest.mark.parametrize("version", [18, 16])
def test_f9_slot_is_announced_then_lost(version: int) -> None:
    settings = {"max_slot_wal_keep_size": "32MB", "max_wal_size": "1GB", "min_wal_size": "32MB"}
    with PostgresServer(version, settings=settings) as server:
        database = Database(server, "postgres")
        captured = make_slot(database)
        with connect(database.url) as connection:
            _switch_wal(database)
            assert (announced := _warning_after_wal(connection, database)) is not None
            assert "is lost" in announced
            wait_until(lambda: _lost_after_wal(connection, database), what="the slot to be lost")
        with pytest.raises(ResyncRequired, match="is lost") as raised:
            check(database, captured)
        assert "max_slot_wal_keep_size" in raised.value.hint


def _switch_wal(database: Database) -> None:
    database.execute("SELECT pg_logical_emit_message(true, 'fill', 'x'), pg_switch_wal()")


def _warning_after_wal(connection: Connection, database: Database) -> str | None:
    def warning() -> str | None:
        slot = read_slot(connection, SLOT)
        assert slot is not None
        assert not slot.lost
        if (text := slot_warning(slot)) is None:
            _switch_wal(database)
        return text

    return wait_until(warning, what="a warning")


def _lost_after_wal(connection: Connection, database: Database) -> bool:
    _switch_wal(database)
    database.execute("CHECKPOINT")
    slot = read_slot(connection, SLOT)
    assert slot is not None
    assert not (slot.lost and slot_warning(slot))
    return slot.lost


def test_f10_slot_in_use_is_named(postgres: PostgresServer, source_db: Database) -> None:
    consistent_point = make_slot(source_db)
    with closing(connect(source_db.url, replication=True, application_name="the other reader")) as reader:
        query = f"START_REPLICATION SLOT {SLOT} LOGICAL 0/0 (proto_version '1', publication_names 'p')"
        reader.pgconn.send_query(query.encode())
        wait_until(lambda: source_db.value("SELECT active FROM pg_replication_slots WHERE slot_name = %s", [SLOT]))
        with pytest.raises(TransientError, match=rf"in use by process {reader.info.backend_pid} \(the other reader\)"):
            check(source_db, consistent_point)
        with connect(source_db.url) as connection, pytest.raises(TransientError, match="active"):
            drop_slot(connection, SLOT)


def test_f12_f13_standby_and_promotion() -> None:
    """One cluster is captured from, becomes a standby, and is promoted: at each step the checks say what it is."""
    with PostgresServer(18) as server:
        with connect(server.url(), replication=True) as replication:
            before = identify_system(replication)
            refuse_standby(replication)
            assert timeline_end(replication, before.timeline, before) is None
        server.stop()
        (server.data_dir / "standby.signal").touch()
        server.start()
        with connect(server.url()) as connection:
            with pytest.raises(FatalError, match="standby"):
                refuse_standby(connection)
            connection.execute("SELECT pg_promote()")
            connection.execute("CREATE TABLE public.t ()")
        with connect(server.url(), replication=True) as replication:
            after = identify_system(replication)
            forked_at = timeline_end(replication, before.timeline, after)
    assert after.system_id == before.system_id
    assert after.timeline == before.timeline + 1
    assert forked_at is not None
    assert before.wal_end <= forked_at < after.wal_end
    check_cluster(before.system_id, after, forked_at, forked_at=forked_at)
    with pytest.raises(ResyncRequired, match="promoted"):
        check_cluster(before.system_id, after, Lsn(forked_at + 1), forked_at=forked_at)


def test_f12_another_cluster(postgres16: PostgresServer, postgres18: PostgresServer) -> None:
    with connect(postgres16.url(), replication=True) as one, connect(postgres18.url(), replication=True) as other:
        stored, identity = identify_system(one).system_id, identify_system(other)
    check_cluster(None, identity, None)
    check_cluster(identity.system_id, identity, identity.wal_end)
    with pytest.raises(ResyncRequired, match=f"another cluster: .*{stored}.*{identity.system_id}"):
        check_cluster(stored, identity, None)


def test_f12_wal_ends_before_what_was_captured(source_db: Database) -> None:
    with connect(source_db.url, replication=True) as replication:
        identity = identify_system(replication)
    with pytest.raises(ResyncRequired, match="restored from a backup"):
        check_cluster(identity.system_id, identity, Lsn(identity.wal_end + 1))


@pytest.mark.parametrize(
    ("creation", "reason"),
    [
        ("SELECT pg_create_physical_replication_slot('{slot}')", "is a physical one"),
        ("SELECT pg_create_logical_replication_slot('{slot}', 'test_decoding')", "uses the plugin test_decoding"),
        ("SELECT pg_create_logical_replication_slot('{slot}', 'pgoutput', false, true)", "two_phase"),
    ],
)
def test_slot_of_another_kind(source_db: Database, creation: str, reason: str) -> None:
    try:
        source_db.execute(creation.format(slot=SLOT))
    except psycopg.errors.UndefinedFile:
        pytest.skip("this server comes without test_decoding")
    try:
        with pytest.raises(FatalError, match=reason):
            check(source_db, None)
    finally:
        source_db.execute(f"SELECT pg_drop_replication_slot('{SLOT}')")


def test_slot_of_another_database(source_db: Database, new_database: NewDatabase) -> None:
    other = new_database(source_db.server)
    make_slot(other)
    with pytest.raises(FatalError, match=f"belongs to the database {other.name}"):
        check(source_db, None)


def test_temporary_slot(source_db: Database) -> None:
    with source_db.connect() as holder:
        holder.execute(f"SELECT pg_create_logical_replication_slot('{SLOT}', 'pgoutput', true)")
        with pytest.raises(FatalError, match="is temporary"):
            check(source_db, None)


@pytest.mark.parametrize("prepared", [False, True], ids=["open", "prepared"])
def test_creation_names_the_transaction_it_waits_for(
    postgres: PostgresServer, source_db: Database, prepared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "WAIT_LOG_SECONDS", 0.01)
    source_db.execute("CREATE TABLE t ()")
    created = threading.Event()
    with source_db.connect(application_name="nightly report") as old, capture_logs() as logs:
        pid = old.info.backend_pid
        old.execute("BEGIN; INSERT INTO t DEFAULT VALUES")
        if prepared:
            old.execute("PREPARE TRANSACTION 'forgotten'")

        def create() -> None:
            make_slot(source_db)
            created.set()

        creator = threading.Thread(target=create)
        creator.start()
        named = wait_until(lambda: _named(logs), what="the log to name the transaction")
        assert not created.is_set()
        old.execute("COMMIT PREPARED 'forgotten'" if prepared else "COMMIT")
        creator.join(60)
    assert created.is_set()
    assert named["slot"] == SLOT
    if prepared:
        assert (named["gid"], named["pid"]) == ("forgotten", None)
    else:
        assert (named["pid"], named["application_name"]) == (pid, "nightly report")
    assert named["age_seconds"] >= 0


def _named(logs: list[Any]) -> Any:
    return next((entry for entry in logs if entry["event"] == "slot creation waits for a transaction"), None)


@pytest.mark.parametrize(
    ("settings", "hint"),
    [({"max_replication_slots": "1"}, "max_replication_slots"), ({"wal_level": "replica"}, "wal_level = logical")],
    ids=["no-free-slot", "wal-level"],
)
def test_server_that_cannot_give_a_slot(settings: dict[str, str], hint: str) -> None:
    with PostgresServer(18, settings=settings) as server, connect(server.url(), replication=True) as replication:
        replication.execute("CREATE_REPLICATION_SLOT occupied PHYSICAL")
        with pytest.raises(FatalError, match=f"slot {SLOT} cannot be created") as raised:
            create_slot(replication, SLOT, failover=True)
    assert hint in raised.value.hint


def test_role_without_replication(postgres: PostgresServer, source_db: Database) -> None:
    with ordinary_role(source_db) as url, pytest.raises(FatalError, match="WAL sender") as raised:
        connect(url, replication=True)
    assert "ALTER ROLE ... REPLICATION" in raised.value.hint
