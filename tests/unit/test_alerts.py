"""What the daemon tells a webhook, and when."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from structlog.testing import capture_logs

from cdc.alerts import Alerts, conditions
from cdc.config import AlertOptions
from cdc.config_file import parse
from cdc.errors import ConfigError
from cdc.queue import QueueStats
from cdc.secret import Token
from cdc.stats import CaptureStats, DeliveryStats, OplogStatus, SlotStats, State
from cdc.status import DaemonStatus, snapshot
from tests.webhook import Webhook

NOW = 1_000_000.0
OPTIONS = AlertOptions(lag_seconds=300, after_seconds=60, interval_seconds=120)


class World:
    """A daemon whose state the test sets, and the time."""

    def __init__(self, webhook: Webhook) -> None:
        self.seconds = 0.0
        self.source = CaptureStats("shop", State.RUNNING, confirmed=1, server_end=1)
        self.sink = DeliveryStats("mirror", "shop", State.RUNNING, position=1)
        self.full = False
        self.webhook = webhook
        self.alerts = Alerts(Token(webhook.url), OPTIONS, self.status, clock=lambda: self.seconds)

    def status(self) -> DaemonStatus:
        queue = QueueStats(0, 0, None, 0, 0, 0, 0, full=self.full)
        return snapshot(version="1", started_at=NOW, sources=[(self.source, queue)], sinks=[self.sink], now=NOW)

    def after(self, seconds: float, *, last: bool = False) -> list[dict[str, object]]:
        """What is told when so much time has passed."""
        self.seconds += seconds
        before = len(self.webhook.messages)
        asyncio.run(self.alerts.look(last=last))
        return self.webhook.messages[before:]


@pytest.fixture
def world() -> Iterator[World]:
    with Webhook() as webhook:
        yield World(webhook)


def test_what_lasts_is_told_once_and_its_end_too(world: World) -> None:
    assert world.after(0) == []
    world.source.state, world.source.error = State.FAILED, "slot cdc_shop is lost"
    assert world.after(1) == []
    (message,) = world.after(60)
    assert message["firing"] == {"shop: failed": "shop has failed: slot cdc_shop is lost"}
    assert message["resolved"] == {}
    assert message["text"] == "cdc: shop has failed: slot cdc_shop is lost"
    assert world.after(1000) == []
    world.source.state = State.RUNNING
    (message,) = world.after(1)
    assert (message["firing"], list(message["resolved"])) == ({}, ["shop: failed"])  # type: ignore[call-overload]
    assert str(message["text"]).startswith("cdc: over: shop has failed")


def test_what_passes_by_itself_is_not_told(world: World) -> None:
    for _ in range(10):
        world.source.state = State.WAITING
        assert world.after(59) == []
        world.source.state = State.RUNNING
        assert world.after(1) == []


def test_messages_are_never_more_frequent_than_they_may_be(world: World) -> None:
    """What flickers for an hour is told of by as many messages as fit, with what else there was in the same ones."""
    told = []
    for second in range(3600):
        world.sink.dead = 1
        world.source.state = State.FAILED if second % 100 < 80 else State.RUNNING
        told += world.after(1)
    assert 2 <= len(told) <= 3600 / OPTIONS.interval_seconds
    assert sum("mirror: dead" in message["firing"] for message in told) == 1  # type: ignore[operator]


def test_what_the_webhook_did_not_take_is_told_again(world: World) -> None:
    world.sink.dead, world.webhook.status = 3, 500
    world.after(0)
    with capture_logs() as logged:
        assert world.after(60) == []
    assert [(entry["event"], entry["status"]) for entry in logged] == [("the webhook refused a message", 500)]
    world.webhook.status = 200
    assert world.after(1) == []
    (message,) = world.after(120)
    assert message["firing"] == {"mirror: dead": "mirror has 3 dead changes"}


def test_f113_a_webhook_that_is_away_is_not_named(world: World) -> None:
    alerts = Alerts(Token("http://127.0.0.1:1/geheim"), OPTIONS, world.status)
    world.sink.dead = 1
    with capture_logs() as logged:
        asyncio.run(alerts.look(last=True))
    assert logged[0]["event"] == "the webhook cannot be reached"
    assert "geheim" not in str(logged)


def test_f113_no_password_is_told(world: World) -> None:
    world.source.state, world.source.error = State.FAILED, "no answer from postgresql://me:geheim@db/shop"
    (message,) = world.after(0, last=True)
    assert "geheim" not in str(message)
    assert "me:" in str(message)


def test_the_last_message_waits_for_nothing(world: World) -> None:
    """As the process ends with it; and what is no longer so by that is not over."""
    world.sink.dead = 1
    world.after(0)
    assert len(world.after(60)) == 1
    world.sink.dead = 0
    world.source.state, world.source.error = State.FAILED, "another cluster"
    (message,) = world.after(0, last=True)
    assert (list(message["firing"]), message["resolved"]) == (["shop: failed"], {})  # type: ignore[call-overload]


def test_all_that_is_told_of(world: World) -> None:
    def now() -> set[str]:
        return set(conditions(world.status(), OPTIONS))

    assert now() == set()
    world.source.slot = SlotStats("s", wal_status="unreserved")
    world.source.oplog = OplogStatus(3600, 10)
    world.source.last_commit_time, world.source.server_end = NOW - 301, 9
    world.sink.dead, world.full = 1, True
    assert now() == {"shop: slot", "shop: oplog", "shop: queue", "shop: lag", "mirror: dead", "mirror: lag"}
    world.sink.state, world.source.state = State.COPYING, State.WAITING
    assert now() == {"shop: slot", "shop: oplog", "shop: queue", "shop: waiting", "mirror: dead"}


@pytest.mark.parametrize(
    "webhook", ["", "example.com/hook", "ftp://example.com/hook", "file:///etc/passwd", "http://a b"]
)
def test_what_is_no_webhook_is_refused(webhook: str) -> None:
    with pytest.raises(ConfigError, match=r"alerts\.webhook: not an URL"):
        parse({"sources": {}, "alerts": {"webhook": webhook}}, {})
