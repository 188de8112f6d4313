"""The initial copy: what is already there, from a source into a mirror, before or beside the stream of changes.

One run reads one snapshot. A table that is complete when a run ends, however it ends, stays; the others start again in
the next run, from a snapshot of its own (or go on, where a mirror can keep what there is of them).
"""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from typing import Final

import msgspec
import structlog
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from cdc.change import TableName
from cdc.position import Position, SourcePosition, format_position
from cdc.sink import Loader, Mirror
from cdc.source import Chunk, Estimate, Snapshot, SnapshotReader, Source
from cdc.stats import CopyStatus

log = structlog.get_logger()

CHUNK_BYTES: Final = 256 * 1024**2

_CHECK_SECONDS: Final = 1.0
_BAR_SECONDS: Final = 0.2
_LINE_SECONDS: Final = 10.0


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


class TableProgress(msgspec.Struct, frozen=True):
    """How far one table is. `size_done` counts in the units of `size`; `sent_bytes` is what really travelled."""

    table: TableName
    rows: int
    rows_expected: int
    size_done: int
    size: int
    sent_bytes: int
    copied: bool


class CopySnapshot(msgspec.Struct, frozen=True):
    """How far a run is, at one moment."""

    tables: tuple[TableProgress, ...]
    rows: int
    sent_bytes: int
    size_done: int
    size: int
    seconds: float

    @property
    def rows_per_second(self) -> float:
        """Of complete chunks, since the start."""
        return self.rows / self.seconds if self.seconds else 0.0

    @property
    def seconds_left(self) -> float | None:
        """If it goes on at this speed; `None` before there is one."""
        return self.seconds * (self.size - self.size_done) / self.size_done if self.size_done else None

    def status(self) -> CopyStatus:
        """In the vocabulary of `cdc.status`."""
        return CopyStatus(
            tables_done=sum(table.copied for table in self.tables),
            tables_expected=len(self.tables),
            rows_done=self.rows,
            rows_expected=sum(max(table.rows, table.rows_expected) for table in self.tables),
            bytes_done=self.size_done,
            bytes_expected=self.size,
            seconds_left=self.seconds_left,
        )


class CopyProgress:
    """Counts what a run does. Every method may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._started: float | None = None
        self._chunks: dict[TableName, list[Chunk]] = {}
        self._under_way: Counter[Chunk] = Counter()
        self._rows: Counter[TableName] = Counter()
        self._sizes: Counter[TableName] = Counter()
        self._sent: Counter[TableName] = Counter()
        self._copied: set[TableName] = set()

    def expect(self, table: TableName, chunks: Iterable[Chunk]) -> None:
        """A table is going to be copied, from its first chunk or again. The clock starts with the first table."""
        with self._lock:
            self._started = self._started or time.monotonic()
            self._chunks[table] = list(chunks)
            del self._sizes[table]
            for chunk in [chunk for chunk in self._under_way if chunk.table == table]:
                del self._under_way[chunk]

    def sent(self, chunk: Chunk, count: int) -> None:
        """So many bytes of a chunk have been relayed."""
        with self._lock:
            self._under_way[chunk] += count
            self._sent[chunk.table] += count

    def chunk_done(self, chunk: Chunk, rows: int) -> None:
        """A chunk is in the mirror."""
        with self._lock:
            self._under_way.pop(chunk, None)
            self._sizes[chunk.table] += chunk.size
            self._rows[chunk.table] += rows

    def table_done(self, table: TableName) -> None:
        """A table is complete."""
        with self._lock:
            self._copied.add(table)

    def snapshot(self) -> CopySnapshot:
        """Everything, at this moment."""
        with self._lock:
            partly: Counter[TableName] = Counter()
            for chunk, count in self._under_way.items():
                partly[chunk.table] += min(count, chunk.size)
            tables = tuple(self._table(table, chunks, partly[table]) for table, chunks in self._chunks.items())
        return CopySnapshot(
            tables=tables,
            rows=sum(table.rows for table in tables),
            sent_bytes=sum(table.sent_bytes for table in tables),
            size_done=sum(table.size_done for table in tables),
            size=sum(table.size for table in tables),
            seconds=time.monotonic() - self._started if self._started else 0.0,
        )

    def _table(self, table: TableName, chunks: Sequence[Chunk], partly: int) -> TableProgress:
        return TableProgress(
            table=table,
            rows=self._rows[table],
            rows_expected=sum(chunk.rows for chunk in chunks),
            size_done=self._sizes[table] + partly,
            size=sum(chunk.size for chunk in chunks),
            sent_bytes=self._sent[table],
            copied=table in self._copied,
        )


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
        """Copy what is not copied yet, build keys and set sequences; build the rest if the mirror is consistent then.

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
        if complete:
            self._mirror.build_keys()
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
        return not others and self._mirror.finish_copy(position)

    def _copy_tables(self, snapshot: Snapshot, tables: Iterable[TableName], stop: threading.Event) -> None:
        run = _Run(snapshot, self._mirror, self.progress, stop)
        for table in tables:
            split = partial(snapshot.chunks, table, self._chunk_bytes)
            run.add(table, self._mirror.pending(table, snapshot.position, split))
        begun_at = format_position(snapshot.position)
        log.info("copy started", sink=self._mirror.name, tables=len(run.left), snapshot=begun_at)
        run.copy(self._workers)


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
        return loader.load(chunk.table, self._relayed(chunk, blocks), binary=binary)

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


