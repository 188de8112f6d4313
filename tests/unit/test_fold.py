"""Folding has the same effect as applying one by one, or refuses."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc.change import DELETE, INSERT, UPDATE, Batch, Change, Transaction
from cdc.errors import DecodeError
from cdc.packed_rows import PackedRows
from cdc.postgres.copy_text import copy_text, plain_text, plain_text_in_python
from cdc.postgres.fold import Appends, Fold, FoldError, KeyOf, changed_columns, old_row
from cdc.postgres.row import UNCHANGED, Row, decode_row, encode_row, first_value, merge
from cdc.postgres.steps import unplain_changes
from tests.batches import TABLE, packed


def inserted(key: bytes, value: bytes) -> Change:
    return Change(INSERT, 0, None, None, encode_row((key, value, b"toast " + value)))


def updated(key: bytes, value: bytes) -> Change:
    return Change(UPDATE, 0, None, None, encode_row((key, value, UNCHANGED)))


def deleted(key: bytes) -> Change:
    return Change(DELETE, 0, encode_row((key, None, None)), None, None)


def apply_one_by_one(table: dict[object, Row], change: Change) -> None:
    if change.operation == DELETE:
        del table[old_row(change)[0]]
        return
    assert change.after is not None
    row = decode_row(change.after)
    assert (row[0] in table) == (change.operation == UPDATE)
    table[row[0]] = merge(row, table[row[0]]) if row[0] in table else row


def apply_folded(table: dict[object, Row], fold: Fold) -> None:
    for row in fold.deleted():
        del table[row[0]]
    for row in map(fold.row, fold.updated()):
        table[row[0]] = merge(row, table[row[0]])
    for row in map(fold.row, fold.inserted()):
        assert row[0] not in table
        assert UNCHANGED not in row
        table[row[0]] = row


@given(st.lists(st.tuples(st.sampled_from([INSERT, UPDATE, DELETE]), st.sampled_from([b"1", b"2", b"3"]))), st.data())
def test_folding_equals_applying_one_by_one(wishes: list[tuple[int, bytes]], data: st.DataObject) -> None:
    start: dict[object, Row] = {b"1": (b"1", b"old", b"toast"), b"2": (b"2", b"old", b"toast")}
    model = dict(start)
    changes: list[Change] = []
    for number, (operation, key) in enumerate(wishes):
        if (key in model) == (operation == INSERT):
            continue  # the source would have refused it
        value = str(number).encode()
        change = {INSERT: inserted(key, value), UPDATE: updated(key, value), DELETE: deleted(key)}[operation]
        apply_one_by_one(model, change)
        changes.append(change)
    folded = dict(start)
    fold = Fold(first_value)
    for change in changes:
        assert fold.add(change)
    apply_folded(folded, fold)
    assert folded == model


class Lane:
    """As much of one as the fold of packed changes looks at."""

    def __init__(self, key_of: KeyOf) -> None:
        self.fold = Fold(key_of)


def second_value(image: bytes) -> bytes:
    value = decode_row(image)[0]
    assert isinstance(value, bytes)
    return value


ROWS = [
    *(inserted(key, value) for key in (b"1", b"2") for value in (b"a", b"b")),
    *(updated(key, value) for key in (b"1", b"2", b"3") for value in (b"a", b"b")),
    *(Change(UPDATE, 0, None, None, encode_row((key, b"whole", None))) for key in (b"1", b"3")),
    *(deleted(key) for key in (b"1", b"2", b"3")),
    Change(UPDATE, 0, encode_row((b"1", None, None)), None, encode_row((b"1", b"same key", UNCHANGED))),
]


@given(st.lists(st.lists(st.sampled_from(ROWS), min_size=1, max_size=6), min_size=1, max_size=4), st.booleans())
def test_packed_changes_fold_as_others_do(wanted: list[list[Change]], first: bool) -> None:
    transactions = [Transaction(n, n, 0, 0, 0, True, changes) for n, changes in enumerate(wanted)]
    batch = Batch((TABLE,), PackedRows(packed(transactions)), 9, 9)
    one_by_one, lane = Fold(first_value), Lane(first_value if first else second_value)
    refused = []
    for fold, changes in (
        (one_by_one, (change for each in transactions for change in each.changes)),
        (lane.fold, unplain_changes(batch, [lane])),  # type: ignore[list-item]
    ):
        try:
            for change in changes:
                assert fold.add(change)
        except FoldError:
            refused.append(fold)
    assert refused in ([], [one_by_one, lane.fold])
    for rows in (Fold.updated, Fold.inserted):
        assert refused or list(rows(lane.fold)) == list(rows(one_by_one))
        assert refused or [*map(lane.fold.row, rows(lane.fold))] == [*map(one_by_one.row, rows(one_by_one))]
    assert refused or list(lane.fold.deleted()) == list(one_by_one.deleted())


@pytest.mark.parametrize(
    "changes",
    [
        [inserted(b"1", b"a"), inserted(b"1", b"b")],
        [updated(b"1", b"a"), inserted(b"1", b"b")],
        [deleted(b"1"), updated(b"1", b"b")],
        [deleted(b"1"), deleted(b"1")],
    ],
)
def test_changes_that_do_not_follow_from_each_other_are_refused(changes: list[Change]) -> None:
    fold = Fold(first_value)
    with pytest.raises(FoldError):
        [fold.add(change) for change in changes]


def test_nothing_is_left_of_a_row_that_came_and_went() -> None:
    fold = Fold(first_value)
    fold.add(inserted(b"1", b"a"))
    assert fold
    fold.add(deleted(b"1"))
    assert not fold


def test_f23_a_moved_key_is_not_folded() -> None:
    fold = Fold(first_value)
    one, two, changed = (encode_row(row) for row in ((b"1", b"x"), (b"2", b"x"), (b"2", b"y")))
    assert not fold.add(Change(UPDATE, 0, encode_row((b"1", None)), None, two))
    assert not fold.add(Change(UPDATE, 0, None, one, two))
    assert fold.add(Change(UPDATE, 0, None, two, changed))
    assert list(map(fold.row, fold.updated())) == [(b"2", b"y")]


def test_rows_without_a_key_are_only_appended() -> None:
    appends = Appends()
    assert appends.add(inserted(b"1", b"a"))
    assert not appends.add(deleted(b"1"))
    assert list(map(appends.row, appends.inserted())) == [(b"1", b"a", b"toast a")]


def test_columns_that_travelled() -> None:
    assert changed_columns((b"1", None)) is None
    assert changed_columns((b"1", UNCHANGED, b"2")) == (0, 2)


def read_copy_text(text: bytes) -> list[Row]:
    """COPY's text format, by the manual."""
    escapes = {b"\\\\": b"\\", b"\\t": b"\t", b"\\n": b"\n", b"\\r": b"\r"}
    assert text.endswith(b"\n")
    assert b"\r" not in text

    def value(field: bytes) -> bytes | None:
        if field == b"\\N":
            return None
        result, at = b"", 0
        while at < len(field):
            step = 2 if field[at : at + 1] == b"\\" else 1
            result += escapes.get(field[at : at + step], field[at : at + step])
            at += step
        return result

    return [tuple(map(value, line.split(b"\t"))) for line in text[:-1].split(b"\n")]


