"""The file behind a queue: its format, its checks, and how it is read and written.

Nothing here knows of threads, except that any of them may read. Writing belongs to one (see `cdc.queue`).
"""

from __future__ import annotations

import sqlite3
import time
import uuid
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from cdc import queue_parked
from cdc.change import Batch
from cdc.errors import FatalError, QueueCorrupt
from cdc.failpoints import failpoint
from cdc.position import SourcePosition
from cdc.queue_parked import ParkedChange, ParkedCount, ParkedId, ParkedOrder

FORMAT: Final = 2
"""Files of format 1 are brought to this one when they are opened for writing, and read as they are otherwise."""

APPLICATION_ID: Final = int.from_bytes(b"cdcq", "big")

PAGE_BYTES: Final = 16 * 1024
_CHECKPOINT_BYTES: Final = 8 * 1024**2
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

_KEPT_FREE_BYTES: Final = 256 * 1024**2
"""Free pages inside the file that stay for the next backlog: a file that shrinks and grows again costs time."""

_STEP_ROWS: Final = 32
"""Batches pruned in one commit: about 10 ms where they are 1 MB each (deleting one reads its chain of pages)."""

_CHECKED_AT_START: Final = 4

_MISSING_PART: Final = """
    SELECT seq FROM (
        SELECT seq, prior, lag(seq, 1, :pruned) OVER (ORDER BY seq) AS expected FROM batch WHERE seq > :pruned
    ) WHERE prior IS NOT expected LIMIT 1
"""
_TOTALS: Final = """
    SELECT count(*), coalesce(sum(length(payload)), 0), min(created_at) FROM batch WHERE seq > ? AND seq <= ?
"""
_SEEK: Final = """
    SELECT seq FROM batch WHERE seq > ? AND seq <= ? AND complete AND position <= ? ORDER BY seq DESC LIMIT 1
"""
_BOUNDARY: Final = "SELECT seq, position FROM batch WHERE seq > ? AND seq <= ? AND complete ORDER BY seq DESC LIMIT 1"
_COUNT_AFTER: Final = "SELECT coalesce(sum(changes), 0) FROM batch WHERE seq > ?"
_BEFORE: Final = "SELECT min(seq) FROM batch WHERE created_at >= ?"
_OLDEST: Final = "SELECT seq, created_at FROM batch WHERE seq > ? ORDER BY seq LIMIT 1"
_PRUNABLE: Final = """
    SELECT seq, position, created_at FROM batch WHERE seq > ? AND seq <= ? AND complete ORDER BY seq LIMIT ?
"""
_DELETE: Final = "DELETE FROM batch WHERE seq IN (SELECT seq FROM batch WHERE seq <= ? ORDER BY seq LIMIT ?)"

_DAMAGED_HINT: Final = "check the disk; then move the file away and copy its sinks again"
_HINTS: Final = {
    sqlite3.SQLITE_CANTOPEN: "does it exist, and may the daemon's user read and write it?",
    sqlite3.SQLITE_FULL: "make room on its disk, then start again",
    sqlite3.SQLITE_IOERR: "check the disk and the kernel's log before starting again",
    sqlite3.SQLITE_READONLY: "the daemon's user must own data_dir",
}

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Batch).decode


class Stored(msgspec.Struct, frozen=True, gc=False):
    """A durable batch and its place in the queue."""

    seq: int
    batch: Batch


class Begin(msgspec.Struct, frozen=True):
    """Write order: the position that a fresh queue starts at."""

    position: SourcePosition


class Restart(msgspec.Struct, frozen=True):
    """Write order: the source goes on from a new position, behind a gap; `facts` go with it.

    keep: what is here can still be delivered, up to the gap. Otherwise nothing of it counts any more.
    """

    position: SourcePosition
    facts: dict[str, str | None]
    keep: bool


class Cursor(msgspec.Struct, frozen=True):
    """Write order: where a sink stands."""

    sink: str
    seq: int
    position: SourcePosition | None


class Fact(msgspec.Struct, frozen=True):
    """Write order: a small fact; `None` forgets it."""

    key: str
    value: str | None


