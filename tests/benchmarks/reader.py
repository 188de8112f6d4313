"""The floor: a reader that takes a backlog out of its socket and does nothing with it."""

from __future__ import annotations

import select
import time
from contextlib import closing
from dataclasses import dataclass
from struct import Struct
from typing import Final

from psycopg import pq

from cdc.postgres.replication import BEHIND_BYTES, NAP_SECONDS
from tests.benchmarks.table import PUBLICATION, BenchFailed
from tests.servers import Database

_KEEPALIVE_END: Final = Struct(">xQ").unpack_from


@dataclass(frozen=True)
class Read:
    """What a bare reader took: time, CPU time of this process, messages and their size."""

    seconds: float
    cpu_seconds: float
    messages: int
    size: int


def read(source: Database, slot: str, *, naps: bool) -> Read:
    """Read a slot up to the present end of the log. naps: sleep whenever the socket is empty, as the daemon does."""
    end = int(source.value("SELECT pg_current_wal_flush_lsn() - '0/0'"))
    with closing(source.connect(replication="database")) as connection:
        _start(connection.pgconn, slot)
        started, cpu_before = time.monotonic(), time.process_time()
        messages, size = _take_all(connection.pgconn, end, naps=naps)
        return Read(time.monotonic() - started, time.process_time() - cpu_before, messages, size)


def _start(pgconn: pq.abc.PGconn, slot: str) -> None:
    query = f"START_REPLICATION SLOT {slot} LOGICAL 0/0 (proto_version '1', publication_names '{PUBLICATION}')"
    pgconn.send_query(query.encode())
    result = pgconn.get_result()
    if result is None or result.status != pq.ExecStatus.COPY_BOTH:
        raise BenchFailed(f"START_REPLICATION: {pgconn.error_message.decode()}")


def _take_all(pgconn: pq.abc.PGconn, end: int, *, naps: bool) -> tuple[int, int]:
    poll = select.poll()
    poll.register(pgconn.socket, select.POLLIN)
    messages = size = napped_at = 0
    while True:
        length, data = pgconn.get_copy_data(1)
        if length > 0:
            messages += 1
            size += length
            if data[0] == ord("k") and _KEEPALIVE_END(data)[0] >= end:  # sent when nothing is left
                return messages, size
        elif length < 0:
            raise BenchFailed("the server ended the stream")
        else:
            if naps and not poll.poll(0) and size - napped_at > BEHIND_BYTES:
                napped_at = size
                time.sleep(NAP_SECONDS)
            poll.poll()
            pgconn.consume_input()
