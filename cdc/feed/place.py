"""Where a feed is kept: three kinds of stores, each a file that this is the only one to name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Final, cast

import msgspec

from cdc.config import Config, SinkConfig
from cdc.errors import ConfigError
from cdc.feed.options import FeedOptions
from cdc.feed.store import FeedReader, FeedWriter
from cdc.preflight import Finding
from cdc.secret import Secret
from cdc.urls import KINDS, kind_of

SQLITE: Final = "sqlite"

_MODULES: Final = {"sqlite": "cdc.feed.sqlite", "postgres": "cdc.postgres.feed", "mongodb": "cdc.mongodb.feed"}


class Place(msgspec.Struct, frozen=True):
    """A feed's database and table.

    url: PostgreSQL or MongoDB; `None` for SQLite, in `directory`.
    table: for PostgreSQL it may be `schema.table`.
    """

    url: Secret | None
    directory: Path
    table: str = "data_changes"

    @property
    def kind(self) -> str:
        """`sqlite`, `postgres` or `mongodb`."""
        kind = SQLITE if self.url is None else kind_of(self.url.reveal())
        assert kind is not None, "place_of() takes no other URLs"
        return kind

    @property
    def file(self) -> Path:
        """The file of an SQLite feed."""
        return self.directory / f"{self.table}.sqlite"


def place_of(config: SinkConfig, data_dir: Path) -> Place:
    """Where a sink of kind `data_changes` writes. Raises `ConfigError` for a URL of an unknown kind."""
    if config.url is not None and kind_of(url := config.url.reveal()) is None:
        raise ConfigError(
            f"sinks.{config.name}.url: no feed can be kept in {url.partition('://')[0][:20]!r}",
            hint=f"one of: {', '.join(f'{scheme}://' for scheme in KINDS)}; without a url it is SQLite, in data_dir",
        )
    options = config.options if isinstance(config.options, FeedOptions) else FeedOptions()
    return Place(config.url, data_dir, options.table)


def served(config: Config) -> Place | None:
    """The feed that is served over HTTP; `None` where there is none.

    Raises `ConfigError` where several may be meant, or where sinks are in each other's way.
    """
    feeds = {name: sink for name, sink in config.sinks.items() if isinstance(sink.options, FeedOptions)}
    data_dir = Path(config.daemon.data_dir)
    _check_writers(feeds, data_dir)
    if config.http.feed and config.http.feed not in feeds:
        raise ConfigError(
            f"http.feed: no sink of kind data_changes is called {config.http.feed!r}",
            hint=f"one of: {', '.join(feeds) or 'none'}",
        )
    chosen = [feeds[config.http.feed]] if config.http.feed else list(feeds.values())
    places = {place_of(sink, data_dir) for sink in chosen}
    if len(places) > 1:
        raise ConfigError(
            f"http.feed: the sinks {', '.join(feeds)} write to different feeds", hint="name the one that is served"
        )
    return next(iter(places), None)


def _check_writers(feeds: Mapping[str, SinkConfig], data_dir: Path) -> None:
    """A feed has one position of each source: two sinks of the same one would take turns, and undo each other."""
    writers: dict[tuple[Place, str], str] = {}
    for name, sink in feeds.items():
        other = writers.setdefault((place_of(sink, data_dir), sink.source), name)
        if other != name:
            raise ConfigError(
                f"sinks.{name}: the sink {other} writes the changes of {sink.source} to this feed already",
                hint="remove one of them, or give it a table of its own",
            )


def check(place: Place) -> Iterator[Finding]:
    """Look for what would keep a feed from being written. Changes nothing."""
    module = import_module(_MODULES[place.kind])
    yield from cast("Callable[[Place], Iterator[Finding]]", module.check)(place)


def writer(place: Place, source: str) -> FeedWriter:
    """What writes the changes of one source to a feed."""
    return cast("Callable[[Place, str], FeedWriter]", import_module(_MODULES[place.kind]).Writer)(place, source)


def reader(place: Place) -> FeedReader:
    """What reads a feed."""
    return cast("Callable[[Place], FeedReader]", import_module(_MODULES[place.kind]).Reader)(place)
