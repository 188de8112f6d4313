"""What happens in each round of a soak: the work of days, and what operators and clients do, made short."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from tests.soak.clients import await_close, listeners
from tests.soak.setting import Setting


class Pace(NamedTuple):
    """How much of everything. silent: WebSockets that never answer, for which the daemon loses patience in time."""

    transactions: int
    idle_seconds: float
    away_seconds: float
    clients: int
    silent: int


Phase = Callable[[Setting, Pace], None]


def idle(setting: Setting, pace: Pace) -> None:
    """Nothing is written."""
    setting.rest(pace.idle_seconds)


def burst(setting: Setting, pace: Pace) -> None:
    """Much is written at once."""
    setting.burst(pace.transactions)


def clients_come_and_go(setting: Setting, pace: Pace) -> None:
    """By WebSocket, event stream and poll; half of them vanish while they are sent to."""
    setting.silent += [setting.api.raw_websocket() for _ in range(pace.silent)]
    with listeners(setting.api, pace.clients):
        setting.burst(10)


def reload(setting: Setting, pace: Pace) -> None:
    """Another configuration, with another token: who listens is sent away."""
    with setting.api.websocket() as client:
        setting.reconfigure()
        setting.signal_reload("reloaded")
        await_close(client)


def refused_reload(setting: Setting, pace: Pace) -> None:
    """A configuration that cannot be read, and one that would take a restart."""
    file = setting.daemon.config_file
    good = file.read_text()
    for bad in (
        "this is no TOML",
        '[sinks.more]\nfrom = "shop"\nkind = "jsonl"',
        '[sources.more]\nurl = "postgresql://a/b"',
    ):
        file.write_text(f"{good}\n{bad}\n")
        setting.signal_reload("not reloaded")
    file.write_text(good)


def rotate_log(setting: Setting, pace: Pace) -> None:
    """As docs/operations.md tells: what is there is copied, and the file cut; the daemon notices nothing."""
    log = setting.daemon.log_file
    shutil.copyfile(log, log.with_suffix(".log.1"))
    os.truncate(log, 0)
    setting.signal_reload("reloaded")  # which it logs
    with log.open("rb") as file:
        assert file.read(1) == b"{", "the log goes on somewhere else"


def pause_and_resume(setting: Setting, pace: Pace) -> None:
    """Each pipeline, while there is something to do."""
    names = ["shop", "orders", "mirror", "changes", "orders_backup"]
    for name in names:
        setting.api.post(f"/pause/{name}")
    setting.burst(pace.transactions // 10)
    for name in names:
        setting.api.post(f"/resume/{name}")


def targets_away(setting: Setting, pace: Pace) -> None:
    """Both, while much is written."""
    lines = [setting.lines[name] for name in ("shop_backup", "ordersDB_backup")]
    for line in lines:
        line.close()
    setting.burst(pace.transactions // 2)
    setting.rest(pace.away_seconds)
    for line in lines:
        line.open()


def network_breaks(setting: Setting, pace: Pace) -> None:
    """Every connection to a database is reset, and half-closed a moment later."""
    for line in setting.lines.values():
        line.reset()
    setting.burst(pace.transactions // 10)
    for line in setting.lines.values():
        line.half_close()


def resync(setting: Setting, pace: Pace) -> None:
    """Both mirrors are compared with their sources, and put right, beside the stream."""
    for name in ("mirror", "orders_backup"):
        setting.api.post(f"/resync/{name}", {"tables": [], "yes": True})
    setting.burst(pace.transactions // 10)


def verify(setting: Setting, pace: Pace) -> None:
    """Sinks are held for a moment, and compared."""
    result = setting.daemon.ask("verify")
    assert result.returncode == 0, f"cdc verify: {result.stdout}{result.stderr}"


PHASES: Final[Sequence[Phase]] = (
    idle,
    burst,
    clients_come_and_go,
    reload,
    refused_reload,
    rotate_log,
    pause_and_resume,
    targets_away,
    network_breaks,
    resync,
    verify,
)
