"""What of a configuration may change while the daemon runs."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest

from cdc.config import Config
from cdc.config_file import parse
from cdc.errors import ConfigError
from cdc.reload import changes, reconnecting, with_passwords
from sinks import options_of

TOKEN = {"name": "operator", "token": "geheim-1", "scopes": ["admin"]}

RUNNING: dict[str, Any] = {
    "daemon": {"data_dir": "/var/lib/cdc"},
    "http": {"tokens": [TOKEN]},
    "sources": {"shop": {"url": "postgresql://me:geheim@db/shop"}},
    "sinks": {
        "mirror": {"from": "shop", "on_error": "park"},
        "feed": {
            "from": "shop",
            "kind": "data_changes",
            "entities": {"public.orders": {"type": "Order"}, "public.items": "Item"},
        },
    },
}


def read(raw: dict[str, Any]) -> Config:
    return parse(deepcopy(raw), {}, options_of=options_of)


def altered(where: str, value: Any) -> Config:
    """RUNNING with another option; where: its name, its parts apart by `/`."""
    raw = section = deepcopy(RUNNING)
    *parts, option = where.split("/")
    for part in parts:
        section = section.setdefault(part, {})
    section[option] = value
    return read(raw)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("daemon/log_level", "debug"),
        ("daemon/log_format", "json"),
        ("daemon/drain_seconds", 5.0),
        ("queue/max_bytes", 1),
        ("queue/min_free_bytes", 1),
        ("queue/keep_seconds", 60.0),
        ("http/tokens", [{**TOKEN, "token": "geheim-2"}]),
        ("http/tokens", [TOKEN, {"name": "reader", "token": "geheim-2", "scopes": ["read"]}]),
        ("sinks/mirror/batch/max_changes", 7),
        ("sinks/mirror/max_parked", 7),
        ("sinks/mirror/max_parked_bytes", 7),
        ("sinks/mirror/retry/attempts", 7),
        ("sinks/feed/retention", "7d"),
        ("sinks/feed/entities/public.orders/retention", "7d"),
    ],
)
def test_f110_may_change(where: str, value: Any) -> None:
    assert changes(read(RUNNING), altered(where, value)) == [where.replace("/", ".")]


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("daemon/data_dir", "/elsewhere"),
        ("http/address", "127.0.0.1:1"),
        ("http/origins", ["https://app.example.com"]),
        ("sources/shop/url", "postgresql://other:geheim-2@db/shop"),
        ("sources/shop/on_gap", "resync"),
        ("sources/stock", {"url": "postgresql://db/stock"}),
        ("sinks/mirror/on_error", "stop"),
        ("sinks/mirror/rename", {"public": "shop"}),
        ("sinks/feed/entities/public.orders/type", "Purchase"),
        ("sinks/other", {"from": "shop", "url": "postgresql://db/other"}),
    ],
)
def test_f110_takes_a_restart(where: str, value: Any) -> None:
    with pytest.raises(ConfigError, match="takes a restart") as caught:
        changes(read(RUNNING), altered(where, value))
    assert where.replace("/", ".") in str(caught.value)
    assert "geheim" not in str(caught.value)
    assert "restart the daemon" in caught.value.hint


@pytest.mark.parametrize(
    "tokens", [[], [TOKEN, {"name": "x", "token": "geheim-2", "scopes": ["read"], "where": {"company_id": "1"}}]]
)
def test_f110_what_a_feed_keeps_for_tokens_takes_a_restart(tokens: list[Any]) -> None:
    with pytest.raises(ConfigError, match=r"takes a restart: .*http\.tokens"):
        changes(read(RUNNING), altered("http/tokens", tokens))


def test_f110_one_that_may_not_change_keeps_the_others_from_it() -> None:
    raw = deepcopy(RUNNING)
    raw["daemon"] |= {"log_level": "debug", "data_dir": "/elsewhere"}
    with pytest.raises(ConfigError, match=r"takes a restart: daemon\.data_dir$"):
        changes(read(RUNNING), read(raw))


def test_f110_passwords_of_urls_may_change() -> None:
    """The mirror's url follows from the source's."""
    wanted = altered("sources/shop/url", "postgresql://me:geheim-2@db/shop")
    assert changes(read(RUNNING), wanted) == ["sources.shop.url", "sinks.mirror.url"]
    assert with_passwords(read(RUNNING), wanted) == wanted
    assert reconnecting(read(RUNNING), wanted) == ["shop", "mirror", "feed"]


def test_f110_a_webhook_is_secret_as_a_whole_and_takes_a_restart() -> None:
    running, wanted = (altered("alerts/webhook", f"https://{name}.example.com") for name in ("one", "two"))
    with pytest.raises(ConfigError, match=r"takes a restart: alerts\.webhook"):
        changes(running, wanted)


def test_nothing_has_changed() -> None:
    assert changes(read(RUNNING), read(RUNNING)) == []
