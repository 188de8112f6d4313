"""The address of the HTTP interface."""

from __future__ import annotations

import socket

from cdc.errors import FatalError


def listen(address: tuple[str, int]) -> socket.socket:
    """A socket that listens there. Raises `FatalError` where that cannot be."""
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    try:
        return socket.create_server(address, family=family)
    except OSError as exc:
        raise FatalError(
            f"cannot listen on {address[0]}:{address[1]}: {exc.strerror or exc}",
            hint="set http.address to a free address of this machine",
        ) from exc
