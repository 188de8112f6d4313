"""The right to use a data directory: one process at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Final, NamedTuple
from urllib.parse import urlsplit

from cdc.errors import DirectoryInUse, FatalError

ADDRESS_FILE: Final = "http"
"""Where the running daemon listens, for the command line."""


class Address(NamedTuple):
    """Where a daemon answers. certificate: SHA-256, in hex, of the one that it shows; empty without TLS."""

    url: str
    certificate: str = ""


class DirectoryLock:
    """The right to use a data directory. Ends with `release`, or with the process however it dies."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def release(self) -> None:
        """Let another process have the directory. Safe to call twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> DirectoryLock:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.release()


def lock_directory(path: Path) -> DirectoryLock:
    """Lock the data directory, made if it is missing. Raises `DirectoryInUse` at once if another process has it."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as exc:
        raise FatalError(
            f"cannot use the data directory {path}: {exc.filename}: {exc.strerror}",
            hint="it and all in it must belong to the user that runs cdc (chown -R); or set another data_dir",
        ) from exc
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        owner = _owner(descriptor)
        os.close(descriptor)
        raise DirectoryInUse(
            f"the data directory {path} is used by process {owner}", hint="stop it, or set another data_dir"
        ) from exc
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    except OSError as exc:  # before anything else is written: a disk that is full says so here
        os.close(descriptor)
        raise FatalError(
            f"cannot write to the data directory {path}: {exc.strerror}", hint="make room on its disk, then start again"
        ) from exc
    return DirectoryLock(descriptor)


def owner_of(path: Path) -> str | None:
    """The process that has locked a data directory, by its number; `None` where none has."""
    try:
        descriptor = os.open(path / "lock", os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _owner(descriptor)
    else:
        return None
    finally:
        os.close(descriptor)


def _owner(descriptor: int) -> str:
    return os.pread(descriptor, 20, 0).decode("ascii", "replace").strip() or "unknown"


def tell_address(directory: Path, address: Address) -> None:
    """Tell the command line where to ask, and whom to trust. Raises `FatalError` where that cannot be written."""
    path = directory / ADDRESS_FILE
    partial_file = path.with_name(f"{path.name}.new")
    try:
        partial_file.write_text("\n".join(filter(None, address)), encoding="ascii")
        partial_file.replace(path)
    except OSError as exc:
        hint = "make room on its disk, and let the user that runs cdc write to it"
        if isinstance(exc, FileNotFoundError):
            hint = "somebody has removed it: what is only in the queue there ends with the daemon; see `cdc status`"
        raise FatalError(f"cannot write to the data directory {directory}: {exc.strerror}", hint=hint) from exc


def read_address(directory: Path) -> Address:
    """Where the running daemon answers. Raises `OSError` where none does."""
    return Address(*(directory / ADDRESS_FILE).read_text(encoding="ascii").split("\n"))


def listens_at(directory: Path, port: int) -> bool:
    """Whether a daemon runs there, and it is the one that listens on a port of this machine."""
    with suppress(OSError):
        return urlsplit(read_address(directory).url).port == port and owner_of(directory) is not None
    return False


@contextmanager
def told_address(directory: Path, address: Address) -> Iterator[None]:
    """The same as long as the daemon runs."""
    tell_address(directory, address)
    try:
        yield
    finally:
        (directory / ADDRESS_FILE).unlink(missing_ok=True)
