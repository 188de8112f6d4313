"""Starting and stopping MongoDB servers for tests: the stand-in, or a real `mongod` as a one-node replica set."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pymongo
from pymongo.errors import OperationFailure

from tests.processes import free_port, kill_tree, wait_until

STAND_IN = "a stand-in for MongoDB, a test tool (no mongod was found)"
ROOT = Path(__file__).parents[2]


class _Server(ABC):
    """Ends with its `with` block."""

    @abstractmethod
    def stop(self) -> None:
        """End it at once."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


class StandIn(_Server):
    """The stand-in as a process of its own; ends with the test process at the latest."""

    def __init__(self, *arguments: str, port: int = 0) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.mongod", "--port", str(port), *arguments],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the stand-in did not start (exit code {self._process.wait()})")
        self.port = int(line)
        self._replica_set = "" if "--standalone" in arguments else "?replicaSet=rs0"

    @property
    def url(self) -> str:
        """Its connection string."""
        return f"mongodb://127.0.0.1:{self.port}/{self._replica_set}"

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def command(self, name: str, value: Any = 1, **fields: Any) -> dict[str, Any]:
        """Run a command on `admin`, such as the `cdcTest...` ones."""
        with pymongo.MongoClient[dict[str, Any]](f"mongodb://127.0.0.1:{self.port}/?directConnection=true") as client:
            return client.admin.command({name: value, **fields})

    def stop(self) -> None:
        """Kill it and wait for its end."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()


class RealServer(_Server):
    """A `mongod` from PATH, initiated as the replica set rs0, with a data folder that goes with it."""

    def __init__(self, *arguments: str) -> None:
        self.port = free_port()
        self._folder = tempfile.mkdtemp(prefix="mongod-")
        self._process = subprocess.Popen(
            [_mongod(), "--replSet", "rs0", "--port", str(self.port), "--bind_ip", "127.0.0.1", "--dbpath",
             self._folder, "--setParameter", "enableTestCommands=1", *arguments],
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        wait_until(self._is_primary, what="mongod to become primary")

    @property
    def url(self) -> str:
        """Its connection string."""
        return f"mongodb://127.0.0.1:{self.port}/?replicaSet=rs0"

    def _is_primary(self) -> bool:
        with pymongo.MongoClient[dict[str, Any]](
            f"mongodb://127.0.0.1:{self.port}/?directConnection=true", serverSelectionTimeoutMS=1000
        ) as client:
            try:
                member = {"_id": 0, "host": f"127.0.0.1:{self.port}"}
                client.admin.command("replSetInitiate", {"_id": "rs0", "members": [member]})
            except pymongo.errors.ConnectionFailure:
                return False
            except OperationFailure as exc:
                if exc.code != 23:  # AlreadyInitialized
                    raise
            return bool(client.admin.command("hello")["isWritablePrimary"])

    def stop(self) -> None:
        """Kill it and remove its data."""
        kill_tree(self._process.pid)
        self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


def _mongod() -> str:
    found = shutil.which("mongod")
    if found is None:
        raise RuntimeError("no mongod on PATH")
    return found


@contextmanager
def mongodb_url() -> Iterator[tuple[str, str]]:
    """The URL of the best server at hand, and what it is: `CDC_TEST_MONGODB_URL`, or what `start_server` finds."""
    if given := os.environ.get("CDC_TEST_MONGODB_URL"):
        yield given, "the MongoDB server of CDC_TEST_MONGODB_URL"
        return
    with start_server() as server:
        yield server.url, "mongod" if isinstance(server, RealServer) else STAND_IN


def start_server() -> StandIn | RealServer:
    """The best server at hand: `mongod` from PATH, else the stand-in. To be used as a context manager."""
    return RealServer() if shutil.which("mongod") else StandIn()
