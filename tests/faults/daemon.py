"""`cdc run` as a process of its own, with one source `shop` and one sink `mirror`, that tests may treat badly."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self

import psutil

from tests.command import read_status, status_of_running
from tests.processes import kill_tree

CHECKOUT: Final = Path(__file__).parents[2]

_CONFIG: Final = """\
[daemon]
data_dir = {data_dir}
log_format = "json"

[http]
address = "127.0.0.1:0"

[queue]
min_free_bytes = {min_free_bytes}

[sources.shop]
url = {source}
{source_options}

[sinks.mirror]
from = "shop"
url = {target}
{sink_options}
"""

_STOP_SECONDS: Final = 60


class Daemon:
    """One configuration, and the process that runs it.

    pg_dump: of a PostgreSQL source. source_options, sink_options: more lines of TOML there; more: more sections.
    tracer: a command line that the daemon's is put behind (strace).
    environment: variables of its process, besides its surroundings.
    """

    def __init__(
        self,
        folder: Path,
        *,
        source: str,
        target: str,
        pg_dump: Path | None = None,
        source_options: str = "",
        sink_options: str = "",
        more: str = "",
        min_free_bytes: int = 0,
        tracer: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.data_dir = folder / "data"
        self.log_file = folder / "daemon.log"
        self.config_file = folder / "cdc.toml"
        self._tracer = tracer
        self._process: subprocess.Popen[bytes] | None = None
        self._environment = {**os.environ, **(environment or {})}
        if pg_dump is not None:
            source_options += f"\npg_dump = {json.dumps(str(pg_dump))}\nheartbeat_seconds = 1.0"
        texts = {"data_dir": str(self.data_dir), "source": source, "target": target}
        quoted = {key: json.dumps(text) for key, text in texts.items()}
        config = _CONFIG.format(
            **quoted, source_options=source_options, sink_options=sink_options, min_free_bytes=min_free_bytes
        )
        self.config_file.write_text(config + more)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            kill_tree(self._process.pid)
            self._process.wait()

    def start(self, **environment: str) -> None:
        """Start the process, with more variables, and do not wait for anything."""
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [*self._tracer, *self._command("run")],
                cwd=CHECKOUT,
                env={**self._environment, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def running(self) -> bool:
        """Whether the process lives."""
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """`kill -9`."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> int:
        """SIGTERM, and wait for an orderly end; the exit code."""
        self.signal(signal.SIGTERM)
        return self.wait(_STOP_SECONDS)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        psutil.Process(self.pid).send_signal(number)

    def wait(self, seconds: float) -> int:
        """Wait until it ends by itself; the exit code, negative for a signal."""
        assert self._process is not None
        return self._process.wait(seconds)

    @property
    def peak_memory_bytes(self) -> int:
        """The most physical memory that the process ever had (Linux: VmHWM)."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        (line,) = (line for line in lines if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024

    def ask(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run another command of `cdc` with the same configuration."""
        return subprocess.run(
            self._command(*arguments), cwd=CHECKOUT, check=False, capture_output=True, text=True, timeout=300
        )

    def status(self) -> dict[str, Any]:
        """What `cdc status` says."""
        return self.told() or read_status(self.ask("status", "--json").stdout)

    def told(self) -> dict[str, Any] | None:
        """The same, but only while the process says it itself."""
        return status_of_running(self.data_dir) if self.running else None

    def log_tail(self, lines: int = 20) -> str:
        """The end of the log."""
        return "\n".join(self.log_file.read_text(errors="replace").splitlines()[-lines:])

    def _command(self, *arguments: str) -> list[str]:
        return [sys.executable, str(CHECKOUT / "cli.py"), "--config", str(self.config_file), *arguments]

    @property
    def pid(self) -> int:
        """The daemon's process, not its tracer's."""
        assert self._process is not None
        if not self._tracer:
            return self._process.pid
        return psutil.Process(self._process.pid).children()[0].pid
