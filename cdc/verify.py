"""Are a source and its mirror equal? Counts and hashes a key range, narrowed down to the keys that differ.

Each server hashes its own rows, so that little more than a number a range travels. With a `Barrier` the answer is exact
while both databases go on: the mirror is seen as it stands at the very position of the source's snapshot.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, as_completed, wait
from contextlib import ExitStack, closing
from itertools import accumulate, pairwise
from typing import Final, NamedTuple, Protocol, TypeVar

import msgspec

from cdc.barrier import Barrier
from cdc.change import TableName
from cdc.errors import PermanentError, TransientError
from cdc.position import SourcePosition, format_position
from cdc.verify_report import Keys, TableReport, VerifyReport

LISTED_ROWS: Final = 100_000
"""Ranges that differ are split until they have no more rows than this together; then they are compared row by row."""

NARROWED_RANGES: Final = 16
"""So many differing ranges are split at once; what lies in the others is only counted where that is certain."""

_PIECES: Final = 128
"""A step's new ranges: a server looks through half of the bounds for each row."""

T = TypeVar("T")


class NotComparable(PermanentError):
    """A table cannot be compared: it, or a column of it, is missing on one side."""


class KeyRange(NamedTuple):
    """Keys from `low` to below `high`, both in an order that is that of Python's strings; `None` is open."""

    low: str | None = None
    high: str | None = None

    def cut(self, bounds: Iterable[str]) -> list[KeyRange]:
        """The ranges between `bounds`, which lie within this one."""
        edges = [self.low, *sorted(set(bounds) - {self.low, self.high}), self.high]
        return [KeyRange(low, high) for low, high in pairwise(edges)]


class RangeDigest(NamedTuple):
    """What a range holds: equal digests mean equal rows (but for one chance in 2**64)."""

    rows: int
    hash: int


class RowDigest(NamedTuple):
    """`copies` rows that show the same key and hash to the same number."""

    key: str
    hash: int
    copies: int


class Comparable(Protocol):
    """One connection into a view, which reads one table at a time. All methods may raise `NotComparable`."""

    def bounds(self, table: TableName, parts: int) -> list[str]:
        """Up to `parts - 1` bounds that split the table about evenly, from a sample."""
        ...

    def digest(self, table: TableName, ranges: Sequence[KeyRange]) -> list[RangeDigest]:
        """One digest for each of `ranges` (which do not overlap), in one scan of the table."""
        ...

    def split(self, table: TableName, ranges: Sequence[KeyRange], pieces: int) -> list[list[str]]:
        """For each of `ranges` up to `pieces - 1` bounds that split its rows evenly, exactly."""
        ...

    def rows(self, table: TableName, ranges: Sequence[KeyRange]) -> Iterator[RowDigest]:
        """Every row of `ranges`, in any order. The key is for people, and equal on both sides for the same row."""
        ...

    def cancel(self) -> None:
        """Make the call that runs in another thread fail soon. Nothing happens if none runs."""
        ...

    def close(self) -> None:
        """Disconnect. Safe to call twice."""
        ...


class View(Protocol):
    """All tables of one database as they were at one moment."""

    def reader(self) -> Comparable:
        """Open one more connection into the view."""
        ...

    def close(self) -> None:
        """Let no more readers in. Safe to call twice."""
        ...


class SourceView(View, Protocol):
    """A view of a source: transactions that commit below `position`, and no others, are visible."""

    @property
    def position(self) -> SourcePosition:
        """Where the view was taken."""
        ...

    def nudge(self) -> None:
        """Write something harmless at the source, so that its stream passes `position` soon."""
        ...


Progress = Callable[[TableName, TableReport | None], None]
"""Called when a table is begun (`None`) and when it is done, from several threads."""


def verify(
    source: View,
    target: View,
    tables: Sequence[TableName],
    *,
    workers: int = 2,
    parts: int = 64,
    max_keys: int = 20,
    progress: Progress = lambda _table, _report: None,
) -> VerifyReport:
    """Compare two views, `workers` tables at a time, and close them.

    parts: ranges that a table is compared by at first. max_keys: keys that are named of each table and kind.
    """
    started = time.monotonic()
    with ExitStack() as stack:
        stack.enter_context(closing(source))
        stack.enter_context(closing(target))
        pairs = []
        for _ in range(max(1, min(workers, len(tables)))):
            one = stack.enter_context(closing(source.reader()))
            pairs.append((one, stack.enter_context(closing(target.reader()))))
        reports = _compare_all(pairs, tables, parts, max_keys, progress)
    return VerifyReport(
        equal=all(report.equal for report in reports),
        exact=False,
        tables=tuple(reports),
        seconds=round(time.monotonic() - started, 3),
    )


