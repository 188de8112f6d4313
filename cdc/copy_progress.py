"""How far an initial copy is, and how that is shown in a terminal or a log."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import msgspec
import structlog
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from cdc.change import TableName
from cdc.source import Chunk
from cdc.stats import CopyStatus

log = structlog.get_logger()

_BAR_SECONDS: Final = 0.2
_LINE_SECONDS: Final = 10.0


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
