"""The search for differences, against a model; barriers over real HTTP; what is shown on a terminal."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import StringIO
from typing import Any, ClassVar

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from cdc import verify as subject
from cdc.barrier import HttpBarrier, NoBarrier
from cdc.change import TableName
from cdc.errors import FatalError, TransientError
from cdc.verify import Comparable, KeyRange, RangeDigest, RowDigest, verify
from cdc.verify_report import Keys, TableReport, VerifyReport, render

TABLE = TableName("public", "t")

Rows = Sequence[tuple[str, int]]


class Model:
    """Both a view and its reader: rows as (key, hash) in a list."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def reader(self) -> Comparable:
        return self

    def bounds(self, table: TableName, parts: int) -> list[str]:
        return self._quantiles(sorted(key for key, _ in self._rows), parts)

    def digest(self, table: TableName, ranges: Sequence[KeyRange]) -> list[RangeDigest]:
        return [RangeDigest(len(rows), sum(value for _, value in rows)) for rows in map(self._within, ranges)]

    def split(self, table: TableName, ranges: Sequence[KeyRange], pieces: int) -> list[list[str]]:
        return [self._quantiles(sorted(key for key, _ in self._within(one)), pieces) for one in ranges]

    def rows(self, table: TableName, ranges: Sequence[KeyRange]) -> Iterator[RowDigest]:
        for one in ranges:
            for (key, value), copies in Counter(self._within(one)).items():
                yield RowDigest(key, value, copies)

    def cancel(self) -> None: ...

    def close(self) -> None: ...

    def _within(self, one: KeyRange) -> Rows:
        low, high = one
        return [row for row in self._rows if (low is None or low <= row[0]) and (high is None or row[0] < high)]

    @staticmethod
    def _quantiles(keys: Sequence[str], parts: int) -> list[str]:
        return [keys[len(keys) * number // parts] for number in range(1, parts)] if keys else []


def compare(source: Rows, target: Rows, **options: Any) -> TableReport:
    (table,) = verify(Model(source), Model(target), [TABLE], **options).tables
    return table


def row(key: str, value: int) -> tuple[str, int]:
    """A key, and a hash of all its row as wide as the server's."""
    digest = hashlib.blake2b(f"{key}\0{value}".encode(), digest_size=8).digest()
    return key, int.from_bytes(digest, "big", signed=True)


rows = st.lists(st.builds(row, st.text("abc", max_size=3), st.integers(0, 2)), max_size=60)


@settings(max_examples=300)
@given(rows, rows, st.integers(1, 9), st.integers(0, 60))
def test_differences_are_found_exactly(source: Rows, target: Rows, parts: int, listed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subject, "LISTED_ROWS", listed)
        patch.setattr(subject, "NARROWED_RANGES", 100)  # more than there are keys
        table = compare(source, target, parts=parts, max_keys=1000)
    missing, extra = Counter(source) - Counter(target), Counter(target) - Counter(source)
    assert table.counted
    assert table.equal == (missing == extra)
    assert {*table.missing.keys, *table.extra.keys, *table.different.keys} == {key for key, _ in missing + extra}
    assert table.missing.count + table.different.count == missing.total()
    assert table.extra.count + table.different.count == extra.total()


def test_a_differing_range_beyond_the_bound_is_not_counted_unless_one_side_is_empty(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(subject, "LISTED_ROWS", 10)
    monkeypatch.setattr(subject, "NARROWED_RANGES", 2)
    rows = [row(f"{number:04}", 1) for number in range(1000)]
    table = compare(rows, [row(key, 2) for key, _ in rows], parts=50)
    assert not table.counted
    assert 1 <= table.different.count <= 10
    assert compare(rows, []).missing.count == 1000
    assert compare(rows, []).counted
    assert compare([], rows).extra.count == 1000


def test_cutting_a_range_loses_no_key() -> None:
    assert KeyRange("b", "y").cut(["m", "b", "m", "c"]) == [("b", "c"), ("c", "m"), ("m", "y")]
    assert KeyRange().cut([]) == [(None, None)]


def test_progress_tells_of_every_table_twice() -> None:
    tables = [TableName("public", f"t{number}") for number in range(9)]
    seen: list[tuple[TableName, bool]] = []
    lock = threading.Lock()

    def progress(table: TableName, report: TableReport | None) -> None:
        with lock:
            seen.append((table, report is not None))

    report = verify(Model([]), Model([]), tables, workers=3, progress=progress)
    assert [table.table for table in report.tables] == [str(table) for table in tables]
    assert sorted(seen) == [(table, done) for table in tables for done in (False, True)]


class Daemon(BaseHTTPRequestHandler):
    """Answers what the test wants, and keeps what it was asked."""

    answers: ClassVar[Mapping[str, tuple[int, bytes]]] = {}
    asked: ClassVar[list[tuple[str, object, str | None]]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((self.path, body, self.headers["Authorization"]))
        status, answer = self.answers[self.path.rpartition("/")[2]]
        self.send_response(status)
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the library's name
        """Keep quiet."""


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(Daemon, "asked", [])
    monkeypatch.setattr(Daemon, "answers", {"hold": (200, b'{"held": true}'), "release": (200, b'{"held": false}')})
    with HTTPServer(("127.0.0.1", 0), Daemon) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_the_daemon_is_asked_to_hold_and_to_release(daemon: str) -> None:
    barrier = HttpBarrier(daemon + "/", "the mirror", "secret")
    assert not barrier.hold(None, 5).exact
    assert barrier.hold(0x16B374D848, 5).exact
    barrier.release()
    path = "/sinks/the%20mirror"
    assert Daemon.asked == [
        (f"{path}/hold", {"until": None, "seconds": 5}, "Bearer secret"),
        (f"{path}/hold", {"until": "16/B374D848", "seconds": 5}, "Bearer secret"),
        (f"{path}/release", {}, "Bearer secret"),
    ]


@pytest.mark.parametrize(
    ("status", "body", "kind", "message", "hint"),
    [
        (503, b'{"error": "too late", "hint": "wait"}', TransientError, "too late", "wait"),
        (409, b'{"error": "the sink is past it"}', TransientError, "the sink is past it", ""),
        (404, b'{"error": "no such sink"}', FatalError, "no such sink", ""),
        (401, b"", FatalError, "the daemon answered with status 401", ""),
        (500, b"<html>", TransientError, "the daemon answered with status 500", ""),
        (500, b"[]", TransientError, "the daemon answered with status 500", ""),
        (200, b"{}", TransientError, "the daemon did not hold the sink", "see `cdc status`"),
        (200, b'{"held": 1}', TransientError, "the daemon did not hold the sink", "see `cdc status`"),
    ],
)
def test_a_refusal_is_a_typed_error(
    daemon: str, monkeypatch: pytest.MonkeyPatch, status: int, body: bytes, kind: type, message: str, hint: str
) -> None:
    monkeypatch.setattr(Daemon, "answers", {"hold": (status, body)})
    with pytest.raises(kind) as raised:
        HttpBarrier(daemon, "mirror").hold(1, 5)
    assert (str(raised.value), raised.value.hint) == (message, hint)  # type: ignore[attr-defined]


def test_a_daemon_that_is_not_there_is_a_transient_error_and_holds_nothing() -> None:
    with HTTPServer(("127.0.0.1", 0), Daemon) as server:
        url = f"http://127.0.0.1:{server.server_port}"
    barrier = HttpBarrier(url, "mirror")
    with pytest.raises(TransientError, match="does not answer"):
        barrier.hold(None, 1)
    barrier.release()


@pytest.mark.parametrize(
    ("position", "until", "lag"), [(70, 100, 30), (100, 70, 0), (None, 100, None), (b"a", 1, None)]
)
def test_without_a_barrier_nothing_is_exact(position: int | bytes | None, until: int, lag: int | None) -> None:
    held = NoBarrier(lambda: position).hold(until, 1)
    assert (held.exact, held.lag_bytes) == (False, lag)


def shown(report: VerifyReport) -> str:
    console = Console(file=StringIO(), width=100, force_terminal=False)
    console.print(render(report))
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def table_report(name: str, **changes: object) -> TableReport:
    table = TableReport(name, 5, 5, True, 1, 0, Keys(), Keys(), Keys(), True, 0.0)
    return msgspec.structs.replace(table, **changes)


def test_what_differs_is_shown_first_and_bounded() -> None:
    keys = Keys(1_000_000, ("([red]1[/red])", "\x1b[2Jé\n", "k" * 5000))
    differing = table_report("public.zebra", equal=False, missing=keys, counted=False)
    report = VerifyReport(False, True, (*(table_report(f"public.t{n:03}") for n in range(500)), differing), 1.0, "0/1")
    lines = shown(report).splitlines()
    assert "zebra" in lines[1]
    assert "at least 1,000,000 missing" in lines[1]
    assert "441 equal, 0 different" in shown(report)
    assert len(lines) < 80
    text = "\n".join(lines)
    assert "([red]1[/red])" in text, "markup in a key is only text"
    assert "\\x1b[2Jé\\n" in text, "a key cannot move the cursor"
    assert "and 999,997 more" in text
    assert text.endswith("the mirror differs at 0/1")


def test_what_is_not_exact_says_so() -> None:
    equal = VerifyReport(True, False, (table_report("public.t"),), 1.0, lag_bytes=1234)
    assert "not exact" in shown(equal)
    assert "1,234 bytes behind" in " ".join(shown(equal).split())
    differing = VerifyReport(False, False, (table_report("public.t", equal=False, problem="no table"),), 1.0)
    assert "not applied yet" in " ".join(shown(differing).split())
    assert "no table" in shown(differing)


def test_a_report_travels_as_json() -> None:
    report = VerifyReport(True, True, (table_report("public.t"),), 1.0, "0/1", 0)
    assert msgspec.json.decode(msgspec.json.encode(report), type=VerifyReport) == report


@pytest.mark.parametrize(("parked", "text"), [(1, "1 change is parked"), (1234, "1,234 changes are parked"), (0, "")])
def test_f89_parked_changes_are_told_as_a_reason(parked: int, text: str) -> None:
    table = table_report("public.orders", equal=False, different=Keys(1, ("7",)))
    report = VerifyReport(equal=False, exact=True, tables=(table,), seconds=1.0, position="0/1", parked=parked)
    assert (f"{text}: rows that differ may be theirs" in shown(report)) == bool(parked)
