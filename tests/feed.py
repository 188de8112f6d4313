"""A daemon with a feed, and what its readers see."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from cdc.errors import CdcError
from cdc.feed.place import Place, reader
from cdc.feed.record import Record
from cdc.feed.store import SCAN_ROWS, FeedReader, Wanted
from cdc.secret import Secret
from tests.command import Cdc
from tests.processes import wait_until


class FeedDaemon(Cdc):
    """`cdc` with one source `shop` and one sink `changes`, in a store of the test's choice."""

    def __init__(self, folder: Path, source_url: str, feed_url: str | None = None) -> None:
        super().__init__(folder)
        self.source_url, self.feed_url = source_url, feed_url
        self.place = Place(None if feed_url is None else Secret(feed_url), self.data_dir)
        self.reader: FeedReader = reader(self.place)
        self._opened = False
        self._seen: list[Record] = []

    def write(self, options: str = "", *, source: str = "", more: str = "") -> None:
        """Write the configuration: raw TOML for the sink, the source, and the end of the file."""
        url = "" if self.feed_url is None else f'url = "{self.feed_url}"'
        self.file.write_text(
            f"""
            {self.surrounded}
            [sources.shop]
            url = "{self.source_url}"
            {source}
            [sinks.changes]
            kind = "data_changes"
            from = "shop"
            {url}
            {options}
            {more}
            """
        )

    @contextmanager
    def following(self) -> Iterator[None]:
        """Run the daemon, from the moment on at which changes go to the feed."""
        with self.running():
            self.wait_running()
            yield

    def wait_running(self) -> None:
        """Wait until changes go to the feed."""
        wait_until(lambda: self.sink["state"] == "running", what=lambda: f"the feed to begin: {self.log}")

    @property
    def sink(self) -> dict[str, Any]:
        """The sink's status."""
        found: dict[str, Any] = self.status()["sinks"]["changes"]
        return found

    def records(self) -> list[Record]:
        """Everything that was ever seen by a reader which polls by cursor."""
        more = True
        while more:
            try:
                if not self._opened:
                    self.reader.open()
                    self._opened = True
                scan = self.reader.scan(self._seen[-1].id if self._seen else 0, Wanted(), SCAN_ROWS)
            except CdcError:  # it has not begun, or is away
                break
            self._seen += scan.records
            more = scan.more
        return list(self._seen)

    def read_anew(self) -> None:
        """Begin to poll at the beginning, as of another feed."""
        self._seen.clear()

    def head(self) -> int:
        """The last id that readers see."""
        self.records()
        return self.reader.head()

    def wait_for(self, condition: Callable[[list[Record]], object], *, what: str = "records") -> list[Record]:
        """Wait until what readers see is as it should be; return that."""
        seen: list[Record] = []

        def look() -> object:
            seen[:] = self.records()
            return condition(seen)

        wait_until(
            look, timeout_seconds=60, what=lambda: f"{what}; there are {len(seen)}: {seen[-3:]}\n{self.log[-3000:]}"
        )
        return seen


def after(record: Record) -> Any:
    """A record's later image, decoded."""
    return None if record.after is None else msgspec.json.decode(record.after)


def assert_ordered(records: list[Record]) -> None:
    """Ids, times and versions only ever go up, and no version is missing or told twice."""
    assert [record.id for record in records] == sorted({record.id for record in records})
    assert [record.recorded_at for record in records] == sorted(record.recorded_at for record in records)
    versions: dict[tuple[str, str, str], int] = {}
    for record in records:
        entity = (record.source, record.entity_type, record.entity_id)
        assert record.version == versions.get(entity, 0) + 1, record
        versions[entity] = record.version
