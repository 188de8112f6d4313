"""What the stream has sent, as batches: packed where it is nothing but rows, put together one by one elsewhere."""

from __future__ import annotations

from collections.abc import Collection

from cdc.change import Batch
from cdc.packed_rows import PackedRows, packed_part
from cdc.postgres.assembly import PART_BYTES, Assembler
from cdc.postgres.frames import BEGIN, DATA_AT, LENGTH_BYTES, Frames, behind, compiled, messages


class Intake:
    """Takes messages and gives out batches, as an `Assembler` does: whatever is not plain goes through one.

    Frames that have come wait here until their transaction is whole, or enough of it is there.
    """

    def __init__(self, position: int, *, ddl_prefixes: Collection[str] = ()) -> None:
        """See `Assembler`."""
        self._assembler = Assembler(position, ddl_prefixes=ddl_prefixes)
        self._data = b""
        self._at = 0  # what is before it was given out, or to the assembler

    @property
    def position(self) -> int:
        """Transactions that commit below it have been given out (or were not wanted); the stream can begin there."""
        return self._assembler.position

    @property
    def in_transaction(self) -> bool:
        """Whether the last message was inside a transaction."""
        return self._at < len(self._data) or self._assembler.in_transaction

    def reset(self) -> None:
        """Forget what was not given out: the stream begins again at `position`, with Relation messages."""
        self._data, self._at = b"", 0
        self._assembler.reset()

    def feed(self, drained: Frames | list[bytes]) -> None:
        """Take messages, as `ReplicationStream.drain` gives them. Raises `DecodeError` on what cannot be understood."""
        if isinstance(drained, Frames):
            self._data = self._data[self._at :] + drained.data
            self._at = 0
        else:
            self._assembler.feed(drained, DATA_AT)

    def take(self) -> Batch | None:
        """Give out finished transactions, or what has come of a large one. There may be more until it gives none."""
        if self._at < len(self._data):
            batch = self._take_part() if self._assembler.in_transaction else self._take_whole()
            if batch is not None:
                return batch
        return self._assembler.take(part=self._assembler.open_bytes >= PART_BYTES)

    def pass_idle(self, position: int) -> bool:
        """See `Assembler`."""
        return self._assembler.pass_idle(position)

    def _take_whole(self) -> Batch | None:
        """Between two transactions: pack as many as are plain. From one that is not on, all go the other way."""
        data, at, assembler = self._data, self._at, self._assembler
        whole = compiled.last_commit(data, at)
        if whole == at:
            if data[at + LENGTH_BYTES] != BEGIN:
                self._assemble(len(data))
            elif len(data) - at >= PART_BYTES:
                self._assemble(behind(data, at))
                return self._take_part()
            return None
        if assembler.is_clean:
            self._at, packed, relations, end, size = compiled.pack(data, at, whole, assembler.end, assembler.relations)
            if self._at > at:
                assembler.passed(end, empty=not packed)
            if packed:
                tables = tuple(assembler.relations[relation] for relation in relations)
                return Batch(tables, PackedRows(packed), end, size)
        self._assemble(whole)
        return None

    def _take_part(self) -> Batch | None:
        """Inside a large transaction: pack what has come of it, once it is enough. What is no row goes by itself."""
        data, assembler = self._data, self._assembler
        while assembler.is_clean_inside:
            commit = compiled.first_commit(data, self._at)
            if commit == len(data) and commit - self._at < PART_BYTES:
                return None
            self._at, changes, relations, counts, size = compiled.pack_rows(data, self._at, commit, assembler.relations)
            if changes:
                part = assembler.passed_part(sum(counts))
                tables = tuple(assembler.relations[relation] for relation in relations)
                return Batch(tables, packed_part(part, counts, changes), assembler.end, size)
            self._assemble(behind(data, self._at))
        if assembler.in_transaction:
            self._assemble(behind(data, compiled.first_commit(data, self._at)))
        return None

    def _assemble(self, to: int) -> None:
        self._assembler.feed(messages(self._data, self._at, to))
        self._at = to
