"""The initial copy: what is already there, from a source into a mirror, before or beside the stream of changes.

One run reads one snapshot. A table that is complete when a run ends, however it ends, stays; the others start again in
the next run, from a snapshot of its own (or go on, where a mirror can keep what there is of them).
"""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import Final

import msgspec
import structlog

from cdc.change import TableName
from cdc.copy_progress import CopyProgress
from cdc.position import Position, SourcePosition, format_position
from cdc.sink import Loader, Mirror
from cdc.source import Chunk, Estimate, Snapshot, SnapshotReader, Source

log = structlog.get_logger()

CHUNK_BYTES: Final = 256 * 1024**2

_WHOLE_SHARE: Final = 1.5
"""So many times what each worker has to copy may be in a table that is copied as a whole, if its parts are not kept. In
parts it takes PostgreSQL half as long again (`cdc.postgres.loader`).
"""

_CHECK_SECONDS: Final = 1.0


class PlannedTable(msgspec.Struct, frozen=True):
    """What a run would do with one table. `rows` and `size` are the source's estimates."""

    table: TableName
    rows: int
    size: int
    copied_at: SourcePosition | None


class CopyResult(msgspec.Struct, frozen=True):
    """What a run did.

    copied: the tables that it completed. complete: whether none is left to copy.
    finished: whether indexes, constraints and triggers are built too; otherwise that waits for the stream.
    """

    copied: tuple[TableName, ...]
    rows: int
    seconds: float
    complete: bool
    finished: bool


class Copy:
    """Copies tables from a source into a mirror that the stream does not write to meanwhile.

    start: where the stream of changes begins, at or before any snapshot that is taken now.
    """

    def __init__(
        self,
        source: Source,
        mirror: Mirror,
        tables: Sequence[TableName],
        start: Position,
        *,
        workers: int = 2,
        chunk_bytes: int = CHUNK_BYTES,
        progress: CopyProgress | None = None,
    ) -> None:
        self.progress = progress or CopyProgress()
        self._source = source
        self._mirror = mirror
        self._tables = tables
        self._start = start
        self._workers = workers
        self._chunk_bytes = chunk_bytes

    def plan(self) -> list[PlannedTable]:
        """What `run` would do. Changes nothing."""
        copied, estimates = self._copied(), self._source.estimates()
        return [
            PlannedTable(table, estimate.rows, estimate.size, copied.get(table))
            for table in self._tables
            for estimate in [estimates.get(table, Estimate(0, 0))]
        ]

    def run(self, stop: threading.Event | None = None) -> CopyResult:
        """Copy what is not copied yet, set sequences and build keys; build the rest if the mirror is consistent then.

        Does not touch the source if nothing is left to copy. Ends within a block once `stop` is set. Raises
        `TransientError` where another run may succeed (the snapshot is lost, a connection is): it goes on with the
        tables that are not complete.
        """
        stop = stop or threading.Event()
        started, rows_before = time.monotonic(), self.progress.snapshot().rows
        already = self._copied()
        missing = [table for table in self._tables if table not in already]
        if missing or not already:
            schema = self._source.dump_schema()
            self._mirror.prepare_copy(self._tables, self._start, schema)
        if missing and not stop.is_set():
            with closing(self._source.snapshot()) as snapshot:
                snapshot.check_schema(schema, missing)
                self._copy_tables(snapshot, missing, stop)
        copied = self._copied()
        done = tuple(table for table in missing if table in copied)
        complete = len(copied) == len(self._tables)
        if done:
            self._mirror.set_sequences(self._source.sequences())
        return CopyResult(
            copied=done,
            rows=self.progress.snapshot().rows - rows_before,
            seconds=time.monotonic() - started,
            complete=complete,
            finished=complete and self._finish(set(copied.values()) or {self._start.source}),
        )

    def _copied(self) -> dict[TableName, SourcePosition]:
        copied = self._mirror.copied()
        return {table: copied[table] for table in self._tables if table in copied}

    def _finish(self, positions: set[SourcePosition]) -> bool:
        """Tables of different snapshots are not consistent with each other until the stream has passed the latest."""
        position, *others = positions
        if others:
            self._mirror.build_keys()
            return False
        return self._mirror.finish_copy(position)

    def _copy_tables(self, snapshot: Snapshot, tables: Sequence[TableName], stop: threading.Event) -> None:
        run = _Run(snapshot, self._mirror, self.progress, stop)
        whole = () if self._mirror.keeps_parts else self._whole(snapshot, tables)
        for table in tables:
            split = partial(snapshot.chunks, table, sys.maxsize if table in whole else self._chunk_bytes)
            run.add(table, self._mirror.pending(table, snapshot.position, split))
        begun_at = format_position(snapshot.position)
        log.info("copy started", sink=self._mirror.name, tables=len(run.left), snapshot=begun_at)
        run.copy(self._workers)

    def _whole(self, snapshot: Snapshot, tables: Sequence[TableName]) -> Collection[TableName]:
        """Tables that are not cut, because no worker would be at one alone while all others have nothing to do."""
        sizes = {table: sum(chunk.size for chunk in snapshot.chunks(table, sys.maxsize)) for table in tables}
        most = _WHOLE_SHARE * sum(sizes.values()) / self._workers
        return {table for table, size in sizes.items() if size <= most}


