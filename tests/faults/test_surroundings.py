"""One thing breaks around a daemon that is at work: it says so, loses nothing, and goes on as soon as it can."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from tests.faults import faults, faults_postgres
from tests.faults.interposer import AVAILABLE
from tests.faults.proxy import Proxy
from tests.faults.world import World
from tests.faults.world_mongodb import MongodbWorld
from tests.faults.world_postgres import PostgresWorld
from tests.processes import wait_until

pytestmark = pytest.mark.slow

MONGODB = pytest.mark.parametrize("world", ["mongodb"], indirect=True)
BOTH = pytest.mark.parametrize("world", ["postgres", "mongodb"], indirect=True)
POSTGRES = pytest.mark.parametrize("world", ["postgres"], indirect=True)
needs_compiler = pytest.mark.skipif(not AVAILABLE, reason="there is no C compiler: the disk cannot be made to fail")


class Briefly(random.Random):
    """Draws the shortest of everything."""

    def uniform(self, a: float, b: float) -> float:
        return a

    def choice(self, seq: Any) -> Any:
        return seq[0]

    def randint(self, a: int, b: int) -> int:
        return a


@POSTGRES
@needs_compiler
def test_f86_a_disk_without_room_stops_reading_until_there_is_some(world: World) -> None:
    """The source's connection lives on, and nobody has to do anything."""
    faults.disk_nearly_full(world, Briefly())
    world.arrive()
    world.wait(lambda: world.daemon.status()["sources"]["shop"]["state"] == "running", "the source to be read again")


@needs_compiler
@pytest.mark.parametrize(
    ("world", "fault"), [("postgres", faults.fsync_fails), ("mongodb", faults.disk_full)], indirect=["world"]
)
def test_f85_f86_what_cannot_be_written_is_final_until_the_next_start(
    world: World, fault: Callable[[World, random.Random], None]
) -> None:
    """And nothing was confirmed that is not there."""
    fault(world, Briefly())
    world.arrive()


@BOTH
@needs_compiler
def test_f88_a_clock_that_jumps_delays_nothing(world: World) -> None:
    with faults.interposed(world) as clock:
        for seconds in (-86_400, 86_400):
            clock.clock_offset_seconds = seconds
            clock.apply()
            world.arrive()
            status = world.daemon.status()
            assert all((sink["lag_seconds"] or 0) >= 0 for sink in status["sinks"].values())
    world.arrive()


@pytest.mark.parametrize(
    ("world", "strike"),
    [
        ("postgres", faults.corrupt),
        ("mongodb", faults.corrupt),
        ("postgres", faults.half_close),
        ("mongodb", faults.black_hole),
    ],
    indirect=["world"],
)
def test_f62_f93_f94_a_network_that_breaks_is_got_over(
    world: World, strike: Callable[[Proxy, World, random.Random], None]
) -> None:
    """On both sides of the daemon: garbage, an end of one direction, silence."""
    for line in world.lines.values():
        strike(line, world, Briefly())
        world.arrive()


@BOTH
def test_f109_sigterm_under_load_ends_in_time(world: World) -> None:
    """`terminate` raises where it takes longer than the deadline, or ends with an error."""
    faults.terminate(world, Briefly())
    world.arrive()


@MONGODB
def test_f87_a_second_daemon_does_not_disturb_the_first(world: World) -> None:
    faults.second_daemon(world, Briefly())
    world.arrive()


@BOTH
def test_f83_f94_a_resync_that_is_killed_goes_on(world: World) -> None:
    """Beside the stream, or as a copy over what is there; all while the source is written."""
    lose_some(world)
    begun = world.logged("resync begins")
    assert world.daemon.ask("resync", "mirror").returncode == 0
    world.wait(lambda: world.logged("resync begins") > begun, "the resync to begin")
    world.daemon.kill()
    if isinstance(world, PostgresWorld):
        assert world.target.value("SELECT count(*) FROM cdc.resyncs") > 0
    world.daemon.start()
    world.await_resync()
    with world.load.resting():
        world.arrive()
        assert world.differences() == []


def lose_some(world: World) -> None:
    """What a mirror may lack that has missed changes."""
    if isinstance(world, PostgresWorld):
        world.target.execute("DELETE FROM documents WHERE id % 3 = 0")
        world.target.execute("UPDATE documents SET body = 'stale' WHERE id % 3 = 1")
    elif isinstance(world, MongodbWorld):
        world.target.journal.delete_many({"_id": {"$lt": 20}})
        world.target.journal.update_many({}, {"$set": {"seq": -1}})


@POSTGRES
def test_f95_the_victim_of_a_deadlock_begins_again(world: PostgresWorld) -> None:
    """Somebody has what the sink wants next, and wants what it has: its position."""
    before = world.target.value("SELECT deadlocks FROM pg_stat_database WHERE datname = 'shop'")
    faults_postgres.deadlock(world, Briefly())
    query = "SELECT deadlocks FROM pg_stat_database WHERE datname = 'shop'"
    wait_until(lambda: world.target.value(query) > before, what="the server to count a deadlock")
    world.arrive()


@POSTGRES
def test_f95_time_outs_of_others_are_not_ours(world: PostgresWorld) -> None:
    """A database's lock and statement time-outs end nothing of the sink's, which waits."""
    world.target.execute("ALTER DATABASE shop SET lock_timeout = '50ms'")
    world.target.execute("ALTER DATABASE shop SET statement_timeout = '50ms'")
    for line in world.lines.values():
        line.reset()  # new sessions, which would have them
    faults_postgres.target_locked(world, Briefly())
    world.arrive()


@POSTGRES
def test_f97_a_target_that_is_read_only_is_waited_for(world: PostgresWorld) -> None:
    set_read_only(world, "on")
    mark = world.mark()
    world.wait(lambda: world.daemon.status()["sinks"]["mirror"]["state"] == "waiting", "the sink to say that it waits")
    assert "read-only" in world.daemon.status()["sinks"]["mirror"]["error"]
    assert not world.has_arrived(mark)
    set_read_only(world, "off")
    world.wait(lambda: world.has_arrived(mark), "the mirror to go on")


def set_read_only(world: PostgresWorld, value: str) -> None:
    with world.target.connect() as connection:
        connection.execute("SET default_transaction_read_only = off")
        connection.execute(psycopg.sql.SQL("ALTER SYSTEM SET default_transaction_read_only = {}").format(value))
        connection.execute("SELECT pg_reload_conf()")
