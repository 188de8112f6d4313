"""What happens to a daemon: each fault breaks something, and has put it right again when it returns."""

from __future__ import annotations

import random
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

from cdc.failpoints import FAILPOINTS, VARIABLE
from tests.faults.interposer import AVAILABLE, Interposer
from tests.faults.proxy import Proxy
from tests.faults.world import Violation, World
from tests.processes import wait_until

STOP_SECONDS: Final = 25.0
"""SIGTERM is obeyed within `drain_seconds` (20), and a little for the interpreter's end."""

FAIL_SECONDS: Final = 60.0
"""In this time a daemon that can do nothing any more ends."""


class Fault(NamedTuple):
    """strike: breaks something of a world and puts it right. needs: whether it can be had on this machine."""

    name: str
    strike: Callable[[Any, random.Random], None]
    needs: bool = True


# the daemon


def kill(world: World, rng: random.Random) -> None:
    """Kill -9, at any moment: soon after its start, too."""
    for _ in range(rng.choice((1, 1, 3))):
        world.daemon.kill()
        world.daemon.start()
        world.rest(rng.uniform(0.0, 2.0))
        world.check()
    world.daemon.kill()
    world.daemon.start()


def kill_at_failpoint(world: World, rng: random.Random) -> None:
    """Dies at a boundary."""
    name = rng.choice([name for name in FAILPOINTS if "park" not in name])
    world.daemon.kill()
    world.daemon.start(**{VARIABLE: f"{name}=kill@{rng.randint(1, 5)}"})
    await_end(world, -signal.SIGKILL)
    world.daemon.start()


def block_at_failpoint(world: World, rng: random.Random) -> None:
    """One of its threads hangs, and then goes on."""
    gate = world.folder / "gate"
    name = rng.choice([name for name in FAILPOINTS if "park" not in name])
    world.daemon.kill()
    world.daemon.start(**{VARIABLE: f"{name}=block:{gate}@{rng.randint(1, 5)}"})
    world.wait(gate.exists, f"a thread to come to {name}")
    world.rest(rng.uniform(0.5, 4.0))
    gate.unlink()


def terminate(world: World, rng: random.Random) -> None:
    """SIGTERM under load: an orderly end, in time."""
    try:
        code = world.daemon.stop()
    except subprocess.TimeoutExpired:
        raise Violation(f"SIGTERM was not obeyed:\n{world.daemon.log_tail()}") from None
    if code:
        raise Violation(f"SIGTERM ended in exit code {code}:\n{world.daemon.log_tail()}")
    world.daemon.start()


def suspend(world: World, rng: random.Random) -> None:
    """The machine is busy with something else."""
    world.daemon.signal(signal.SIGSTOP)
    world.rest(rng.uniform(0.5, 5.0))
    world.daemon.signal(signal.SIGCONT)


def second_daemon(world: World, rng: random.Random) -> None:
    """On the same data directory: it ends, and names the first."""
    result = world.daemon.ask("run")
    if result.returncode != 1 or "is used by process" not in result.stderr:
        raise Violation(f"a second daemon was not refused: {result.returncode} {result.stderr}")


def resync(world: World, rng: random.Random) -> None:
    """All of the mirror is compared and put right under load; kill -9 within that, and it goes on."""
    begun = world.logged("resync begins")
    result = world.daemon.ask("resync", "mirror")
    if result.returncode:
        raise Violation(f"no resync: {result.stderr}")
    world.wait(lambda: world.logged("resync begins") > begun, "the resync to begin")
    for _ in range(rng.randint(1, 3)):
        world.rest(rng.uniform(0.0, 2.0))
        world.check()
        world.daemon.kill()
        world.daemon.start()
    world.await_resync()


# the network


def network(strike: Callable[[Proxy, World, random.Random], None]) -> Callable[[World, random.Random], None]:
    """On the way to the source, to the target, or to both."""

    def strike_some(world: World, rng: random.Random) -> None:
        for name in rng.choice((("source",), ("target",), ("source", "target"))):
            strike(world.lines[name], world, rng)

    return strike_some


def slow(line: Proxy, world: World, rng: random.Random) -> None:
    """Every packet takes long."""
    line.delay_seconds = rng.uniform(0.02, 0.2)
    world.rest(rng.uniform(1.0, 4.0))
    line.delay_seconds = 0.0


def black_hole(line: Proxy, world: World, rng: random.Random) -> None:
    """Nothing comes through, nobody is told, and afterwards the connections go on, or are gone."""
    line.hold()
    world.rest(rng.choice((0.5, 2.0, 6.0, 15.0)))
    if rng.random() < 0.5:
        line.reset()
    line.release()


