"""The daemon around pipelines in memory: isolation, pauses, draining, signals, HTTP."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from cdc.api.client import Client
from cdc.barrier import HttpBarrier
from cdc.change import INSERT, Change, Column, Table
from cdc.config import Config, SinkConfig, SourceConfig
from cdc.config_file import parse
from cdc.daemon import Daemon
from cdc.directory import ADDRESS_FILE
from cdc.errors import CdcError, DirectoryInUse, FatalError, TransientError
from cdc.hold import Hold
from cdc.pipeline import Wiring
from cdc.position import Position, SourcePosition
from cdc.queue import Queue
from cdc.sink import Sink
from cdc.stats import DeliveryStats, State
from cdc.testing import MemorySink, MemorySource
from tests.processes import wait_until

ORDERS = Table("public", "orders", (Column("id", 23, is_key=True),))


def insert(number: int) -> Change:
    return Change(INSERT, 0, None, None, str(number).encode())


class World:
    """Two sources with a sink each, that outlive the daemons that run over them."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self.sources = {name: MemorySource(name, [ORDERS]) for name in ("shop", "stock")}
        self.sinks = {name: MemorySink(name) for name in ("mirror", "copy")}
        self.copied: list[str] = []
        self.copying = threading.Event()
        self.copying.set()

    def config(self, address: str = "127.0.0.1:0", **daemon: object) -> Config:
        return parse(
            {
                "daemon": {"data_dir": str(self.data_dir), "drain_seconds": 5.0} | daemon,
                "http": {"address": address},
                "queue": {"min_free_bytes": 0},
                "sources": {name: {"url": "postgresql://nowhere/db"} for name in self.sources},
                "sinks": {"mirror": {"from": "shop"}, "copy": {"from": "stock"}},
            },
            {},
        )

    def wiring(self) -> Wiring:
        return Wiring(self.build_source, self.build_sink, self.copy, self.config)

    def build_source(self, _all: Config, config: SourceConfig, queue: Queue) -> MemorySource:
        return self.sources[config.name]

    def build_sink(self, _all: Config, config: SinkConfig) -> MemorySink:
        return self.sinks[config.name]

    def copy(self, _all: Config, sink: Sink, queue: Queue, stats: DeliveryStats, stop: threading.Event) -> None:
        assert isinstance(sink, MemorySink)
        stats.state = State.COPYING
        while not self.copying.wait(0.01):
            if stop.is_set():
                return
        if sink.position is None:
            self.copied.append(sink.name)
            sink.position = Position(queue.queue_id, 0, 0)

    @contextmanager
    def running(self, **daemon: object) -> Iterator[Client]:
        """A daemon in a thread of its own, and a client for it; drained at the end."""
        running = Daemon(self.config("127.0.0.1:0", **daemon), self.wiring())
        loops: list[asyncio.AbstractEventLoop] = []
        results: list[bool] = []

        def run() -> None:
            with asyncio.Runner() as runner:
                loops.append(runner.get_loop())
                results.append(runner.run(running.run()))

        thread = threading.Thread(target=run)
        thread.start()
        try:
            wait_until(lambda: (self.data_dir / ADDRESS_FILE).exists() or not thread.is_alive())
            yield self.client()
        finally:
            loops[0].call_soon_threadsafe(running.stop)
            thread.join(60)
        assert results == [True]
        assert not thread.is_alive()

    def client(self) -> Client:
        return Client((self.data_dir / ADDRESS_FILE).read_text())


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "data")


def arrived(sink: MemorySink, count: int) -> Callable[[], bool]:
    return lambda: len(sink.transactions) == count


def test_changes_flow_and_status_counts_them(world: World) -> None:
    with world.running() as client:
        world.sources["shop"].commit(insert(1), insert(2))
        wait_until(arrived(world.sinks["mirror"], 1))
        wait_until(lambda: client.status().sinks["mirror"].lag_bytes == 0)
        status = client.status()
        assert status.healthy
        assert status.ready
        assert status.sources["shop"].changes["insert"] == 2
        assert status.sinks["mirror"].changes["insert"] == 2
        assert status.sinks["mirror"].lag_seconds == 0
        assert status.sinks["copy"].transactions == 0