Item = Batch | Begin | Restart | Cursor | Fact | ParkedOrder


class Upkeep(msgspec.Struct, frozen=True):
    """What a commit does besides its items.

    cursors: all there are.
    prune_to: every sink has passed this seq.
    created_before: unix seconds; younger batches stay.
    """

    cursors: Sequence[Cursor]
    prune_to: int
    created_before: float


class State(msgspec.Struct, frozen=True):
    """The row of table `state`."""

    queue_id: str
    position: SourcePosition | None = None
    complete_seq: int = 0
    pruned_seq: int = 0
    pruned_position: SourcePosition | None = None


class Contents(msgspec.Struct, frozen=True):
    """What is durable in the file, counted.

    bytes: of the payloads.
    oldest_at: when the oldest batch was stored, unix seconds.
    free_bytes: pages inside the file that the next batches will use.
    """

    state: State
    last_seq: int
    batches: int
    bytes: int
    oldest_at: float | None
    free_bytes: int = 0

    @property
    def oldest_seconds(self) -> float | None:
        """Age of the oldest batch; never negative, whatever the clock does."""
        return None if self.oldest_at is None else max(0.0, time.time() - self.oldest_at)


class _Row(NamedTuple):
    """A row of table `batch`."""

    seq: int
    prior: int
    position: SourcePosition
    complete: int
    changes: int
    size: int
    created_at: float
    crc: int
    payload: bytes


