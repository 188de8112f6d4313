"""The daemon's own messages, end to end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.command import NOWHERE, Cdc
from tests.processes import wait_until
from tests.servers import Database
from tests.webhook import Webhook


@pytest.fixture
def webhook() -> Iterator[Webhook]:
    with Webhook() as webhook:
        yield webhook


def section(webhook: Webhook) -> str:
    return f'[alerts]\nwebhook = "{webhook.url}"\nafter_seconds = 0\ninterval_seconds = 0.1\n'


def test_a_server_that_is_away_is_told_of(cdc: Cdc, webhook: Webhook) -> None:
    cdc.configure(NOWHERE, NOWHERE)
    cdc.file.write_text(cdc.file.read_text() + section(webhook))
    with cdc.running():
        wait_until(lambda: webhook.messages, what=lambda: f"a message: {cdc.log}")
    assert "shop: waiting" in webhook.messages[0]["firing"]
    assert "geheim" not in cdc.log
    assert all(message["resolved"] == {} for message in webhook.messages), "stopped by a person: nothing is over"


def test_a_daemon_that_gives_up_says_why(cdc: Cdc, webhook: Webhook, source_db: Database) -> None:
    """It ends before anything could have lasted."""
    cdc.configure(source_db.url.replace(source_db.name, "not_there"), source_db.url)
    cdc.file.write_text(cdc.file.read_text() + section(webhook).replace("after_seconds = 0", "after_seconds = 600"))
    result = cdc("run")
    assert result.returncode == 1
    (message,) = webhook.messages
    assert "not_there" in message["firing"]["shop: failed"]