def test_sink_is_copied_before_it_is_delivered_to(world: World) -> None:
    world.copying.clear()
    world.sources["shop"].commit(insert(1))
    with world.running() as client:
        wait_until(lambda: client.status().sinks["mirror"].state == State.COPYING)
        wait_until(lambda: client.status().sources["shop"].transactions == 1)
        assert world.sinks["mirror"].transactions == []
        world.copying.set()
        wait_until(arrived(world.sinks["mirror"], 1))
        wait_until(lambda: sorted(world.copied) == ["copy", "mirror"])


@pytest.mark.parametrize(
    ("error", "message", "hint"),
    [
        (FatalError("slot is gone", hint="make another"), "slot is gone", "make another"),
        (ZeroDivisionError("at postgresql://me:geheim@db/shop"), "ZeroDivisionError: at postgresql://me:***@", "bug"),
    ],
)
def test_f114_failing_source_does_not_stop_another(world: World, error: Exception, message: str, hint: str) -> None:
    """It stays failed, with the reason and no secret; its sink gets what is queued, and the others run on."""
    with world.running() as client:
        wait_until(lambda: all(sink.state == State.RUNNING for sink in client.status().sinks.values()))
        world.sources["shop"].fail(error)
        wait_until(lambda: client.status().sources["shop"].state == State.FAILED)
        world.sources["stock"].commit(insert(1))
        wait_until(arrived(world.sinks["copy"], 1))
        status = client.status()
        assert message in str(status.sources["shop"].error)
        assert hint in status.sources["shop"].hint
        assert (status.healthy, status.ready) == (False, False)
        assert status.problems[0].startswith("shop: failed: ")
        assert status.sinks["mirror"].state == State.RUNNING
    assert not world.sinks["mirror"].transactions


def test_f114_failing_sink_does_not_stop_another(world: World) -> None:
    with world.running() as client:
        wait_until(lambda: client.status().sinks["mirror"].state == State.RUNNING)
        world.sinks["mirror"].fail(FatalError("no such table", hint="create it"))
        world.sources["shop"].commit(insert(1))
        world.sources["stock"].commit(insert(1))
        wait_until(lambda: client.status().sinks["mirror"].state == State.FAILED)
        wait_until(arrived(world.sinks["copy"], 1))
        assert client.status().sinks["mirror"].hint == "create it"


def test_f114_damaged_queue_stops_only_its_own_pipelines(world: World) -> None:
    world.data_dir.mkdir(parents=True)
    (world.data_dir / "shop.queue").write_bytes(b"this is no queue" * 1000)
    with world.running() as client:
        world.sources["stock"].commit(insert(1))
        wait_until(arrived(world.sinks["copy"], 1))
        status = client.status()
        assert (status.sources["shop"].state, status.sinks["mirror"].state) == (State.FAILED, State.FAILED)
        with pytest.raises(CdcError, match="shop has failed"):
            client.pause("shop")


def test_f114_part_that_cannot_be_built_stops_only_itself(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_all: Config, config: SourceConfig, queue: Queue) -> MemorySource:
        if config.name == "shop":
            raise FatalError("no such kind of database")
        return world.sources[config.name]

    monkeypatch.setattr(world, "build_source", refuse)
    with world.running() as client:
        world.sources["stock"].commit(insert(1))
        wait_until(arrived(world.sinks["copy"], 1))
        assert client.status().sources["shop"].error == "no such kind of database"


def test_transient_errors_are_ridden_out(world: World) -> None:
    with world.running() as client:
        wait_until(lambda: client.status().ready)
        world.sources["shop"].fail(TransientError("server is restarting"))
        world.sinks["mirror"].fail(TransientError("deadlock"))
        world.sources["shop"].commit(insert(1))
        wait_until(arrived(world.sinks["mirror"], 1))
        wait_until(lambda: client.status().healthy)
        status = client.status()
        assert status.sources["shop"].retries == 1
        assert status.sinks["mirror"].retries == 1


