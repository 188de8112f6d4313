"""The copy engine with a source and a mirror in memory: what is copied, recorded, given up."""

from __future__ import annotations

import io
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import pytest
from rich.console import Console

from cdc.change import TableName
from cdc.copy import CHUNK_BYTES, Copy
from cdc.copy_progress import CopyProgress, reported
from cdc.errors import PermanentError, TransientError
from cdc.position import Position
from cdc.sink import Mirror
from cdc.source import Chunk, Estimate, Source
from tests.processes import wait_until

A, B, C = (TableName("public", name) for name in "abc")
START = Position("queue", 0, 100)


class FakeSource:
    """Tables whose chunks are lists of blocks. Also its own snapshot and reader."""

    def __init__(self, **tables: list[list[bytes]]) -> None:
        self.contents = {TableName("public", name): chunks for name, chunks in tables.items()}
        self.exact: dict[str, str] = {"id": "integer"}
        self.position = 200
        self.snapshots = 0
        self.lost = False
        self.read_order: list[Chunk] = []
        self.cut: dict[TableName, int] = {}

    def dump_schema(self) -> object:
        return "schema"

    def sequences(self) -> object:
        return "sequences"

    def estimates(self) -> Mapping[TableName, Estimate]:
        return {table: Estimate(rows=10, size=100) for table in self.contents}

    def snapshot(self) -> FakeSource:
        self.snapshots += 1
        return self

    def chunks(self, table: TableName, chunk_bytes: int) -> Sequence[Chunk]:
        self.cut[table] = chunk_bytes
        parts = enumerate(self.contents[table])
        return [Chunk(table, (n,), rows=len(blocks), size=sum(map(len, blocks))) for n, blocks in parts]

    def check_schema(self, schema: object, tables: Collection[TableName]) -> None:
        """Never altered."""

    def binary_columns(self, table: TableName) -> dict[str, str]:
        return self.exact

    def end(self, table: TableName) -> int:
        return self.position

    def check(self) -> None:
        if self.lost:
            raise TransientError("the snapshot is lost")

    def reader(self) -> FakeSource:
        return self

    def read(self, chunk: Chunk, *, columns: Sequence[str], binary: bool) -> Iterator[bytes]:
        self.read_order.append(chunk)
        yield from self.contents[chunk.table][cast("int", chunk.part[0])]

    def close(self) -> None:
        pass


class FakeMirror:
    """Remembers what it was told. Also its own loader."""

    name = "mirror"

    def __init__(self, *, keeps_parts: bool = True) -> None:
        self.keeps_parts = keeps_parts
        self.done: dict[TableName, int] = {}
        self.loaded: dict[TableName, list[bytes]] = {}
        self.calls: list[object] = []
        self.binary: set[bool] = set()
        self.fail_on: bytes | None = None
        self.kept: list[Chunk] = []

    def copied(self) -> Mapping[TableName, int]:
        return dict(self.done)

    def prepare_copy(self, tables: Sequence[TableName], start: Position, schema: object) -> None:
        self.calls.append(("prepare", tuple(tables), start, schema))

    def column_types(self, table: TableName) -> dict[str, str]:
        return {"id": "integer"}

    def pending(self, table: TableName, position: int, chunks: Callable[[], Sequence[Chunk]]) -> list[Chunk]:
        return [chunk for chunk in chunks() if chunk not in self.kept]

    def loader(self) -> FakeMirror:
        return self

    def chunk_copied(self, chunk: Chunk, rows: int) -> None:
        self.kept.append(chunk)

    def load(self, table: TableName, blocks: Iterable[bytes], *, binary: bool, whole: bool) -> int:
        self.binary.add(binary)
        taken = []
        for block in blocks:
            if block == self.fail_on:
                raise PermanentError("does not fit")
            taken.append(block)
        self.loaded.setdefault(table, []).extend(taken)
        return len(taken)

    def table_copied(self, table: TableName, position: int, rows: int) -> None:
        self.done[table] = position
        self.calls.append(("copied", table, rows))

    def build_keys(self) -> None:
        self.calls.append("keys")

    def set_sequences(self, sequences: object) -> None:
        self.calls.append(sequences)

    def finish_copy(self, position: int) -> bool:
        self.calls.append(("finish", position))
        return True

    def close(self) -> None:
        pass


def copy(source: FakeSource, mirror: FakeMirror, *, workers: int = 1, progress: CopyProgress | None = None) -> Copy:
    fakes = cast("Source", source), cast("Mirror", mirror)
    return Copy(*fakes, list(source.contents), START, workers=workers, progress=progress)


