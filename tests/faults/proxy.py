"""The network between the daemon and a database's server, as tests want it: slow, silent, broken or out of its mind."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import Final, Self

from tests.beside import EventLoop

GARBAGE: Final = b"\xff" * 64
"""Neither protocol has messages of such a type and length."""


class Protocol:
    """Where messages of a server begin: after how many bytes a header tells a message's size, and which."""

    def __init__(self, header_bytes: int, size: Callable[[bytes], int]) -> None:
        self.header_bytes = header_bytes
        self.size = size


POSTGRES: Final = Protocol(5, lambda header: 1 + int(struct.unpack(">i", header[1:])[0]))
"""Without encryption: its negotiation has messages of one byte."""

MONGODB: Final = Protocol(4, lambda header: int(struct.unpack("<i", header)[0]))


class Proxy:
    """Passes on what comes to `port`, in a thread of its own.

    delay_seconds: how long every piece is kept back, in both directions.
    """

    def __init__(self, to_port: int, protocol: Protocol) -> None:
        self.delay_seconds = 0.0
        self._to_port = to_port
        self._protocol = protocol
        self._lines: set[_Line] = set()
        self._refusing = False
        self._passing = asyncio.Event()
        self._passing.set()

    def __enter__(self) -> Self:
        self._loop = EventLoop("proxy")
        self._server = self._loop.run(asyncio.start_server(self._connected, "127.0.0.1", 0))
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call(self._server.close)
        self._loop.close()

    @property
    def connections(self) -> int:
        """How many there are."""
        return len(self._lines)

    def hold(self) -> None:
        """Be a black hole: nothing passes, nothing is closed, and who connects hears nothing."""
        self._loop.call(self._passing.clear)

    def release(self) -> None:
        """Let everything pass again, what was held first."""
        self._loop.call(self._passing.set)

    def close(self) -> None:
        """Refuse connections, and break those that there are, until `open`."""
        self._refusing = True
        self.reset()

    def open(self) -> None:
        """Take connections again."""
        self._refusing = False

    def reset(self) -> None:
        """Break every connection, for both ends, as a server's crash does."""
        self._each(_Line.reset)

    def half_close(self) -> None:
        """Tell the daemon on every connection that nothing more will come, and go on listening to it."""
        self._each(_Line.half_close)

    def corrupt(self) -> None:
        """On every connection let the server's next message be garbage, and nothing come after it."""
        self._each(_Line.corrupt)

    def _each(self, do: Callable[[_Line], None]) -> None:
        async def all_of_them() -> None:
            for line in list(self._lines):
                do(line)

        self._loop.run(all_of_them())

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.CancelledError):  # cancelled at the end
            await self._passing.wait()
            if self._refusing:
                writer.transport.abort()
                return
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._to_port)
            line = _Line(writer, far_writer, self._protocol)
            self._lines.add(line)
            try:
                await asyncio.gather(
                    self._pass(reader, far_writer, bytes), self._pass(far_reader, writer, line.from_server)
                )
            finally:
                self._lines.discard(line)
                far_writer.close()
        writer.close()

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, change: Callable[[bytes], bytes]
    ) -> None:
        while data := await reader.read(1 << 16):
            await self._passing.wait()
            if self.delay_seconds:
                await asyncio.sleep(self.delay_seconds)
            if changed := change(data):
                writer.write(changed)
                await writer.drain()
        with suppress(OSError, RuntimeError):
            writer.write_eof()


class _Line:
    """One connection that passes through."""

    def __init__(self, client: asyncio.StreamWriter, server: asyncio.StreamWriter, protocol: Protocol) -> None:
        self._client = client
        self._server = server
        self._protocol = protocol
        self._header = b""
        self._left = 0  # bytes of the message at hand
        self._corrupting = self._mute = False

    def reset(self) -> None:
        for writer in (self._client, self._server):
            connection = writer.get_extra_info("socket")
            with suppress(OSError):
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    def half_close(self) -> None:
        self._mute = True
        with suppress(OSError, RuntimeError):
            self._client.write_eof()

    def corrupt(self) -> None:
        self._corrupting = True

    def from_server(self, data: bytes) -> bytes:
        """What the client gets instead."""
        if self._mute:
            return b""
        beginning = self._next_message(data)
        if not self._corrupting or beginning is None:
            return data
        self._mute = True
        return data[:beginning] + GARBAGE

    def _next_message(self, data: bytes) -> int | None:
        """Where the first message begins that begins in these bytes."""
        found = None
        at = 0
        while at < len(data):
            if self._left:
                step = min(self._left, len(data) - at)
                self._left -= step
            else:
                if found is None and not self._header:
                    found = at
                step = min(self._protocol.header_bytes - len(self._header), len(data) - at)
                self._header += data[at : at + step]
                if len(self._header) == self._protocol.header_bytes:
                    self._left = self._protocol.size(self._header) - len(self._header)
                    self._header = b""
            at += step
        return found
