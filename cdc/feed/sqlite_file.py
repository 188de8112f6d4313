"""The file of an SQLite feed: made at once and whole, opened by writers and readers, its rows and its errors."""

from __future__ import annotations

import fcntl
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Final

import msgspec

from cdc.errors import FatalError, PermanentError, TransientError
from cdc.feed.record import iso_time
from cdc.feed.tables import COLUMNS, LOCK_SECONDS, Codec, Tables, check_format, not_ours

_PAGE_BYTES: Final = 8 * 1024
_CHECKPOINT_BYTES: Final = 32 * 1024**2
_CACHE_BYTES: Final = 12 * 1024**2
"""Of each connection that writes. Five times as much is worth 15 % where a million entities change at random, and too
much to ask of everybody else."""

_SPAN: Final = """span (low, high) AS (
        SELECT (SELECT min(id) FROM {main}), (SELECT max(id) + 1 FROM {main}) UNION ALL
        SELECT CASE WHEN recorded_at < ?1 THEN id + 1 ELSE low END,
            CASE WHEN recorded_at < ?1 THEN high ELSE (low + high) / 2 END
        FROM span CROSS JOIN {main} WHERE low < high
            AND id = (SELECT min(id) FROM {main} WHERE id >= (low + high) / 2))"""
"""Of a recursive query, as {span}, whose first parameter is a time: its largest `low` is above all ids recorded before
that, and not above any later one. Ids and times rise together: halves are looked at."""

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)

_WAIT: Final = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN}
_REFUSED: Final = {sqlite3.SQLITE_TOOBIG, sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISMATCH}
_HINTS: Final = {
    sqlite3.SQLITE_BUSY: "another writer holds the feed; it is tried again",
    sqlite3.SQLITE_FULL: "make room on its disk",
    sqlite3.SQLITE_CANTOPEN: "may the daemon's user read and write it?",
    sqlite3.SQLITE_READONLY: "the daemon's user must own it",
    sqlite3.SQLITE_IOERR: "check the disk and the kernel's log",
    sqlite3.SQLITE_CORRUPT: "check the disk; then move the file away: a new feed begins",
    sqlite3.SQLITE_NOTADB: "move it away, or name another table",
}


def composed(tables: Tables, queries: Mapping[str, str]) -> dict[str, str]:
    """Queries with the names of the tables, the columns of the main one, and `_SPAN`."""
    names = {**msgspec.structs.asdict(tables), "columns": ", ".join(f'"{name}"' for name in COLUMNS)}
    names["span"] = _SPAN.format(**names)
    return {name: query.format(**names) for name, query in queries.items()}