class _Run:
    """One snapshot's chunks, the workers that relay them, and what is left to do."""

    def __init__(self, snapshot: Snapshot, mirror: Mirror, progress: CopyProgress, stop: threading.Event) -> None:
        self.left: dict[TableName, int] = {}
        self._snapshot = snapshot
        self._mirror = mirror
        self._progress = progress
        self._stop = stop
        self._failed = threading.Event()
        self._rows: Counter[TableName] = Counter()
        self._chunks: dict[TableName, Sequence[Chunk]] = {}
        self._pending: deque[Chunk] = deque()
        self._results: queue.SimpleQueue[tuple[Chunk, int] | Exception | None] = queue.SimpleQueue()

    def add(self, table: TableName, chunks: Sequence[Chunk]) -> None:
        self._chunks[table] = chunks
        self.left[table] = len(chunks)
        self._progress.expect(table, chunks)

    def copy(self, workers: int) -> None:
        """Return when all is copied or `stop` is set; raise the first error, once every worker has ended."""
        # the largest table first: its chunks must not be what everybody waits for at the end
        by_size = sorted(self._chunks.values(), key=lambda chunks: -sum(chunk.size for chunk in chunks))
        self._pending.extend(chunk for chunks in by_size for chunk in chunks)
        threads = [
            threading.Thread(target=self._work, name=f"copy-{n}")
            for n in range(min(workers, max(1, len(self._pending))))
        ]
        for thread in threads:
            thread.start()
        try:
            error = self._collect(len(threads))
        finally:
            self._failed.set()
            for thread in threads:
                thread.join()
        if error is not None:
            raise error

    def _collect(self, workers: int) -> Exception | None:
        """Record finished tables until all workers have ended; the first error, if there was one."""
        error: Exception | None = None
        for table in [table for table, left in self.left.items() if not left]:
            self._table_done(table)
        while workers:
            try:
                result = self._next_result()
                if result is None:
                    workers -= 1
                elif isinstance(result, Exception):
                    raise result
                elif error is None:
                    self._chunk_done(*result)
            except Exception as exc:  # noqa: BLE001 - raised by `copy`, once every worker has ended
                error = error or exc
                self._failed.set()
        return error

    def _next_result(self) -> tuple[Chunk, int] | Exception | None:
        while True:
            try:
                return self._results.get(timeout=_CHECK_SECONDS)
            except queue.Empty:
                if not self._failed.is_set():
                    self._snapshot.check()

    def _chunk_done(self, chunk: Chunk, rows: int) -> None:
        self._mirror.chunk_copied(chunk, rows)
        self._progress.chunk_done(chunk, rows)
        self._rows[chunk.table] += rows
        self.left[chunk.table] -= 1
        if not self.left[chunk.table]:
            self._table_done(chunk.table)

    def _table_done(self, table: TableName) -> None:
        self._snapshot.check()  # its locks held until now, or ranges may have been read twice or never
        self._mirror.table_copied(table, self._snapshot.end(table), self._rows[table])
        self._progress.table_done(table)
        log.info("table copied", sink=self._mirror.name, table=str(table), rows=self._rows[table])

    def _work(self) -> None:
        try:
            with closing(self._snapshot.reader()) as reader, closing(self._mirror.loader()) as loader:
                while (chunk := self._next_chunk()) is not None:
                    self._results.put((chunk, self._relay(chunk, reader, loader)))
        except _Ended:
            pass
        except Exception as exc:  # noqa: BLE001 - handed to `_collect`
            self._results.put(exc)
        finally:
            self._results.put(None)

    def _next_chunk(self) -> Chunk | None:
        try:
            return None if self._ending() else self._pending.popleft()
        except IndexError:
            return None

    def _relay(self, chunk: Chunk, reader: SnapshotReader, loader: Loader) -> int:
        binary = self._binary(chunk.table)
        columns = list(self._mirror.column_types(chunk.table))
        blocks = reader.read(chunk, columns=columns, binary=binary)
        whole = len(self._chunks[chunk.table]) == 1
        return loader.load(chunk.table, self._relayed(chunk, blocks), binary=binary, whole=whole)

    def _relayed(self, chunk: Chunk, blocks: Iterable[bytes]) -> Iterator[bytes]:
        for block in blocks:
            if self._ending():
                raise _Ended
            yield block
            self._progress.sent(chunk, len(block))

    def _ending(self) -> bool:
        return self._stop.is_set() or self._failed.is_set()

    def _binary(self, table: TableName) -> bool:
        """Whether COPY's binary format is exact: for every column, and the same type on both sides."""
        exact = self._snapshot.binary_columns(table)
        return all(exact.get(column) == kind for column, kind in self._mirror.column_types(table).items())


class _Ended(Exception):
    """A worker was told to end in the middle of a chunk."""
