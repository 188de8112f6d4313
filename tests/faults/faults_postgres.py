"""What happens to PostgreSQL servers, and what their users do, besides `tests.faults.faults`."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, Final

import psutil
import psycopg

from tests.faults.daemon import Daemon
from tests.faults.faults import Fault
from tests.faults.faults_ddl import new_table, reshaped
from tests.faults.world_postgres import PostgresWorld
from tests.processes import wait_until
from tests.servers import PostgresServer

_BACKENDS: Final = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
 WHERE pid <> pg_backend_pid() AND (application_name LIKE 'cdc%' OR backend_type = 'walsender')
"""

_SLOT: Final = "FROM pg_replication_slots WHERE NOT temporary"

_WAITING: Final = "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted)"


def server_killed(world: PostgresWorld, rng: random.Random) -> None:
    """kill -9 of a server; what it had committed is there again."""
    server = _any(world, rng)
    server.kill()
    world.rest(rng.uniform(0.0, 3.0))
    server.start()


def server_restarted(world: PostgresWorld, rng: random.Random) -> None:
    """An orderly restart, which waits for walsenders (smart and fast do)."""
    _any(world, rng).restart(rng.choice(("fast", "immediate")))


def server_suspended(world: PostgresWorld, rng: random.Random) -> None:
    """SIGSTOP of all its processes: connections stay, nothing answers."""
    postmaster = psutil.Process(_any(world, rng).pid)
    processes = [postmaster, *postmaster.children()]
    for process in processes:
        process.suspend()
    world.rest(rng.choice((0.5, 2.0, 8.0)))
    for process in processes:
        process.resume()


def backends_terminated(world: PostgresWorld, rng: random.Random) -> None:
    """An administrator ends all that the daemon has."""
    database = world.databases[rng.choice(("source", "target"))]
    for _ in range(rng.randint(1, 3)):
        database.execute(_BACKENDS)
        world.rest(rng.uniform(0.0, 0.5))


def target_down(world: PostgresWorld, rng: random.Random) -> None:
    """For a while: the queue takes what comes."""
    world.servers["target"].stop("immediate")
    world.rest(rng.uniform(2.0, 8.0))
    world.servers["target"].start()


def target_read_only(world: PostgresWorld, rng: random.Random) -> None:
    """As when it is demoted."""
    _set(world, "ALTER SYSTEM SET default_transaction_read_only = on")
    world.rest(rng.uniform(1.0, 4.0))
    _set(world, "ALTER SYSTEM RESET default_transaction_read_only")


def target_locked(world: PostgresWorld, rng: random.Random) -> None:
    """Somebody holds what is to be written, longer than time-outs that he has set for everybody."""
    world.target.execute("ALTER DATABASE shop SET lock_timeout = '100ms'")
    world.target.execute("ALTER DATABASE shop SET statement_timeout = '200ms'")
    with world.target.connect(autocommit=False) as connection:
        connection.execute("SET statement_timeout = 0")
        connection.execute("SET lock_timeout = 0")
        connection.commit()
        _lock(connection, "journal", "bulk")
        world.rest(rng.uniform(0.5, 3.0))
    world.target.execute("ALTER DATABASE shop RESET ALL")


def _lock(connection: psycopg.Connection[Any], *tables: str) -> None:
    """Again where that closes a circle with the sink: the server may end either of the two."""
    while True:
        try:
            connection.execute(f"LOCK TABLE {', '.join(tables)} IN EXCLUSIVE MODE")
        except psycopg.errors.DeadlockDetected:
            connection.rollback()
        else:
            return


def deadlock(world: PostgresWorld, rng: random.Random) -> None:
    """Somebody locks in the other order: the server ends one of the two."""
    for _ in range(rng.randint(1, 2)):
        with world.target.connect(autocommit=False) as connection:
            _lock(connection, "counters", "journal")
            world.wait(lambda: world.target.value(_WAITING), "the sink to wait for the lock, with its position locked")
            try:
                connection.execute("SELECT FROM cdc.positions FOR UPDATE")
            except psycopg.errors.DeadlockDetected:
                continue


