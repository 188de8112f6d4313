"""The format of a queue's file: how it is made, recognised, upgraded and checked."""

from __future__ import annotations

import sqlite3
import uuid
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec
from msgspec.msgpack import Ext

from cdc.change import Batch, Table, Transaction
from cdc.errors import DecodeError, FatalError, QueueCorrupt
from cdc.packed_documents import PackedDocuments
from cdc.packed_rows import PackedRows
from cdc.position import SourcePosition
from cdc.queue import parked as parked_rows
from cdc.queue.orders import Contents, State
from cdc.queue.parked import ParkedId

FORMAT: Final = 4
"""Files of earlier formats are brought to this one when they are opened for writing, and read as they are otherwise.

2: parked changes know their subjects. 3: transactions may be packed rows, 4: or packed documents (see `cdc.packed`).
"""

APPLICATION_ID: Final = int.from_bytes(b"cdcq", "big")

PAGE_BYTES: Final = 16 * 1024
CHECKPOINT_BYTES: Final = 8 * 1024**2
_WAL_LIMIT_BYTES: Final = 64 * 1024**2
"""Measured on ext4, a virtual disk of 2024, 2 cores. Milliseconds of a commit with one batch of 1 KB (p50 / p99), and
seconds of CPU for 100 batches of 1 MB / 400 of 256 KB, while batches are pruned behind:

    page   4 KiB  0.09 / 0.4   0.42  0.28
    page   8 KiB  0.12 / 0.5   0.38  0.30
    page  16 KiB  0.15 / 0.4   0.30  0.23
    page  32 KiB  0.18 / 0.5   0.22  0.18

- A checkpoint every 8 MiB takes 2 to 4 ms of small batches and 10 to 25 ms of large ones. It always finds the log
  free of readers (they end every statement at once), so the log starts again at its beginning, stays at 8 MiB plus
  one commit, and its fsync (fdatasync) costs 0.1 ms: no new blocks, no metadata.
- The limit cuts a log back only after something extraordinary made it larger.
- Debian's SQLite overwrites deleted data with zeros (`secure_delete`): twice the CPU, and a commit of 90 ms.
"""

TOTALS: Final = """
    SELECT count(*), coalesce(sum(length(payload)), 0), min(created_at) FROM batch WHERE seq > ? AND seq <= ?
"""

_DAMAGED_HINT: Final = "check the disk; then move the file away and copy its sinks again"
_HINTS: Final = {
    sqlite3.SQLITE_CANTOPEN: "does it exist, and may the daemon's user read and write it?",
    sqlite3.SQLITE_FULL: "make room on its disk, then start again",
    sqlite3.SQLITE_IOERR: "check the disk and the kernel's log before starting again",
    sqlite3.SQLITE_READONLY: "the daemon's user must own data_dir",
}


class _StoredBatch(msgspec.Struct, frozen=True, array_like=True):
    """A `Batch` as it is written: packed rows are bytes, packed documents an extension's."""

    tables: tuple[Table, ...]
    transactions: list[Transaction] | bytes | Ext
    position: SourcePosition
    size: int


_DOCUMENTS: Final = 1
"""Which extension."""


def _stored(transactions: object) -> bytes | Ext:
    if isinstance(transactions, PackedRows):
        return transactions.data
    assert isinstance(transactions, PackedDocuments)
    return Ext(_DOCUMENTS, transactions.data)


encode = msgspec.msgpack.Encoder(enc_hook=_stored).encode
"""Of batches, among others."""

_decode = msgspec.msgpack.Decoder(_StoredBatch).decode


def decode(payload: bytes) -> Batch:
    """The batch that was encoded. Raises `msgspec.DecodeError` or `DecodeError` for anything else."""
    stored = _decode(payload)
    return Batch(stored.tables, _transactions(stored.transactions), stored.position, stored.size)


def _transactions(stored: list[Transaction] | bytes | Ext) -> Sequence[Transaction]:
    if isinstance(stored, bytes):
        return PackedRows(stored)
    if not isinstance(stored, Ext):
        return stored
    if stored.code != _DOCUMENTS:
        raise DecodeError(f"transactions are packed in a way {stored.code} that is not known")
    return PackedDocuments(bytes(stored.data))


def connect(path: Path, options: str) -> sqlite3.Connection:
    """Open a connection that any thread may use, with these options of an SQLite URI."""
    uri = f"{path.absolute().as_uri()}?{options}"
    return sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)


