"""The streaming replication protocol over libpq's COPY BOTH mode (manual: "Streaming Replication Protocol")."""

from __future__ import annotations

import select
import time
from collections.abc import Sequence
from struct import Struct
from typing import Final

from psycopg import pq, sql

from cdc.errors import DecodeError, TransientError
from cdc.position import Lsn, format_lsn
from cdc.postgres.connection import Connection, result_error, translated_errors
from cdc.postgres.frames import DATA_AT, Frames, compiled
from cdc.postgres.libpq import address_of, find_libpq
from cdc.postgres.pgoutput import POSTGRES_EPOCH_MICROSECONDS

BEHIND_BYTES: Final = 256 * 1024
"""A drain above this means that the reader is behind; below it every message is handed on at once."""

NAP_SECONDS: Final = 0.01
"""The walsender writes one small packet a message: woken for each, reader and walsender both waste a core."""

STATUS_SECONDS: Final = 10.0
"""Unsolicited status updates, also while nothing is read; more often where wal_sender_timeout is short."""

STATUS_SECONDS_MOVING: Final = 1.0
"""The same while there is something new to confirm."""

DRAIN_SECONDS: Final = 0.25
"""A drain takes no longer, or a slow one would delay the answer to a keepalive."""

SILENCE_SECONDS: Final = 60.0
"""Half of this without a word, and the server is asked for a keepalive."""

_XLOG_DATA, _KEEPALIVE = b"wk"
_DATA_HEADER: Final = Struct(">xQQ").unpack_from
_KEEPALIVE_BODY: Final = Struct(">xQqB").unpack_from
_STATUS: Final = Struct(">cQQQqB").pack


