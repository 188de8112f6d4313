"""PackedRows transactions are the same transactions, however they are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from struct import pack

import bson
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc.change import DELETE, INSERT, UPDATE, Batch, Change, Delta, Summary, Transaction
from cdc.errors import DecodeError
from cdc.packed_documents import PackedDocuments
from cdc.packed_documents import unpack as unpack_documents
from cdc.packed_documents import unpack_in_python as unpack_documents_in_python
from cdc.packed_rows import PackedRows, transactions_at, transactions_at_in_python, unpack, unpack_in_python
from cdc.position import Position
from cdc.queue import Queue
from cdc.queue.format import decode
from tests.batches import TABLE, packed, packed_documents

TRANSACTIONS = [
    Transaction(100, 108, 5_000_000, 7, 0, True,
                [Change(INSERT, 0, None, None, b"one"), Change(INSERT, 1, None, None, b"")]),
    Transaction(2**63, 2**64 - 1, -1, 2**32 - 1, 0, True, [Change(DELETE, 0, b"key", None, None)]),
    Transaction(2**63, 2**64 - 1, 9, 0, 3, True, [Change(UPDATE, 65535, b"k", b"before", b"after")]),
]  # fmt: skip


def document(number: int, change: Change) -> Transaction:
    token = bson.encode({"_data": f"82{number:06}"})
    return Transaction(token, token, number * 1_000_000, 0, 0, True, [change])


KEY, AFTER, DELTA = bson.encode({"_id": 1}), bson.encode({"_id": 1, "a": 2}), bson.encode({"updatedFields": {"a": 2}})
DOCUMENTS = [
    document(1, Change(INSERT, 0, KEY, None, AFTER)),
    document(-2, Change(UPDATE, 65535, KEY, None, None, Delta(DELTA))),
    document(3, Change(UPDATE, 0, KEY, None, AFTER, Delta(DELTA))),
    document(4, Change(UPDATE, 0, KEY, None, AFTER)),
    document(5, Change(DELETE, 0, KEY, None, None)),
]

READERS = pytest.mark.parametrize("read", [unpack, unpack_in_python])


@READERS
def test_every_value_comes_back(read: Callable[[bytes], list[Transaction]]) -> None:
    assert read(packed(TRANSACTIONS)) == TRANSACTIONS


def assert_seen(
    read: Callable[[bytes], list[Transaction]], whole: bytes, ends: set[int], transactions: list[Transaction]
) -> None:
    """What is cut off behind the summary. ends: where a transaction does, the summary's own among them."""
    for size in range(min(ends), len(whole)):
        if size in ends:
            assert read(whole[:size]) == transactions[: len(read(whole[:size]))]
        else:
            with pytest.raises(DecodeError):
                read(whole[:size])


@READERS
def test_f90_what_is_cut_off_is_seen(read: Callable[[bytes], list[Transaction]]) -> None:
    whole = packed(TRANSACTIONS)
    ends = {len(packed(TRANSACTIONS[:number])) for number in range(4) if number} | {45}
    assert_seen(read, whole, ends, TRANSACTIONS)
    for size in range(45):
        with pytest.raises(DecodeError):
            PackedRows(whole[:size])
    with pytest.raises(DecodeError):
        list(PackedRows(whole[: len(packed(TRANSACTIONS[:2]))]))


@given(st.binary(max_size=300))
def test_whatever_the_bytes_are_both_readers_say_the_same(data: bytes) -> None:
    def found(read: Callable[[bytes], list[Transaction]]) -> object:
        try:
            return read(packed(TRANSACTIONS)[:45] + data)
        except DecodeError as exc:
            return str(exc)

    assert found(unpack) == found(unpack_in_python)


@given(st.binary(max_size=300), st.lists(st.integers(0, 400)))
def test_whatever_the_bytes_are_both_find_the_same_transactions(data: bytes, places: list[int]) -> None:
    data = packed(TRANSACTIONS) + data

    def found(find: Callable[[bytes, list[int]], list[tuple[int, int]]]) -> object:
        try:
            return find(data, sorted(place for place in places if place < len(data)))
        except DecodeError as exc:
            return str(exc)

    assert found(transactions_at) == found(transactions_at_in_python)


DOCUMENT_READERS = pytest.mark.parametrize("read", [unpack_documents, unpack_documents_in_python])


@DOCUMENT_READERS
def test_every_document_comes_back(read: Callable[[bytes], list[Transaction]]) -> None:
    assert read(packed_documents(DOCUMENTS)) == DOCUMENTS


@DOCUMENT_READERS
def test_f90_documents_that_are_cut_off_are_seen(read: Callable[[bytes], list[Transaction]]) -> None:
    whole = packed_documents(DOCUMENTS)
    ends = {len(packed_documents(DOCUMENTS[:number])) for number in range(1, 6)} | {16}
    assert_seen(read, whole, ends, DOCUMENTS)
    for size in range(len(whole)):
        with pytest.raises(DecodeError):
            PackedDocuments(whole[:size])
    inner = packed_documents(DOCUMENTS[:3])[16:]
    with pytest.raises(DecodeError, match="5 packed transactions should be 3"):
        list(PackedDocuments(whole[:12] + pack("<I", 16) + inner))


@given(st.binary(max_size=300) | st.sampled_from([KEY, DELTA]), st.integers(0, 3), st.binary(max_size=20))
def test_whatever_the_bytes_are_both_readers_of_documents_say_the_same(data: bytes, parts: int, more: bytes) -> None:
    def found(read: Callable[[bytes], list[Transaction]]) -> object:
        try:
            return read(bytes(16) + bytes([0, parts]) + bytes(10) + KEY + data + more)
        except DecodeError as exc:
            return str(exc)

    assert found(unpack_documents) == found(unpack_documents_in_python)