@pytest.mark.parametrize("workers", [1, 4])
def test_everything_is_copied_once_and_recorded_in_order(workers: int) -> None:
    source = FakeSource(a=[[b"1"], [b"2", b"3"]], b=[[b"4"]], c=[[]])
    mirror = FakeMirror()
    result = copy(source, mirror, workers=workers).run()
    assert {table: sorted(blocks) for table, blocks in mirror.loaded.items()} == {
        A: [b"1", b"2", b"3"],
        B: [b"4"],
        C: [],
    }
    assert mirror.done == {A: 200, B: 200, C: 200}
    assert mirror.calls[0] == ("prepare", (A, B, C), START, "schema")
    assert set(mirror.calls[1:4]) == {("copied", A, 3), ("copied", B, 1), ("copied", C, 0)}
    assert mirror.calls[4:] == ["sequences", ("finish", 200)]
    assert (result.copied, result.rows, result.complete, result.finished) == ((A, B, C), 4, True, True)


def test_the_largest_table_comes_first() -> None:
    source = FakeSource(a=[[b"1"]], b=[[b"22"], [b"22"]], c=[[b"333"]])
    copy(source, FakeMirror()).run()
    assert [chunk.table for chunk in source.read_order] == [B, B, C, A]


@pytest.mark.parametrize("keeps_parts", [False, True])
def test_only_a_table_that_others_would_wait_for_is_cut_where_parts_are_not_kept(*, keeps_parts: bool) -> None:
    whole = CHUNK_BYTES if keeps_parts else sys.maxsize
    source = FakeSource(a=[[b"x" * 60]], b=[[b"x" * 40]])
    copy(source, FakeMirror(keeps_parts=keeps_parts), workers=2).run()
    assert source.cut == {A: whole, B: whole}, "60 % for one of two workers"
    source = FakeSource(a=[[b"x" * 80]], b=[[b"x" * 20]])
    copy(source, FakeMirror(keeps_parts=keeps_parts), workers=2).run()
    assert source.cut == {A: CHUNK_BYTES, B: whole}


def test_a_table_without_chunks_is_complete_too() -> None:
    mirror = FakeMirror()
    assert copy(FakeSource(a=[]), mirror).run().complete
    assert mirror.done == {A: 200}


def test_what_is_copied_already_stays_and_waits_for_the_stream() -> None:
    source, mirror = FakeSource(a=[[b"1"]], b=[[b"2"]]), FakeMirror()
    mirror.done[A] = 150
    result = copy(source, mirror).run()
    assert mirror.loaded == {B: [b"2"]}
    assert result.copied == (B,)
    assert (result.complete, result.finished) == (True, False)
    assert mirror.calls[-1] == "keys", "the rest waits: a and b are of different snapshots"


def test_when_all_is_copied_the_source_is_left_alone_and_building_goes_on() -> None:
    source, mirror = FakeSource(a=[[b"1"]]), FakeMirror()
    mirror.done[A] = 150
    assert copy(source, mirror).run().finished
    assert source.snapshots == 0
    assert mirror.calls == [("finish", 150)]


def test_a_database_without_tables_is_mirrored_too() -> None:
    mirror = FakeMirror()
    assert copy(FakeSource(), mirror).run().finished
    assert mirror.calls == [("prepare", (), START, "schema"), ("finish", 100)]


@pytest.mark.parametrize("workers", [1, 3])
def test_an_error_ends_the_run_and_the_table_is_not_recorded(workers: int) -> None:
    source, mirror = FakeSource(a=[[b"1"], [b"bad"], [b"3"]], b=[[b"long enough to be first"]]), FakeMirror()
    mirror.fail_on = b"bad"
    with pytest.raises(PermanentError, match="does not fit"):
        copy(source, mirror, workers=workers).run()
    assert A not in mirror.done
    assert "keys" not in mirror.calls


def test_f51_a_lost_snapshot_counts_for_nothing_that_was_read_since() -> None:
    source, mirror = FakeSource(a=[[b"1"]]), FakeMirror()
    source.lost = True
    with pytest.raises(TransientError, match="the snapshot is lost"):
        copy(source, mirror).run()
    assert mirror.done == {}


def test_f51_a_snapshot_lost_in_the_middle_of_a_chunk_is_noticed_before_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cdc.copy._CHECK_SECONDS", 0.01)
    source, mirror = FakeSource(a=[[]]), FakeMirror()

    def endless(*_: object, **__: object) -> Iterator[bytes]:
        while True:
            source.lost = True
            yield b"1"

    monkeypatch.setattr(source, "read", endless)
    with pytest.raises(TransientError, match="the snapshot is lost"):
        copy(source, mirror).run()


