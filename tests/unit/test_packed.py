"""Packed transactions are the same transactions, however they are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from struct import pack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc.change import DELETE, INSERT, UPDATE, Batch, Change, Summary, Transaction
from cdc.errors import DecodeError
from cdc.packed import Packed, unpack, unpack_in_python
from cdc.position import Position
from cdc.queue import Queue
from tests.batches import TABLE

TRANSACTIONS = [
    Transaction(100, 108, 5_000_000, 7, 0, True,
                [Change(INSERT, 0, None, None, b"one"), Change(INSERT, 1, None, None, b"")]),
    Transaction(2**63, 2**64 - 1, -1, 2**32 - 1, 0, True, [Change(DELETE, 0, b"key", None, None)]),
    Transaction(2**63, 2**64 - 1, 9, 0, 3, True, [Change(UPDATE, 65535, b"k", b"before", b"after")]),
]  # fmt: skip

READERS = pytest.mark.parametrize("read", [unpack, unpack_in_python])


def packed(transactions: list[Transaction]) -> bytes:
    """As the compiled reader of a stream writes them."""
    changes = [change for transaction in transactions for change in transaction.changes]
    counts = (sum(change.operation == operation for change in changes) for operation in (INSERT, UPDATE, DELETE))
    last = transactions[-1]
    data = pack("<5I", len(transactions), len(transactions), *counts)
    data += pack("<QQq?", transactions[0].position, last.position, last.commit_time, True)
    for each in transactions:
        data += pack("<QQqIII?", each.position, each.end, each.commit_time, each.xid, each.first_ordinal,
                     len(each.changes), each.complete)  # fmt: skip
        for change in each.changes:
            images = (change.key, change.before, change.after)
            parts = sum(1 << bit for bit, image in enumerate(images) if image is not None)
            data += pack("<BHB", change.operation, change.table, parts)
            data += b"".join(pack("<I", len(image)) + image for image in images if image is not None)
    return data


@READERS
def test_every_value_comes_back(read: Callable[[bytes], list[Transaction]]) -> None:
    assert read(packed(TRANSACTIONS)) == TRANSACTIONS


@READERS
def test_f90_what_is_cut_off_is_seen(read: Callable[[bytes], list[Transaction]]) -> None:
    whole = packed(TRANSACTIONS)
    ends = {len(packed(TRANSACTIONS[:number])) for number in range(4) if number} | {45}
    for size in range(45, len(whole)):
        if size in ends:
            assert read(whole[:size]) == TRANSACTIONS[: len(read(whole[:size]))]
        else:
            with pytest.raises(DecodeError):
                read(whole[:size])
    for size in range(45):
        with pytest.raises(DecodeError):
            Packed(whole[:size])
    with pytest.raises(DecodeError):
        list(Packed(whole[: len(packed(TRANSACTIONS[:2]))]))


@given(st.binary(max_size=300))
def test_whatever_the_bytes_are_both_readers_say_the_same(data: bytes) -> None:
    def found(read: Callable[[bytes], list[Transaction]]) -> object:
        try:
            return read(packed(TRANSACTIONS)[:45] + data)
        except DecodeError as exc:
            return str(exc)

    assert found(unpack) == found(unpack_in_python)


def test_a_batch_tells_the_same_of_packed_transactions_as_of_others() -> None:
    plain = Batch((TABLE, TABLE), TRANSACTIONS, 2**63 + 8, 10)
    found = Batch((TABLE, TABLE), Packed(packed(TRANSACTIONS)), 2**63 + 8, 10)
    assert (found.complete, found.change_count) == (plain.complete, plain.change_count) == (True, 4)
    assert Summary(*found.summary)._replace(counts=[*found.summary.counts]) == plain.summary
    assert found.summary == (3, True, (2, 1, 1, 0, 0, 0), 100, 2**63, 9)
    assert found == plain
    assert found.transactions[-1] is found.transactions[2], "who looks twice sees the same"
    assert list(found.transactions) == TRANSACTIONS
    assert found.transactions[1:] == TRANSACTIONS[1:]
    assert found.transactions != TRANSACTIONS[1:]


def test_the_queue_keeps_them(tmp_path: Path) -> None:
    path = tmp_path / "shop.queue"
    batch = Batch((TABLE, TABLE), Packed(packed(TRANSACTIONS[:1])), 108, 10)
    for _ in range(2):  # from memory, and from the file
        queue = Queue(path, max_bytes=10**9, min_free_bytes=0)
        if queue.position is None:
            queue.begin(0)
            queue.register("mirror")
            queue.append(batch)
            queue.flush(timeout_seconds=10)
        (stored,) = queue.read(0, max_bytes=10**6, timeout_seconds=1)
        assert stored.batch == batch
        assert stored.batch.transactions == TRANSACTIONS[:1]
        assert queue.seek(Position(queue.queue_id, 0, 0)) == 0
        queue.close()