def slot_dropped(world: PostgresWorld, rng: random.Random) -> None:
    """By somebody, while nobody reads it: what was written since is in no stream."""

    def drop() -> bool:
        try:
            world.source.execute(f"SELECT pg_drop_replication_slot(slot_name) {_SLOT}")
        except psycopg.errors.ObjectInUse:
            world.source.execute(f"SELECT pg_terminate_backend(active_pid) {_SLOT}")
        return not world.source.value(f"SELECT count(*) {_SLOT}")

    world.pass_gap(lambda: _while_unread(world, rng, drop, "the slot to be dropped"))


def slot_invalidated(world: PostgresWorld, rng: random.Random) -> None:
    """The server gives it up: it would have to keep more than it may."""

    def give_up() -> bool:
        world.source.execute("SELECT pg_logical_emit_message(true, 'filling', 'x'), pg_switch_wal()")
        world.source.execute("CHECKPOINT")
        return bool(world.source.value(f"SELECT wal_status {_SLOT}") == "lost")

    def lose() -> bool:
        world.source.execute("ALTER SYSTEM SET max_slot_wal_keep_size = '1MB'")
        world.source.execute("SELECT pg_reload_conf()")
        wait_until(give_up, what="the slot to be lost")
        world.source.execute("ALTER SYSTEM RESET max_slot_wal_keep_size")  # or its successor would be lost as well
        world.source.execute("SELECT pg_reload_conf()")
        return True

    world.pass_gap(lambda: _while_unread(world, rng, lose, "the slot to be lost"))


def second_reader(world: PostgresWorld, rng: random.Random) -> None:
    """Another daemon with the same slot waits, and says for whom."""
    folder = world.folder / "rival"
    folder.mkdir(exist_ok=True)
    target = world.servers["target"].create_database(f"rival_{rng.getrandbits(40)}")
    pg_dump = world.servers["source"].bin_dir / "pg_dump"
    with Daemon(folder, source=world.source.url, target=target.url, pg_dump=pg_dump) as rival:

        def waits() -> bool:
            status = rival.ask("status").stdout
            return "in use by process" in status and "cdc" in status

        world.wait(waits, "the second reader to wait")
        world.arrive()
    target.drop()


def poison(world: PostgresWorld, rng: random.Random) -> None:
    """A change that the mirror refuses is parked, what comes later for its row behind it; the rest flows on."""
    value = f"{rng.getrandbits(40)}"
    world.target.execute("CREATE UNIQUE INDEX of_the_mirror_alone ON poisoned (p)")
    good, bad = f"a{value}", f"b{value}"
    world.source.execute("INSERT INTO poisoned VALUES (%s, %s, 0), (%s, %s, 0)", [good, value, bad, value])
    for number in range(3):
        world.source.execute("UPDATE poisoned SET n = %s WHERE id = %s", [number, bad])
    world.wait(lambda: world.parked >= 4, "changes to be parked")
    world.arrive()
    world.target.execute("DROP INDEX of_the_mirror_alone")
    world.wait(lambda: not world.parked, "parked changes to be applied")
    world.source.execute("DELETE FROM poisoned WHERE p = %s", [value])
    world.arrive()


def _while_unread(world: PostgresWorld, rng: random.Random, done: Callable[[], bool], what: str) -> None:
    line = world.lines["source"]
    line.close()
    try:
        wait_until(done, what=what)
        world.rest(rng.uniform(0.0, 2.0))
    finally:
        line.open()


def _any(world: PostgresWorld, rng: random.Random) -> PostgresServer:
    return world.servers[rng.choice(("source", "target"))]


def _set(world: PostgresWorld, command: str) -> None:
    with world.target.connect() as connection:
        connection.execute("SET default_transaction_read_only = off")
        connection.execute(command)
        connection.execute("SELECT pg_reload_conf()")


POSTGRES: Final = (
    Fault("server killed", server_killed),
    Fault("server restarted", server_restarted),
    Fault("server suspended", server_suspended),
    Fault("backends terminated", backends_terminated),
    Fault("target down", target_down),
    Fault("target read-only", target_read_only),
    Fault("target locked", target_locked),
    Fault("deadlock", deadlock),
    Fault("poison", poison),
    Fault("slot dropped", slot_dropped),
    Fault("slot invalidated", slot_invalidated),
    Fault("second reader of the slot", second_reader),
    Fault("reshaped", reshaped),
    Fault("new table", new_table),
)