def verify_at_barrier(
    open_source: Callable[[], SourceView],
    open_target: Callable[[], View],
    barrier: Barrier,
    tables: Sequence[TableName],
    *,
    hold_seconds: float = 60.0,
    workers: int = 2,
    parts: int = 64,
    max_keys: int = 20,
    progress: Progress = lambda _table, _report: None,
) -> VerifyReport:
    """Compare at one position of the source. The mirror stands still only while the views are opened."""
    with ExitStack() as stack:
        try:
            # before the source's view is taken: a mirror that keeps up would be past it by the time it is asked
            barrier.hold(None, hold_seconds)
            source = stack.enter_context(closing(open_source()))
            source.nudge()
            asked = time.monotonic()
            held = barrier.hold(source.position, hold_seconds)
            target = stack.enter_context(closing(open_target()))
            if time.monotonic() - asked >= hold_seconds:
                raise TransientError("the hold ended before the mirror's view was open", hint="allow a longer hold")
        finally:
            barrier.release()
        report = verify(source, target, tables, workers=workers, parts=parts, max_keys=max_keys, progress=progress)
    position = format_position(source.position)
    return msgspec.structs.replace(report, exact=held.exact, lag_bytes=held.lag_bytes, position=position)


def _compare_all(
    pairs: Sequence[tuple[Comparable, Comparable]],
    tables: Sequence[TableName],
    parts: int,
    max_keys: int,
    progress: Progress,
) -> list[TableReport]:
    """Reports in the order of `tables`. An error ends all of it soon: what runs is cancelled."""
    waiting = deque(tables)
    reports: dict[TableName, TableReport] = {}

    def work(source: Comparable, target: Comparable) -> None:
        while (table := _next(waiting)) is not None:
            progress(table, None)
            reports[table] = _report(_Pair(source, target, table, pool), parts, max_keys)
            progress(table, reports[table])

    with ThreadPoolExecutor(3 * len(pairs), "verify") as pool:  # a worker, and a thread for each of its sides
        futures = [pool.submit(work, *pair) for pair in pairs]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            waiting.clear()
            _cancel_until_done(pairs, futures)
            raise
    return [reports[table] for table in tables]


def _next(waiting: deque[TableName]) -> TableName | None:
    try:
        return waiting.popleft()
    except IndexError:
        return None


def _cancel_until_done(pairs: Sequence[tuple[Comparable, Comparable]], futures: Sequence[Future[T]]) -> None:
    """Again and again: a worker may be between two calls, where there is nothing to cancel."""
    while wait(futures, timeout=0).not_done:
        for source, target in pairs:
            source.cancel()
            target.cancel()
        wait(futures, timeout=0.5)


class _Pair:
    """A table on both sides, which work at the same time."""

    def __init__(self, source: Comparable, target: Comparable, table: TableName, pool: ThreadPoolExecutor) -> None:
        self.source = source
        self.target = target
        self.table = table
        self._pool = pool

    def digest(self, ranges: Sequence[KeyRange]) -> list[_RangePair]:
        left, right = self._both(lambda side: side.digest(self.table, ranges))
        return [_RangePair(*row) for row in zip(ranges, left, right, strict=True)]

    def split(self, pairs: Sequence[_RangePair], pieces: int) -> list[KeyRange]:
        """Cut each range by the quantiles of the side that has more rows there."""
        ranges = [one.range for one in pairs]
        bounds = zip(*self._both(lambda side: side.split(self.table, ranges, pieces)), strict=True)
        return [
            piece
            for one, (source, target) in zip(pairs, bounds, strict=True)
            for piece in one.range.cut(source if one.source.rows >= one.target.rows else target)
        ]

    def rows(self, ranges: Sequence[KeyRange]) -> tuple[list[RowDigest], list[RowDigest]]:
        return self._both(lambda side: list(side.rows(self.table, ranges)))

    def _both(self, call: Callable[[Comparable], T]) -> tuple[T, T]:
        """An error on one side ends the call on the other."""
        futures = [self._pool.submit(call, side) for side in (self.source, self.target)]
        done, pending = wait(futures, return_when=FIRST_EXCEPTION)
        failed = [future for future in done if future.exception() is not None]
        if failed and pending:
            _cancel_until_done([(self.source, self.target)], futures)
        for future in failed:
            future.result()
        return futures[0].result(), futures[1].result()