def reset(line: Proxy, world: World, rng: random.Random) -> None:
    """Connections break, several times."""
    for _ in range(rng.randint(1, 4)):
        line.reset()
        world.rest(rng.uniform(0.0, 0.7))


def half_close(line: Proxy, world: World, rng: random.Random) -> None:
    """The server seems to end its half of each connection."""
    line.half_close()
    world.rest(rng.uniform(0.0, 1.0))


def corrupt(line: Proxy, world: World, rng: random.Random) -> None:
    """What arrives makes no sense. (A wrong byte inside a value would, and only encryption protects from it.)"""
    line.corrupt()
    world.rest(rng.uniform(0.0, 1.0))


# disk and clock


@contextmanager
def interposed(world: World) -> Iterator[Interposer]:
    """Everything is as it should be afterwards."""
    assert world.interposer is not None
    try:
        yield world.interposer
    finally:
        world.interposer.heal()


def disk_full(world: World, rng: random.Random) -> None:
    """Writes fail: what was not written is not confirmed."""
    with interposed(world) as disk:
        disk.disk_full = True
        _await_failure_of(disk, world, rng)
    restart(world)


def fsync_fails(world: World, rng: random.Random) -> None:
    """It is never tried a second time."""
    with interposed(world) as disk:
        disk.fsync_fails = True
        _await_failure_of(disk, world, rng)
    restart(world)


def _await_failure_of(disk: Interposer, world: World, rng: random.Random) -> None:
    disk.apply()
    await_failure(world)
    world.rest(rng.uniform(0.0, 2.0))


def disk_nearly_full(world: World, rng: random.Random) -> None:
    """Nothing is read from the source while there is too little room; then it goes on by itself."""
    with interposed(world) as disk:
        disk.no_room = True
        disk.apply()
        world.wait(lambda: world.daemon.status()["sources"]["shop"]["state"] == "waiting", "the source to wait")
        world.rest(rng.uniform(0.0, 3.0))


def clock_jumps(world: World, rng: random.Random) -> None:
    """The time of the day is another, for a while."""
    with interposed(world) as clock:
        clock.clock_offset_seconds = rng.choice((-86_400, -3600, -5, 5, 3600, 86_400))
        clock.apply()
        world.arrive()
        lag = [sink["lag_seconds"] for sink in world.daemon.status()["sinks"].values()]
        if any(seconds is not None and seconds < 0 for seconds in lag):
            raise Violation(f"negative lag: {lag}")


def await_failure(world: World) -> None:
    """Wait until the source's pipeline has failed; the daemon may have ended by that."""

    def failed() -> bool:
        return not world.daemon.running or world.daemon.status()["sources"]["shop"]["state"] == "failed"

    wait_until(failed, timeout_seconds=FAIL_SECONDS, what=lambda: f"a failure\n{world.daemon.log_tail()}")


def restart(world: World) -> None:
    """As a person does after a failure."""
    if world.daemon.running:
        world.daemon.stop()
    world.daemon.start()


def await_end(world: World, code: int) -> None:
    """Wait until the daemon ends, with that exit code."""
    try:
        ended = world.daemon.wait(FAIL_SECONDS)
    except subprocess.TimeoutExpired:
        status = world.daemon.ask("status").stdout
        raise Violation(f"the daemon did not end\n{status}\n{world.daemon.log_tail()}") from None
    if ended != code:
        raise Violation(f"the daemon ended with {ended}, not {code}:\n{world.daemon.log_tail()}")


EVERYWHERE: Final = (
    Fault("kill -9", kill),
    Fault("kill at a failpoint", kill_at_failpoint),
    Fault("a thread hangs", block_at_failpoint),
    Fault("SIGTERM", terminate),
    Fault("daemon suspended", suspend),
    Fault("second daemon", second_daemon),
    Fault("resync, killed", resync),
    Fault("slow network", network(slow)),
    Fault("black hole", network(black_hole)),
    Fault("connections reset", network(reset)),
    Fault("half-closed connections", network(half_close)),
    Fault("garbage on the network", network(corrupt)),
    Fault("disk full", disk_full, needs=AVAILABLE),
    Fault("disk nearly full", disk_nearly_full, needs=AVAILABLE),
    Fault("fsync fails", fsync_fails, needs=AVAILABLE),
    Fault("clock jumps", clock_jumps, needs=AVAILABLE),
)
"""Whatever the databases are."""
