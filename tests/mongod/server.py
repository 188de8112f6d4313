"""The TCP server: connections, messages, blackouts, and the no-ops of an idle oplog."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import ssl
import stat
import sys
import threading
from collections.abc import Callable

from .dispatch import answer
from .errors import CloseConnection
from .state import Connection, State
from .wire import HEADER, MAX_MESSAGE_BYTES, Message, ProtocolError, decode, encode_reply

log = logging.getLogger(__name__)


class Server:
    """Serves one `State` on loopback. tls: what to encrypt with; `None` for not at all."""

    def __init__(self, state: State, port: int, tls: ssl.SSLContext | None = None) -> None:
        self._state = state
        self._port = port
        self._tls = tls
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

        self._connections = 0

    async def run(self, ready: Callable[[int], None]) -> None:
        """Serve until cancelled; `ready` is called with the port once connections are accepted."""
        await self._listen()
        ready(self._port)
        noop = asyncio.create_task(self._write_noops(), name="noop-writer")
        try:
            while True:
                self._state.blackout = asyncio.get_running_loop().create_future()
                seconds = await self._state.blackout
                await self._go_dark(seconds)
        finally:
            noop.cancel()

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", self._port, limit=2**20, ssl=self._tls)
        self._port = self._server.sockets[0].getsockname()[1]
        self._state.address = ("127.0.0.1", self._port)

    async def _go_dark(self, seconds: float) -> None:
        assert self._server is not None
        self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        self._state.cursors.clear()
        await asyncio.sleep(seconds)
        await self._listen()

    async def _write_noops(self) -> None:
        while self._state.settings.noop_seconds > 0:
            await asyncio.sleep(self._state.settings.noop_seconds)
            if self._state.primary:
                self._state.oplog.note()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections += 1
        connection = Connection(self._connections)
        self._writers.add(writer)
        try:
            while True:
                message = await _read(reader)
                reply = await answer(self._state, message, connection)
                if not message.more_to_come:
                    writer.write(encode_reply(0, message.request_id, message.opcode, reply))
                    await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, CloseConnection):
            pass
        except ProtocolError as exc:
            log.warning("connection %d closed: %s", connection.id, exc)
        finally:
            self._writers.discard(writer)
            writer.close()


async def _read(reader: asyncio.StreamReader) -> Message:
    header = await reader.readexactly(16)
    size, request_id, _, opcode = HEADER.unpack(header)
    if not 16 <= size <= MAX_MESSAGE_BYTES:
        raise ProtocolError(f"message of {size} bytes")
    return decode(request_id, opcode, await reader.readexactly(size - 16))


def exit_with_parent() -> None:
    """End this process when its standard input, a pipe from who started it, is closed: so it never outlives a test."""
    if not stat.S_ISFIFO(os.fstat(0).st_mode):
        return

    def watch() -> None:
        while sys.stdin.buffer.read(4096):
            pass
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="watch-stdin").start()
