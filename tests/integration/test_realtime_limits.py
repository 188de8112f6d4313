"""Clients that do not read, break the protocol, or come in floods: what they get, and that others do not notice."""

from __future__ import annotations

import socket
import struct
import time
from contextlib import ExitStack, suppress

import httpx
import jwt
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from cdc.api.connections import MAX_FRAGMENTS
from cdc.api.feed import Feed
from cdc.api.websocket import MAX_MESSAGE_BYTES, MAX_MESSAGES
from cdc.feed.place import Place
from cdc.http_config import Http, JwtConfig, TokenConfig
from cdc.secret import Token
from tests.gateway import Gateway, Source, closed, events, record, subscribe
from tests.processes import is_cut_off, wait_until

FIN, RSV, MASKED = 0x80, 0x40, 0x80
CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10

BIG = b'"%s"' % (b"x" * 50_000)


def raw_connection(gateway: Gateway, request: str, receive_buffer: int | None = None) -> socket.socket:
    connection = socket.socket()
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(60)
    connection.connect(gateway.address)
    connection.sendall(request.encode())
    return connection


def received_until_the_end(connection: socket.socket) -> int:
    """How many bytes came before the connection ended, in whatever way."""
    received = 0
    with suppress(ConnectionResetError):
        while data := connection.recv(1 << 16):
            received += len(data)
    return received


class RawClient:
    """A WebSocket by hand, for what no library sends."""

    def __init__(self, gateway: Gateway, receive_buffer: int | None = None) -> None:
        host = "{}:{}".format(*gateway.address)
        self.socket = raw_connection(
            gateway,
            f"GET /ws HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n",
            receive_buffer,
        )
        self._file = self.socket.makefile("rb")
        while self._file.readline() != b"\r\n":
            pass
        assert self.receive()[0] == TEXT  # the welcome

    def send(self, first: int, payload: bytes = b"", mask: int = MASKED, size: int | None = None) -> None:
        """A frame: flags and opcode, and the payload, masked with zeros. size: another than it has."""
        size = len(payload) if size is None else size
        head = bytes((first, mask | size)) if size < 126 else struct.pack("!BBQ", first, mask | 127, size)
        self.socket.sendall(head + bytes(4 if mask else 0) + payload)

    def receive(self) -> tuple[int, bytes]:
        """Opcode and payload of the next frame."""
        first, size = self._file.read(2)
        if size >= 126:
            (size,) = struct.unpack("!H" if size == 126 else "!Q", self._file.read(2 if size == 126 else 8))
        return first & 15, self._file.read(size)

    def close_code(self) -> int:
        """Of the close frame that comes after everything else."""
        while (frame := self.receive())[0] != CLOSE:
            pass
        return int(struct.unpack("!H", frame[1][:2])[0])

    def end(self) -> None:
        self._file.close()
        self.socket.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cdc.api.hub.TICK_SECONDS", 0.05)
    monkeypatch.setattr("cdc.api.hub.SEND_SECONDS", 0.2)
    monkeypatch.setattr("cdc.api.connections.STALLED_SECONDS", 0.1)


@pytest.mark.usefixtures("impatient")
def test_f103_websocket_that_does_not_read_is_disconnected_and_resumes(gateway: Gateway, source: Source) -> None:
    slow = RawClient(gateway, receive_buffer=4096)
    slow.send(FIN | TEXT, b'{"type":"subscribe","channels":["orders"]}')
    assert b'"subscribed"' in slow.receive()[1]
    with gateway.websocket() as other:
        subscribe(other, "orders")
        for version in range(1, 401):
            source.commit(record("orders", version, after=BIG))
            assert [event["id"] for event in events(other, 1)] == [str(version)]
        wait_until(lambda: gateway.stats()["dropped"] == 1)
    received, cursor = 0, "0"
    while (frame := slow.receive())[0] != CLOSE:
        received += len(frame[1])
        cursor = frame[1].rpartition(b'"cursor":"')[2].partition(b'"')[0].decode()
    assert struct.unpack("!H", frame[1][:2]) == (1013,)
    assert received < 400 * len(BIG) / 2  # what was sent before is in buffers of bounded size
    slow.end()
    with gateway.websocket() as client:
        subscribe(client, "orders", since={"orders": cursor})
        assert next(event["id"] for event in events(client, 400 - int(cursor))) == str(int(cursor) + 1)