def open_for_writing(path: Path) -> sqlite3.Connection:
    """Open for writing; create what is not there."""
    path.touch(mode=0o600)  # SQLite gives the log the same mode: there are rows in it
    connection = connect(path, "mode=rw")
    try:
        if not is_ours(connection, path):
            _create(connection)
        elif _format(connection) < FORMAT:
            _upgrade(connection)
        _configure(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def is_ours(connection: sqlite3.Connection, path: Path) -> bool:
    """False for an empty file. Raises `QueueCorrupt` for any other that this version cannot read."""
    application_id = connection.execute("PRAGMA application_id").fetchone()[0]
    version = _format(connection)
    if application_id == APPLICATION_ID and 1 <= version <= FORMAT:
        return True
    if application_id == APPLICATION_ID:
        raise QueueCorrupt(
            f"{path} has format {version}, this version of cdc reads format {FORMAT}",
            hint="run the version that wrote it until its sinks have caught up, or move the file away and copy again",
        )
    if (application_id, version) != (0, 0) or connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]:
        raise QueueCorrupt(f"{path} is not a queue file", hint="is data_dir the right directory?")
    return False


def _create(connection: sqlite3.Connection) -> None:
    connection.execute(f"PRAGMA page_size = {PAGE_BYTES}")
    connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
    connection.execute("PRAGMA journal_mode = WAL")
    schema = Path(__file__).with_name("queue.sql").read_text(encoding="utf-8") + parked_rows.schema()
    marks = f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {FORMAT};"
    connection.executescript(f"BEGIN IMMEDIATE; {schema} {marks}")
    save_state(connection, State(uuid.uuid4().hex))
    connection.execute("COMMIT")


def _format(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def _upgrade(connection: sqlite3.Connection) -> None:
    """All or nothing: a file is of one format or the other, whenever this is interrupted."""
    connection.execute("BEGIN IMMEDIATE")
    if _format(connection) < 2:
        parked_rows.upgrade(connection)
    connection.execute(f"PRAGMA user_version = {FORMAT}")
    connection.execute("COMMIT")


def _configure(connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA fullfsync = ON")  # on macOS a plain fsync does not reach the medium
    connection.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_BYTES // PAGE_BYTES}")
    connection.execute(f"PRAGMA journal_size_limit = {_WAL_LIMIT_BYTES}")
    connection.execute("PRAGMA secure_delete = OFF")


def load_state(connection: sqlite3.Connection, path: Path) -> State:
    """The state. Raises `QueueCorrupt` on damage."""
    query = "SELECT queue_id, position, complete_seq, pruned_seq, pruned_position, crc FROM state"
    row = connection.execute(query).fetchone()
    if row is None or zlib.crc32(encode(row[:-1])) != row[-1]:
        raise corrupt(path, "its state fails the checksum")
    return State(*row[:-1])


def save_state(connection: sqlite3.Connection, state: State) -> None:
    """Replace the state."""
    row = msgspec.structs.astuple(state)
    values = (*row, zlib.crc32(encode(row)))
    connection.execute("INSERT OR REPLACE INTO state VALUES (1, ?, ?, ?, ?, ?, ?)", values)


def load_cursors(connection: sqlite3.Connection) -> dict[str, tuple[int, SourcePosition | None]]:
    """Where each sink stands."""
    return {sink: (seq, position) for sink, seq, position in connection.execute("SELECT * FROM cursor")}


def load_facts(connection: sqlite3.Connection) -> dict[str, str]:
    """All facts."""
    return dict(connection.execute("SELECT * FROM fact"))


def count(connection: sqlite3.Connection, state: State) -> Contents:
    """Count what is durable."""
    batches, size, oldest_at = connection.execute(TOTALS, (state.pruned_seq, state.complete_seq)).fetchone()
    return Contents(state, state.complete_seq, batches, size, oldest_at, count_free_bytes(connection))


def count_free_bytes(connection: sqlite3.Connection) -> int:
    """Bytes in pages that the file keeps for reuse."""
    return int(connection.execute("PRAGMA freelist_count").fetchone()[0]) * PAGE_BYTES


def checksum(header: tuple[object, ...], payload: bytes) -> int:
    """CRC-32 of a row and its payload: SQLite does not notice a flipped byte in a blob."""
    return zlib.crc32(payload, zlib.crc32(encode(header)))


def corrupt(path: Path, what: str) -> QueueCorrupt:
    """The error for a damaged file."""
    return QueueCorrupt(f"{path} is damaged: {what}", hint=_DAMAGED_HINT)


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Turn errors of SQLite and of the file system into `FatalError`s that name the file."""
    try:
        yield
    except sqlite3.Error as exc:
        code = getattr(exc, "sqlite_errorcode", 0) & 0xFF
        if code in {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}:
            raise corrupt(path, str(exc)) from exc
        raise FatalError(f"{path}: {exc}", hint=_HINTS.get(code, "")) from exc
    except OSError as exc:
        raise FatalError(f"{path}: {exc.strerror}", hint="the daemon's user must own data_dir") from exc


def parked_batch(path: Path, connection: sqlite3.Connection, sink: str, parked: ParkedId) -> Batch | None:
    """A parked change as a batch, `None` if it is gone. Raises `QueueCorrupt` on damage."""
    try:
        with translated(path):
            return parked_rows.batch(connection, sink, parked)
    except msgspec.DecodeError as exc:
        raise corrupt(path, str(exc)) from exc
