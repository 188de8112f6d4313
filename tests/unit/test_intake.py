"""However the stream's messages are cut, packed or not: the same transactions come out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain, count
from struct import pack

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc.change import Batch, Change, Transaction, Truncate
from cdc.errors import DecodeError, ResyncRequired
from cdc.packed_rows import PackedRows
from cdc.postgres.assembly import PART_BYTES, Assembler
from cdc.postgres.frames import Frames
from cdc.postgres.intake import Intake
from cdc.postgres.row import UNCHANGED, Value
from tests.unit.test_assembly import RELATION, begin, commit, insert
from tests.unit.test_pgoutput import row, text

pytest.importorskip("cdc.postgres._frames", reason="no C compiler was there when it was installed")

OTHER = RELATION.replace(pack(">I", 1) + text("public"), pack(">I", 2) + text("other"), 1)
MESSAGE = b"M\1" + pack(">Q", 5) + text("mine") + pack(">I", 2) + b"hi"


def change(kind: bytes, relation: int, *rows: tuple[bytes, list[Value]]) -> bytes:
    return kind + pack(">I", relation) + b"".join(tag + row(*values) for tag, values in rows)


def update(*rows: tuple[bytes, list[Value]]) -> bytes:
    return change(b"U", 1, *rows)


CHANGES = {
    "insert": insert(b"1"),
    "null": change(b"I", 1, (b"N", [b"2", None])),
    "empty": change(b"I", 1, (b"N", [])),
    "of another": change(b"I", 2, (b"N", [b"1", b"x"])),
    "update": update((b"N", [b"1", b"y"])),
    "in part": update((b"N", [b"1", UNCHANGED])),
    "key": update((b"K", [b"1", None]), (b"N", [b"2", b"y"])),
    "full": update((b"O", [b"1", b"x"]), (b"N", [b"1", b"y"])),
    "full, in part": update((b"O", [b"1", b"x"]), (b"N", [b"1", UNCHANGED])),
    "delete": change(b"D", 1, (b"K", [b"1", None])),
    "delete, full": change(b"D", 1, (b"O", [b"1", b"x"])),
    "truncate": b"T" + pack(">IBI", 1, 0, 1),
    "message": MESSAGE,
    "described": RELATION,
    "origin": b"O" + pack(">Q", 5) + text("elsewhere"),
    "type": b"Y" + pack(">I", 9) + text("public") + text("mood"),
    "long": change(b"I", 1, (b"N", [b"3", b"x" * 70_000])),
}


def frames(*messages: bytes) -> Frames:
    return Frames(b"".join(pack("<I", len(message)) + message for message in messages))


def taken(intake: Intake | Assembler) -> list[Batch]:
    found = []
    while (batch := intake.take()) is not None:
        found.append(batch)
    return found


def described() -> Intake:
    """An intake that knows both tables."""
    intake = Intake(0)
    intake.feed(frames(begin(10), RELATION, OTHER, insert(b"0"), commit(10)))
    assert len(taken(intake)) == 1
    return intake


def as_seen(batches: list[Batch]) -> list[tuple[Transaction, list[list[str]]]]:
    """Transactions, in parts or not, with the names of their tables in place of indexes."""
    found = []
    for batch in batches:
        for each in batch.transactions:
            indexes = [change.detail.tables if isinstance(change.detail, Truncate) else [change.table]
                       for change in each.changes]  # fmt: skip
            names = [[str(batch.tables[index].qualified) for index in own if index >= 0] for own in indexes]
            plain = [
                msgspec.structs.replace(
                    change, table=0, detail=None if isinstance(change.detail, Truncate) else change.detail
                )
                for change in each.changes
            ]
            found.append((msgspec.structs.replace(each, changes=plain), names))
    return found


@given(
    st.lists(st.tuples(st.lists(st.sampled_from(sorted(CHANGES)), max_size=5), st.booleans()), max_size=8),
    st.lists(st.integers(1, 40), max_size=12),
)
def test_the_same_transactions_as_one_by_one(wanted: list[tuple[list[str], bool]], cuts: list[int]) -> None:
    stream = [begin(10), RELATION, OTHER, insert(b"0"), commit(10)]
    for number, (names, again) in enumerate(wanted):
        lsn = 20 + 10 * number - 15 * again  # what came before comes again
        stream += [begin(lsn), *(CHANGES[name] for name in names), commit(lsn)]
    assembler = Assembler(0)
    assembler.feed(stream)
    expected = taken(assembler)
    intake, found, at = Intake(0), [], 0
    for size in [*cuts, len(stream)]:
        intake.feed(frames(*stream[at : at + size]))
        found += taken(intake)
        at += size
    assert as_seen(found) == as_seen(expected)
    intake.pass_idle(0)
    assembler.pass_idle(0)  # past transactions of nothing
    assert intake.position == assembler.position
    assert not intake.in_transaction


@pytest.mark.parametrize(
    "name", ["insert", "null", "of another", "update", "in part", "key", "full", "delete", "origin", "type"]
)
def test_rows_are_packed(name: str) -> None:
    intake = described()
    intake.feed(frames(begin(20), CHANGES[name], insert(b"1"), commit(20), begin(30), insert(b"2")))
    (batch,) = taken(intake)
    assert isinstance(batch.transactions, PackedRows)
    changes = 1 if name in {"origin", "type"} else 2
    assert (batch.position, batch.change_count, intake.position) == (28, changes, 28)
    assert batch.size == sum(map(len, (begin(20), CHANGES[name], insert(b"1"), commit(20))))
    assert intake.in_transaction
    intake.feed(frames(commit(30)))
    (batch,) = taken(intake)
    assert isinstance(batch.transactions, PackedRows)
    assert [table.name for table in batch.tables] == ["t"]
    assert not intake.in_transaction


@pytest.mark.parametrize("name", ["full, in part", "truncate", "message", "described"])
def test_what_is_more_than_rows_goes_one_by_one(name: str) -> None:
    intake = described()
    rest = (begin(30), CHANGES[name], insert(b"2"), commit(30), begin(40), insert(b"3"), commit(40))
    intake.feed(frames(begin(20), insert(b"1"), commit(20), *rest))
    packed, plain = taken(intake)
    assert isinstance(packed.transactions, PackedRows)
    assert isinstance(plain.transactions, list)
    assert [each.position for each in plain.transactions] == [30, 40]


@pytest.mark.parametrize("damaged", [
    insert(b"1")[:-1] + b"", update((b"K", [b"1"]))[:-1], update((b"K", [b"1", None])), change(b"I", 9, (b"N", [b"1"])),
    b"I", b"", b"?123456789", begin(1), commit(1)[:-1], change(b"U", 1, (b"X", [b"1"])),
])  # fmt: skip
def test_whatever_is_not_whole_is_left_to_the_assembler(damaged: bytes) -> None:
    """Which says what is wrong with it; a row that is cut off is seen where it is taken apart, as ever."""
    messages = (begin(20), damaged, commit(20))
    assembler = Assembler(0)
    assembler.feed([begin(10), RELATION, OTHER, insert(b"0"), commit(10)])
    assembler.take()
    intake = described()
    intake.feed(frames(*messages))
    try:
        assembler.feed(messages)
        expected = taken(assembler)
    except (DecodeError, IndexError) as exc:
        with pytest.raises(type(exc), match=re.escape(str(exc))):
            taken(intake)
    else:
        assert as_seen(taken(intake)) == as_seen(expected)


def test_f40_a_large_transaction_is_given_out_in_parts_and_the_next_ones_are_packed_again() -> None:
    intake, long = described(), change(b"I", 1, (b"N", [b"3", b"x" * (PART_BYTES // 3)]))
    intake.feed(frames(begin(20), long, long))
    assert taken(intake) == []
    intake.feed(frames(long, long))
    (part,) = taken(intake)
    assert (part.complete, part.change_count, part.position) == (False, 4, 18)
    intake.feed(frames(insert(b"4"), commit(20), begin(30), insert(b"5"), commit(30), begin(40)))
    rest, end, packed = taken(intake)
    assert (rest.change_count, end.change_count, end.position) == (1, 0, 28)
    assert [each.transactions[0].first_ordinal for each in (part, rest, end)] == [0, 4, 5]
    assert [(each.complete, each.change_count, each.position) for each in (rest, end)] == [
        (False, 1, 18),
        (True, 0, 28),
    ]
    assert [isinstance(each.transactions, PackedRows) for each in (part, rest, end, packed)] == [
        True,
        True,
        False,
        True,
    ]
    assert intake.in_transaction


@pytest.fixture(scope="module")
def small_parts() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cdc.postgres.intake.PART_BYTES", 150)
        yield


@pytest.mark.usefixtures("small_parts")
@given(
    st.lists(st.lists(st.sampled_from(sorted(CHANGES)), max_size=40), max_size=4),
    st.lists(st.tuples(st.integers(1, 20), st.booleans()), max_size=12),
)
def test_f5_f40_large_transactions_are_the_same_in_parts_also_over_new_streams(
    wanted: list[list[str]], cuts: list[tuple[int, bool]]
) -> None:
    described_first = [begin(10), RELATION, OTHER, insert(b"0"), commit(10)]
    rest = {
        lsn: [begin(lsn), *(CHANGES[name] for name in names), commit(lsn)] for lsn, names in zip(count(20, 10), wanted)
    }
    assembler = Assembler(0)
    assembler.feed([*described_first, *chain.from_iterable(rest.values())])
    expected = taken(assembler)
    intake, found, stream = Intake(0), [], [*described_first, *chain.from_iterable(rest.values())]
    for size, is_lost in [*cuts, (len(stream), False)]:
        intake.feed(frames(*stream[:size]))
        del stream[:size]
        found += taken(intake)
        if is_lost:
            intake.reset()
            again = [each for lsn, each in rest.items() if lsn >= intake.position]
            stream = [*described_first, *chain.from_iterable(again)]
    assert as_seen(joined(found)) == as_seen(joined(expected))
    assert not intake.in_transaction


def moved_on(change: Change, tables: int) -> Change:
    """The same where so many tables come before its own."""
    if isinstance(change.detail, Truncate):
        detail = msgspec.structs.replace(change.detail, tables=tuple(index + tables for index in change.detail.tables))
        change = msgspec.structs.replace(change, detail=detail)
    return msgspec.structs.replace(change, table=change.table + tables) if change.table >= 0 else change


def joined(batches: list[Batch]) -> list[Batch]:
    """With every transaction as a whole, in a batch of its own."""
    found: list[Batch] = []
    for batch in batches:
        for each in batch.transactions:
            last = found[-1].transactions[0] if found else None
            if last is None or last.complete:
                found.append(Batch(batch.tables, [each], each.end, 0))
                continue
            assert (last.position, last.first_ordinal + len(last.changes)) == (each.position, each.first_ordinal)
            tables, known = found[-1].tables, len(found[-1].tables)
            moved = [moved_on(change, known) for change in each.changes]
            whole = msgspec.structs.replace(each, first_ordinal=0, changes=[*last.changes, *moved])
            found[-1] = Batch((*tables, *batch.tables), [whole], each.end, 0)
    return found


def test_f4_f5_a_new_stream_begins_where_the_last_one_was_given_out() -> None:
    intake, long = described(), change(b"I", 1, (b"N", [b"3", b"x" * (PART_BYTES // 2)]))
    intake.feed(frames(begin(20), insert(b"1"), commit(20), begin(30), insert(b"2")))
    taken(intake)
    intake.reset()
    assert intake.position == 28
    intake.feed(frames(begin(30), RELATION, long, long, long))
    (part,) = taken(intake)
    assert isinstance(part.transactions, PackedRows)
    intake.reset()
    intake.feed(frames(begin(30), RELATION, long, long, long, insert(b"4"), commit(30)))
    (rest,) = taken(intake)
    assert (part.transactions[0].first_ordinal, rest.transactions[0].first_ordinal) == (0, 3)
    assert rest.change_count == 1
    intake.feed(frames(begin(50), long, long, long))
    taken(intake)
    intake.reset()
    intake.feed(frames(begin(60), RELATION, long, commit(60)))
    with pytest.raises(ResyncRequired):
        taken(intake)


def test_transactions_of_nothing_move_the_position() -> None:
    intake = described()
    intake.feed(frames(begin(20), commit(20), begin(30), commit(30)))
    assert taken(intake) == []
    assert intake.pass_idle(0)
    assert intake.position == 38


def test_one_that_comes_again_is_dropped() -> None:
    intake = described()
    intake.feed(frames(begin(12), insert(b"1"), commit(12), begin(20), insert(b"2"), commit(20)))
    (batch,) = taken(intake)
    assert [each.position for each in batch.transactions] == [20]


def test_f4_one_that_comes_again_is_dropped_also_behind_one_of_nothing() -> None:
    intake = described()
    intake.feed(frames(begin(15), commit(15), begin(30), commit(30)))
    assert taken(intake) == []
    intake.feed(frames(begin(25), insert(b"1"), commit(25)))
    assert taken(intake) == []
