"""The libpq that psycopg is linked with, for compiled code that is to call it itself."""

from __future__ import annotations

import ctypes
import sys
from typing import Any, NamedTuple

from psycopg import pq


class Libpq(NamedTuple):
    """Addresses of its functions."""

    get_copy_data: int
    free: int


def find_libpq() -> Libpq | None:
    """`None` where psycopg is not compiled: then it is not sure which libpq it has."""
    module = sys.modules.get(pq.PGconn.__module__)
    if pq.__impl__ == "python" or module is None or module.__file__ is None:
        return None
    try:
        library = ctypes.CDLL(module.__file__)  # it is loaded: this finds what it is linked with
        return Libpq(_address(library.PQgetCopyData), _address(library.PQfreemem))
    except (OSError, AttributeError):
        return None


def address_of(pgconn: pq.abc.PGconn) -> int:
    """Where libpq has what a connection is to it."""
    address: int = pgconn.pgconn_ptr  # type: ignore[attr-defined]  # of every implementation
    return address


def _address(function: Any) -> int:
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    return address
