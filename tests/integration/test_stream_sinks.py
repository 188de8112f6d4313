"""One contract for all sinks that are no mirrors (`cdc.sink.StreamSink`)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

import pytest

from cdc.config_file import parse
from cdc.feed.place import Place, reader
from cdc.feed.store import Wanted
from cdc.position import Position
from cdc.sink import SinkContext, StreamSink
from sinks import load
from tests.batches import TABLE, batch, end_of, idle, transaction
from tests.command import NOWHERE
from tests.documents import example_sink, module_at

START = Position("queue", 0, 0)


class Target(Protocol):
    """One kind of sink, as the contract needs it."""

    def sink(self) -> StreamSink:
        """A new one, on the same target."""
        ...

    def notes(self) -> list[str]:
        """What readers may see: the column `note` of each row, in their order."""
        ...


def build(kind: type[Any], folder: Path, **options: object) -> StreamSink:
    raw = {"from": "shop", "kind": "tried", **options}
    given = {"sources": {"shop": {"url": NOWHERE}}, "sinks": {"tried": raw}}
    config = parse(given, {}, options_of=lambda _kind: kind.Options)
    context = SinkContext(
        source=config.sources["shop"],
        data_dir=folder,
        primary_key=lambda _table: [column.name for column in TABLE.columns if column.is_key],
    )
    sink: StreamSink = kind(config.sinks["tried"], context)
    return sink


class FeedInSqlite:
    """`sinks/data_changes.py`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def sink(self) -> StreamSink:
        return build(load("data_changes"), self._folder)

    def notes(self) -> list[str]:
        with closing(reader(Place(None, self._folder))) as feed:
            feed.open()
            records = feed.scan(0, Wanted(), 1_000).records
        return [note(json.loads(record.after or b"")) for record in records]


class LinesOfJson:
    """The example in CONTRIBUTING.md."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "lines"
        self._kind = module_at(example_sink(folder)).JsonlSink

    def sink(self) -> StreamSink:
        return build(self._kind, self._path.parent, path=str(self._path))

    def notes(self) -> list[str]:
        text, _, _ = self._path.read_text().rpartition('{"position":')
        return [note(line["change"]["after"]) for line in map(json.loads, text.splitlines()) if "change" in line]


def note(row: dict[str, str]) -> str:
    """Without what only fills it up."""
    return row["note"].partition(".")[0]


@pytest.fixture(params=[FeedInSqlite, LinesOfJson])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Target:
    """Add yours here."""
    found: Target = request.param(tmp_path)
    return found


@pytest.fixture
def sink(target: Target) -> Iterator[StreamSink]:
    """One that has begun, and is open."""
    sink = target.sink()
    sink.begin(START)
    assert sink.open() == START
    yield sink
    sink.close()


def at(number: int) -> Position:
    """Behind transaction `number`."""
    return Position("queue", number, end_of(number))


def test_it_has_no_position_before_it_begins(target: Target) -> None:
    assert target.sink().stored_position() is None
    target.sink().begin(START)
    assert target.sink().stored_position() == START


def test_changes_are_visible_in_order_with_their_position(target: Target, sink: StreamSink) -> None:
    assert sink.apply([batch(1), batch(2)], at(2)).changes == 2
    assert target.notes() == ["row-1-0", "row-2-0"]
    assert target.sink().stored_position() == at(2)
    sink.apply([batch(3)], at(3))
    assert target.notes() == ["row-1-0", "row-2-0", "row-3-0"]


def test_an_unfinished_transaction_is_invisible(target: Target, sink: StreamSink) -> None:
    sink.apply([batch(1)], at(1))
    first, second = transaction(2, parts=2)
    sink.apply([first], at(1))
    assert target.notes() == ["row-1-0"]
    assert target.sink().stored_position() == at(1)
    sink.apply([second], at(2))
    assert target.notes() == ["row-1-0", "row-2-0", "row-2-1"]


def test_what_was_not_complete_is_gone_when_it_is_opened_again(target: Target, sink: StreamSink) -> None:
    sink.apply([batch(1)], at(1))
    first, second = transaction(2, parts=2)
    sink.apply([first], at(1))
    sink.close()
    sink.close()
    other = target.sink()
    with closing(other):
        assert other.open() == at(1), "the target says where it stands"
        other.apply([first, second], at(2))
    assert target.notes() == ["row-1-0", "row-2-0", "row-2-1"], "nothing is told twice"


def test_a_batch_without_changes_moves_the_position(target: Target, sink: StreamSink) -> None:
    sink.apply([batch(1)], at(1))
    sink.apply([idle(end_of(4))], at(4))
    assert target.sink().stored_position() == at(4)


def test_preparing_changes_nothing(target: Target, sink: StreamSink) -> None:
    ahead = [batch(1)]
    sink.prepare(ahead)
    assert target.notes() == []
    sink.apply(ahead, at(1))
    assert target.notes() == ["row-1-0"]


def test_it_forgets_its_position_and_begins_again(target: Target, sink: StreamSink) -> None:
    sink.apply([batch(1)], at(1))
    sink.close()
    target.sink().forget()
    assert target.sink().stored_position() is None
    target.sink().begin(at(5))
    assert sink.open() == at(5)
    sink.apply([batch(6)], at(6))
    assert target.notes() == ["row-1-0", "row-6-0"], "what was told stays"


def test_its_check_finds_nothing_wrong(target: Target) -> None:
    assert {finding.level for finding in target.sink().check()} == {"ok"}