@pytest.mark.usefixtures("impatient")
def test_f103_websocket_that_never_reads_again_holds_nothing(
    gateway: Gateway, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cdc.api.connections.CLOSING_SECONDS", 0.1)
    slow = RawClient(gateway, receive_buffer=4096)
    slow.send(FIN | TEXT, b'{"type":"subscribe","channels":["orders"]}')
    for version in range(1, 401):
        source.commit(record("orders", version, after=BIG))
    wait_until(lambda: gateway.open_connections == 0)
    slow.end()


@pytest.mark.usefixtures("impatient")
def test_f103_event_stream_that_is_not_read_is_disconnected(gateway: Gateway, source: Source) -> None:
    slow = raw_connection(gateway, "GET /api/changes/stream HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", receive_buffer=4096)
    assert slow.recv(1)
    for version in range(1, 401):
        source.commit(record("orders", version, after=BIG))
    wait_until(lambda: gateway.stats()["dropped"] == 1)
    wait_until(lambda: gateway.stats()["connections"] == 0)
    assert received_until_the_end(slow) < 400 * len(BIG) / 2


@pytest.mark.parametrize(
    ("code", "frames"),
    [
        (1002, [(FIN | RSV | TEXT, b"{}")]),
        (1002, [(FIN | 0x20 | TEXT, b"{}")]),
        (1002, [(FIN | 3, b"")]),
        (1002, [(FIN | 11, b"")]),
        (1002, [(FIN | TEXT, b"{}", 0)]),
        (1002, [(PING, b"")]),
        (1002, [(FIN | PING, b"x" * 126)]),
        (1002, [(FIN | CONTINUATION, b"{}")]),
        (1002, [(TEXT, b"{"), (FIN | TEXT, b"{}")]),
        (1002, [(FIN | CLOSE, b"\x03")]),
        *[(1002, [(FIN | CLOSE, struct.pack("!H", code))]) for code in (0, 999, 1004, 1005, 1006, 1015, 2999, 5000)],
        (1003, [(FIN | BINARY, b"{}")]),
        (1007, [(FIN | TEXT, b'"\xff"')]),
        (1007, [(TEXT, b'"\xce'), (FIN | CONTINUATION, b'"')]),
        (1007, [(FIN | CLOSE, b"\x03\xe8\xff")]),
        (1009, [(FIN | TEXT, b" " * (MAX_MESSAGE_BYTES + 1))]),
        (1009, [(FIN | TEXT, b"", MASKED, 2**62)]),
        (1009, [(TEXT, b" " * MAX_MESSAGE_BYTES), (FIN | CONTINUATION, b" ")]),
        (1009, [(TEXT, b""), *[(CONTINUATION, b"")] * MAX_FRAGMENTS]),
        (1008, [(FIN | TEXT, b'{"type":"ping"}')] * (MAX_MESSAGES + 1)),
        (1000, [(FIN | CLOSE, b"\x03\xe8bye")]),
    ],
)
def test_f106_bad_frame_ends_in_the_right_close_code(
    gateway: Gateway, source: Source, code: int, frames: list[tuple[int, bytes]]
) -> None:
    bad = RawClient(gateway)
    with gateway.websocket() as good:
        subscribe(good, "orders")
        for frame in frames:
            bad.send(*frame)
        assert bad.close_code() == code
        source.commit(record("orders"))
        assert len(events(good, 1)) == 1
    bad.end()
    wait_until(lambda: gateway.stats()["connections"] == 0)


def test_f106_fragments_with_a_ping_between_them_are_one_message(gateway: Gateway) -> None:
    client = RawClient(gateway)
    client.send(TEXT, b'{"type":"ping"')
    client.send(FIN | PING, b"between")
    client.send(FIN | CONTINUATION, b',"id":7}')
    assert [client.receive(), client.receive()] == [(PONG, b"between"), (TEXT, b'{"type":"pong","id":7}')]
    client.end()


def test_f106_pings_of_a_client_that_does_not_read_fill_no_buffer(gateway: Gateway) -> None:
    client = RawClient(gateway, receive_buffer=4096)
    sent = 0
    pings = bytes((FIN | PING, MASKED | 125)) + bytes(4 + 125)
    for _ in range(200):
        client.socket.sendall(pings * 400)
        sent += 400
    client.send(FIN | TEXT, b'{"type":"ping","id":"last"}')
    pongs = 0
    while client.receive()[0] == PONG:
        pongs += 1
    assert pongs < sent
    client.end()


def test_f107_places_are_limited_in_all_and_for_each(place: Place, source: Source) -> None:
    for http in (Http(max_clients=2), Http(max_clients_each=2)):
        with Gateway(Feed.at(place), http) as gateway, gateway.websocket(), gateway.stream():
            with pytest.raises(InvalidStatus) as caught, gateway.websocket():
                pass
            assert caught.value.response.status_code == 503
            assert httpx.get(f"{gateway.url}/api/changes/stream").status_code == 503
            assert httpx.get(f"{gateway.url}/health").status_code == 200
            assert httpx.get(f"{gateway.url}/metrics").status_code == 200


def test_f107_requests_that_wait_do_not_crowd_out_the_operator(place: Place, source: Source) -> None:
    with Gateway(Feed.at(place), Http(max_connections=3)) as gateway, ExitStack() as stack:
        poll = "GET /api/changes/poll?wait=60 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
        for _ in range(3):
            stack.enter_context(raw_connection(gateway, poll))
        wait_until(lambda: httpx.get(f"{gateway.url}/api/changes/poll").status_code == 503)
        assert httpx.get(f"{gateway.url}/health").status_code == 200
        assert httpx.get(f"{gateway.url}/metrics").status_code == 200


def test_f107_flood_of_silent_connections_makes_room(
    place: Place, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cdc.api.server.RESERVE", 10)
    with (
        Gateway(Feed.at(place), Http(max_connections=20)) as gateway,
        gateway.websocket() as client,
        ExitStack() as stack,
    ):
        flood = [stack.enter_context(raw_connection(gateway, "")) for _ in range(100)]
        assert httpx.get(f"{gateway.url}/health").status_code == 200
        assert httpx.get(f"{gateway.url}/api/changes/poll").status_code == 200
        assert subscribe(client, "orders")["type"] == "subscribed"
        wait_until(lambda: sum(is_cut_off(each) for each in flood) >= 70)


def test_f107_enormous_headers_are_refused(gateway: Gateway) -> None:
    with raw_connection(gateway, "GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Large: " + "x" * 100_000) as connection:
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 400 ")
    assert httpx.get(f"{gateway.url}/health").status_code == 200


@pytest.mark.parametrize("request_", ["", "GET /health HTT", "GET /health HTTP/1.1\r\nHost: x\r\nX-Slow: "])
def test_f107_dawdling_request_is_cut_off(gateway: Gateway, monkeypatch: pytest.MonkeyPatch, request_: str) -> None:
    monkeypatch.setattr("cdc.api.connections.REQUEST_SECONDS", 0.1)
    with raw_connection(gateway, request_) as connection:
        assert received_until_the_end(connection) == 0


@pytest.mark.usefixtures("impatient")
def test_f107_response_that_is_not_read_is_cut_off(gateway: Gateway, source: Source) -> None:
    source.commit(*(record("orders", each, after=BIG) for each in range(400)))
    poll = "GET /api/changes/poll?limit=1000 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    with raw_connection(gateway, poll, receive_buffer=4096) as connection:
        assert connection.recv(1)
        wait_until(lambda: gateway.open_connections == 0)
        assert received_until_the_end(connection) < 400 * len(BIG)


def test_expired_token_ends_its_streams(place: Place, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cdc.api.hub.TICK_SECONDS", 0.05)
    key = "k" * 32
    http = Http(jwt=JwtConfig(key=Token(key), algorithms=("HS256",)))
    now = time.time
    token = jwt.encode({"sub": "u5", "scope": "read", "exp": now() + 300}, key, "HS256")
    with (
        Gateway(Feed.at(place), http, token) as gateway,
        gateway.websocket() as client,
        gateway.stream() as found,
    ):
        monkeypatch.setattr(time, "time", lambda: now() + 400)
        assert closed(client) == 4401
        assert list(found) == []


@pytest.mark.parametrize(
    ("query", "headers", "status"),
    [
        ("", {}, 401),
        ("", {"Authorization": "Bearer wrong"}, 401),
        ("?ticket=wrong", {}, 401),
        ("", {"Authorization": "Bearer geheim", "Origin": "https://elsewhere.example"}, 403),
    ],
)
def test_f107_strangers_cannot_fill_the_log(
    place: Place,
    source: Source,
    caplog: pytest.LogCaptureFixture,
    query: str,
    headers: dict[str, str],
    status: int,
) -> None:
    tokens = (TokenConfig(name="reader", token=Token("geheim"), scopes=("read",)),)
    with Gateway(Feed.at(place), Http(tokens=tokens), "geheim") as gateway:
        with pytest.raises(InvalidStatus) as refused:
            connect(f"ws://{gateway.url[7:]}/ws{query}", proxy=None, additional_headers=headers).close()
        assert refused.value.response.status_code == status
        assert b"error" in (refused.value.response.body or b"")
        wait_until(lambda: gateway.open_connections == 0, what="the refused connection to be closed")
    assert [line for line in caplog.records if line.levelname in {"WARNING", "ERROR"}] == []
