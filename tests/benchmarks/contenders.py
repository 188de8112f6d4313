"""Those who replicate: PostgreSQL's own subscription, and this daemon as its user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from tests.benchmarks.table import PUBLICATION, SCHEMA, BenchFailed
from tests.processes import wait_until
from tests.servers import Database, PostgresServer

CDC: Final = (sys.executable, str(Path(__file__).parents[2] / "cli.py"))

_DAEMON: Final = """\
[daemon]
data_dir = {data_dir}

[http]
address = "127.0.0.1:0"

[queue]
min_free_bytes = 100_000_000

"""

_PIPELINE: Final = """\
[sources.bench]
url = {source}
slot = {slot}
publication = {publication}
pg_dump = {pg_dump}

[sinks.mirror]
from = "bench"
url = {target}
on_error = {on_error}
[sinks.mirror.copy]
workers = {workers}
"""


def write_config(path: Path, pipeline: str, values: Mapping[str, object]) -> Path:
    """Write a daemon's configuration with these sources and sinks; values: what they leave open, and its `data_dir`."""
    path.write_text((_DAEMON + pipeline).format_map({key: json.dumps(value) for key, value in values.items()}))
    return path


@dataclass(frozen=True)
class Usage:
    """What a process has used since it was started; MiB of resident memory at its peak."""

    cpu_seconds: float
    peak_rss_mb: float


def usage_of(pid: int) -> Usage:
    """Of a process that runs."""
    times = psutil.Process(pid).cpu_times()
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    (peak_kib,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
    return Usage(times.user + times.system, int(peak_kib) / 1024)


def wait_until_read(source: Database, slot: str, explain: Callable[[], str]) -> None:
    """Return when somebody reads a slot. explain: why it takes so long, perhaps."""
    query = "SELECT FROM pg_replication_slots WHERE slot_name = %s AND active"
    with source.connect() as connection:
        wait_until(
            lambda: connection.execute(query, [slot]).rowcount,
            timeout_seconds=60,
            what=lambda: f"slot {slot} to be read; {explain()}",
        )


def drop_slot(source: Database, name: str) -> None:
    """Drop it as soon as its reader has left."""
    free = "SELECT FROM pg_replication_slots WHERE slot_name = %s AND NOT active"
    with source.connect() as connection:
        wait_until(lambda: connection.execute(free, [name]).rowcount, what=f"slot {name} to be free")
        connection.execute("SELECT pg_drop_replication_slot(%s)", [name])


class Contender(ABC):
    """Replicates the published table of a source into a database of its own.

    What is committed at the source after `prepare` is its to deliver.
    """

    def __init__(self, name: str, source: Database, target_server: PostgresServer) -> None:
        self.name = name
        self.source = source
        self.target = target_server.create_database(name)

    @abstractmethod
    def prepare(self) -> None:
        """Make slot and target."""

    @abstractmethod
    def start(self) -> None:
        """Let it replicate. May return before it does."""

    @abstractmethod
    def stop(self) -> None:
        """Let it end. Safe to call twice."""

    @abstractmethod
    def log_tail(self) -> str:
        """What it said last."""

    def usage(self) -> Usage | None:
        """Of its process; `None` for what runs inside the servers."""
        return None

    def wait_until_reading(self) -> None:
        """Return when it has taken its slot: the start of a drain, for every contender alike."""
        wait_until_read(self.source, self.name, lambda: f"{self.name} says:\n{self.log_tail()}")

    def close(self) -> None:
        """Stop it and drop slot and target: the next one must not pay for them."""
        self.stop()
        self.target.drop()
        drop_slot(self.source, self.name)


class Native(Contender):
    """A subscription, with the options that PostgreSQL gives it by default."""

    def prepare(self) -> None:
        self.source.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [self.name])
        self.target.execute(SCHEMA)
        self.target.execute(
            f"CREATE SUBSCRIPTION {self.name} CONNECTION '{self.source.url}' PUBLICATION {PUBLICATION}"
            " WITH (create_slot = false, copy_data = false, enabled = false)"
        )

    def start(self) -> None:
        self.target.execute(f"ALTER SUBSCRIPTION {self.name} ENABLE")

    def stop(self) -> None:
        with self.target.connect() as connection:
            if connection.execute("SELECT FROM pg_subscription WHERE subname = %s", [self.name]).rowcount:
                connection.execute(f"ALTER SUBSCRIPTION {self.name} DISABLE")
                connection.execute(f"ALTER SUBSCRIPTION {self.name} SET (slot_name = NONE)")
                connection.execute(f"DROP SUBSCRIPTION {self.name}")

    def log_tail(self) -> str:
        return self.target.server.log_tail()


class Cdc(Contender):
    """`cdc copy` of the empty table, then `cdc run`, with default options."""

    def __init__(
        self,
        name: str,
        source: Database,
        target_server: PostgresServer,
        folder: Path,
        *,
        on_error: str = "stop",
        workers: int = 2,
    ) -> None:
        super().__init__(name, source, target_server)
        self.data_dir = folder / name
        self._log = folder / f"{name}.log"
        self._config = self._write_config(folder, on_error, workers)
        self._process: subprocess.Popen[bytes] | None = None

    def prepare(self) -> None:
        done = subprocess.run([*CDC, "--config", self._config, "copy"], capture_output=True, text=True, check=False)
        if done.returncode:
            raise BenchFailed(f"cdc copy: {done.stderr}")

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*CDC, "--config", self._config, "run"], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def stop(self) -> None:
        if self._process is None:
            return
        process, self._process = self._process, None
        process.terminate()
        if process.wait(timeout=60):
            raise BenchFailed(f"cdc run ended with exit code {process.returncode}:\n{self.log_tail()}")

    def usage(self) -> Usage:
        assert self._process is not None, "the daemon was not started"
        return usage_of(self._process.pid)

    def log_tail(self) -> str:
        return self._log.read_text(errors="replace")[-3000:]

    def _write_config(self, folder: Path, on_error: str, workers: int) -> Path:
        values = {
            "data_dir": str(self.data_dir),
            "source": self.source.url,
            "slot": self.name,
            "publication": PUBLICATION,
            "pg_dump": str(self.source.server.bin_dir / "pg_dump"),
            "target": self.target.url,
            "on_error": on_error,
            "workers": workers,
        }
        return write_config(folder / f"{self.name}.toml", _PIPELINE, values)
