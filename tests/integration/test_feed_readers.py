"""Two daemons write one table under load, one of them commits late on purpose; all who read see all of theirs, once."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
from websockets.sync.client import connect

from tests.conftest import NewDatabase
from tests.feed import FeedDaemon
from tests.gateway import event_stream
from tests.servers import Database, PostgresServer

TABLES = ("orders", "clients")
BRANCHES = ("north", "south")
CHANGES = 600

Seen = list[tuple[str, str, int]]
"""(source, entity, version), in the order in which it was seen."""


class Branch(FeedDaemon):
    """A daemon of its own source, that writes to the feed of all, and serves it."""

    def __init__(self, folder: Path, source: Database, feed: Database, name: str) -> None:
        folder.mkdir()
        super().__init__(folder, source.url, feed.url)
        self.source, self.name = source, name
        for table in TABLES:
            source.execute(f"CREATE TABLE {table} (id int PRIMARY KEY, branch text, n int)")
        self.write('location = "branch"')
        self.file.write_text(
            self.file.read_text().replace("sources.shop", f"sources.{name}").replace('"shop"', f'"{name}"')
        )

    def load(self) -> None:
        """Changes of five rows of each table, in small transactions."""
        with self.source.connect() as connection:
            for table in TABLES:
                connection.execute(f"INSERT INTO {table} SELECT i, %s, 0 FROM generate_series(1, 5) i", [self.name])
            for number in range(CHANGES // 2 - 5):
                with connection.transaction():
                    for table in TABLES:
                        connection.execute(f"UPDATE {table} SET n = n + 1 WHERE id = %s", [number % 5 + 1])

    @property
    def url(self) -> str:
        return (self.data_dir / "http").read_text()


def late_commits(feed: Database, stop: threading.Event) -> None:
    """What writers lock is held, again and again, while ids have been given: whoever ignores that commits too early."""
    with feed.connect() as connection:
        while not stop.is_set():
            with connection.transaction():
                connection.execute("SELECT FROM data_changes_state FOR UPDATE")
                stop.wait(0.1)
            stop.wait(0.02)


def poll(url: str, done: Callable[[Seen], bool], **query: str) -> Seen:
    """As an application does: by cursor, with a filter."""
    seen: Seen = []
    cursor = "0"
    while not done(seen):
        answer = httpx.get(
            f"{url}/api/changes/poll", params={"since": cursor, "wait": "5", "limit": "50"} | query, timeout=30
        )
        page = answer.raise_for_status().json()
        seen += [
            (change["source"], f"{change['channel']}/{change['entityId']}", change["version"])
            for change in page["changes"]
        ]
        cursor = page["cursor"]
    return seen


def poll_table(feed: Database, done: Callable[[Seen], bool]) -> Seen:
    """As an application does that knows only the table."""
    seen: Seen = []
    last = 0
    query = "SELECT id, source, channel, entity_id, version FROM data_changes WHERE id > %s ORDER BY id LIMIT 100"
    while not done(seen):
        for number, source, channel, entity_id, version in feed.execute(query, [last]):
            seen.append((source, f"{channel}/{entity_id}", version))
            last = number
    return seen


def websocket(url: str, done: Callable[[Seen], bool], began: threading.Event) -> Seen:
    """One channel, live from its beginning."""
    seen: Seen = []
    with connect(f"ws://{url.removeprefix('http://')}/ws", proxy=None) as client:
        client.send(json.dumps({"type": "subscribe", "channels": ["orders"], "since": {"orders": "0"}}))
        began.set()
        while not done(seen):
            for event in json.loads(client.recv(30)).get("events", ()):
                seen.append((event["locationId"], f"{event['channel']}/{event['id']}", event["version"]))
    return seen


def stream(url: str, done: Callable[[Seen], bool], began: threading.Event) -> Seen:
    """One type of one location."""
    seen: Seen = []
    with event_stream(url, "?entityTypes=clients&locationId=south&since=0") as events:
        began.set()
        for fields in events:
            event = json.loads(fields["data"])
            seen.append((event["locationId"], f"{event['channel']}/{event['id']}", event["version"]))
            if done(seen):
                break
    return seen


def expected(sources: Sequence[str], tables: Sequence[str]) -> dict[tuple[str, str], list[int]]:
    """Versions by entity: an insert, and updates in turn."""
    versions = CHANGES // 2 // 5
    return {
        (source, f"{table}/{entity}"): list(range(1, versions + 1))
        for source in sources
        for table in tables
        for entity in range(1, 6)
    }


def by_entity(seen: Seen) -> dict[tuple[str, str], list[int]]:
    found: dict[tuple[str, str], list[int]] = {}
    for source, entity, version in seen:
        found.setdefault((source, entity), []).append(version)
    return found


def has(number: int, stop: threading.Event) -> Callable[[Seen], bool]:
    """Whether a reader has seen as many; or need not go on, for the test has failed."""
    return lambda seen: len(seen) >= number or stop.is_set()


def test_two_writers_three_pollers_websocket_and_stream_each_see_all_once(
    tmp_path: Path, new_database: NewDatabase, postgres18: PostgresServer, target18: PostgresServer
) -> None:
    feed = new_database(target18)
    branches = [Branch(tmp_path / name, new_database(postgres18), feed, name) for name in BRANCHES]
    stop, began = threading.Event(), [threading.Event(), threading.Event()]
    with ThreadPoolExecutor(8) as threads, ExitStack() as stack:
        stack.callback(stop.set)
        for branch in branches:
            stack.enter_context(branch.following())
        north, south = (branch.url for branch in branches)
        everything, half, quarter = (has(number, stop) for number in (2 * CHANGES, CHANGES, CHANGES // 2))
        reading = {
            "poll": threads.submit(poll, north, half, entityTypes="orders"),
            "poll of a location": threads.submit(poll, south, half, locationId="north"),
            "table": threads.submit(poll_table, feed, everything),
            "websocket": threads.submit(websocket, north, half, began[0]),
            "stream": threads.submit(stream, south, quarter, began[1]),
        }
        assert all(event.wait(60) for event in began)
        holding = threads.submit(late_commits, feed, stop)
        for each in [threads.submit(branch.load) for branch in branches]:
            each.result(60)
        seen = {name: by_entity(each.result(60)) for name, each in reading.items()}
        stop.set()
        holding.result(60)
    assert seen["poll"] == expected(BRANCHES, ["orders"])
    assert seen["poll of a location"] == expected(["north"], TABLES)
    assert seen["table"] == expected(BRANCHES, TABLES)
    assert seen["websocket"] == expected(BRANCHES, ["orders"])
    assert seen["stream"] == expected(["south"], ["clients"])
