"""Messages become whole transactions; what comes twice is dropped."""

from __future__ import annotations

from struct import pack

import pytest

from cdc.change import DELETE, INSERT, UPDATE, Batch, Change, Message, Truncate
from cdc.errors import DecodeError, ResyncRequired
from cdc.postgres.assembly import Assembler
from cdc.postgres.row import UNCHANGED, first_value
from tests.unit.test_pgoutput import row, text

RELATION = (
    b"R" + pack(">I", 1) + text("public") + text("t") + b"d" + pack(">H", 2)
    + b"\1" + text("id") + pack(">Ii", 23, -1) + b"\0" + text("v") + pack(">Ii", 25, -1)
)  # fmt: skip


def begin(lsn: int) -> bytes:
    return b"B" + pack(">QqI", lsn, 0, 7)


def commit(lsn: int) -> bytes:
    return b"C" + pack(">BQQq", 0, lsn, lsn + 8, 0)


def insert(value: bytes) -> bytes:
    return b"I" + pack(">I", 1) + b"N" + row(value, b"x")


def fed(assembler: Assembler, *messages: bytes) -> Assembler:
    assembler.feed(messages)
    return assembler


def values(batch: Batch | None) -> list[bytes]:
    assert batch is not None
    images = [change.after for transaction in batch.transactions for change in transaction.changes]
    return [value for image in images if image and (value := first_value(image))]


def test_a_transaction_is_given_out_when_it_is_complete() -> None:
    assembler = fed(Assembler(0), begin(100), RELATION, insert(b"1"))
    assert assembler.take() is None
    assert assembler.in_transaction
    batch = fed(assembler, insert(b"2"), commit(100)).take()
    assert batch is not None
    (transaction,) = batch.transactions
    assert (transaction.position, transaction.end, batch.position) == (100, 108, 108)
    assert values(batch) == [b"1", b"2"]
    assert (transaction.first_ordinal, transaction.complete, transaction.xid) == (0, True, 7)
    assert assembler.take() is None


def test_an_open_transaction_stays_behind_with_its_tables() -> None:
    assembler = fed(Assembler(0), begin(100), RELATION, insert(b"1"), commit(100), begin(200), insert(b"2"))
    assert values(assembler.take()) == [b"1"]
    batch = fed(assembler, insert(b"3"), commit(200)).take()
    assert values(batch) == [b"2", b"3"]
    assert batch is not None
    assert batch.tables[batch.transactions[0].changes[0].table].name == "t"


def test_f33_a_table_that_is_described_again_stays_one() -> None:
    """It is, after every TRUNCATE or ANALYZE; two tables of one name could not be applied set-wise."""
    assembler = fed(Assembler(0), begin(100), RELATION, insert(b"1"), RELATION, insert(b"2"), commit(100))
    batch = fed(assembler, begin(200), RELATION, insert(b"3"), commit(200)).take()
    assert values(batch) == [b"1", b"2", b"3"]
    assert batch is not None
    assert [table.name for table in batch.tables] == ["t"]


def test_f40_a_large_transaction_is_given_out_in_parts() -> None:
    assembler = fed(Assembler(50), begin(100), RELATION, insert(b"1"), insert(b"2"))
    first = assembler.take(part=True)
    assert first is not None
    assert not first.complete
    assert first.position == 50, "an incomplete transaction does not move the position"
    second = fed(assembler, insert(b"3"), commit(100)).take()
    assert second is not None
    assert second.complete
    assert second.position == 108
    assert (second.transactions[0].first_ordinal, values(second)) == (2, [b"3"])


def test_f4_transactions_below_the_position_are_dropped() -> None:
    assembler = fed(Assembler(150), begin(100), RELATION, insert(b"1"), commit(100), begin(150), insert(b"2"))
    assert values(fed(assembler, commit(150)).take()) == [b"2"]


def test_f4_f5_a_part_that_comes_again_is_skipped_by_ordinal() -> None:
    assembler = fed(Assembler(50), begin(100), RELATION, insert(b"1"), insert(b"2"))
    assembler.take(part=True)
    for _ in range(2):
        assembler.reset()
        fed(assembler, begin(100), RELATION, insert(b"1"))
        assert assembler.take(part=True) is None
    assembler.reset()
    batch = fed(assembler, begin(100), RELATION, insert(b"1"), insert(b"2"), insert(b"3"), commit(100)).take()
    assert values(batch) == [b"3"]
    assert batch is not None
    assert batch.transactions[0].first_ordinal == 2


