"""Many WebSocket clients in one process: port, number of clients and of channels, and events to wait for, as arguments.

They cost as little as can be, for they share the machine with what is measured: one epoll loop over raw sockets, and a
frame that many of them get is decoded once. Says `ready` once all have subscribed; answers with JSON, as `Received`.
"""

from __future__ import annotations

import base64
import os
import selectors
import socket
import struct
import sys
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from statistics import quantiles
from typing import Any, Final

import msgspec

PATIENCE_SECONDS: Final = 20.0
"""Without any news, the clients give up."""

_KEPT_FRAMES: Final = 200


class Received(msgspec.Struct, frozen=True):
    """delivered: events, those that a client got twice or out of order not counted. Delays in milliseconds."""

    delivered: int
    frames: int
    p50_ms: float
    p99_ms: float
    max_ms: float
    cpu_seconds: float


class Client:
    """One subscriber of one channel. headers: more lines of its request, each with its end."""

    def __init__(self, port: int, channel: str, headers: str = "") -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.last = 0
        self.frames = 0
        self._buffer = b""
        key = base64.b64encode(os.urandom(16)).decode()
        self.socket.sendall(
            f"GET /ws HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n{headers}\r\n".encode()
        )
        answer = b""
        while b"\r\n\r\n" not in answer:
            answer += self.socket.recv(4096)
        head, _, self._buffer = answer.partition(b"\r\n\r\n")
        assert b" 101 " in head, head
        self._send(1, msgspec.json.encode({"type": "subscribe", "channels": [channel]}))
        while not any(payload.startswith(b'{"type":"subscribed"') for payload in self.receive()):
            pass

    def receive(self) -> Iterator[bytes]:
        """Payloads of the text frames that have arrived; waits for the first bytes."""
        data = self._buffer + self.socket.recv(1 << 18)
        at = 0
        while (frame := _frame(data, at)) is not None:
            opcode, start, at = frame
            if opcode == 1:
                yield data[start:at]
            elif opcode == 9:
                self._send(10, data[start:at])
            else:
                raise ConnectionError(f"closed: {data[start:at]!r}")
        self._buffer = data[at:]

    def _send(self, opcode: int, payload: bytes) -> None:
        """Masked with zeros, which is allowed, and free."""
        assert len(payload) < 126
        self.socket.sendall(bytes((0x80 | opcode, 0x80 | len(payload), 0, 0, 0, 0)) + payload)


def _frame(data: bytes, at: int) -> tuple[int, int, int] | None:
    """Opcode, start and end of the payload of a whole frame; `None` if it is not whole yet."""
    if len(data) < at + 2:
        return None
    size, start = data[at + 1], at + 2
    if size >= 126:
        form, length = (">H", 2) if size == 126 else (">Q", 8)
        if len(data) < start + length:
            return None
        (size,) = struct.unpack_from(form, data, start)
        start += length
    return (data[at] & 15, start, start + size) if len(data) >= start + size else None


class _Data(msgspec.Struct, frozen=True):
    at: int


class _Event(msgspec.Struct, frozen=True):
    cursor: str
    data: _Data


class _Events(msgspec.Struct, frozen=True):
    type: str
    events: list[_Event] = []


class Receiver:
    """All clients, until they have got all events or nothing comes any more."""

    def __init__(self, clients: Sequence[Client]) -> None:
        self._delays: Counter[int] = Counter()
        self._decoder = msgspec.json.Decoder(_Events)
        self._decoded: OrderedDict[bytes, tuple[list[int], list[int]]] = OrderedDict()
        self._delivered = self._frames = 0
        self._selector = selectors.EpollSelector()
        for client in clients:
            self._selector.register(client.socket, selectors.EVENT_READ, client)

    def run(self, expected: int) -> Received:
        while self._delivered < expected and (ready := self._selector.select(PATIENCE_SECONDS)):
            for key, _ in ready:
                for payload in key.data.receive():
                    self._take(key.data, payload)
        delays = sorted(self._delays.elements()) or [0]
        percentiles = quantiles(delays, n=100, method="inclusive") if len(delays) > 1 else delays * 99
        return Received(
            self._delivered,
            self._frames,
            percentiles[49] / 10,
            percentiles[98] / 10,
            delays[-1] / 10,
            time.process_time(),
        )

    def _take(self, client: Client, payload: bytes) -> None:
        now = time.time_ns() // 100_000
        cursors, times = self._decode(payload)
        self._frames += bool(cursors)
        for cursor, at in zip(cursors, times, strict=True):
            if cursor > client.last:
                client.last = cursor
                self._delivered += 1
                self._delays[now - at] += 1

    def _decode(self, payload: bytes) -> tuple[list[int], list[int]]:
        found = self._decoded.get(payload)
        if found is None:
            events = self._decoder.decode(payload).events
            found = [int(event.cursor) for event in events], [event.data.at // 100_000 for event in events]
            self._decoded[payload] = found
            if len(self._decoded) > _KEPT_FRAMES:
                self._decoded.popitem(last=False)
        return found


def main() -> None:
    port, number, channels, expected = map(int, sys.argv[1:])
    clients = [Client(port, f"channel{each % channels}") for each in range(number)]
    print("ready", flush=True)
    found: Any = Receiver(clients).run(expected)
    print(msgspec.json.encode(found).decode(), flush=True)


if __name__ == "__main__":
    main()
