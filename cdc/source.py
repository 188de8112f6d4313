"""What a source of changes promises.

A source blocks and is not thread-safe: `cdc.capture` gives each one a thread of its own. Snapshots are read by
other threads, each through a reader (and so a connection) of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Protocol

import msgspec

from cdc.change import Batch, Image, Table, TableName
from cdc.position import SourcePosition
from cdc.stats import CaptureStats


class Chunk(msgspec.Struct, frozen=True):
    """A part of a table that one worker copies.

    part: which rows, in the words of the snapshot that made it; means nothing elsewhere.
    rows, size: estimates (rows, bytes), for progress only.
    """

    table: TableName
    part: tuple[object, ...]
    rows: int
    size: int


class Estimate(msgspec.Struct, frozen=True):
    """How large a table is, as far as the source knows without counting."""

    rows: int
    size: int


class SnapshotReader(Protocol):
    """One worker's connection into a snapshot."""

    def read(self, chunk: Chunk, *, columns: Sequence[str], binary: bool) -> Iterator[bytes]:
        """Yield the chunk's rows in blocks of about 256 KiB, in COPY's binary or text format (or raw BSON).

        Concatenated, the blocks are one complete stream in that format, of these columns in this order. After a
        read that was not taken to its end the reader can only be closed.
        """
        ...

    def close(self) -> None:
        """Leave the snapshot. Safe to call twice."""
        ...


class Snapshot(Protocol):
    """All tables of a source as they were at one position, where the source has such a thing.

    Where it has not, every row is read as it is when its turn comes: `position` is from before the first read, and each
    table has an `end` of its own. The stream must then reach back to `position` at least, and every change after it is
    applied on top, whether the copy holds it already or not; the mirror is right from the moment on at which the stream
    has passed the last `end`. Until then it may show rows of different moments.
    """

    @property
    def position(self) -> SourcePosition:
        """A transaction is visible if it commits before it; otherwise it is not, or (see above) may be."""
        ...

    def end(self, table: TableName) -> SourcePosition:
        """`position`, or where the reading of this table ended: to be asked for when all of it has been read.

        Raises `TransientError` where what was read of the table cannot be used.
        """
        ...

    def chunks(self, table: TableName, chunk_bytes: int) -> Sequence[Chunk]:
        """Split a table into parts of about this size; together they hold every row once."""
        ...

    def binary_columns(self, table: TableName) -> dict[str, str]:
        """Column name -> type name, of the columns that COPY's binary format carries exactly."""
        ...

    def check(self) -> None:
        """Raise `TransientError` if the snapshot is lost, and with it what was read since the last check."""
        ...

    def check_schema(self, schema: object, tables: Collection[TableName]) -> None:
        """Raise `TransientError` if tables are no longer what `Source.dump_schema` said, where that matters."""
        ...

    def reader(self) -> SnapshotReader:
        """Open a connection into the snapshot."""
        ...

    def close(self) -> None:
        """Let the source forget the snapshot. Safe to call twice."""
        ...


class Facts(Protocol):
    """Small facts that survive a restart, kept beside the queue."""

    def get(self, key: str) -> str | None:
        """The fact, if it is known."""
        ...

    def set(self, key: str, value: str | None) -> None:
        """Durable on return."""
        ...


class Beginning(msgspec.Struct, frozen=True):
    """Where a stream begins anew. facts: to be stored together with the position, in place of what was known before."""

    position: SourcePosition
    facts: dict[str, str]


class Source(Protocol):
    """A database whose changes are captured."""

    name: str

    def open(self, position: SourcePosition | None) -> SourcePosition:
        """Connect, and stream from `position` on (`None`: from where a new stream begins).

        Returns the position that the stream really begins at. Raises `ResyncRequired` where changes after `position`
        can no longer be had, `TransientError` where trying again may help, `FatalError` otherwise.
        """
        ...

    def restart(self) -> Beginning:
        """Connect, and stream from now on, whatever was captured before and from wherever: there is a gap behind it.

        Removes from the server what was made there for us and can be used no more. May be called again after an error,
        or a crash.
        """
        ...

    def read(self, timeout_seconds: float) -> Batch | None:
        """Wait for changes; `None` if nothing new came in time. Never blocks much longer than the time-out.

        Every transaction comes once, in commit order, also across a lost connection that `open` repaired.
        """
        ...

    def confirm(self, *, durable: SourcePosition, applied: SourcePosition | None) -> None:
        """Tell upstream what it need not keep. Cheap: sends only when something is due.

        durable: fsynced in the queue. Nothing beyond it is ever confirmed.
        applied: stored in the slowest target.
        """
        ...

    def observe(self, stats: CaptureStats) -> None:
        """Fill in what only the source knows: the end of the server's log, the state of the slot. Cheap."""
        ...

    def tables(self) -> Sequence[TableName]:
        """The tables that are captured, by name. Uses a connection of its own."""
        ...

    def estimates(self) -> Mapping[TableName, Estimate]:
        """How large each captured table is, for plans and progress. Uses a connection of its own."""
        ...

    def dump_schema(self) -> object:
        """Describe the captured tables and what they need, for a mirror of the same kind of database."""
        ...

    def sequences(self) -> object:
        """Where the source's sequences stand now, for a mirror of the same kind; nothing where there are none."""
        ...

    def snapshot(self) -> Snapshot:
        """Open a consistent view for copying or verifying, while the stream goes on."""
        ...

    def primary_key(self, table: TableName) -> Sequence[str]:
        """The columns of a table's primary key; empty where it has none. Uses a connection of its own."""
        ...

    def shapes(self, oids: Collection[int]) -> Sequence[object]:
        """What tables are now, by OID, where tables have such a thing. From any thread."""
        ...

    def reread(self, table: Table, image: Image) -> Image | None:
        """Read one row as it is now, by the key in `image`; `None` if it is gone. From any thread."""
        ...

    def close(self) -> None:
        """Disconnect; the source's server keeps the changes. Safe to call twice."""
        ...