def test_another_transaction_in_place_of_one_that_was_begun_is_a_gap() -> None:
    assembler = fed(Assembler(50), begin(100), RELATION, insert(b"1"))
    assembler.take(part=True)
    assembler.reset()
    with pytest.raises(ResyncRequired):
        fed(assembler, begin(120))


def test_f22_unchanged_values_come_from_the_old_row_where_it_is_sent() -> None:
    old = row(b"1", b"toast", b"x")
    update = b"U" + pack(">I", 1) + b"O" + old + b"N" + row(b"1", UNCHANGED, None)
    batch = fed(Assembler(0), begin(100), RELATION, update, commit(100)).take()
    assert batch is not None
    assert batch.transactions[0].changes == [Change(UPDATE, 0, None, old, row(b"1", b"toast", None))]


def test_f20_a_new_relation_message_counts_from_then_on() -> None:
    wider = RELATION.replace(text("v"), text("w"))
    batch = fed(Assembler(0), begin(100), RELATION, insert(b"1"), wider, insert(b"2"), commit(100)).take()
    assert batch is not None
    names = [batch.tables[change.table].columns[1].name for change in batch.transactions[0].changes]
    assert names == ["v", "w"]


def test_deletes_truncates_and_messages() -> None:
    batch = fed(
        Assembler(0),
        begin(100),
        RELATION,
        b"D" + pack(">I", 1) + b"K" + row(b"1", None),
        b"T" + pack(">IBI", 1, 2, 1),
        b"M" + pack(">BQ", 1, 77) + text("app") + pack(">I", 2) + b"{}",
        commit(100),
    ).take()
    assert batch is not None
    deleted, truncated, message = batch.transactions[0].changes
    assert deleted == Change(DELETE, 0, row(b"1", None), None, None)
    assert truncated.detail == Truncate((0,), False, True)
    assert message.detail == Message("app", b"{}")


def test_f43_messages_outside_transactions_and_heartbeats_leave_nothing_but_the_position() -> None:
    outside = b"M" + pack(">BQ", 0, 77) + text("app") + pack(">I", 0)
    heartbeat = b"M" + pack(">BQ", 1, 77) + text("cdc.heartbeat") + pack(">I", 0)
    assembler = fed(Assembler(0), outside, begin(100), outside, heartbeat, commit(100))
    assert assembler.take() is None
    assert assembler.pass_idle(0)
    assert not assembler.pass_idle(0)
    assert assembler.position == 108


def test_f7_the_position_moves_while_nothing_happens_but_never_past_what_waits() -> None:
    assembler = Assembler(50)
    assembler.pass_idle(80)
    assert assembler.position == 80
    fed(assembler, begin(100), RELATION, insert(b"1"))
    assembler.pass_idle(90)
    assert assembler.position == 80
    fed(assembler, commit(100)).pass_idle(200)
    assert assembler.position == 80
    assert values(assembler.take()) == [b"1"]
    assembler.pass_idle(200)
    assert assembler.position == 200


@pytest.mark.parametrize(
    "messages", [[RELATION, insert(b"1")], [begin(1), insert(b"1")], [begin(1), begin(2)], [commit(1)]]
)
def test_messages_out_of_order_are_decode_errors(messages: list[bytes]) -> None:
    with pytest.raises(DecodeError):
        fed(Assembler(0), *messages)


def test_sizes_add_up() -> None:
    assembler = fed(Assembler(0), begin(100), RELATION, insert(b"1"), commit(100), begin(200), insert(b"2"))
    first = assembler.take()
    second = fed(assembler, commit(200)).take()
    assert first is not None
    assert second is not None
    messages = [begin(100), RELATION, insert(b"1"), commit(100), begin(200), insert(b"2"), commit(200)]
    assert first.size + second.size == sum(map(len, messages))
    assert assembler.pending_bytes == 0
    assert first.transactions[0].changes[0].operation == INSERT


def test_f4_what_was_not_given_out_when_the_stream_broke_comes_again() -> None:
    assembler = fed(Assembler(50), begin(100), RELATION, insert(b"1"), commit(100))
    assembler.reset()  # before anybody took it
    assert assembler.position == 50, "the stream would go on behind it"
    assert values(fed(assembler, begin(100), RELATION, insert(b"1"), commit(100)).take()) == [b"1"]
    assert assembler.position == 108
