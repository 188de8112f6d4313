"""Clients that are cut off again and again under load: nothing is lost, nothing comes twice, on every way there is."""

from __future__ import annotations

import json
import random
import socket
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from cdc.api.feed import Feed
from cdc.feed.place import Place, writer
from cdc.secret import Secret
from tests.gateway import Gateway, Source, event_stream, events, record, subscribe
from tests.servers import Database

CUTS: Final = 50
CHANNELS: Final = ("orders", "clients", "products")
ENTITIES: Final = 7


class Proxy:
    """Between a client and a gateway: passes on a random number of bytes, and then cuts the connection off."""

    def __init__(self, target: tuple[str, int], seed: int) -> None:
        self.cuts = 0
        self._target = target
        self._random = random.Random(seed)
        self._listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client = self._listener.accept()[0]
                server = socket.create_connection(self._target)
                limit = self._random.randrange(200, 20_000) if self.cuts < CUTS else 1 << 60
                threading.Thread(target=self._pass, args=(client, server, 1 << 60), daemon=True).start()
                threading.Thread(target=self._pass, args=(server, client, limit), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, limit: int) -> None:
        with suppress(OSError):
            while limit > 0 and (data := source.recv(min(limit, 1 << 16))):
                target.sendall(data)
                limit -= len(data)
            self.cuts += limit == 0
        for each in (source, target):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


class Reader:
    """Collects (channel, entity, version) until it has as many as there are."""

    def __init__(self, expected: int) -> None:
        self.found: list[tuple[str, str, int]] = []
        self._expected = expected

    @property
    def done(self) -> bool:
        return len(self.found) >= self._expected

    def take(self, event: Mapping[str, Any], entity: str) -> None:
        self.found.append((event["channel"], event[entity], event["version"]))


def read_websocket(url: str, reader: Reader) -> None:
    cursors = dict.fromkeys(CHANNELS, "0")
    while not reader.done:
        with suppress(ConnectionClosed, OSError, EOFError), connect(f"ws://{url}/ws", proxy=None) as client:
            client.send(json.dumps({"type": "subscribe", "channels": CHANNELS, "since": cursors}))
            while not reader.done:
                message = json.loads(client.recv(30))
                for event in message.get("events", []):
                    reader.take(event, "id")
                    cursors[event["channel"]] = event["cursor"]


def read_event_stream(url: str, reader: Reader) -> None:
    cursor = "0"
    while not reader.done:
        query = "?channels=" + ",".join(CHANNELS)
        with suppress(httpx.TransportError), event_stream(f"http://{url}", query, {"Last-Event-ID": cursor}) as found:
            for fields in found:
                reader.take(json.loads(fields["data"]), "id")
                cursor = fields["id"]
                if reader.done:
                    return


def read_long_poll(url: str, reader: Reader) -> None:
    cursor = "0"
    while not reader.done:
        with suppress(httpx.TransportError):
            answer = httpx.get(f"http://{url}/api/changes/poll?wait=5&since={cursor}", timeout=30)
            page = answer.raise_for_status().json()
            for change in page["changes"]:
                reader.take(change, "entityId")
            cursor = page["cursor"]


def transactions(changes: int) -> list[list[tuple[str, str, int]]]:
    """A few changes each, with versions that ascend for each entity."""
    generator = random.Random(7)
    versions: Counter[tuple[str, str]] = Counter()
    planned: list[list[tuple[str, str, int]]] = []
    while changes > 0:
        size = min(generator.randrange(1, 6), changes)
        keys = [(generator.choice(CHANNELS), str(generator.randrange(ENTITIES))) for _ in range(size)]
        planned.append([])
        for key in keys:
            versions[key] += 1
            planned[-1].append((*key, versions[key]))
        changes -= size
    return planned


def by_channel(changes: Sequence[tuple[str, str, int]]) -> dict[str, list[tuple[str, str, int]]]:
    return {channel: [change for change in changes if change[0] == channel] for channel in CHANNELS}


WAYS: Final = {"websocket": read_websocket, "stream": read_event_stream, "poll": read_long_poll}


@pytest.mark.parametrize("store", ["sqlite", "postgres"])
def test_cut_off_fifty_times_every_change_arrives_once_and_in_order(
    store: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url = None
    if store == "postgres":
        database: Database = request.getfixturevalue("source_db")
        url = Secret(database.url)
    place = Place(url, tmp_path)
    source = Source(writer(place, "shop"))
    with Gateway(Feed.at(place)) as gateway, ThreadPoolExecutor() as threads:
        proxies = {name: Proxy(gateway.address, seed) for seed, name in enumerate(WAYS)}
        planned = transactions(5_000)
        written = [change for transaction in planned for change in transaction]
        readers = {name: Reader(len(written)) for name in WAYS}
        reading = [threads.submit(read, proxies[name].url, readers[name]) for name, read in WAYS.items()]
        for transaction in planned:
            source.commit(*(record(*change) for change in transaction))
        for each in reading:
            each.result(120)
        for name, reader in readers.items():
            if name == "websocket":  # each channel has an order of its own
                assert by_channel(reader.found) == by_channel(written)
            else:
                assert reader.found == written
        assert {name: proxy.cuts >= CUTS for name, proxy in proxies.items()} == dict.fromkeys(WAYS, True)
        for proxy in proxies.values():
            proxy.close()
    source.close()


def test_every_gateway_of_one_feed_sees_all_of_two_writers(source_db: Database, tmp_path: Path) -> None:
    place = Place(Secret(source_db.url), tmp_path)
    sources = [Source(writer(place, name)) for name in ("shop", "archive")]
    with (
        Gateway(Feed.at(place)) as first,
        Gateway(Feed.at(place)) as second,
        first.websocket() as one,
        second.websocket() as two,
        ThreadPoolExecutor() as threads,
    ):
        for client in (one, two):
            assert subscribe(client, "*")["type"] == "subscribed"

        def write(at: int) -> None:
            for number in range(500):
                sources[at].commit(record("orders", f"{at}-{number}", source=("shop", "archive")[at]))

        writing = [threads.submit(write, at) for at in range(2)]
        found = [threads.submit(events, client, 1_000) for client in (one, two)]
        for each in writing:
            each.result(60)
        ids = [[event["id"] for event in each.result(60)] for each in found]
    assert ids[0] == ids[1]
    assert sorted(ids[0]) == sorted(f"{at}-{number}" for at in range(2) for number in range(500))
    for source in sources:
        source.close()
