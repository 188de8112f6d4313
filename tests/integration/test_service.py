"""The daemon under a service manager: what it says, and when it no longer does."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from cdc.api.client import Client
from cdc.errors import CdcError
from cdc.notify import Notifier
from cdc.secret import Token
from tests.command import Cdc
from tests.faults.proxy import POSTGRES, Proxy
from tests.processes import wait_until
from tests.servers import Database
from tests.service_manager import ServiceManager

WATCHDOG_SECONDS = 2.0


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[ServiceManager]:
    with ServiceManager(tmp_path) as manager:
        yield manager


@pytest.fixture
def shop(cdc: Cdc, source_db: Database, target_db: Database, pg_dump: Path) -> Database:
    source_db.execute("CREATE TABLE items (id int PRIMARY KEY, name text)")
    cdc.configure(source_db.url, target_db.url, source=f'pg_dump = "{pg_dump}"')
    return source_db


def test_f111_ready_once_the_source_has_connected(
    cdc: Cdc, shop: Database, target_db: Database, pg_dump: Path, manager: ServiceManager
) -> None:
    with Proxy(shop.server.port, POSTGRES) as proxy:
        proxy.hold()
        url = shop.url.replace(f":{shop.server.port}/", f":{proxy.port}/")
        assert url != shop.url
        cdc.configure(url, target_db.url, source=f'pg_dump = "{pg_dump}"')
        with cdc.running(**manager.environment(WATCHDOG_SECONDS)):
            heard = manager.hear("STATUS=0 of 1 sources and 0 of 1 sinks run")
            heard += manager.hear("WATCHDOG=1", times=3)  # alive, although its database does not answer
            assert "READY=1" not in heard
            proxy.release()
            manager.hear("READY=1")
            manager.hear("STATUS=1 of 1 sources and 1 of 1 sinks run")
            assert "READY=1" not in manager.hear("WATCHDOG=1", times=2)  # once, and alive while nothing happens
    assert "STOPPING=1" in manager.said()


def test_f111_ready_without_a_source_that_has_failed_for_good(
    cdc: Cdc, shop: Database, target_db: Database, pg_dump: Path, manager: ServiceManager
) -> None:
    missing = shop.url.replace(f"/{shop.name}", "/missing")
    more = f'[sources.lost]\nurl = "{missing}"'
    cdc.configure(
        shop.url, target_db.url, source=f'pg_dump = "{pg_dump}"', sink=f'\n[sinks.other]\nfrom = "lost"\n{more}'
    )
    with cdc.running(**manager.environment()):
        manager.hear("READY=1")
        manager.hear("STATUS=1 of 2 sources")


@pytest.mark.parametrize("failpoint", ["delivery.apply.before", "capture.append.before"])
def test_f111_a_thread_that_hangs_starves_the_watchdog(
    cdc: Cdc, shop: Database, target_db: Database, tmp_path: Path, manager: ServiceManager, failpoint: str
) -> None:
    gate = tmp_path / "gate"
    with cdc.running(**manager.environment(WATCHDOG_SECONDS), CDC_FAILPOINTS=f"{failpoint}=block:{gate}"):
        cdc.wait_for_sink("running")
        shop.execute("INSERT INTO items VALUES (1, 'one')")
        assert_starved_by(gate, cdc, manager)
    assert target_db.value("SELECT count(*) FROM items") == 1


def test_f111_so_does_a_queue_that_hangs(cdc: Cdc, shop: Database, tmp_path: Path, manager: ServiceManager) -> None:
    gate = tmp_path / "gate"
    failpoint = f"queue.fsync.before=block:{gate}@4"
    with cdc.running(**manager.environment(WATCHDOG_SECONDS), CDC_FAILPOINTS=failpoint):
        assert_starved_by(gate, cdc, manager)


def assert_starved_by(gate: Path, cdc: Cdc, manager: ServiceManager) -> None:
    wait_until(gate.exists, what="the thread to hang")
    wait_until(lambda: "a thread hangs" in cdc.log, what=lambda: cdc.log)
    assert "failpoints.py" in cdc.log  # where it hangs
    manager.said()
    assert cdc.status()["started_at"]  # the rest of the daemon goes on
    assert "WATCHDOG=1" not in manager.said()
    gate.unlink()
    manager.hear("WATCHDOG=1")


def test_a_server_that_takes_its_time_is_no_thread_that_hangs(
    cdc: Cdc, shop: Database, target_db: Database, manager: ServiceManager
) -> None:
    with cdc.running(**manager.environment(WATCHDOG_SECONDS)):
        cdc.wait_for_sink("running")
        with target_db.connect() as other:
            other.execute("BEGIN; LOCK TABLE items")
            shop.execute("INSERT INTO items VALUES (1, 'one')")
            wait_until(
                lambda: target_db.value("SELECT count(*) FROM pg_locks WHERE NOT granted"), what="the mirror to wait"
            )
            manager.said()
            manager.hear("WATCHDOG=1", times=4)
            assert "hangs" not in cdc.log


TOKENS = """
[[http.tokens]]
name = "operator"
token = "{}"
scopes = ["admin"]
"""


def reloaded(cdc: Cdc, process: subprocess.Popen[str], event: str) -> dict[str, Any]:
    """The line that tells what has become of a SIGHUP."""
    before = len(cdc.log)
    process.send_signal(signal.SIGHUP)
    wait_until(lambda: event in cdc.log[before:], what=lambda: f"{event}: {cdc.log[before:]}")
    lines: list[dict[str, Any]] = [json.loads(line) for line in cdc.log[before:].splitlines()]
    (found,) = (line for line in lines if event in line["event"])
    return found


def test_f110_a_reload_changes_what_can_be_changed(
    cdc: Cdc, shop: Database, target_db: Database, pg_dump: Path, manager: ServiceManager
) -> None:
    source = f'pg_dump = "{pg_dump}"'
    cdc.configure(shop.url, target_db.url, source=source, http=TOKENS.format("geheim-1"))
    with cdc.running(**manager.environment()) as process:
        manager.hear("READY=1")
        cdc.wait_for_sink("running")
        address = (cdc.data_dir / "http").read_text()
        before = Client(address, Token("geheim-1"))
        assert before.status().ready
        daemon = 'log_level = "debug"'
        cdc.configure(
            shop.url,
            target_db.url,
            source=source,
            http=TOKENS.format("geheim-2"),
            daemon=daemon,
            queue="max_bytes = 12345678",
        )
        line = reloaded(cdc, process, "reloaded")
        assert line["changed"] == ["daemon.log_level", "http.tokens", "queue.max_bytes"]
        assert manager.hear("READY=1")[-2].startswith("RELOADING=1\nMONOTONIC_USEC=")
        queue = Client(address, Token("geheim-2")).status().sources["shop"].queue
        assert queue is not None
        assert queue.max_bytes == 12345678
        with pytest.raises(CdcError, match="token is wrong"):
            before.status()
        assert cdc("log-level", "error").stdout == "the log begins at error\n"
    assert "geheim" not in cdc.log


@pytest.mark.parametrize(
    ("daemon", "error"),
    [
        ("log_level = 'loud'", "daemon.log_level: Invalid enum value"),
        ("this is no TOML", "not valid TOML"),
        ("log_level = 'debug'\n[sources.other]\nurl = 'postgresql://db/other'", "sources.other"),
    ],
)
def test_f110_a_bad_configuration_changes_nothing(
    cdc: Cdc, shop: Database, target_db: Database, manager: ServiceManager, daemon: str, error: str
) -> None:
    good = cdc.file.read_text()
    with cdc.running(**manager.environment()) as process:
        manager.hear("READY=1")
        cdc.wait_for_sink("running")
        cdc.configure(shop.url, target_db.url, daemon=daemon)
        line = reloaded(cdc, process, "not reloaded")
        assert error in line["error"]
        assert line["hint"]
        manager.hear("READY=1")  # the old one is in force
        assert process.poll() is None
        status = cdc.status()
        (problem,) = (problem for problem in status["problems"] if "not reloaded" in problem)
        assert error in problem
        assert error in status["reload_error"]
        assert status["healthy"]
        assert cdc("status").returncode in {1, 2}, "it wants a person; what cannot be read ends with 2 by itself"
        assert "\ncdc_config_last_reload_successful 0.0\n" in metrics(cdc)
        manager.hear(f"STATUS=1 of 1 sources and 1 of 1 sinks run, {problem[:40]}")
        cdc.file.write_text(good)
        reloaded(cdc, process, "reloaded")
        assert cdc.status()["problems"] == []
        assert "\ncdc_config_last_reload_successful 1.0\n" in metrics(cdc)


def test_f110_a_reload_without_a_data_directory_is_refused(cdc: Cdc, shop: Database) -> None:
    with cdc.running() as process:
        cdc.wait_for_sink("running")
        address = cdc.address.url
        shutil.rmtree(cdc.data_dir)
        line = reloaded(cdc, process, "not reloaded")
        assert re.search(r"cannot write to the data directory .*/data: No such file", line["error"])
        assert "the queue" in line["hint"]
        assert "Traceback" not in cdc.log
        assert process.poll() is None
        with urlopen(f"{address}/health", timeout=60) as answer:
            assert answer.status == 200


def metrics(cdc: Cdc) -> str:
    with urlopen(f"{cdc.address.url}/metrics", timeout=60) as answer:
        return str(answer.read(), "utf-8")


def test_f109_a_stop_is_announced_and_drains(cdc: Cdc, shop: Database, manager: ServiceManager) -> None:
    with cdc.running(**manager.environment()) as process:
        manager.hear("READY=1")
        process.send_signal(signal.SIGTERM)
        manager.hear("STOPPING=1")
        assert process.wait(timeout=30) == 0


def test_nobody_listens(tmp_path: Path) -> None:
    environment = {"NOTIFY_SOCKET": str(tmp_path / "missing"), "WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"}
    notifier = Notifier.from_environment(environment)
    assert environment == {}
    assert notifier.watchdog_seconds is None  # it is another process that has to say so
    assert notifier.is_heard
    assert not notifier.ready()
    assert not Notifier().ready()
