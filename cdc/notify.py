"""Telling systemd, or who speaks its protocol, how a service is: datagrams to the socket that NOTIFY_SOCKET names.

See sd_notify(3) and sd_watchdog_enabled(3). Where nobody listens, nothing happens.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import MutableMapping
from contextlib import suppress
from typing import Final

_SEND_SECONDS: Final = 0.1
"""How long the event loop waits where the service manager does not empty its socket."""


class Notifier:
    """What a process tells its service manager.

    watchdog_seconds: within which it has to say that it is alive; `None` where nobody waits for that.
    """

    def __init__(self, address: str = "", watchdog_seconds: float | None = None) -> None:
        """address: a path, or a name that begins with `@`. Empty: nobody listens."""
        self.watchdog_seconds = watchdog_seconds
        self._address = "\0" + address[1:] if address.startswith("@") else address

    @classmethod
    def from_environment(cls, environment: MutableMapping[str, str] | None = None) -> Notifier:
        """Take what a service manager has put there; removed, so that no child takes it for its own."""
        environment = os.environ if environment is None else environment
        address = environment.pop("NOTIFY_SOCKET", "")
        microseconds, process = environment.pop("WATCHDOG_USEC", ""), environment.pop("WATCHDOG_PID", "")
        ours = microseconds.isdecimal() and process in {"", str(os.getpid())}
        return cls(address, int(microseconds) / 1e6 if ours and int(microseconds) else None)

    @property
    def is_heard(self) -> bool:
        """Whether anybody listens."""
        return self._address.startswith(("/", "\0"))

    def ready(self) -> bool:
        """Start-up, or a reload, is complete. Like all that is told here: returns whether it was taken."""
        return self._send("READY=1")

    def reloading(self) -> bool:
        """The configuration is being read; `ready` ends that."""
        return self._send("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self) -> bool:
        """It drains."""
        return self._send("STOPPING=1")

    def alive(self) -> bool:
        """The watchdog is to go on waiting."""
        return self._send("WATCHDOG=1")

    def status(self, text: str) -> bool:
        """One line for people."""
        return self._send(f"STATUS={' '.join(text.split())}")

    def _send(self, *lines: str) -> bool:
        if not self.is_heard:
            return False
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
            channel.settimeout(_SEND_SECONDS)
            channel.sendto("\n".join(lines).encode(), self._address)
            return True
        return False
