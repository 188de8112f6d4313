"""What tests of the MongoDB source share: a source without a daemon, and what it gives."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import bson

from cdc.change import Batch, Change, Ddl, Table, Transaction
from cdc.config import Config
from cdc.config_file import parse
from cdc.mongodb.source import MongoSource
from cdc.position import SourcePosition
from cdc.source import Facts as SourceFacts


class Facts(dict[str, str]):
    """Facts in memory."""

    def set(self, key: str, value: str | None) -> None:
        self.pop(key, None)
        if value is not None:
            self[key] = value


def configure(url: str, *tables: str, exclude: tuple[str, ...] = (), sinks: Any = None, **options: Any) -> Config:
    """A configuration of one source, `shop`."""
    globs: dict[str, Any] = {"exclude": list(exclude)} | ({"include": list(tables)} if tables else {})
    return parse({"sources": {"shop": {"url": url, "tables": globs, **options}}, "sinks": sinks or {}}, {})


class Reader:
    """Keeps what a source has given, as the queue would."""

    def __init__(self, source: MongoSource, position: SourcePosition | None = None) -> None:
        self.source = source
        self.batches: list[Batch] = []
        opened = source.open(position)
        assert isinstance(opened, bytes)
        self.position = opened

    def read(self) -> Batch | None:
        batch = self.source.read(0.1)
        if batch is not None:
            self.batches.append(batch)
            if batch.complete:
                assert isinstance(batch.position, bytes)
                self.position = batch.position
        return batch

    def until(self, done: Callable[[], bool], *, seconds: float = 60.0) -> None:
        """Read until a condition holds."""
        deadline = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < deadline, "it never came"
            self.read()

    def changes_until(self, count: int) -> list[Change]:
        """Read until there are so many changes, and then once more: there must not be others."""
        self.until(lambda: len(self.changes()) >= count)
        self.read()
        assert len(self.changes()) == count
        return self.changes()

    def transactions(self) -> list[Transaction]:
        return [transaction for batch in self.batches for transaction in batch.transactions]

    def changes(self) -> list[Change]:
        return [change for transaction in self.transactions() for change in transaction.changes]

    def kinds(self) -> list[str]:
        """`operation database.collection` of each change."""
        return [
            f"{kind_of(change)} {name_of(batch, change)}"
            for batch in self.batches
            for transaction in batch.transactions
            for change in transaction.changes
        ]

    def documents(self) -> dict[Any, Any]:
        """What a mirror of one collection would hold, by `_id`."""
        held: dict[Any, Any] = {}
        for change in self.changes():
            if change.operation <= 2:
                assert change.key is not None
                key = bson.decode(change.key)["_id"]
                if change.operation == 2:
                    held.pop(key, None)
                elif change.after is not None:
                    held[key] = bson.decode(change.after)
        return held


def kind_of(change: Change) -> str:
    return change.detail.kind if isinstance(change.detail, Ddl) else ("insert", "update", "delete")[change.operation]


def name_of(batch: Batch, change: Change) -> str:
    table: Table | None = batch.tables[change.table] if change.table >= 0 else None
    return str(table.qualified) if table else "-"


@contextmanager
def streaming(
    config: Config, position: SourcePosition | None = None, facts: SourceFacts | None = None
) -> Iterator[Reader]:
    """A reader of the configured source; closed at the end."""
    source = MongoSource(config, config.sources["shop"], facts if facts is not None else Facts())
    try:
        yield Reader(source, position)
    finally:
        source.close()
