"""`cdc serve` and `cdc prune`, as processes; and what the daemon removes by itself."""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.command import NOWHERE, Cdc, assert_complaint
from tests.feed import FeedDaemon
from tests.gateway import event_stream
from tests.processes import kill_tree, wait_until
from tests.servers import Database

PRODUCTS = "CREATE TABLE products (id int PRIMARY KEY, name text)"


@pytest.fixture
def daemon(tmp_path: Path, source_db: Database, target_db: Database) -> FeedDaemon:
    """Its feed is in PostgreSQL."""
    source_db.execute(PRODUCTS)
    daemon = FeedDaemon(tmp_path, source_db.url, target_db.url)
    daemon.write()
    return daemon


@contextmanager
def serving(daemon: FeedDaemon, name: str) -> Iterator[str]:
    """A gateway, and its URL; ended by SIGTERM, which it must obey."""
    log = daemon.folder / name
    surroundings = daemon.surroundings()
    with log.open("w") as file:
        surroundings["stderr"] = file
        process = subprocess.Popen(daemon.command("serve", "--listen", "127.0.0.1:0"), **surroundings)
    try:
        found = wait_until(lambda: re.search(r'"http": "(http://[^"]+)"', log.read_text()), what=log.read_text)
        yield found[1]
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0, log.read_text()
    finally:
        kill_tree(process.pid)
        process.communicate()


def test_gateways_show_the_same_feed_and_publish_into_it(daemon: FeedDaemon, source_db: Database) -> None:
    with serving(daemon, "early") as early:
        assert httpx.get(f"{early}/ready").status_code == 503, "there is no feed yet"
    with serving(daemon, "early") as early, daemon.following(), serving(daemon, "late") as late:
        for url in (early, late):
            wait_until(lambda: httpx.get(f"{url}/api/changes/poll").status_code == 200)  # noqa: B023 - used at once
            assert httpx.get(f"{url}/status").status_code == 404, "there is no daemon in a gateway"
            assert httpx.get(f"{url}/health").status_code == 200
            assert httpx.get(f"{url}/ready").json() == {"ready": True, "sources": {}}
        with event_stream(late, "?since=0") as events:
            source_db.execute("INSERT INTO products VALUES (1, 'tea')")
            assert next(events)["event"] == "created"
            httpx.post(f"{early}/publish", json={"channel": "products", "event": "sold", "id": "1"}).raise_for_status()
            assert next(events)["event"] == "sold"
        for url in (early, late, (daemon.data_dir / "http").read_text()):
            changes = httpx.get(f"{url}/api/changes/poll", params={"wait": 10, "since": 1}).json()["changes"]
            assert [change["event"] for change in changes] == ["sold"]


def test_without_a_feed_there_is_nothing_to_serve_or_to_prune(cdc: Cdc) -> None:
    cdc.configure(NOWHERE)
    assert_complaint(cdc("serve"), 1, "no feed to serve", hint='kind = "data_changes"')
    assert_complaint(cdc("prune"), 1, "no feed to prune", hint='kind = "data_changes"')
    assert_complaint(cdc("prune", "mirror"), 1, "no feed to prune", hint='kind = "data_changes"')


def test_a_gateway_listens_to_others_only_with_tokens(daemon: FeedDaemon) -> None:
    assert_complaint(daemon("serve", "--listen", "0.0.0.0:0"), 2, "can be reached from other machines", hint="token")
    assert_complaint(daemon("serve", "--listen", "nowhere"), 2, "not host:port", hint="127.0.0.1")


def test_two_feeds_are_a_question(daemon: FeedDaemon) -> None:
    more = '[sinks.other]\nkind = "data_changes"\nfrom = "shop"\ntable = "sync_log"\n'
    daemon.write(more=more)
    assert_complaint(daemon("serve"), 2, "write to different feeds", hint="name the one")
    assert "write to different feeds" in daemon("check").stdout
    daemon.write(more=more + '[http]\nfeed = "nothing"')
    daemon.file.write_text(daemon.file.read_text().replace('[http]\n            address = "127.0.0.1:0"', "", 1))
    assert_complaint(daemon("serve"), 2, "no sink of kind data_changes is called 'nothing'", hint="changes, other")


def test_prune_removes_what_is_old_and_says_how_much(daemon: FeedDaemon, source_db: Database) -> None:
    with daemon.following():
        source_db.execute("INSERT INTO products VALUES (1, 'tea'), (2, 'coffee')")
        daemon.wait_for(lambda seen: len(seen) == 2)
        assert daemon("prune").stdout == "changes: 0 changes removed\n"
        assert daemon("prune", "--hours-to-keep", "0", "--type", "orders").stdout == "changes: 0 changes removed\n"
        assert daemon("prune", "changes", "--hours-to-keep", "0").stdout == "changes: 2 changes removed\n"
    assert_complaint(daemon("prune", "--type", "products"), 1, "--type goes with --hours-to-keep", hint="retention")


def test_the_daemon_removes_what_is_past_its_retention(tmp_path: Path, source_db: Database) -> None:
    """And keeps what is to be kept; a DELETE still has its place in the count."""
    source_db.execute(PRODUCTS)
    source_db.execute("CREATE TABLE orders (id int PRIMARY KEY)")
    daemon = FeedDaemon(tmp_path, source_db.url)
    daemon.write('retention = "1s"\n[sinks.changes.entities."public.orders"]\nretention = "never"')
    with daemon.following():
        source_db.execute("INSERT INTO products VALUES (1, 'tea')")
        source_db.execute("INSERT INTO orders VALUES (1)")
        _, order = daemon.wait_for(lambda seen: len(seen) == 2)
        wait_until(lambda: daemon.reader.oldest() == order.id, what=lambda: daemon.log)
        source_db.execute("DELETE FROM products")
        deleted = daemon.wait_for(lambda seen: len(seen) == 3)[-1]
        url = (daemon.data_dir / "http").read_text()
        assert httpx.get(f"{url}/api/changes/poll", params={"since": 0, "entityTypes": "orders"}).status_code == 200
        assert httpx.get(f"{url}/api/changes/poll", params={"since": 0, "entityTypes": "products"}).status_code == 410
    assert (deleted.change_type, deleted.version) == ("DELETE", 2)
