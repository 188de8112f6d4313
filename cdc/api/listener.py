"""The address of the HTTP interface."""

from __future__ import annotations

import errno
import socket

from cdc.api.client import Client
from cdc.errors import FatalError


def listen(address: tuple[str, int]) -> socket.socket:
    """A socket that listens there. Raises `FatalError` where that cannot be."""
    host, port = address
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server(address, family=family)
    except OSError as exc:
        hint = "set http.address to a free address of this machine"
        netloc = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        if exc.errno == errno.EADDRINUSE and Client(f"http://{netloc}").is_cdc():
            hint = "cdc answers there: end that process, if its data directory is gone; or set another http.address"
        raise FatalError(f"cannot listen on {host}:{port}: {exc.strerror or exc}", hint=hint) from exc
