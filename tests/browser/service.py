"""What the browser's tests talk to: a service that can be killed, and a way to it that can be cut."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from cdc.feed.place import Place, writer
from tests.beside import EventLoop
from tests.command import CHECKOUT
from tests.feed_stores import numbered_from_one
from tests.gateway import Source, record
from tests.processes import free_port, kill_tree, wait_until


class Service:
    """A feed, whoever writes to it, and the process that serves it."""

    def __init__(self, directory: Path, *, token: str = "", daemon: bool = True) -> None:
        self.token = token
        self.port = free_port()
        self._directory = directory
        self._daemon = "daemon" if daemon else "gateway"
        self._source = Source(writer(numbered_from_one(Place(None, directory)), "shop"))
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns once it listens; it answers all that come from then on."""
        arguments = [str(self._directory), str(self.port), self.token, self._daemon]
        self._process = subprocess.Popen([sys.executable, "-m", "tests.browser.server", *arguments], cwd=CHECKOUT)
        wait_until(self._answers, what="the service")

    def kill(self) -> None:
        if self._process is not None:
            kill_tree(self._process.pid)
            self._process.wait()

    def close(self) -> None:
        self.kill()
        self._source.close()

    def commit(self, channel: str, *ids: object, **more: Any) -> None:
        """One transaction, of one change for each id."""
        self._source.commit(*(record(channel, entity_id, **more) for entity_id in ids))

    def get(self, path: str) -> Any:
        return httpx.get(f"http://127.0.0.1:{self.port}{path}", headers=self._headers).json()

    @property
    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"} if self.token else {}

    def _answers(self) -> bool:
        with suppress(OSError):  # a client of httpx takes 30 ms to make: too much for each look
            socket.create_connection(("127.0.0.1", self.port), timeout=60).close()
            return True
        return False


class Line:
    """A TCP proxy: the network between browser and service. `cut` breaks all that is connected.

    websockets, all: whether new ones come through; what does not is closed at once.
    """

    def __init__(self, to_port: int) -> None:
        self.websockets = True
        self.all = True
        self._to_port = to_port
        self._open: set[asyncio.StreamWriter] = set()
        self._stalled: set[asyncio.StreamWriter] = set()
        self._loop = EventLoop("line")
        self._server = self._loop.run(asyncio.start_server(self._connected, "127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def cut(self) -> None:
        """Break every connection, as a network does: without a word."""

        async def abort() -> None:
            for writer_ in list(self._open):
                writer_.transport.abort()

        self._loop.run(abort())

    def stall(self) -> None:
        """From now on nothing comes out of the connections that there are, and none is closed."""
        self._stalled |= self._open

    def close(self) -> None:
        self._loop.call(self._server.close)
        self._loop.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n")
            if not self.all or (b" /ws" in head and not self.websockets):
                return
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._to_port)
            far_writer.write(head)
            self._open |= {writer, far_writer}
            await asyncio.gather(self._pass(reader, far_writer), self._pass(far_reader, writer))
            self._open -= {writer, far_writer}
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.transport.abort()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                if writer not in self._stalled:
                    writer.write(data)
                    await writer.drain()
        writer.transport.abort()
