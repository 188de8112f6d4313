"""The data of a COPY TO STDOUT in large blocks, whatever its rows are like."""

from __future__ import annotations

import selectors
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

import psycopg
from psycopg import pq

from cdc.postgres.connection import result_error
from cdc.postgres.libpq import address_of, find_libpq

if TYPE_CHECKING:
    from cdc.postgres import _copy_out
else:
    try:
        from cdc.postgres import _copy_out
    except ImportError:
        _copy_out = None

BLOCK_BYTES: Final = 256 * 1024

Take = Callable[[pq.abc.PGconn, int], tuple[bytes, int]]
"""Takes what libpq holds, up to about so many bytes; returns also 0 if it holds no more, -1 if the copy has ended."""


def copy_out(pgconn: pq.abc.PGconn, query: bytes) -> Iterator[bytes]:
    """Yield COPY data in blocks of `BLOCK_BYTES`. Raises `CdcError`, psycopg's where the connection is lost.

    Non-blocking throughout: libpq's own waits would hold the GIL, and with it all other workers. (psycopg's `Copy`
    costs half as much again for each row.)
    """
    with selectors.DefaultSelector() as selector:
        selector.register(pgconn.socket, selectors.EVENT_READ)
        pgconn.send_query(query)
        while pgconn.flush():
            selector.select(0.01)
        _expect(pgconn, selector, pq.ExecStatus.COPY_OUT)
        pieces: list[bytes] = []
        missing, status = BLOCK_BYTES, 0
        while status >= 0:
            piece, status = take(pgconn, missing)
            pieces.append(piece)
            missing -= len(piece)
            if missing <= 0:
                yield b"".join(pieces)
                pieces.clear()
                missing = BLOCK_BYTES
            elif status == 0:
                selector.select()
                pgconn.consume_input()
        _expect(pgconn, selector, pq.ExecStatus.COMMAND_OK)
        while pgconn.get_result() is not None:
            pass
    if missing < BLOCK_BYTES:
        yield b"".join(pieces)


def take_in_python(pgconn: pq.abc.PGconn, max_bytes: int) -> tuple[bytes, int]:
    """`Take`. The same compiled costs a tenth, and lets other threads run meanwhile."""
    rows: list[bytes | memoryview] = []
    status = 1
    while max_bytes > 0 and (status := (got := pgconn.get_copy_data(1))[0]) > 0:
        rows.append(got[1])
        max_bytes -= status
    return b"".join(rows), status


def take_compiled(pgconn: pq.abc.PGconn, max_bytes: int) -> tuple[bytes, int]:
    """`Take`, a row at a time in C."""
    assert _LIBPQ is not None, "nobody takes this function then"
    data, status = _copy_out.take(address_of(pgconn), *_LIBPQ, max_bytes)
    if status < -1:
        raise psycopg.OperationalError(pgconn.get_error_message())
    return data, status


def _expect(pgconn: pq.abc.PGconn, selector: selectors.BaseSelector, status: pq.ExecStatus) -> None:
    while pgconn.is_busy():
        selector.select()
        pgconn.consume_input()
    result = pgconn.get_result()
    assert result is not None, "libpq has no result for a query under way"
    if result.status != status:
        raise result_error(result)


_LIBPQ: Final = find_libpq() if _copy_out is not None else None

take: Take = take_in_python if _LIBPQ is None else take_compiled

COMPILED: Final = take is take_compiled
