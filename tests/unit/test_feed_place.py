"""Where a feed is kept, and which configurations of it are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cdc.config import Config
from cdc.config_file import parse
from cdc.errors import ConfigError
from cdc.feed.place import place_of, served
from sinks import options_of


def configured(**sinks: dict[str, Any]) -> Config:
    """Two sources, and sinks of kind data_changes."""
    sources = {name: {"url": f"postgresql://db/{name}"} for name in ("shop", "depot")}
    feeds = {name: {"kind": "data_changes", "from": "shop"} | sink for name, sink in sinks.items()}
    return parse({"sources": sources, "sinks": feeds}, {}, options_of=options_of)


@pytest.mark.parametrize("scheme", ["mysql", "redis", "sqlite"])
def test_f112_another_database_is_refused_and_not_taken_for_sqlite(scheme: str, tmp_path: Path) -> None:
    config = configured(changes={"url": f"{scheme}://me:geheim@db/feed"})
    with pytest.raises(ConfigError, match=rf"sinks\.changes\.url: no feed can be kept in '{scheme}'") as caught:
        place_of(config.sinks["changes"], tmp_path)
    assert "geheim" not in f"{caught.value}{caught.value.hint}"


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        (None, "sqlite"),
        ("postgresql://db/feed", "postgres"),
        ("postgres://db/feed", "postgres"),
        ("host=db dbname=feed", "postgres"),
        ("mongodb://db/feed", "mongodb"),
        ("mongodb+srv://db/feed", "mongodb"),
    ],
)
def test_the_url_tells_the_kind(url: str | None, kind: str, tmp_path: Path) -> None:
    config = configured(changes={} if url is None else {"url": url})
    assert place_of(config.sinks["changes"], tmp_path).kind == kind


def test_f112_a_source_has_one_sink_for_a_feed() -> None:
    """They would take turns: each moves the one position that the feed has of the source."""
    with pytest.raises(
        ConfigError, match=r"sinks\.two: the sink one writes the changes of shop to this feed"
    ) as caught:
        served(configured(one={}, two={}))
    assert caught.value.hint


def test_sources_share_a_feed() -> None:
    place = served(configured(one={}, two={"from": "depot"}))
    assert place is not None
    assert place.kind == "sqlite"
