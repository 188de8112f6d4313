"""TLS for those who connect: a handshake is limited in time, and counts as a connection from its first byte on."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from functools import partial
from typing import Final

import structlog

from cdc.api.connections import REQUEST_SECONDS

_NO_DESCRIPTOR_SECONDS: Final = 1.0
"""Until the next attempt to accept somebody, where too many files are open."""

log = structlog.get_logger()


class Handshakes:
    """Accepts connections, and gives each a protocol once it is encrypted.

    (An event loop's own server knows nothing of connections that do not finish their handshake, and has patience.)
    """

    def __init__(
        self, context: ssl.SSLContext, new_protocol: Callable[[], asyncio.Protocol], room: Callable[[], int]
    ) -> None:
        """room: how many connections there may be besides those that are open."""
        self._context = context
        self._new_protocol = new_protocol
        self._room = room
        self._pending: dict[asyncio.Task[bool], None] = {}

    async def accept(self, listening: socket.socket) -> None:
        """Accept until cancelled."""
        loop = asyncio.get_running_loop()
        listening.setblocking(False)
        try:
            while True:
                try:
                    connection, _ = await loop.sock_accept(listening)
                except OSError as exc:
                    log.warning("cannot accept a connection", error=exc.strerror)
                    await asyncio.sleep(_NO_DESCRIPTOR_SECONDS)
                else:
                    self._begin(connection)
        finally:
            for task in self._pending:
                task.cancel()

    def _begin(self, connection: socket.socket) -> None:
        task = asyncio.create_task(self._encrypt(connection), name="handshake")
        self._pending[task] = None
        task.add_done_callback(partial(self._ended, connection))
        if len(self._pending) > max(self._room(), 1):
            oldest = next(iter(self._pending))
            del self._pending[oldest]  # now: its task ends later than others may come
            oldest.cancel()

    async def _encrypt(self, connection: socket.socket) -> bool:
        """Whether it is now the protocol's."""
        loop = asyncio.get_running_loop()
        try:
            await loop.connect_accepted_socket(
                self._new_protocol, connection, ssl=self._context, ssl_handshake_timeout=REQUEST_SECONDS
            )
        except OSError:  # an `ssl.SSLError` is one: somebody who speaks no TLS, or does not trust us
            return False
        return True

    def _ended(self, connection: socket.socket, task: asyncio.Task[bool]) -> None:
        self._pending.pop(task, None)
        if task.cancelled() or not task.result():
            connection.close()