class QueueFile:
    """An open queue file. One thread writes; `read` and `seek` may be called by any."""

    def __init__(self, path: Path) -> None:
        """Open or create. Raises `QueueCorrupt` on damage, and on an unknown format, which is left as it is."""
        self.path = path
        self._readers: list[sqlite3.Connection] = []
        self._more = True  # a crash may have interrupted it
        with _translated(path), ExitStack() as on_error:
            self._writer = on_error.enter_context(closing(_open(path)))
            self._state = _load_state(self._writer, path)
            self._check()
            self._drop_unfinished()
            self._contents = _count(self._writer, self._state)
            self._next_seq = self._unused_seq()
            on_error.pop_all()

    @property
    def contents(self) -> Contents:
        """As of the last `write`."""
        return self._contents

    @property
    def has_more_upkeep(self) -> bool:
        """Whether the last upkeep left something to do: it works in small steps."""
        return self._more

    def cursors(self) -> dict[str, tuple[int, SourcePosition | None]]:
        """The stored cursors."""
        return _load_cursors(self._writer)

    def facts(self) -> dict[str, str]:
        """The stored facts."""
        return _load_facts(self._writer)

    def write(self, items: Iterable[Item], upkeep: Upkeep | None) -> list[Stored]:
        """Write all in one transaction and return the batches, with their seqs, when it is durable.

        An error leaves it open whether anything was written. Never call again after one: what a failed fsync
        did not write may look clean to the next (see PostgreSQL's "fsyncgate").
        """
        before = self._state
        with _translated(self.path):
            self._writer.execute("BEGIN IMMEDIATE")
            if upkeep is not None:
                self._keep_up(upkeep)
            stored = [stored for item in items if (stored := self._put(item)) is not None]
            if self._state is not before:
                _save_state(self._writer, self._state)
            failpoint("queue.fsync.before")
            self._writer.execute("COMMIT")
            failpoint("queue.fsync.after")
            if upkeep is not None:
                self._give_back()
        self._contents = msgspec.structs.replace(self._contents, state=self._state)
        return stored

    def read(self, after_seq: int, *, last_seq: int, max_bytes: int) -> list[Stored]:
        """Batches after `after_seq` up to `last_seq`: at least one, else no more than `max_bytes` of `Batch.size`."""
        query = "SELECT * FROM batch WHERE seq > ? AND seq <= ? ORDER BY seq"
        rows: list[_Row] = []
        # the rows first, then the decoding: an unfinished statement would keep the log from starting again
        with _translated(self.path), self._reader() as connection:
            for values in connection.execute(query, (after_seq, last_seq)):
                row = _Row(*values)
                max_bytes -= row.size
                if rows and max_bytes < 0:
                    break
                rows.append(row)
        if not rows:
            raise self._corrupt(f"what follows batch {after_seq} is missing")
        self._check_chain(after_seq, rows)
        return [Stored(row.seq, self._decode(row)) for row in rows]

    def seek(self, source: SourcePosition, contents: Contents) -> int:
        """Seq of the last complete batch that ends at or before `source`; the pruned ones count as one."""
        pruned_seq = contents.state.pruned_seq
        with _translated(self.path), self._reader() as connection:
            row = connection.execute(_SEEK, (pruned_seq, contents.last_seq, source)).fetchone()
        return pruned_seq if row is None else int(row[0])

    def boundary(self, seq: int, state: State) -> tuple[int, SourcePosition]:
        """The last end of a transaction at or before a batch: its seq, and its position."""
        with _translated(self.path), self._reader() as connection:
            row = connection.execute(_BOUNDARY, (state.pruned_seq, seq)).fetchone()
        if row is None:
            assert state.pruned_position is not None
            return state.pruned_seq, state.pruned_position
        return int(row[0]), row[1]

    def count_after(self, seq: int) -> int:
        """How many changes are kept after a batch."""
        with _translated(self.path), self._reader() as connection:
            return int(connection.execute(_COUNT_AFTER, (seq,)).fetchone()[0])

    def stored_at(self, seconds: float) -> int:
        """The seq before the first batch that was stored at a time (unix seconds) or later; the last if none was."""
        with _translated(self.path), self._reader() as connection:
            row = connection.execute(_BEFORE, (seconds,)).fetchone()
        return self._contents.last_seq if row[0] is None else int(row[0]) - 1

    def oldest(self, state: State) -> tuple[int, float] | None:
        """The oldest batch that is kept: its seq, and when it was stored, in unix seconds."""
        with _translated(self.path), self._reader() as connection:
            row = connection.execute(_OLDEST, (state.pruned_seq,)).fetchone()
        return None if row is None else (int(row[0]), float(row[1]))

    def parked(self, sink: str) -> list[ParkedChange]:
        """A sink's parked changes, in the order of the source."""
        with _translated(self.path), self._reader() as connection:
            return queue_parked.listed(connection, sink)

    def parked_batches(self, sink: str, ids: Sequence[ParkedId]) -> list[Batch]:
        """Parked changes, each as a batch by itself."""
        try:
            with _translated(self.path), self._reader() as connection:
                return list(queue_parked.batches(connection, sink, ids))
        except msgspec.DecodeError as exc:
            raise self._corrupt(str(exc)) from exc

    def parked_batch(self, sink: str, parked: ParkedId) -> Batch | None:
        """A parked change as a batch, `None` if it is gone."""
        with self._reader() as connection:
            return _parked_batch(self.path, connection, sink, parked)

    def close(self, *, checkpoint: bool) -> None:
        """Close all connections; with `checkpoint`, everything is in one file afterwards."""
        for connection in self._readers:
            connection.close()
        with _translated(self.path):
            if checkpoint:
                self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            self._writer.close()

    def _check(self) -> None:
        """No row is missing, and the newest ones are whole (the others are checked when read)."""
        state = self._state
        broken = self._writer.execute(_MISSING_PART, {"pruned": state.pruned_seq}).fetchone()
        if broken is not None:
            raise self._corrupt(f"what precedes batch {broken[0]} is missing")
        query = "SELECT * FROM batch WHERE seq > ? AND seq <= ? ORDER BY seq DESC LIMIT ?"
        newest = self._writer.execute(query, (state.pruned_seq, state.complete_seq, _CHECKED_AT_START)).fetchall()
        if (newest[0][0] if newest else state.pruned_seq) != state.complete_seq:
            raise self._corrupt(f"batch {state.complete_seq} is missing")
        for values in newest:
            self._decode(_Row(*values))

    def _drop_unfinished(self) -> None:
        """The source sends an unfinished transaction again, from the last durable position."""
        self._writer.execute("DELETE FROM batch WHERE seq > ?", (self._state.complete_seq,))

    def _unused_seq(self) -> int:
        """Never one that was used before, also if its batch was dropped or pruned."""
        sequence = self._writer.execute("SELECT seq FROM sqlite_sequence WHERE name = 'batch'").fetchone()
        return max(self._state.complete_seq, sequence[0] if sequence else 0) + 1

    def _put(self, item: Item) -> Stored | None:
        match item:
            case Batch(transactions=[]):
                self._state = msgspec.structs.replace(self._state, position=item.position)
            case Batch():
                return self._insert(item)
            case Begin(position):
                self._state = msgspec.structs.replace(self._state, position=position, pruned_position=position)
            case Restart():
                self._restart(item)
            case Cursor():
                self._put_cursor(item)
            case Fact(key, None):
                self._writer.execute("DELETE FROM fact WHERE key = ?", (key,))
            case Fact(key, value):
                self._writer.execute("INSERT OR REPLACE INTO fact VALUES (?, ?)", (key, value))
            case _:
                queue_parked.write(self._writer, item)
        return None

    def _insert(self, batch: Batch) -> Stored:
        before, seq, now = self._contents, self._next_seq, time.time()
        payload = _encode(batch)
        header = (seq, before.last_seq, batch.position, int(batch.complete), batch.change_count, batch.size, now)
        row = _Row(*header, _crc(header, payload), payload)
        self._writer.execute("INSERT INTO batch VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
        self._next_seq += 1
        if batch.complete:
            self._state = msgspec.structs.replace(self._state, position=batch.position, complete_seq=seq)
        self._contents = msgspec.structs.replace(
            before,
            last_seq=seq,
            batches=before.batches + 1,
            bytes=before.bytes + len(payload),
            oldest_at=now if before.oldest_at is None else before.oldest_at,
        )
        return Stored(seq, batch)

    def _restart(self, restart: Restart) -> None:
        """The batches of an unfinished transaction go: its end never comes."""
        self._drop_unfinished()
        state = msgspec.structs.replace(self._state, position=restart.position)
        if not restart.keep:
            state = msgspec.structs.replace(state, pruned_seq=state.complete_seq, pruned_position=restart.position)
            self._more = True
        self._state = state
        self._contents = _count(self._writer, state)
        for key, value in restart.facts.items():
            self._put(Fact(key, value))

    def _put_cursor(self, cursor: Cursor) -> None:
        row = (cursor.sink, cursor.seq, cursor.position)
        self._writer.execute("INSERT OR REPLACE INTO cursor VALUES (?, ?, ?)", row)

    def _keep_up(self, upkeep: Upkeep) -> None:
        for sink in _load_cursors(self._writer).keys() - {cursor.sink for cursor in upkeep.cursors}:
            queue_parked.forget_sink(self._writer, sink)
        self._writer.execute("DELETE FROM cursor")
        for cursor in upkeep.cursors:
            self._put_cursor(cursor)
        pruned = self._prune(upkeep.prune_to, upkeep.created_before)
        deleted = self._writer.execute(_DELETE, (self._state.pruned_seq, _STEP_ROWS)).rowcount
        if deleted:
            failpoint("queue.prune.after")
        self._more = _STEP_ROWS in (pruned, deleted)

    def _prune(self, prune_to: int, created_before: float) -> int:
        """Move the pruned position over up to `_STEP_ROWS` complete batches; return how many.

        It only ever moves to the end of a transaction. The rows go afterwards, a few in each commit, since a single
        transaction may have filled thousands.
        """
        before = self._state.pruned_seq
        rows = self._writer.execute(_PRUNABLE, (before, prune_to, _STEP_ROWS)).fetchall()
        rows = list(takewhile(lambda row: row[2] <= created_before, rows))
        if rows:
            failpoint("queue.prune.before")
            seq, position, _ = rows[-1]
            self._state = msgspec.structs.replace(self._state, pruned_seq=seq, pruned_position=position)
            self._forget(before, seq)
        return len(rows)

    def _forget(self, after_seq: int, seq: int) -> None:
        """Take the batches after `after_seq` up to `seq` out of the count."""
        batches, size, _ = self._writer.execute(_TOTALS, (after_seq, seq)).fetchone()
        query = "SELECT created_at FROM batch WHERE seq > ? ORDER BY seq LIMIT 1"
        oldest = self._writer.execute(query, (seq,)).fetchone()
        self._contents = msgspec.structs.replace(
            self._contents,
            batches=self._contents.batches - batches,
            bytes=self._contents.bytes - size,
            oldest_at=oldest[0] if oldest else None,
        )

    def _give_back(self) -> None:
        """Shrink a file that has become far too large: its free pages would be missing to other sources' queues."""
        free_bytes = _free_bytes(self._writer)
        if free_bytes > max(_KEPT_FREE_BYTES, 4 * self._contents.bytes):
            # a script: `execute` takes one step of a statement without columns, which here is a single page
            self._writer.executescript(f"PRAGMA incremental_vacuum({_CHECKPOINT_BYTES // PAGE_BYTES})")
            self._writer.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
            self._more = True
        self._contents = msgspec.structs.replace(self._contents, free_bytes=free_bytes)

    @contextmanager
    def _reader(self) -> Iterator[sqlite3.Connection]:
        """Lend a connection that only reads: there are as many as threads ever read at the same time."""
        try:
            connection = self._readers.pop()
        except IndexError:
            connection = _connect(self.path, "mode=ro")
        try:
            yield connection
        finally:
            self._readers.append(connection)

    def _check_chain(self, after_seq: int, rows: Iterable[_Row]) -> None:
        for row in rows:
            if row.prior != after_seq:
                raise self._corrupt(f"batch {row.seq} does not follow {after_seq}")
            after_seq = row.seq

    def _decode(self, row: _Row) -> Batch:
        if row.crc != _crc(row[:7], row.payload):
            raise self._corrupt(f"batch {row.seq} fails its checksum")
        try:
            return _decode(row.payload)
        except msgspec.DecodeError as exc:
            raise self._corrupt(f"batch {row.seq} is not a batch") from exc

    def _corrupt(self, what: str) -> QueueCorrupt:
        return _corrupt(self.path, what)


class FileStatus(msgspec.Struct, frozen=True):
    """What a queue file says while no daemon has it open."""

    queue_id: str
    contents: Contents
    cursors: dict[str, tuple[int, SourcePosition | None]]
    facts: dict[str, str]
    parked: dict[str, ParkedCount]


def read_file_status(path: Path) -> FileStatus:
    """Read without creating or changing any file, with or without a daemon at work, and also after its death."""
    with _reading(path) as connection:
        connection.execute("BEGIN")
        state = _load_state(connection, path)
        return FileStatus(
            queue_id=state.queue_id,
            contents=_count(connection, state),
            cursors=_load_cursors(connection),
            facts=_load_facts(connection),
            parked=queue_parked.counts(connection),
        )


class ParkedInFile:
    """The parked changes in a queue's file, read as `read_file_status` does."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def parked(self, sink: str) -> list[ParkedChange]:
        """A sink's parked changes, in the order of the source."""
        with _reading(self._path) as connection:
            return queue_parked.listed(connection, sink)

    def parked_batch(self, sink: str, parked: ParkedId) -> Batch | None:
        """A parked change as a batch, `None` if it is gone."""
        with _reading(self._path) as connection:
            return _parked_batch(self._path, connection, sink, parked)


def _parked_batch(path: Path, connection: sqlite3.Connection, sink: str, parked: ParkedId) -> Batch | None:
    try:
        with _translated(path):
            return queue_parked.batch(connection, sink, parked)
    except msgspec.DecodeError as exc:
        raise _corrupt(path, str(exc)) from exc


@contextmanager
def _reading(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection that changes nothing on disk."""
    log = path.with_name(path.name + "-wal")
    in_log = log.exists() and log.stat().st_size > 0
    # a log is read with the help of its index (-shm), which `mode=ro` alone would rebuild on disk
    options = "mode=ro&readonly_shm=1" if in_log else "mode=ro&immutable=1"
    with _translated(path), closing(_connect(path, options)) as connection:
        if not _is_ours(connection, path):
            raise _corrupt(path, "it is empty")
        yield connection


def _connect(path: Path, options: str) -> sqlite3.Connection:
    uri = f"{path.absolute().as_uri()}?{options}"
    return sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)


def _open(path: Path) -> sqlite3.Connection:
    """Open for writing; create what is not there."""
    path.touch(mode=0o600)  # SQLite gives the log the same mode: there are rows in it
    connection = _connect(path, "mode=rw")
    try:
        if not _is_ours(connection, path):
            _create(connection)
        elif _format(connection) < FORMAT:
            _upgrade(connection)
        _configure(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _is_ours(connection: sqlite3.Connection, path: Path) -> bool:
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
    schema = Path(__file__).with_name("queue.sql").read_text(encoding="utf-8") + queue_parked.schema()
    marks = f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {FORMAT};"
    connection.executescript(f"BEGIN IMMEDIATE; {schema} {marks}")
    _save_state(connection, State(uuid.uuid4().hex))
    connection.execute("COMMIT")


def _format(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def _upgrade(connection: sqlite3.Connection) -> None:
    """All or nothing: a file is of one format or the other, whenever this is interrupted."""
    connection.execute("BEGIN IMMEDIATE")
    queue_parked.upgrade(connection)
    connection.execute(f"PRAGMA user_version = {FORMAT}")
    connection.execute("COMMIT")


def _configure(connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA fullfsync = ON")  # on macOS a plain fsync does not reach the medium
    connection.execute(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_BYTES // PAGE_BYTES}")
    connection.execute(f"PRAGMA journal_size_limit = {_WAL_LIMIT_BYTES}")
    connection.execute("PRAGMA secure_delete = OFF")


def _load_state(connection: sqlite3.Connection, path: Path) -> State:
    query = "SELECT queue_id, position, complete_seq, pruned_seq, pruned_position, crc FROM state"
    row = connection.execute(query).fetchone()
    if row is None or zlib.crc32(_encode(row[:-1])) != row[-1]:
        raise _corrupt(path, "its state fails the checksum")
    return State(*row[:-1])


def _save_state(connection: sqlite3.Connection, state: State) -> None:
    row = msgspec.structs.astuple(state)
    values = (*row, zlib.crc32(_encode(row)))
    connection.execute("INSERT OR REPLACE INTO state VALUES (1, ?, ?, ?, ?, ?, ?)", values)


def _load_cursors(connection: sqlite3.Connection) -> dict[str, tuple[int, SourcePosition | None]]:
    return {sink: (seq, position) for sink, seq, position in connection.execute("SELECT * FROM cursor")}


def _load_facts(connection: sqlite3.Connection) -> dict[str, str]:
    return dict(connection.execute("SELECT * FROM fact"))


def _count(connection: sqlite3.Connection, state: State) -> Contents:
    batches, size, oldest_at = connection.execute(_TOTALS, (state.pruned_seq, state.complete_seq)).fetchone()
    return Contents(state, state.complete_seq, batches, size, oldest_at, _free_bytes(connection))


def _free_bytes(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA freelist_count").fetchone()[0]) * PAGE_BYTES


def _crc(header: tuple[object, ...], payload: bytes) -> int:
    return zlib.crc32(payload, zlib.crc32(_encode(header)))


def _corrupt(path: Path, what: str) -> QueueCorrupt:
    return QueueCorrupt(f"{path} is damaged: {what}", hint=_DAMAGED_HINT)


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    """Turn errors of SQLite and of the file system into `FatalError`s that name the file."""
    try:
        yield
    except sqlite3.Error as exc:
        code = getattr(exc, "sqlite_errorcode", 0) & 0xFF
        if code in {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}:
            raise _corrupt(path, str(exc)) from exc
        raise FatalError(f"{path}: {exc}", hint=_HINTS.get(code, "")) from exc
    except OSError as exc:
        raise FatalError(f"{path}: {exc.strerror}", hint="the daemon's user must own data_dir") from exc