@contextmanager
def reported(progress: CopyProgress, console: Console) -> Iterator[None]:
    """Show progress while the block runs: bars on a terminal, a log line now and then elsewhere."""
    done = threading.Event()
    show = _show_bars if console.is_terminal else _log_lines
    reporter = threading.Thread(target=show, args=(progress, console, done), name="copy-progress", daemon=True)
    reporter.start()
    try:
        yield
    finally:
        done.set()
        reporter.join()


def _log_lines(progress: CopyProgress, _console: Console, done: threading.Event) -> None:
    while not done.wait(_LINE_SECONDS):
        now = progress.snapshot()
        status = now.status()
        log.info(
            "copying",
            tables=f"{status.tables_done}/{status.tables_expected}",
            rows=now.rows,
            megabytes=now.sent_bytes // 1_000_000,
            rows_per_second=round(now.rows_per_second),
            seconds_left=None if now.seconds_left is None else round(now.seconds_left),
        )


def _show_bars(progress: CopyProgress, console: Console, done: threading.Event) -> None:
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%  {task.fields[rows]:>12,} rows  {task.fields[note]}"),
        console=console,
        auto_refresh=False,
    ) as bars:
        total = bars.add_task("[bold]all tables", total=None, rows=0, note="")
        tasks: dict[TableName, TaskID] = {}
        ended = False
        while not ended:
            ended = done.wait(_BAR_SECONDS)
            _update_bars(bars, total, tasks, progress.snapshot())


def _update_bars(bars: Progress, total: TaskID, tasks: dict[TableName, TaskID], now: CopySnapshot) -> None:
    """One bar for each table that is under way (never hundreds), and one for the whole."""
    for table in now.tables:
        if table.copied and (task := tasks.pop(table.table, None)) is not None:
            bars.remove_task(task)
        elif table.sent_bytes and not table.copied:
            if table.table not in tasks:
                tasks[table.table] = bars.add_task(str(table.table), rows=0, note="")
            bars.update(tasks[table.table], total=max(table.size, 1), completed=table.size_done, rows=table.rows)
    left = "" if now.seconds_left is None else f"{now.seconds_left:,.0f} s left"
    note = f"{now.rows_per_second:,.0f} rows/s  {left}"
    bars.update(total, total=max(now.size, 1), completed=now.size_done, rows=now.rows, note=note)
    bars.refresh()