def test_pause_of_a_sink_survives_a_restart(world: World) -> None:
    with world.running() as client:
        client.pause("mirror")
        wait_until(lambda: client.status().sinks["mirror"].state == State.PAUSED)
        world.sources["shop"].commit(insert(1))
        wait_until(lambda: client.status().sources["shop"].transactions == 1)
    with world.running() as client:
        wait_until(lambda: client.status().sinks["mirror"].state == State.PAUSED)
        assert client.status().healthy
        assert world.sinks["mirror"].transactions == []
        client.resume("mirror")
        wait_until(arrived(world.sinks["mirror"], 1))
    with world.running() as client:
        wait_until(lambda: client.status().sinks["mirror"].state == State.RUNNING)


def test_pause_of_a_source_survives_a_restart(world: World) -> None:
    with world.running() as client:
        client.pause("shop")
        wait_until(lambda: client.status().sources["shop"].state == State.PAUSED)
        world.sources["shop"].commit(insert(1))
    with world.running() as client:
        wait_until(lambda: client.status().sources["shop"].state == State.PAUSED)
        assert client.status().sources["shop"].transactions == 0
        client.resume("shop")
        wait_until(arrived(world.sinks["mirror"], 1))


def test_paused_sink_is_not_even_copied(world: World) -> None:
    world.copying.clear()
    with world.running() as client:
        client.pause("mirror")
    world.copying.set()
    world.copied.clear()
    world.sinks["mirror"].position = None
    with world.running() as client:
        wait_until(lambda: client.status().sinks["mirror"].state == State.PAUSED)
        wait_until(lambda: client.status().sinks["copy"].state == State.RUNNING)
        assert "mirror" not in world.copied


def test_held_sink_stands_still_until_released(world: World) -> None:
    with world.running() as client:
        barrier = HttpBarrier(client.url, "mirror")
        barrier.hold(None, 20)
        end = world.sources["shop"].commit(insert(1))
        world.sources["shop"].commit(insert(2))
        assert barrier.hold(end, 20).exact
        assert client.status().sinks["mirror"].state == State.HELD
        assert len(world.sinks["mirror"].transactions) == 1
        with pytest.raises(CdcError, match="no sink is called 'shop'"):
            HttpBarrier(client.url, "shop").hold(end, 20)
        barrier.release()
        wait_until(arrived(world.sinks["mirror"], 2))