def test_a_stop_request_ends_within_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    source, mirror, stop = FakeSource(a=[[]], b=[[b"22"]]), FakeMirror(), threading.Event()

    def endless(chunk: Chunk, **_: object) -> Iterator[bytes]:
        yield b"22"
        while chunk.table == A:
            stop.set()
            yield b"1"

    monkeypatch.setattr(source, "read", endless)
    result = copy(source, mirror).run(stop)
    assert (result.copied, result.complete, result.finished) == ((B,), False, False)
    assert mirror.done == {B: 200}
    assert "keys" not in mirror.calls


def test_stopped_before_it_began() -> None:
    source, stop = FakeSource(a=[[b"1"]]), threading.Event()
    stop.set()
    assert not copy(source, FakeMirror()).run(stop).complete
    assert source.snapshots == 0


@pytest.mark.parametrize(
    ("exact", "binary"),
    [({"id": "integer"}, True), ({"id": "bigint"}, False), ({}, False), ({"other": "integer"}, False)],
)
def test_binary_only_where_it_is_exact_for_the_same_types(exact: dict[str, str], binary: bool) -> None:
    source, mirror = FakeSource(a=[[b"1"]]), FakeMirror()
    source.exact = exact
    copy(source, mirror).run()
    assert mirror.binary == {binary}


def test_plan_tells_and_does_nothing() -> None:
    source, mirror = FakeSource(a=[[b"1"]], b=[[b"2"]]), FakeMirror()
    mirror.done[A] = 150
    plan = copy(source, mirror).plan()
    assert [(table.table, table.rows, table.size, table.copied_at) for table in plan] == [
        (A, 10, 100, 150),
        (B, 10, 100, None),
    ]
    assert mirror.calls == []


def test_progress_counts_in_the_middle_of_a_chunk() -> None:
    progress = CopyProgress()
    first, second = Chunk(A, (0,), rows=10, size=100), Chunk(A, (1,), rows=10, size=100)
    progress.expect(A, [first, second])
    progress.expect(B, [])
    progress.table_done(B)
    assert progress.snapshot().seconds_left is None
    progress.sent(first, 40)
    assert (progress.snapshot().size_done, progress.snapshot().rows) == (40, 0)
    progress.sent(first, 400)  # estimates are too low at times
    assert progress.snapshot().size_done == 100
    progress.chunk_done(first, 12)
    now = progress.snapshot()
    assert (now.size_done, now.size, now.rows, now.sent_bytes) == (100, 200, 12, 440)
    assert now.seconds_left == pytest.approx(now.seconds)
    status = now.status()
    assert (status.tables_done, status.tables_expected, status.rows_done, status.rows_expected) == (1, 2, 12, 20)


def test_progress_of_a_table_that_begins_again_begins_again() -> None:
    progress, chunk = CopyProgress(), Chunk(A, (0,), rows=10, size=100)
    progress.expect(A, [chunk])
    progress.chunk_done(chunk, 10)
    progress.sent(other := Chunk(A, (1,), rows=10, size=100), 40)
    progress.expect(A, [chunk, other])
    assert (progress.snapshot().size_done, progress.snapshot().size) == (0, 200)
    progress.chunk_done(chunk, 10)
    progress.chunk_done(other, 10)
    assert progress.snapshot().seconds_left == 0.0


def test_progress_is_bars_on_a_terminal() -> None:
    output, progress = io.StringIO(), CopyProgress()
    chunk = Chunk(A, (0,), rows=10, size=100)
    progress.expect(A, [chunk])
    with reported(progress, Console(file=output, force_terminal=True, width=120)):
        progress.sent(chunk, 50)
        wait_until(lambda: "public.a" in output.getvalue(), what="a bar for the table")
        progress.chunk_done(chunk, 1234)
        progress.table_done(A)
    assert "1,234 rows" in output.getvalue(), "the last state is shown even if the run is over at once"


def test_progress_is_log_lines_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cdc.copy_progress._LINE_SECONDS", 0.01)
    lines: list[dict[str, Any]] = []
    monkeypatch.setattr("cdc.copy_progress.log.info", lambda event, **facts: lines.append({"event": event, **facts}))
    progress = CopyProgress()
    progress.expect(A, [Chunk(A, (0,), rows=10, size=100)])
    with reported(progress, Console(file=io.StringIO())):
        wait_until(lambda: bool(lines), what="a log line")
    assert (lines[0]["event"], lines[0]["tables"], lines[0]["rows"]) == ("copying", "0/1", 0)