class ReplicationStream:
    """One stream of a logical slot's changes.

    received: end of the log as far as it was sent to us. idle_end: the log is sent up to here and nothing of it
    is still on the way; moves only by keepalives. reply_wanted: the server waits for a status update.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        slot: str,
        start: Lsn,
        publications: Sequence[str],
        server_version: int,
        sender_timeout_seconds: float,
    ) -> None:
        self.received = start
        self.idle_end = start
        self.reply_wanted = False
        self._pgconn = connection.pgconn
        self._poll = select.poll()
        self._poll.register(self._pgconn.socket, select.POLLIN)
        self._libpq = find_libpq() if compiled is not None else None
        self._taken: list[bytes] = []  # frames, or messages one by one
        self._behind = False
        # the server drops a reader that is silent for longer than its timeout (0: never)
        self._status_seconds = min(STATUS_SECONDS, sender_timeout_seconds / 4 or STATUS_SECONDS)
        self._heard_at = time.monotonic()
        self._status_at = 0.0
        self._last_status: tuple[int, int, int] = (0, 0, 0)
        self._start(_start_statement(slot, start, publications, server_version).as_bytes(connection))

    def drain(self, *, max_bytes: int, timeout_seconds: float) -> Frames | list[bytes]:
        """Return the messages that have come; in a list what the plugin wrote starts at byte `DATA_AT` of each.

        Waits up to the time-out if nothing has come. Raises `TransientError` when the stream has ended.
        """
        if self._behind:
            time.sleep(NAP_SECONDS)
        self._taken = []
        size = 0
        wait_seconds = timeout_seconds
        deadline = time.monotonic() + timeout_seconds + DRAIN_SECONDS
        with translated_errors():
            while size < max_bytes and time.monotonic() < deadline:
                if taken := self._take(max_bytes - size):
                    size += taken
                elif self._poll.poll(0 if size else wait_seconds * 1000):
                    self._pgconn.consume_input()
                    wait_seconds = 0  # what has come may be half a message: look once more, then return
                else:
                    break
        self._behind = size >= BEHIND_BYTES and size < max_bytes
        self._check_silence(size)
        if self._libpq is not None:
            return Frames(b"".join(self._taken))
        if self._taken:
            self.received = max(self.received, _DATA_HEADER(self._taken[-1])[0])
        return self._taken

    def send_status(self, *, flushed: Lsn, applied: Lsn) -> None:
        """Report three true LSNs, if the server asked, the position moved or it is time."""
        status = (max(self.received, flushed), flushed, min(applied, flushed))
        now = time.monotonic()
        moving = status != self._last_status
        wait = min(STATUS_SECONDS_MOVING, self._status_seconds) if moving else self._status_seconds
        if not self.reply_wanted and now - self._status_at < wait:
            return
        self._put_status(status, ask=False)
        self.reply_wanted = False

    def _put_status(self, status: tuple[int, int, int], *, ask: bool) -> None:
        clock = int(time.time() * 1e6) - POSTGRES_EPOCH_MICROSECONDS
        with translated_errors():
            self._pgconn.put_copy_data(_STATUS(b"r", *status, clock, ask))
            self._pgconn.flush()
        self._last_status = status
        self._status_at = time.monotonic()

    def _start(self, statement: bytes) -> None:
        with translated_errors():
            self._pgconn.send_query(statement)
            while self._pgconn.flush():
                select.select([], [self._pgconn.socket], [], 1.0)
            while self._pgconn.is_busy():
                if not self._poll.poll(30_000):
                    raise TransientError("START_REPLICATION: no answer within 30 seconds")
                self._pgconn.consume_input()
            result = self._pgconn.get_result()
        if result is None or result.status != pq.ExecStatus.COPY_BOTH:
            raise result_error(result) if result is not None else TransientError("START_REPLICATION: no answer")

    def _take(self, max_bytes: int) -> int:
        """Take what libpq holds already, up to about `max_bytes`; return its size, 0 if there is no whole message."""
        if self._libpq is None:
            return self._take_one_by_one(max_bytes)
        size, frames, received, others, ended = compiled.take(address_of(self._pgconn), *self._libpq, max_bytes)
        self._taken.append(frames)
        self.received = max(self.received, Lsn(received))
        for data in others:
            self._take_other(data)
        if ended:
            self._ended()
        return size

    def _take_one_by_one(self, max_bytes: int) -> int:
        messages = self._taken
        get, size = self._pgconn.get_copy_data, 0
        while size < max_bytes:
            length, view = get(1)
            if length <= 0:
                if length < 0:
                    self._ended()
                break
            size += length
            data = bytes(view)  # slicing the memoryview would cost three times as much
            if length > DATA_AT and data[0] == _XLOG_DATA:
                messages.append(data)
            else:
                self._take_other(data)
        return size

    def _take_other(self, data: bytes) -> None:
        if data[0] != _KEEPALIVE or len(data) != 18:
            raise DecodeError(f"unknown replication message {data[0]:#04x} of {len(data)} bytes")
        end, _, reply = _KEEPALIVE_BODY(data)
        self.received = max(self.received, end)
        self.idle_end = max(self.idle_end, end)
        self.reply_wanted |= bool(reply)

    def _ended(self) -> None:
        """Raise why the server ended the stream: an error, or its own shutdown."""
        result = self._pgconn.get_result()
        if result is not None and result.status == pq.ExecStatus.FATAL_ERROR:
            raise result_error(result)
        raise TransientError("the server ended the stream", hint="it is shutting down, or was told to end it")

    def _check_silence(self, size: int) -> None:
        now = time.monotonic()
        if size:
            self._heard_at = now
        elif now - self._heard_at > SILENCE_SECONDS:
            raise TransientError(f"nothing was heard from the server for {SILENCE_SECONDS:.0f} seconds")
        elif now - self._heard_at > SILENCE_SECONDS / 2 and now - self._status_at > STATUS_SECONDS / 2:
            self._put_status(self._last_status, ask=True)


def _start_statement(slot: str, start: Lsn, publications: Sequence[str], server_version: int) -> sql.Composed:
    options = [
        sql.SQL("proto_version '1'"),
        sql.SQL("publication_names {}").format(sql.Literal(",".join(_quoted(name) for name in publications))),
        sql.SQL("messages 'true'"),
    ]
    if server_version >= 160000:
        options.append(sql.SQL("origin 'any'"))
    return sql.SQL("START_REPLICATION SLOT {} LOGICAL {} ({})").format(
        sql.Identifier(slot), sql.SQL(format_lsn(start)), sql.SQL(", ").join(options)
    )


def _quoted(name: str) -> str:
    """Quote: the plugin splits the list as SQL identifiers."""
    return '"' + name.replace('"', '""') + '"'
