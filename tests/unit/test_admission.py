"""What need not wait behind parked changes is told quickly, and never of a change that has to wait."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import msgspec
import pytest

from cdc.admission import ParkedRows, admission, apart
from cdc.change import DDL, DELETE, INSERT, TRUNCATE, UPDATE, Batch, Change, Column, Ddl, Table, Transaction, Truncate
from cdc.packed_rows import PackedRows
from cdc.parts import Item, Subjects, items_of
from cdc.postgres.parking import SubjectFinder, Uniqueness
from cdc.postgres.plan import TablePlan
from cdc.postgres.row import UNCHANGED, Row, Value, decode_row, encode_row
from cdc.postgres.schema import SchemaColumn, SchemaTable
from cdc.queue import Stored
from cdc.queue.parked import ParkedChange, ParkedCount
from cdc.sink import Subject
from cdc.testing import MemorySink
from tests.batches import packed

TEXT = 25
NAMES = ("a", "b", "c", "d")


@dataclass(frozen=True)
class Shape:
    """A table of four columns, its key, and what else is unique."""

    name: str
    key: tuple[str, ...]
    unique: dict[str, tuple[str, ...]]

    @property
    def table(self) -> Table:
        return Table("public", self.name, tuple(Column(name, TEXT, name in self.key) for name in NAMES))

    @property
    def target(self) -> SchemaTable:
        columns = tuple(SchemaColumn(name, TEXT, "text", "text", False, "", "", True) for name in NAMES)
        name = self.table.qualified
        return SchemaTable(1, name, False, columns, self.key, False, "d", self.key, False)


SHAPES = [
    Shape("plain", ("a",), {}),
    Shape("composite", ("a", "b"), {}),
    Shape("reversed", ("b", "a"), {"c_key": ("c",)}),
    Shape("behind", ("c",), {}),
    Shape("unique", ("a",), {"b_key": ("b",), "c_d_key": ("d", "c")}),
]
TABLES = tuple(shape.table for shape in SHAPES)


def finder() -> SubjectFinder:
    targets = {shape.table.qualified: shape.target for shape in SHAPES}
    unique = {shape.table.qualified: Uniqueness(dict.fromkeys(NAMES, TEXT), shape.unique) for shape in SHAPES}
    return SubjectFinder(lambda table: TablePlan(table, targets[table.qualified], None), set(targets), unique)


COMMON = (b"1", b"2", b"12")
ODD = (b"", b"t", b"u", b"b_key", b"t\0\0\0\x011", b"x" * 256, b"x" * 300)


class Source:
    """Writes changes by chance: what a source sends, and what none ever should."""

    def __init__(self, seed: str) -> None:
        self.random = Random(seed)

    def change(self, index: int) -> Change:
        """Of a row of a table."""
        key = SHAPES[index].key
        operation = self.random.choice([INSERT, UPDATE, UPDATE, DELETE])
        old = self.random.choice(["key", "before"] if operation == DELETE else ["", "", "", "key", "before"])
        return Change(
            operation,
            index,
            self._image(key, only_key=True) if old == "key" else None,
            self._image(key) if old == "before" else None,
            None if operation == DELETE else self._image(key),
        )

    def changes(self, count: int, index: int) -> list[Change]:
        """Several of one table."""
        return [self.change(index) for _ in range(count)]

    def piece(self, seq: int, others: Sequence[Change]) -> Stored:
        """Transactions of up to three changes of rows, and sometimes one of the others."""
        transactions = []
        for position in range(seq * 100, seq * 100 + self.random.randint(0, 12)):
            own = [self.change(self.random.choice([0, 0, 4])) for _ in range(self.random.randint(0, 3))]
            if others and not self.random.randrange(20):
                own.append(self.random.choice(others))
            transactions.append(Transaction(position, position, 0, 0, 0, True, own))
        return Stored(seq, Batch(TABLES, transactions, seq * 100 + 50, 0))

    def _image(self, key: tuple[str, ...], *, only_key: bool = False) -> bytes:
        """Mostly its key has travelled."""
        return encode_row(tuple([self._value(name in key, only_key=only_key) for name in NAMES]))

    def _value(self, is_key: bool, *, only_key: bool) -> Value:
        if only_key and not is_key:
            return None
        if not self.random.randrange(20 if is_key else 5):
            return self.random.choice([None, UNCHANGED])
        return self.random.choice(ODD if not self.random.randrange(5) else COMMON)


def could_have(key: bytes, shape: Shape, change: Change) -> bool:
    """Whether a row that is changed may have a key, as far as its columns have travelled."""
    wanted = (key,) if len(shape.key) == 1 else decode_row(key)
    rows = [
        dict(zip(NAMES, decode_row(image), strict=True))
        for image in (change.before or change.key, change.after)
        if image
    ]
    return any(
        all(row[name] in {value, None, UNCHANGED} for name, value in zip(shape.key, wanted, strict=True))
        for row in rows
    )


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_f89_a_row_is_free_only_if_none_of_the_keys_can_be_its_own(shape: Shape) -> None:
    source, find, index = Source(shape.name), finder(), SHAPES.index(shape)
    for number in range(2_000):
        change, parked = source.change(index), source.changes(60 if number % 100 == 0 else 1 + number % 3, index)
        own = find.find(TABLES, change).keys
        parked_keys = [find.find(TABLES, each).keys or () for each in parked]
        keys = {key for each in parked_keys for key in each}
        exactly = own is not None and keys.isdisjoint(own)
        is_free = find.free_of(shape.table, keys).is_free(change)
        assert is_free or not exactly
        if is_free and not exactly:
            assert own is None, "it has one of the keys"
            assert not any(could_have(key, shape, change) for key, *_ in filter(None, parked_keys))


@pytest.mark.parametrize("refused", [1, 1_000])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_f89_all_other_rows_are_free(shape: Shape, refused: int) -> None:
    index = SHAPES.index(shape)

    def insert(number: int) -> Change:
        row: Row = tuple([f"{name}{number:06}".encode() for name in NAMES])
        return Change(INSERT, index, None, None, encode_row(row))

    subjects = [finder().find(TABLES, insert(number)) for number in range(refused)]
    is_free = finder().free_of(shape.table, {key for subject in subjects for key in subject.keys or ()}).is_free
    assert not any(is_free(insert(number)) for number in range(refused))
    assert all(is_free(insert(number)) for number in range(refused, refused + 10))


class Sink(MemorySink):
    """With the subjects of a PostgreSQL mirror."""

    def __init__(self) -> None:
        super().__init__("mirror")
        finding = finder()
        self.subject_of = finding.find  # type: ignore[method-assign]
        self.free_of = finding.free_of  # type: ignore[method-assign]


def as_packed(piece: Stored) -> Stored:
    transactions = piece.batch.transactions
    if not transactions:
        return piece
    return Stored(piece.seq, msgspec.structs.replace(piece.batch, transactions=PackedRows(packed(list(transactions)))))


TRUNCATED = Change(TRUNCATE, -1, None, None, None, Truncate((1, 4), cascade=False, restart_identity=False))
ALTERED = Change(DDL, 4, None, None, None, Ddl("alter", b""))


def parked_row(number: int, subject: Subject) -> ParkedChange:
    return ParkedChange(
        place=number, ordinal=0, position=number, tables=subject.tables, keys=subject.keys, size=1, created_at=0.0
    )


def waiting_one_by_one(pieces: list[Stored], parked: ParkedRows, sink: Sink) -> list[tuple[Item, Subject]]:
    behind = Subjects()
    waiting = []
    for item in (item for piece in pieces for item in items_of(piece)):
        subject = sink.subject_of(item.stored.batch.tables, item.change)
        if parked.subjects.block(subject) or behind.block(subject):
            behind.add(subject)
            waiting.append((item, subject))
    return waiting


@pytest.mark.parametrize("others", [(), (TRUNCATED, ALTERED), None], ids=["rows", "tables", "packed"])
def test_f89_what_has_to_wait_is_the_same_as_one_by_one(others: Sequence[Change] | None) -> None:
    source, sink = Source("batches"), Sink()
    for number in range(300):
        parked = ParkedRows()
        for place, change in enumerate(source.changes(1 + number % 3, number % 2 * 4)):
            parked.add(parked_row(place, sink.subject_of(TABLES, change)))
        pieces = [source.piece(seq, others or ()) for seq in (1, 2)]
        if others is None:
            pieces = list(map(as_packed, pieces))
        found, expected = admission(pieces, parked, sink, again=False), waiting_one_by_one(pieces, parked, sink)
        assert [(item.id, subject) for item, subject in found.waiting] == [
            (item.id, subject) for item, subject in expected
        ]
        waiting = {item.id for item, _ in expected}
        free, held = apart((item for piece in pieces for item in items_of(piece)), parked, sink)
        assert held == expected
        items = [item for piece in pieces for item in items_of(piece)]
        passed = [item.change for piece in found.admitted for item in items_of(piece)]
        assert passed == [item.change for item in items if item.id not in waiting] == [item.change for item in free]
        assert found.has_ddl == any(item.change is ALTERED for item in items)
        for piece, admitted in zip(pieces, found.admitted, strict=True):
            places = [each.position for each in admitted.batch.transactions]
            assert places == [each.position for each in piece.batch.transactions], "an empty one is a position, too"
            assert (admitted is piece) == (admitted.batch.change_count == piece.batch.change_count)


@pytest.mark.parametrize("is_packed", [False, True])
def test_f89_what_follows_a_truncate_waits_also_in_a_batch_of_another_table(*, is_packed: bool) -> None:
    """Of two tables, of which only the one has something parked."""
    sink, parked = Sink(), ParkedRows()
    one, two = TABLES[0], TABLES[4]
    row = encode_row((b"1", b"", b"", b""))
    parked.add(parked_row(1, sink.subject_of(TABLES, Change(UPDATE, 0, None, None, row))))
    emptied = Change(TRUNCATE, -1, None, None, None, Truncate((0, 1), cascade=False, restart_identity=False))
    first = Stored(1, Batch((one, two), [Transaction(10, 10, 0, 0, 0, True, [emptied])], 10, 0))
    inserted = Change(INSERT, 0, None, None, row)
    second = Stored(2, Batch((two,), [Transaction(20, 20, 0, 0, 0, True, [inserted])], 20, 0))
    found = admission([first, as_packed(second) if is_packed else second], parked, sink, again=False)
    assert [item.id for item, _ in found.waiting] == [(10, 0), (20, 0)]


def test_what_is_parked_itself_is_told_nothing_of() -> None:
    sink, parked = Sink(), ParkedRows()
    changes = [Change(UPDATE, 0, None, None, encode_row((key, b"", b"", b""))) for key in (b"1", b"1", b"2")]
    transactions = [Transaction(position, position, 0, 0, 0, True, [each]) for position, each in enumerate(changes, 10)]
    parked.add(parked_row(10, sink.subject_of(TABLES, changes[0])))
    found = admission([Stored(1, Batch(TABLES, transactions, 12, 0))], parked, sink, again=True)
    assert [item.id for item, _ in found.waiting] == [(11, 0)]
    free, waiting = apart(items_of(found.given[0]), parked, sink)
    assert ([item.id for item, _ in waiting], [item.change for item in free]) == ([(11, 0)], changes[2:])
    assert [item.change for piece in found.admitted for item in items_of(piece)] == changes[2:]


def test_what_is_parked_is_counted_as_it_comes_and_goes() -> None:
    """The clock may jump between two of them: the first one need not be the oldest."""
    choose, parked = Random(1), ParkedRows()
    known: dict[int, ParkedChange] = {}
    for number in range(3_000):
        row = choose.choice([*known.values(), None])
        match choose.choice(["add", "add", "again", "replace", "remove", "clear"]):
            case "add":
                row = parked_row(number, Subject((TABLES[0].qualified,), (b"1",)))
                row = known[number] = msgspec.structs.replace(row, created_at=float(choose.randrange(50)))
                parked.add(row)
            case "again" if row is not None:
                parked.add(msgspec.structs.replace(row, created_at=-1.0, attempts=7))
            case "replace" if row is not None:
                attempts, state = choose.randrange(3), choose.choice(["retrying", "dead"])
                known[row.place] = msgspec.structs.replace(row, attempts=attempts, state=state)
                parked.replace(known[row.place])
            case "remove" if row is not None:
                parked.remove(row)
                del known[row.place]
            case "clear" if not choose.randrange(200):
                parked.clear()
                known.clear()
        assert parked.count == ParkedCount(
            len(known),
            sum(row.state == "dead" for row in known.values()),
            min((row.created_at for row in known.values()), default=None),
            sum(row.state != "dead" and not row.attempts for row in known.values()),
        )