class _RangePair(NamedTuple):
    range: KeyRange
    source: RangeDigest
    target: RangeDigest

    @property
    def differs(self) -> bool:
        return self.source != self.target

    @property
    def rows(self) -> int:
        return max(self.source.rows, self.target.rows)


class _Differences:
    """Collects differing rows of one table; the number of keys it keeps is bounded."""

    def __init__(self, max_keys: int) -> None:
        self.counted = True
        self._max_keys = max_keys
        self._counts = Counter[str]()
        self._keys: dict[str, list[str]] = {"missing": [], "extra": [], "different": []}

    def add(self, kind: str, count: int, key: str | None = None) -> None:
        self._counts[kind] += count
        if count and key is not None and len(self._keys[kind]) < self._max_keys:
            self._keys[kind].append(key)

    def add_unlisted(self, pair: _RangePair) -> None:
        """A range that is not followed: its rows are known to be missing or extra only where a side has none."""
        if not pair.target.rows:
            self.add("missing", pair.source.rows)
        elif not pair.source.rows:
            self.add("extra", pair.target.rows)
        else:
            self.counted = False

    def add_rows(self, source: Iterable[RowDigest], target: Iterable[RowDigest]) -> None:
        """Compare as multisets: a key may come several times where a side has no unique key."""
        surplus = Counter[tuple[str, int]]()
        for row in source:
            surplus[row.key, row.hash] += row.copies
        for row in target:
            surplus[row.key, row.hash] -= row.copies
        only_source, only_target = Counter[str](), Counter[str]()
        for (key, _), count in surplus.items():
            only_source[key] += max(count, 0)
            only_target[key] += max(-count, 0)
        for key in sorted(only_source):
            different = min(only_source[key], only_target[key])
            self.add("different", different, key)
            self.add("missing", only_source[key] - different, key)
            self.add("extra", only_target[key] - different, key)

    def found(self, kind: str) -> Keys:
        return Keys(self._counts[kind], tuple(self._keys[kind]))


def _report(pair: _Pair, parts: int, max_keys: int) -> TableReport:
    started = time.monotonic()
    problem = ""
    pairs: list[_RangePair] = []
    differences = _Differences(max_keys)
    try:
        pairs = pair.digest(KeyRange().cut(pair.source.bounds(pair.table, parts)))
        _narrow(pair, [one for one in pairs if one.differs], differences)
    except NotComparable as exc:
        problem = str(exc)
    differing = sum(one.differs for one in pairs)
    return TableReport(
        table=str(pair.table),
        source_rows=sum(one.source.rows for one in pairs),
        target_rows=sum(one.target.rows for one in pairs),
        equal=not differing and not problem,
        ranges=len(pairs),
        differing_ranges=differing,
        missing=differences.found("missing"),
        extra=differences.found("extra"),
        different=differences.found("different"),
        counted=differences.counted,
        seconds=round(time.monotonic() - started, 3),
        problem=problem,
    )


def _narrow(pair: _Pair, differing: list[_RangePair], differences: _Differences) -> None:
    """Split ranges until few rows are left, then compare those. A step is two scans, however many ranges there are."""
    while (fitting := _fitting(differing)) < len(differing):
        kept = max(fitting, NARROWED_RANGES)
        for unlisted in differing[kept:]:
            differences.add_unlisted(unlisted)
        del differing[kept:]
        if fitting >= NARROWED_RANGES:
            break
        finer = pair.split(differing, max(8, _PIECES // len(differing)))
        if len(finer) == len(differing):  # nothing left to split: equal rows, which are listed as one
            break
        differing = [one for one in pair.digest(finer) if one.differs]
    if differing:
        differences.add_rows(*pair.rows([one.range for one in differing]))


def _fitting(pairs: Sequence[_RangePair]) -> int:
    """How many of the first ranges have no more than `LISTED_ROWS` rows together."""
    return bisect_right(list(accumulate(one.rows for one in pairs)), LISTED_ROWS)