values = st.one_of(st.none(), st.binary(max_size=5), st.sampled_from([b"\\N", b"\\.", b"\\", b"\t", b"\n", b"\r", b""]))


special_rows = st.integers(1, 3).flatmap(lambda width: st.lists(st.tuples(*[values] * width), min_size=1, max_size=6))


@given(special_rows)
def test_copy_text_reads_back(rows: list[Row]) -> None:
    assert read_copy_text(copy_text(rows)) == rows


PlainText = Callable[[Collection[bytes], int], tuple[bytes, Collection[bytes]]]
both_ways = pytest.mark.parametrize("write", [plain_text, plain_text_in_python])
"""The same function twice where nothing was compiled."""


@both_ways
@given(rows=special_rows)
def test_plain_rows_are_written_from_their_images_and_the_others_left(write: PlainText, rows: list[Row]) -> None:
    text, others = write([encode_row(row) for row in rows], len(rows[0]))
    written = read_copy_text(text) if text else []
    left = [decode_row(image) for image in others]
    assert sorted(written + left, key=repr) == sorted(rows, key=repr)
    if all(value and value.isalnum() for row in rows for value in row):
        assert not left


@both_ways
@given(images=st.lists(st.one_of(st.binary(max_size=30), special_rows.map(lambda rows: encode_row(rows[0])))))
def test_what_is_no_row_of_that_width_is_left(write: PlainText, images: list[bytes]) -> None:
    """Also where it ends before its end, or goes on behind it."""
    images += [image[:-1] for image in images] + [image + b"n" for image in images]
    text, others = write(images, 2)
    rows = list(filter(None, map(read_pair, images)))
    written = read_copy_text(text) if text else []
    left = list(filter(None, map(read_pair, others)))
    assert sorted(written + left, key=repr) == sorted(rows, key=repr)


@both_ways
def test_large_rows_fit(write: PlainText) -> None:
    rows: list[Row] = [(None,) * 3000, (b"\t" * 3000, *(b"x",) * 2999), (b"y" * 300_000, *(b"",) * 2999)]
    text, others = write([encode_row(row) for row in rows], 3000)
    assert len(read_copy_text(text) if text else []) + len(others) == 3


def read_pair(image: bytes) -> Row | None:
    """The row, if it is one of two columns that could be inserted."""
    with contextlib.suppress(DecodeError):
        row = decode_row(image)
        return row if len(row) == 2 and UNCHANGED not in row else None
    return None


def test_copy_text_of_nothing() -> None:
    assert copy_text([]) == b""