def open_writing(path: Path, tables: Tables) -> sqlite3.Connection:
    """A connection that writes. The file is made if it is not there; `FatalError` for one that no feed has made."""
    with translated(path):
        _make_if_missing(path, tables)
        connection = _connect(path)
        try:
            check_file(connection, path, tables)
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA fullfsync = ON")  # on macOS a plain fsync does not reach the medium
            connection.execute("PRAGMA secure_delete = OFF")
            connection.execute(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_BYTES // _PAGE_BYTES}")
            connection.execute(f"PRAGMA cache_size = -{_CACHE_BYTES // 1024}")
        except BaseException:
            connection.close()
            raise
    return connection


def open_reading(path: Path) -> sqlite3.Connection:
    """A connection that cannot write. Raises `TransientError` where there is no file."""
    with translated(path):
        if not path.exists():
            raise TransientError(f"there is no feed at {path} yet", hint="the daemon makes it when it begins to write")
        connection = _connect(path)
        connection.execute("PRAGMA query_only = ON")
    return connection


def identity(path: Path) -> tuple[int, int] | None:
    """Which file has that name now; `None` where there is none. One that is removed is still there for who has it."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def removed(path: Path) -> TransientError:
    """For a file that was removed or replaced while it was in use."""
    return TransientError(f"{path} was removed while it was in use", hint="never remove or replace it beside a daemon")


def check_file(connection: sqlite3.Connection, path: Path, tables: Tables) -> None:
    """Raise `FatalError` unless the file holds this feed, in the format of this version."""
    query = "SELECT count(*) FROM sqlite_schema WHERE type = 'table' AND name = ?"
    if not connection.execute(query, [tables.state]).fetchone()[0]:
        raise not_ours(str(path))
    try:
        found = connection.execute(f'SELECT format FROM "{tables.state}"').fetchone()  # noqa: S608 - an identifier
    except sqlite3.OperationalError as exc:
        raise not_ours(str(path)) from exc
    check_format(found and found[0], str(path))


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Turn errors of SQLite and of the file system into `CdcError`s that name the file."""
    try:
        yield
    except sqlite3.Error as exc:
        code = getattr(exc, "sqlite_errorcode", 0) & 0xFF
        kind = TransientError if code in _WAIT else PermanentError if code in _REFUSED else FatalError
        raise kind(f"{path}: {exc}", hint=_HINTS.get(code, "")) from exc
    except OSError as exc:
        hint = "the daemon's user must own the directory"
        if not path.parent.exists():
            hint = f"{path.parent} is gone, with all that was in it: put it right, then restart the daemon"
        raise FatalError(f"{path}: {exc.strerror}", hint=hint) from exc


def _connect(path: Path) -> sqlite3.Connection:
    uri = f"{path.absolute().as_uri()}?mode=rw"
    return sqlite3.connect(uri, uri=True, timeout=LOCK_SECONDS, isolation_level=None, check_same_thread=False)


def _make_if_missing(path: Path, tables: Tables) -> None:
    """Make the file under another name and give it its own when it is whole: nobody ever finds half a feed."""
    if path.exists():
        return
    unfinished = path.with_name(f".{path.name}.new")
    with _locked(path.parent):  # several sources, or processes, may begin at once
        if path.exists():
            return
        unfinished.unlink(missing_ok=True)
        unfinished.touch(mode=0o600)  # SQLite gives the log the same mode: there are rows in it
        with closing(_connect(unfinished)) as connection:
            connection.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
            connection.execute("PRAGMA journal_mode = WAL")
            schema = Path(__file__).with_name("sqlite.sql").read_text(encoding="utf-8")
            schema = schema.format(**msgspec.structs.asdict(tables), begins=_begins())
            connection.executescript(f"BEGIN; {schema} COMMIT")
        for left in ("-wal", "-shm"):  # of a file that was moved away: SQLite would take its rows for ours
            path.with_name(path.name + left).unlink(missing_ok=True)
        unfinished.replace(path)
        _sync(path.parent)


def _begins() -> int:
    """What a new feed's ids begin behind: the microseconds since 1970.

    A file may be lost, and all that cdc knows with it, while readers keep their cursors. No feed has a million changes
    a second: so these are behind all ids of those that were there before. (And below 2^53 until 2255, for JavaScript.)
    """
    return time.time_ns() // 1_000


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# rows


def microseconds(text: str) -> int:
    """What `iso_time` wrote."""
    return (datetime.fromisoformat(text) - _EPOCH) // _MICROSECOND


def _names(names: Iterable[str]) -> str:
    return msgspec.json.encode(names).decode()


_JSON: Final = ("before", "after", "delta", "scope_before", "scope_after")
_time: Final = lru_cache(64)(iso_time)  # those of one transaction are the same
_microseconds: Final = lru_cache(64)(microseconds)

CODEC: Final = Codec(
    kept={
        "changed_at": _time,
        "recorded_at": _time,
        "change_type": str,
        "changed": _names,
        **dict.fromkeys(_JSON, bytes.decode),
    },
    read={
        "changed_at": _microseconds,
        "recorded_at": _microseconds,
        "changed": lambda text: tuple(msgspec.json.decode(text)),
        "lookup": bool,
        "truncated": bool,
        **dict.fromkeys(_JSON, str.encode),
    },
)
"""Times are ISO 8601, JSON is text, for those who read the file by other means."""
