"""A feed in SQLite, who commits to it, and a gateway that serves it; a daemon between two databases."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cdc import delivery
from cdc.api.feed import Feed
from cdc.feed.place import Place, reader, writer
from cdc.feed.store import FeedReader
from cdc.postgres import source as postgres_source
from tests.command import Cdc
from tests.feed_stores import numbered_from_one, opened
from tests.gaps import SCHEMA, Run
from tests.gateway import Gateway, Source
from tests.servers import Database


@pytest.fixture
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deliveries and sources look around often: for what is left to build, and for tables that were altered."""
    monkeypatch.setattr(delivery, "UPKEEP_SECONDS", 0.05)
    monkeypatch.setattr(postgres_source, "CATALOG_SECONDS", 0.1)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return numbered_from_one(Place(None, tmp_path))


@pytest.fixture
def source(place: Place) -> Iterator[Source]:
    source = Source(writer(place, "shop"))
    yield source
    source.close()


@pytest.fixture
def gateway(place: Place, source: Source) -> Iterator[Gateway]:
    with Gateway(Feed.at(place)) as gateway:
        yield gateway


@pytest.fixture
def feed(place: Place) -> Iterator[FeedReader]:
    """A reader of the feed, which is there and empty."""
    with opened(place):
        pass
    found = reader(place)
    found.open()
    yield found
    found.close()


@pytest.fixture
def run(cdc: Cdc, source_db: Database, target_db: Database, pg_dump: Path) -> Run:
    """It has filled its mirror, and stopped."""
    source_db.execute(SCHEMA)
    run = Run(cdc, source_db, target_db, pg_dump)
    run.fill_and_stop()
    return run