def test_a_batch_tells_the_same_of_packed_documents_as_of_others() -> None:
    plain = Batch((TABLE, TABLE), DOCUMENTS, DOCUMENTS[-1].end, 10)
    found = Batch((TABLE, TABLE), PackedDocuments(packed_documents(DOCUMENTS)), DOCUMENTS[-1].end, 10)
    assert (found.complete, found.change_count) == (plain.complete, plain.change_count) == (True, 5)
    assert Summary(*found.summary)._replace(counts=[*found.summary.counts]) == plain.summary
    assert found == plain
    assert found.transactions != PackedRows(packed(TRANSACTIONS))


def without_first(transactions: Sequence[Transaction]) -> list[Transaction]:
    return [msgspec.structs.replace(each, changes=each.changes[1:]) for each in transactions]


def test_marked_transactions_are_found_and_may_be_replaced() -> None:
    found = PackedRows(packed(TRANSACTIONS))
    assert found.spans(frozenset((b"nothing",))) == []
    assert [found.part(span) for span in found.spans(frozenset((b"fore",)))] == [TRANSACTIONS[2:]]
    assert [found.part(span) for span in found.spans(frozenset((b"one", b"ey")))] == [
        TRANSACTIONS[:1],
        TRANSACTIONS[1:2],
    ]
    first, second = found.spans(frozenset((b"one", b"key")))
    assert (found.part(first), found.part(second)) == (TRANSACTIONS[:1], TRANSACTIONS[1:2])
    assert found.part(found.rest(first)) == TRANSACTIONS[1:]
    emptied = without_first(TRANSACTIONS[:2])
    others = found.altered(iter((first, second)), without_first)
    assert others is not None
    assert others == [*emptied, TRANSACTIONS[2]]
    assert others.summary == found.summary._replace(counts=(1, 1, 0, 0, 0, 0))
    assert found.altered([first], lambda _: None) is None


def test_a_mark_is_found_behind_what_only_looks_like_it() -> None:
    found = PackedRows(packed(TRANSACTIONS))
    _, end = found.spans(frozenset((b"key",)))[0]
    across = found.data[end - 1 : found.data.index(b"before") + 1]
    assert [found.part(span) for span in found.spans(frozenset((across, b"before")))] == [
        TRANSACTIONS[1:2],
        TRANSACTIONS[2:],
    ]


def test_a_batch_tells_the_same_of_packed_transactions_as_of_others() -> None:
    plain = Batch((TABLE, TABLE), TRANSACTIONS, 2**63 + 8, 10)
    found = Batch((TABLE, TABLE), PackedRows(packed(TRANSACTIONS)), 2**63 + 8, 10)
    assert (found.complete, found.change_count) == (plain.complete, plain.change_count) == (True, 4)
    assert Summary(*found.summary)._replace(counts=[*found.summary.counts]) == plain.summary
    assert found.summary == (3, True, (2, 1, 1, 0, 0, 0), 100, 2**63, 9)
    assert found == plain
    assert found.transactions[-1] is found.transactions[2], "who looks twice sees the same"
    assert list(found.transactions) == TRANSACTIONS
    assert found.transactions[1:] == TRANSACTIONS[1:]
    assert found.transactions != TRANSACTIONS[1:]


def test_who_goes_through_them_once_leaves_nothing_behind() -> None:
    batch = Batch((TABLE, TABLE), PackedRows(packed(TRANSACTIONS)), 2**63 + 8, 10)
    assert list(batch.once()) == TRANSACTIONS
    assert batch.once() is not batch.once()
    assert batch.transactions[0] is batch.once()[0], "but what is there already is not made again"
    assert Batch((TABLE, TABLE), TRANSACTIONS, 2**63 + 8, 10).once() is TRANSACTIONS
    with pytest.raises(DecodeError):
        PackedRows(packed(TRANSACTIONS)[:-1]).once()


def test_the_queue_keeps_documents(tmp_path: Path) -> None:
    path = tmp_path / "shop.queue"
    end = DOCUMENTS[-1].end
    batch = Batch((TABLE, TABLE), PackedDocuments(packed_documents(DOCUMENTS)), end, 10)
    for _ in range(2):  # from memory, and from the file
        queue = Queue(path, max_bytes=10**9, min_free_bytes=0)
        if queue.position is None:
            queue.begin(b"")
            queue.register("mirror")
            queue.append(batch)
            queue.flush(timeout_seconds=60)
        (stored,) = queue.read(0, max_bytes=10**6, timeout_seconds=1)
        assert isinstance(stored.batch.transactions, PackedDocuments)
        assert stored.batch == batch
        assert stored.batch.transactions == DOCUMENTS
        queue.close()


def test_what_is_packed_in_another_way_is_refused() -> None:
    stored = msgspec.msgpack.encode(((), msgspec.msgpack.Ext(2, packed_documents(DOCUMENTS)), b"", 0))
    with pytest.raises(DecodeError, match="in a way 2 that is not known"):
        decode(stored)


def test_the_queue_keeps_them(tmp_path: Path) -> None:
    path = tmp_path / "shop.queue"
    batch = Batch((TABLE, TABLE), PackedRows(packed(TRANSACTIONS[:1])), 108, 10)
    for _ in range(2):  # from memory, and from the file
        queue = Queue(path, max_bytes=10**9, min_free_bytes=0)
        if queue.position is None:
            queue.begin(0)
            queue.register("mirror")
            queue.append(batch)
            queue.flush(timeout_seconds=60)
        (stored,) = queue.read(0, max_bytes=10**6, timeout_seconds=1)
        assert stored.batch == batch
        assert stored.batch.transactions == TRANSACTIONS[:1]
        assert queue.seek(Position(queue.queue_id, 0, 0)) == 0
        queue.close()
