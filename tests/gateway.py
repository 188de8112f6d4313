"""A gateway of a feed for tests: the real server on a real port, in a thread with an event loop of its own."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from typing import Any

import httpx
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from cdc.api.app import create_app
from cdc.api.backend import Backend
from cdc.api.feed import Feed
from cdc.api.server import Server
from cdc.feed.record import ChangeType, Record
from cdc.feed.store import FeedWriter
from cdc.http_config import Http
from cdc.position import Position

_numbers = count(1)


class Gateway:
    """Runs from `with` on. token: what all requests are made with. backend: of a daemon; without, it is a gateway."""

    def __init__(
        self,
        feed: Feed,
        http: Http = Http(),  # noqa: B008 - frozen
        token: str | None = None,
        backend: Backend | None = None,
    ) -> None:
        self.feed = feed
        self.headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        app = create_app(backend, http, feed)
        self._server = Server(app, ("127.0.0.1", 0), max_connections=http.max_connections)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._stop: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ready = threading.Event()

    def __enter__(self) -> Gateway:
        self._thread.start()
        if not self._ready.wait(60):
            self.stop()
            raise TimeoutError("the feed cannot be followed")
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """As the daemon stops it: streams, server, feed. Safe to call twice."""
        assert self._loop is not None
        assert self._stop is not None
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(60)
        self._server.close()

    @property
    def address(self) -> tuple[str, int]:
        return self._server.address

    @property
    def url(self) -> str:
        return "http://{}:{}".format(*self.address)

    @property
    def open_connections(self) -> int:
        """As the server counts them, those included that it is about to close."""
        return len(self._server._uvicorn.server_state.connections)

    def stats(self) -> Any:
        return httpx.get(f"{self.url}/stats", headers=self.headers).json()

    @contextmanager
    def stream(self, query: str = "", **headers: str) -> Iterator[Iterator[dict[str, str]]]:
        """An event stream that has begun."""
        with event_stream(self.url, query, self.headers | headers) as found:
            yield found

    @contextmanager
    def websocket(self) -> Iterator[ClientConnection]:
        """A connection that has got its welcome."""
        with connect(f"ws://{self.url[7:]}/ws", proxy=None, max_size=None, additional_headers=self.headers) as client:
            assert receive(client)["type"] == "welcome"
            yield client

    async def _run(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self.feed.start()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._server.serve())
            while not (self.feed.connected or self._stop.is_set()):  # the follower reports to nobody
                await asyncio.sleep(0.01)
            self._ready.set()
            await self._stop.wait()
            self.feed.end_streams()
            self._server.stop()
        await self.feed.stop()


def record(channel: str, entity_id: object = 1, version: int = 1, **more: Any) -> Record:
    """A change that is no other's replay."""
    values: dict[str, Any] = {
        "source": "shop",
        "position": str(next(_numbers)),
        "entity_type": channel.capitalize(),
        "entity_id": str(entity_id),
        "channel": channel,
        "change_type": ChangeType.UPDATE,
        "version": version,
        "changed_at": 1_700_000_000_000_000,
        "after": json.dumps({"id": entity_id, "version": version}).encode(),
    }
    return Record(**(values | more))


class Source:
    """Whoever commits to a feed."""

    def __init__(self, writer: FeedWriter) -> None:
        self._writer = writer
        writer.open()
        writer.begin(Position("queue", 0, 0))

    def commit(self, *records: Record) -> None:
        """One transaction."""
        number = next(_numbers)
        self._writer.append(records, ())
        self._writer.commit(Position("queue", number, number))

    def close(self) -> None:
        self._writer.close()


def closed(client: ClientConnection) -> int | None:
    """The close code that a client gets, behind whatever else it gets."""
    with suppress(ConnectionClosed):
        while True:
            client.recv(30)
    return client.close_code


def receive(client: ClientConnection, timeout_seconds: float = 30) -> Any:
    return json.loads(client.recv(timeout_seconds))


def subscribe(client: ClientConnection, *channels: str, since: dict[str, str] | None = None) -> Any:
    """Subscribe, and return the answer, whatever it is."""
    client.send(json.dumps({"type": "subscribe", "channels": channels, "since": since or {}}))
    return receive(client)


def events(client: ClientConnection, number: int) -> Sequence[Any]:
    """The next events, from as many frames as they take; other frames are passed over."""
    found: list[Any] = []
    while len(found) < number:
        found += receive(client).get("events", [])
    return found


@contextmanager
def event_stream(
    url: str, query: str = "", headers: Mapping[str, str] | None = None
) -> Iterator[Iterator[dict[str, str]]]:
    """Server-sent events, as dictionaries of their fields; it is connected when this returns."""
    with httpx.stream("GET", f"{url}/api/changes/stream{query}", headers=headers, timeout=30) as answer:
        assert answer.status_code == 200, answer.read()
        lines = answer.iter_lines()
        assert next(lines).startswith(":")
        yield _events(lines)


def _events(lines: Iterator[str]) -> Iterator[dict[str, str]]:
    fields: dict[str, str] = {}
    for line in lines:
        if line.startswith(":"):
            continue
        if line:
            name, _, value = line.partition(": ")
            fields[name] = value
        elif fields:
            yield fields
            fields = {}
