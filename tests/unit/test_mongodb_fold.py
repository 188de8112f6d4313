"""Folding has the effect of applying one by one, whatever was looked up when, and however often it is repeated."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import bson
import pytest
from bson import Decimal128, Int64, Timestamp
from hypothesis import given
from hypothesis import strategies as st

from cdc.change import DDL, DELETE, INSERT, MESSAGE, UPDATE, Batch, Change, Ddl, Delta, Message, Table, TableName
from cdc.change import Transaction as Tx
from cdc.mongodb.delta import statements
from cdc.mongodb.equality import id_only, key_of
from cdc.mongodb.fold import Fold, FoldInPython, add_all, add_all_in_python, fold, segments
from cdc.mongodb.folded import Folded
from cdc.packed_documents import PackedDocuments
from tests.batches import packed_documents
from tests.mongo_model import Document, describe, execute

IDS = [1, 1.0, Int64(1), Decimal128("1"), "a", {"x": 1}, {"x": 1.0}]
ORDERS = Table("shop", "orders", (), "")
ITEMS = Table("shop", "items", (), "")

Documents = dict[Hashable, bytes]


def key(value: Any) -> bytes:
    return bson.encode({"_id": value})


class History:
    """What happened at a source, and what its change stream says of it to a reader that comes as late as it likes."""

    def __init__(self) -> None:
        self.states: list[Documents] = [{}]
        self.events: list[tuple[str, bytes, bytes | None, bytes | None]] = []

    def do(self, wish: str, value: Any, field: str, number: int) -> None:
        now = dict(self.states[-1])
        found = key_of(key(value))
        before = now.get(found)
        if wish == "insert" and before is None:
            after = bson.encode({"_id": value, field: number})
            self.events.append(("insert", key(value), after, None))
        elif wish == "delete" and before is not None:
            self.events.append(("delete", id_of(before), None, None))
            del now[found]
            self.states.append(now)
            return
        elif wish == "replace" and before is not None:
            own = bson.decode(id_of(before))["_id"]
            after = bson.encode({"_id": own, field: number})
            self.events.append(("replace", id_of(before), after, None))
        elif wish == "update" and before is not None:
            decoded = bson.decode(before)
            changed: Document = {**decoded, field: {"n": number}}
            if number % 3 == 0:
                changed.pop(field)
            after = bson.encode(changed)
            if after == before:
                return
            self.events.append(("update", id_of(before), None, describe(decoded, changed, certain=True)))
        else:
            return
        now[found] = after
        self.states.append(now)

    def changes(self, looks: Sequence[int | None]) -> list[Change]:
        """looks: how many events later each update is looked up; `None`: never."""
        found = []
        for number, (kind, own, after, description) in enumerate(self.events):
            if kind == "update":
                late = looks[number % len(looks)] if looks else None
                state = self.states[min(number + 1 + late, len(self.states) - 1)] if late is not None else {}
                assert description is not None
                found.append(Change(UPDATE, 0, own, None, state.get(key_of(own)), Delta(description)))
            else:
                operation = {"insert": INSERT, "replace": UPDATE, "delete": DELETE}[kind]
                found.append(Change(operation, 0, own, None, after))
        return found


def id_of(document: bytes) -> bytes:
    return id_only(document)


def transactions(changes: Sequence[Change]) -> list[Tx]:
    return [Tx(b"%d" % n, b"%d" % n, 0, 0, 0, True, [change]) for n, change in enumerate(changes)]


def packed(changes: Sequence[Change]) -> PackedDocuments:
    token = bson.encode({"_data": "82"})
    return PackedDocuments(packed_documents([Tx(token, token, 0, 0, 0, True, [change]) for change in changes]))


def batch(changes: Sequence[Change], tables: tuple[Table, ...] = (ORDERS,)) -> Batch:
    return Batch(tables, transactions(changes), b"end", 0)


def apply_folded(target: Documents, changes: Sequence[Change], latest: Documents) -> None:
    """As a server would, with its equality; what does not fit is read again."""
    (segment,) = segments([batch(changes)])
    for effect in fold(segment, ()).values():
        assert isinstance(effect, Folded)
        for own in effect.deletes:
            target.pop(key_of(own), None)
        for own, image in [*effect.replaces, *effect.inserts]:
            put(target, own, image)
        for change in effect.deltas:
            assert change.key is not None
            apply_delta(target, change, latest)


def apply_delta(target: Documents, change: Change, latest: Documents) -> None:
    assert change.key is not None
    assert isinstance(change.detail, Delta)
    found = key_of(change.key)
    document = bson.decode(target[found]) if found in target else None
    for part in statements(id_only(change.key), change.detail.description):
        try:
            document = None if document is None else execute(part, document)
        except (TypeError, AttributeError):
            document = None  # the server would refuse it
    if document is not None:
        target[found] = bson.encode(document)
    elif found in latest:
        target[found] = latest[found]
    else:
        target.pop(found, None)


def put(target: Documents, own: bytes, image: bytes) -> None:
    found = key_of(own)
    if found in target:  # a replacement keeps the bytes of the `_id` that is there
        image = bson.encode({**bson.decode(image), "_id": bson.decode(id_of(target[found]))["_id"]})
    target[found] = image


wishes = st.lists(
    st.tuples(
        st.sampled_from(["insert", "delete", "replace", "update", "update"]),
        st.sampled_from(IDS),
        st.sampled_from(["f", "g"]),
        st.integers(0, 9),
    ),
    min_size=1,
    max_size=25,
)
looks = st.lists(st.one_of(st.none(), st.integers(0, 12)), max_size=3)


def happened(wanted: Sequence[tuple[str, Any, str, int]]) -> History:
    history = History()
    for wish in wanted:
        history.do(*wish)
    return history


@given(wishes, looks, st.integers(0, 25))
def test_f68_f74_folding_batches_equals_applying_one_by_one(
    wanted: list[tuple[str, Any, str, int]], late: list[int | None], cut: int
) -> None:
    """F68, F74: images from the future, missing ones, and `_id`s that are equal in different bytes."""
    history = happened(wanted)
    changes = history.changes(late)
    target: Documents = {}
    for part in (changes[:cut], changes[cut:]):
        apply_folded(target, part, history.states[-1])
    assert target == history.states[-1]


@given(wishes, looks, st.integers(0, 25), st.integers(0, 25), st.integers(0, 25))
def test_f101_replaying_converges_from_anywhere(
    wanted: list[tuple[str, Any, str, int]], late: list[int | None], done: int, begin: int, cut: int
) -> None:
    """F101: applied up to `done`, then again from `begin` on (a crash, or a copy that was made meanwhile)."""
    history = happened(wanted)
    changes = history.changes(late)
    begin = min(begin, done)
    target: Documents = dict(history.states[min(done, len(changes))])
    for part in (changes[begin : begin + cut], changes[begin + cut :]):
        apply_folded(target, part, history.states[-1])
    assert target == history.states[-1]


NUMBERS = [0, -1, 2**31, -(2**63), 1.5, float("nan"), Int64(-1), Decimal128("1.5")]
OTHERS = ["", "a\0b", None, True, b"x", bson.ObjectId(b"0" * 12), [1], Timestamp(1, 2)]
keys = st.builds(
    lambda value, more: bson.encode({"_id": value, **more}),
    st.sampled_from([*IDS, *NUMBERS, *OTHERS]),
    st.sampled_from([{}, {}, {"shard": 1}]),
)
documents = keys.map(lambda own: bson.encode({"_id": bson.decode(own)["_id"], "a": 1}))
any_changes = st.lists(
    st.builds(Change, st.sampled_from([INSERT, UPDATE, DELETE, MESSAGE]), st.integers(0, 2), keys, st.none(), documents)
    | keys.flatmap(lambda own: st.builds(Change, st.just(UPDATE), st.just(0), st.just(own), st.none(), st.none()))
    | keys.flatmap(lambda own: st.builds(Change, st.just(DELETE), st.just(0), st.just(own), st.none(), st.none())),
    max_size=25,
)


@given(any_changes)
def test_f68_f73_compiled_or_not_the_fold_is_the_same(changes: list[Change]) -> None:
    """The same functions twice where nothing was compiled."""
    work = transactions(changes)
    ours: list[Any] = [Fold(), [], Fold()]
    theirs: list[Any] = [FoldInPython(), [], FoldInPython()]
    add_all(work, ours)
    add_all_in_python(work, theirs)
    assert ours[1] == theirs[1]
    for one_fold, other in ((ours[0], theirs[0]), (ours[2], theirs[2])):
        assert bool(one_fold) == bool(other)
        assert one_fold.folded() == other.folded()


@given(any_changes, st.booleans())
def test_packed_or_not_the_fold_is_the_same(changes: list[Change], in_order: bool) -> None:
    plain = [change for change in changes if change.operation != MESSAGE]
    if not plain:
        return
    ours: list[Any] = [Fold(), [] if in_order else Fold(), Fold()]
    theirs: list[Any] = [Fold(), [] if in_order else Fold(), Fold()]
    add_all(packed(plain), ours)
    add_all(transactions(plain), theirs)
    for one_taker, other in zip(ours, theirs, strict=True):
        assert (one_taker if isinstance(one_taker, list) else one_taker.folded()) == (
            other if isinstance(other, list) else other.folded()
        )


def test_packed_changes_of_no_table_that_is_known() -> None:
    with pytest.raises(IndexError):
        add_all(packed([one(INSERT, 1, table=3)]), [Fold()])


def one(operation: int, number: int, *, table: int = 0, detail: Any = None) -> Change:
    after = bson.encode({"_id": number}) if operation in {INSERT, UPDATE} else None
    return Change(operation, table, key(number), None, after, detail)


def folded(*changes: Change) -> Folded:
    (segment,) = segments([batch(changes)])
    effect = fold(segment, ())[ORDERS.qualified]
    assert isinstance(effect, Folded)
    return effect


def test_what_came_and_went_is_only_deleted() -> None:
    effect = folded(one(INSERT, 1), one(DELETE, 1), one(DELETE, 2))
    assert effect.deletes == [key(1), key(2)]
    assert effect.expected_deletes == 1
    assert not effect.inserts
    assert not effect.replaces


def test_f73_what_comes_back_in_other_bytes_is_deleted_first() -> None:
    back = Change(INSERT, 0, key(1.0), None, bson.encode({"_id": 1.0}))
    effect = folded(one(DELETE, 1), back)
    assert effect.deletes == [key(1.0)]
    assert effect.inserts == [(key(1.0), bson.encode({"_id": 1.0}))]


def ddl(kind: str, table: int = 0) -> Change:
    return Change(DDL, table, None, None, None, Ddl(kind, b""))


def test_ddl_is_a_barrier() -> None:
    parts = [one(INSERT, 1), ddl("drop"), ddl("create"), one(INSERT, 2), ddl("dropDatabase", -1)]
    found = segments([batch(parts[:2]), batch(parts[2:])])
    assert [segment.ddl for segment in found] == [parts[1], parts[2], parts[4], None]
    assert [[change for _, change in segment.changes()] for segment in found] == [[parts[0]], [], [parts[3]], []]
    assert [segment.table for segment in found] == [ORDERS.qualified, ORDERS.qualified, None, None]
    assert [segment.through for segment in found[:3]] == [b"0", b"1", b"1"]
    assert [segment.position for segment in found[:3]] == [b"1", b"0", b"2"]


def test_ddl_within_a_transaction_comes_first() -> None:
    whole = Tx(b"t", b"t", 0, 0, 0, True, [ddl("create"), one(INSERT, 1), ddl("createIndexes"), one(INSERT, 2)])
    found = segments([Batch((ORDERS,), [*transactions([one(INSERT, 0)]), whole], b"end", 0)])
    assert [segment.ddl is not None and segment.whole for segment in found] == [False, False, False]
    assert [segment.ddl for segment in found] == [whole.changes[0], whole.changes[2], None]
    assert [[change.key for _, change in segment.changes()] for segment in found] == [[key(0)], [], [key(1), key(2)]]


def test_what_is_applied_already_is_left_out() -> None:
    changes = [one(INSERT, 1), ddl("drop"), one(INSERT, 2)]
    (rest,) = segments([batch(changes)], after=b"1")
    assert [change for _, change in rest.changes()] == [changes[2]]
    assert len(segments([batch(changes)], after=b"elsewhere")) == 2


def test_collections_in_order_are_not_folded() -> None:
    changes = [one(INSERT, 1), one(INSERT, 1, table=1), one(DELETE, 1), one(DELETE, 1, table=1)]
    note = Change(MESSAGE, -1, None, None, None, Message("cdc", b""))
    (segment,) = segments([batch([*changes, note], (ORDERS, ITEMS))])
    effects = fold(segment, {TableName("shop", "items")})
    assert effects[ITEMS.qualified] == [changes[1], changes[3]]
    assert isinstance(effects[ORDERS.qualified], Folded)


def test_f75_a_mark_is_behind_all_parts_of_a_transaction() -> None:
    """F75: parts may have one position. One that is applied already is so with all of its parts."""
    changes = [Change(INSERT, 0, key(number), None, key(number)) for number in range(3)]
    parts = [Tx(b"1", b"1", 0, 0, number, number == 2, [change]) for number, change in enumerate(changes)]
    batches = [Batch((ORDERS,), [part], b"1", 0) for part in parts]
    (rest,) = segments(batches, after=b"1")
    assert list(rest.changes()) == []
