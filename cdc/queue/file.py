"""The file behind a queue: its format, its checks, and how it is read and written.

Nothing here knows of threads, except that any of them may read. Writing belongs to one (see `cdc.queue`).
"""

from __future__ import annotations

import sqlite3
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from cdc.change import Batch
from cdc.errors import DecodeError, QueueCorrupt
from cdc.failpoints import failpoint
from cdc.position import SourcePosition
from cdc.queue import parked as parked_rows
from cdc.queue.format import (
    CHECKPOINT_BYTES,
    PAGE_BYTES,
    TOTALS,
    checksum,
    connect,
    corrupt,
    count,
    count_free_bytes,
    decode,
    encode,
    load_cursors,
    load_facts,
    load_state,
    open_for_writing,
    parked_batch,
    save_state,
    translated,
)
from cdc.queue.orders import Begin, Contents, Cursor, Fact, Item, Restart, State, Stored, Upkeep
from cdc.queue.parked import ParkedChange, ParkedId

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
        with translated(path), ExitStack() as on_error:
            self._writer = on_error.enter_context(closing(open_for_writing(path)))
            self._state = load_state(self._writer, path)
            self._check()
            self._drop_unfinished()
            self._contents = count(self._writer, self._state)
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
        return load_cursors(self._writer)

    def facts(self) -> dict[str, str]:
        """The stored facts."""
        return load_facts(self._writer)

    def write(self, items: Iterable[Item], upkeep: Upkeep | None) -> list[Stored]:
        """Write all in one transaction and return the batches, with their seqs, when it is durable.

        An error leaves it open whether anything was written. Never call again after one: what a failed fsync
        did not write may look clean to the next (see PostgreSQL's "fsyncgate").
        """
        before = self._state
        with translated(self.path):
            self._writer.execute("BEGIN IMMEDIATE")
            if upkeep is not None:
                self._keep_up(upkeep)
            stored = [stored for item in items if (stored := self._put(item)) is not None]
            if self._state is not before:
                save_state(self._writer, self._state)
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
        rows: deque[_Row] = deque()
        # the rows first, then the decoding: an unfinished statement would keep the log from starting again
        with translated(self.path), self._reader() as connection:
            for values in connection.execute(query, (after_seq, last_seq)):
                row = _Row(*values)
                max_bytes -= row.size
                if rows and max_bytes < 0:
                    break
                rows.append(row)
        if not rows:
            raise self._corrupt(f"what follows batch {after_seq} is missing")
        self._check_chain(after_seq, rows)
        stored: list[Stored] = []
        while rows:
            row = rows.popleft()  # so that it goes when it is decoded: else everything would be in memory twice
            stored.append(Stored(row.seq, self._decode(row)))
        return stored

    def seek(self, source: SourcePosition, contents: Contents) -> int:
        """Seq of the last complete batch that ends at or before `source`; the pruned ones count as one."""
        pruned_seq = contents.state.pruned_seq
        with translated(self.path), self._reader() as connection:
            row = connection.execute(_SEEK, (pruned_seq, contents.last_seq, source)).fetchone()
        return pruned_seq if row is None else int(row[0])

    def boundary(self, seq: int, state: State) -> tuple[int, SourcePosition]:
        """The last end of a transaction at or before a batch: its seq, and its position."""
        with translated(self.path), self._reader() as connection:
            row = connection.execute(_BOUNDARY, (state.pruned_seq, seq)).fetchone()
        if row is None:
            assert state.pruned_position is not None
            return state.pruned_seq, state.pruned_position
        return int(row[0]), row[1]

    def count_after(self, seq: int) -> int:
        """How many changes are kept after a batch."""
        with translated(self.path), self._reader() as connection:
            return int(connection.execute(_COUNT_AFTER, (seq,)).fetchone()[0])

    def stored_at(self, seconds: float) -> int:
        """The seq before the first batch that was stored at a time (unix seconds) or later; the last if none was."""
        with translated(self.path), self._reader() as connection:
            row = connection.execute(_BEFORE, (seconds,)).fetchone()
        return self._contents.last_seq if row[0] is None else int(row[0]) - 1

    def oldest(self, state: State) -> tuple[int, float] | None:
        """The oldest batch that is kept: its seq, and when it was stored, in unix seconds."""
        with translated(self.path), self._reader() as connection:
            row = connection.execute(_OLDEST, (state.pruned_seq,)).fetchone()
        return None if row is None else (int(row[0]), float(row[1]))

    def parked(self, sink: str) -> list[ParkedChange]:
        """A sink's parked changes, in the order of the source."""
        with translated(self.path), self._reader() as connection:
            return parked_rows.listed(connection, sink)

    def parked_batches(self, sink: str, ids: Sequence[ParkedId]) -> list[Batch]:
        """Parked changes, each as a batch by itself."""
        try:
            with translated(self.path), self._reader() as connection:
                return list(parked_rows.batches(connection, sink, ids))
        except msgspec.DecodeError as exc:
            raise self._corrupt(str(exc)) from exc

    def parked_batch(self, sink: str, parked: ParkedId) -> Batch | None:
        """A parked change as a batch, `None` if it is gone."""
        with self._reader() as connection:
            return parked_batch(self.path, connection, sink, parked)

    def close(self, *, checkpoint: bool) -> None:
        """Close all connections; with `checkpoint`, everything is in one file afterwards."""
        for connection in self._readers:
            connection.close()
        with translated(self.path):
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
                parked_rows.write(self._writer, item)
        return None

    def _insert(self, batch: Batch) -> Stored:
        before, seq, now = self._contents, self._next_seq, time.time()
        payload = encode(batch)
        header = (seq, before.last_seq, batch.position, int(batch.complete), batch.change_count, batch.size, now)
        row = _Row(*header, checksum(header, payload), payload)
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
        self._contents = count(self._writer, state)
        for key, value in restart.facts.items():
            self._put(Fact(key, value))

    def _put_cursor(self, cursor: Cursor) -> None:
        row = (cursor.sink, cursor.seq, cursor.position)
        self._writer.execute("INSERT OR REPLACE INTO cursor VALUES (?, ?, ?)", row)

    def _keep_up(self, upkeep: Upkeep) -> None:
        for sink in load_cursors(self._writer).keys() - {cursor.sink for cursor in upkeep.cursors}:
            parked_rows.forget_sink(self._writer, sink)
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
        batches, size, _ = self._writer.execute(TOTALS, (after_seq, seq)).fetchone()
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
        free_bytes = count_free_bytes(self._writer)
        if free_bytes > max(_KEPT_FREE_BYTES, 4 * self._contents.bytes):
            # a script: `execute` takes one step of a statement without columns, which here is a single page
            self._writer.executescript(f"PRAGMA incremental_vacuum({CHECKPOINT_BYTES // PAGE_BYTES})")
            self._writer.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
            self._more = True
        self._contents = msgspec.structs.replace(self._contents, free_bytes=free_bytes)

    @contextmanager
    def _reader(self) -> Iterator[sqlite3.Connection]:
        """Lend a connection that only reads: there are as many as threads ever read at the same time."""
        try:
            connection = self._readers.pop()
        except IndexError:
            connection = connect(self.path, "mode=ro")
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
        if row.crc != checksum(row[:7], row.payload):
            raise self._corrupt(f"batch {row.seq} fails its checksum")
        try:
            return decode(row.payload)
        except (msgspec.DecodeError, DecodeError) as exc:
            raise self._corrupt(f"batch {row.seq} is not a batch") from exc

    def _corrupt(self, what: str) -> QueueCorrupt:
        return corrupt(self.path, what)
