"""Those who copy a whole database: `cdc copy`, PostgreSQL's own dump and restore, and pgcopydb."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.contenders import Cdc
from tests.benchmarks.table import BenchFailed
from tests.servers import Database, PostgresServer


class Copier(ABC):
    """Copies one database into a new one on another server, all of it, with so many jobs at a time."""

    @abstractmethod
    def __init__(self, name: str, source: Database, target_server: PostgresServer, folder: Path, jobs: int) -> None:
        """folder: an empty one, for its files."""
        self.target: Database

    @abstractmethod
    def copy(self) -> None:
        """Return when everything is there, indexes and constraints included."""

    @abstractmethod
    def close(self) -> None:
        """Leave nothing behind."""


class CdcCopy(Copier):
    """`cdc copy`, which makes its slot and queue as well."""

    def __init__(self, name: str, source: Database, target_server: PostgresServer, folder: Path, jobs: int) -> None:
        self._cdc = Cdc(name, source, target_server, folder, workers=jobs)
        self.target = self._cdc.target

    def copy(self) -> None:
        self._cdc.prepare()

    def close(self) -> None:
        self._cdc.close()


class _Programs(Copier):
    """What is done by programs that read one database and write another."""

    def __init__(self, name: str, source: Database, target_server: PostgresServer, folder: Path, jobs: int) -> None:
        self.target = target_server.create_database(name)
        self._source, self._folder, self._jobs = source, folder, jobs

    def close(self) -> None:
        self.target.drop()
        shutil.rmtree(self._folder)

    def _run(self, program: str | Path, *arguments: str | Path) -> None:
        """With the server's own client programs first on the PATH, which pgcopydb looks for there."""
        path = f"{self._source.server.bin_dir}{os.pathsep}{os.environ.get('PATH', '')}"
        done = subprocess.run(
            [program, *arguments],
            env={**os.environ, "PATH": path},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise BenchFailed(f"{Path(program).name} ended with {done.returncode}: {done.stderr[-2000:]}")


class DumpAndRestore(_Programs):
    """One after the other, through files, with their default compression."""

    def copy(self) -> None:
        programs, dump, jobs = self._source.server.bin_dir, self._folder / "dump", f"-j{self._jobs}"
        self._run(programs / "pg_dump", "-Fd", jobs, "-f", dump, "-d", self._source.url)
        self._run(programs / "pg_restore", jobs, "-d", self.target.url, dump)


class Pgcopydb(_Programs):
    """Streams tables, and builds the indexes of one while others are copied."""

    def copy(self) -> None:
        where = ("--source", self._source.url, "--target", self.target.url, "--dir", self._folder / "work")
        jobs = str(self._jobs)
        self._run("pgcopydb", "clone", *where, "--table-jobs", jobs, "--index-jobs", jobs)


@dataclass(frozen=True)
class Version:
    """A version of pgcopydb, and those of PostgreSQL that it says it is made for."""

    number: str
    made_for: Sequence[int]

    def __str__(self) -> str:
        return f"{self.number}, made for PostgreSQL {', '.join(map(str, self.made_for))}"


def pgcopydb_version() -> Version | None:
    """Of what is installed; `None` where it is not."""
    if shutil.which("pgcopydb") is None:
        return None
    done = subprocess.run(["pgcopydb", "--version"], capture_output=True, text=True, check=True)
    says = done.stdout + done.stderr
    number, made_for = re.search(r"pgcopydb version (\S+)", says), re.search(r"compatible with Postgres (.*)", says)
    versions = re.findall(r"\d+", made_for[1]) if made_for else []
    return Version(number[1] if number else "?", [int(version) for version in versions])
