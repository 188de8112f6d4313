"""Failpoints: what the environment says is what happens, and each stands somewhere in the code."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cdc.errors import ConfigError, TransientError
from cdc.failpoints import FAILPOINTS, VARIABLE, arm
from tests.processes import wait_until

CHECKOUT = Path(__file__).parents[2]


def test_each_failpoint_stands_somewhere_in_the_code() -> None:
    files = [*(CHECKOUT / "cdc").rglob("*.py"), *(CHECKOUT / "sinks").rglob("*.py")]
    called = {name for file in files for name in re.findall(r'failpoint\("([\w.]+)"\)', file.read_text())}
    assert called == set(FAILPOINTS)


def test_it_happens_once_and_when_it_is_due() -> None:
    act = arm("queue.fsync.before=raise@3,queue.park.after=kill")["queue.fsync.before"]
    act()
    act()
    with pytest.raises(TransientError, match=r"queue\.fsync\.before"):
        act()
    act()


def test_a_thread_stands_still_until_it_is_let_go(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    thread = threading.Thread(target=arm(f"target.commit.after=block:{gate}")["target.commit.after"])
    thread.start()
    wait_until(lambda: gate.exists() and gate.read_text() == "target.commit.after", what="the thread to come there")
    assert thread.is_alive()
    gate.unlink()
    thread.join(timeout=60)
    assert not thread.is_alive()


def test_the_process_dies_as_in_a_crash() -> None:
    code = "from cdc.failpoints import failpoint; failpoint('delivery.apply.before'); print('still alive')"
    environment = {VARIABLE: "delivery.apply.before=kill"}
    done = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, b"")


@pytest.mark.parametrize(
    "text",
    ["queue.fsync.before", "queue.fsync=kill", "queue.fsync.before=die", "queue.fsync.before=kill@", "x=kill@2",
     "queue.fsync.before=block", "queue.fsync.before=raise:there", "queue.fsync.before=kill@-1"],
)  # fmt: skip
def test_what_is_no_failpoint_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=VARIABLE):
        arm(text)