def test_f109_hold_that_waits_does_not_delay_the_end(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    asks, ask = threading.Event(), Hold.ask

    def noticed(hold: Hold, until: SourcePosition | None, seconds: float) -> None:
        ask(hold, until, seconds)
        asks.set()

    monkeypatch.setattr(Hold, "ask", noticed)
    with ThreadPoolExecutor() as pool, world.running() as client:
        wait_until(lambda: client.status().sinks["mirror"].state == State.RUNNING)
        asked = pool.submit(HttpBarrier(client.url, "mirror").hold, 10**9, 120)
        assert asks.wait(60)
    assert isinstance(asked.exception(), CdcError)


def test_unknown_names_are_refused(world: World) -> None:
    with world.running() as client, pytest.raises(CdcError, match="no source or sink is called 'nobody'") as caught:
        client.pause("nobody")
    assert "shop, stock, mirror, copy" in caught.value.hint


def test_restart_goes_on_where_it_was(world: World) -> None:
    with world.running():
        world.sources["shop"].commit(insert(1))
        wait_until(arrived(world.sinks["mirror"], 1))
    world.sources["shop"].commit(insert(2))
    with world.running():
        wait_until(arrived(world.sinks["mirror"], 2))
    assert [row for _, _, row in world.sinks["mirror"].rows] == [b"1", b"2"]


def test_f87_second_daemon_on_one_directory_refuses(world: World) -> None:
    with world.running():
        other = Daemon(world.config(), world.wiring())
        with pytest.raises(DirectoryInUse, match="is used by process"):
            asyncio.run(other.run())
        assert (world.data_dir / ADDRESS_FILE).exists()
    assert not (world.data_dir / ADDRESS_FILE).exists()


def test_address_in_use_is_a_clear_error_and_nothing_is_touched(world: World, tmp_path: Path) -> None:
    with world.running():
        taken = (world.data_dir / ADDRESS_FILE).read_text().removeprefix("http://")
        other = World(tmp_path / "other")
        with pytest.raises(FatalError, match="cannot listen on 127") as caught:
            asyncio.run(Daemon(other.config(taken), other.wiring()).run())
    assert "http.address" in caught.value.hint
    assert [file.name for file in other.data_dir.iterdir()] == ["lock"]


def test_f108_status_answers_while_pipelines_are_stuck(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every thread of the pipelines blocks; status, metrics and health answer all the same."""
    stuck, leave = set(), threading.Event()

    def block(part: MemorySource | MemorySink, *_: object) -> None:
        stuck.add(part.name)
        leave.wait(60)
        stuck.discard(part.name)

    monkeypatch.setattr(MemorySource, "read", block)
    monkeypatch.setattr(MemorySink, "open", block)
    with world.running() as client:
        wait_until(lambda: stuck == {"shop", "stock", "mirror", "copy"})
        for _ in range(20):
            assert client.status().sources["shop"].state == State.RUNNING
            assert len(stuck) == 4
        leave.set()


DAEMON_PROGRAM = """
import sys
from pathlib import Path
from cdc import daemon, logs
from cdc.testing import MemorySink
from tests.integration.test_daemon import World

class SlowSink(MemorySink):
    def apply(self, batches, position):
        Path(sys.argv[1], "applying").touch()
        {slow}
        Path(sys.argv[1], "applied").touch()
        return super().apply(batches, position)

logs.configure("json")
world = World(Path(sys.argv[1], "data"))
world.sinks["mirror"] = SlowSink("mirror")
from tests.integration.test_daemon import insert
world.sources["shop"].commit(insert(1))
sys.stdout.flush()
drained = daemon.run(world.config(drain_seconds={drain_seconds}), world.wiring())
import os
os._exit(0 if drained else 1)
"""


@contextmanager
def daemon_process(tmp_path: Path, *, slow: str, drain_seconds: float = 5.0) -> Iterator[subprocess.Popen[str]]:
    """A daemon as a process of its own, whose sink is applying a batch."""
    program = DAEMON_PROGRAM.format(slow=slow, drain_seconds=drain_seconds)
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    try:
        wait_until(lambda: (tmp_path / "applying").exists() or process.poll() is not None)
        yield process
    finally:
        process.kill()
        process.wait()


WAIT_FOR_FILE = "import time\n        while not Path(sys.argv[1], 'go').exists(): time.sleep(0.01)"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_f109_signal_drains_what_is_at_hand(tmp_path: Path, number: signal.Signals) -> None:
    with daemon_process(tmp_path, slow=WAIT_FOR_FILE) as process:
        process.send_signal(number)
        (tmp_path / "go").touch()
        _, log = process.communicate(timeout=60)
    assert process.returncode == 0, log
    assert (tmp_path / "applied").exists()
    assert '"drained": true' in log
    assert not (tmp_path / "data" / ADDRESS_FILE).exists()


def test_f109_drain_ends_inside_its_deadline(tmp_path: Path) -> None:
    with daemon_process(tmp_path, slow=WAIT_FOR_FILE, drain_seconds=0.3) as process:
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=60)
    assert process.returncode == 1
    assert '"at_most_seconds": 0.3' in log
    assert '"drained": false' in log
    assert not (tmp_path / "applied").exists()


def test_f109_second_signal_ends_at_once(tmp_path: Path) -> None:
    with daemon_process(tmp_path, slow=WAIT_FOR_FILE, drain_seconds=120) as process:
        assert process.stderr is not None
        process.send_signal(signal.SIGTERM)
        for line in process.stderr:
            if "draining" in line:
                break
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 128 + signal.SIGTERM
