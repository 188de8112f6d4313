"""Those who use a daemon's HTTP interface: they come, listen and poll, and leave in every way there is."""

from __future__ import annotations

import http.client
import json
import socket
import struct
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Final

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from tests.benchmarks.stream_clients import Client
from tests.gateway import event_stream, events, receive, subscribe

CROWD: Final = 16
"""Requests at the same time: more than the daemon has threads for any of them."""

_SECONDS: Final = 30


class Api:
    """One daemon's interface, for one token. No connection outlives its request."""

    def __init__(self, url: str, token: str) -> None:
        self.url = url
        self.headers = {"Authorization": f"Bearer {token}"}
        self.port = int(url.rpartition(":")[2])

    def get(self, path: str) -> Any:
        """What is answered, decoded. Raises `OSError` for errors, those of HTTP too."""
        return self._ask(urllib.request.Request(self.url + path, headers=self.headers))

    def post(self, path: str, body: object = None) -> Any:
        """The same."""
        data = json.dumps(body).encode() if body is not None else b""
        headers = {**self.headers, "Content-Type": "application/json"}
        return self._ask(urllib.request.Request(self.url + path, data, headers, method="POST"))

    def crowd(self) -> None:
        """Poll at the same time, so that the feed's pools of threads and connections are full."""
        with ThreadPoolExecutor(CROWD) as threads:
            list(threads.map(self.get, ["/api/changes/poll?limit=1"] * 4 * CROWD))

    @contextmanager
    def websocket(self) -> Iterator[ClientConnection]:
        """One that follows all channels; closed in order."""
        with connect(f"ws://{self.url[7:]}/ws", proxy=None, additional_headers=self.headers) as client:
            assert receive(client)["type"] == "welcome"
            assert subscribe(client, "*")["type"] == "subscribed"
            yield client

    def raw_websocket(self) -> Client:
        """One that speaks no more than it must; its socket is the caller's."""
        return Client(self.port, "*", "".join(f"{name}: {value}\r\n" for name, value in self.headers.items()))

    def raw_request(self, path: str) -> socket.socket:
        """The socket on which an answer will come that nobody reads."""
        client = http.client.HTTPConnection("127.0.0.1", self.port, timeout=_SECONDS)
        client.request("GET", path, headers=self.headers)
        assert client.sock is not None
        return client.sock

    def _ask(self, request: urllib.request.Request) -> Any:
        with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
            return json.load(answer)


@contextmanager
def listeners(api: Api, each: int) -> Iterator[None]:
    """So many of each kind listen while the block runs, which has to write; then half of them leave, half vanish."""
    cursor = api.get("/stats")["cursor"]
    polling, streaming = f"/api/changes/poll?since={cursor}&wait={_SECONDS}", "/api/changes/stream"
    with ThreadPoolExecutor(each) as threads, ExitStack() as stack:
        sockets = [stack.enter_context(api.websocket()) for _ in range(each)]
        streams = [stack.enter_context(event_stream(api.url, headers=api.headers)) for _ in range(each)]
        polls = [threads.submit(api.get, polling) for _ in range(each)]
        vanishing = [api.raw_websocket().socket for _ in range(each)]
        vanishing += [api.raw_request(path) for path in (polling, streaming) for _ in range(each)]
        yield
        for client in sockets:
            assert events(client, 1)
        for stream in streams:
            assert next(stream)
        for poll in polls:
            assert "cursor" in poll.result()
        for vanished in vanishing:
            vanish(vanished)


def vanish(client: socket.socket) -> None:
    """Be gone without a word: the next that is sent to it is answered by a reset, as after a crash."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def await_close(client: ClientConnection) -> None:
    """Wait until the daemon ends a WebSocket."""
    with suppress(ConnectionClosed):
        while True:
            client.recv(_SECONDS)
