"""Change events become changes, transactions and batches: pure, from recorded and from hostile bytes."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final

import bson
import pytest
from bson import Int64, Timestamp
from hypothesis import given
from hypothesis import strategies as st

from cdc.change import DDL, DELETE, INSERT, UPDATE, Batch, Ddl, Delta, Transaction
from cdc.config import TableGlobs
from cdc.errors import DecodeError
from cdc.mongodb import walk
from cdc.mongodb.assembly import PART_BYTES, Assembler
from cdc.mongodb.equality import id_only
from cdc.mongodb.event import decode, fragment, join, quick
from cdc.mongodb.plain_events import PlainEvents, PlainEventsInPython
from cdc.mongodb.scope import Scope
from cdc.packed_documents import PackedDocuments

WALL: Final = dt.datetime(2024, 5, 1, 12, 30, tzinfo=dt.UTC)
SCOPE: Final = Scope(TableGlobs(include=("shop.*",), exclude=("shop.tmp*",)))
START: Final = bson.encode({"_data": "00"})


def event(number: int, kind: str = "insert", coll: str | None = "orders", **fields: Any) -> bytes:
    """An event as a server of 7.0 writes it; a field that is `...` is left out."""
    made: dict[str, Any] = {}
    for name in ("txnNumber", "lsid"):
        if name in fields:
            made[name] = fields.pop(name)
    made |= {"_id": {"_data": f"{number:04}"}, "operationType": kind, "clusterTime": Timestamp(1_700_000_000, number)}
    made["wallTime"] = WALL
    if kind in {"insert", "replace"}:
        made["fullDocument"] = {"_id": number, "a": 1}
    if "fullDocument" in fields:
        made["fullDocument"] = fields.pop("fullDocument")
    made["ns"] = {"db": "shop"} | ({"coll": coll} if coll else {})
    if kind in {"insert", "update", "replace", "delete"}:
        made["documentKey"] = {"_id": number}
    if kind == "update":
        made["updateDescription"] = {"updatedFields": {"a": 2}, "removedFields": [], "truncatedArrays": []}
    made |= fields
    return bson.encode({name: value for name, value in made.items() if value is not ...})


def within(transaction: int, number: int, **fields: Any) -> bytes:
    return event(number, txnNumber=Int64(transaction), lsid={"id": b"x"}, **fields)


def assemble(*events: bytes, post: bytes | None = None, assembler: Assembler | None = None) -> list[Batch]:
    """What comes of one reply."""
    assembler = assembler or Assembler(SCOPE, START)
    batches, at = [], 0
    while at < len(events):
        at = assembler.feed(events, at)
        if at == len(events):
            assembler.exhausted(post, empty=False)
        if (batch := assembler.take()) is not None:
            batches.append(batch)
    return batches


EVENTS: Final = [
    event(1),
    event(2, "update"),
    event(3, "update", fullDocument=None),
    event(4, "update", fullDocument={"_id": 4, "b": 1}),
    event(5, "replace"),
    event(6, "delete"),
    event(7, wallTime=...),
    event(8, fullDocumentBeforeChange={"_id": 8}),
]
OTHERS: Final = [
    event(9, "drop"),
    event(10, "rename", to={"db": "shop", "coll": "x"}),
    event(11, "dropDatabase", coll=None),
    event(12, "invalidate", ns=...),
    event(13, "somethingNew", coll=None, extra=[1, {"x": 1}]),
    within(1, 14),
]


@pytest.mark.parametrize("raw", EVENTS)
def test_quick_and_thorough_agree(raw: bytes) -> None:
    found = quick(raw)
    assert found == decode(raw) or (found is None and b"fullDocumentBeforeChange" in raw)


@pytest.mark.parametrize("raw", OTHERS)
def test_quick_leaves_the_rest_alone(raw: bytes) -> None:
    assert quick(raw) is None
    decode(raw)


def test_f70_delta_replacement_and_look_up() -> None:
    insert, update, gone, looked_up, replace, delete, old, before = (decode(raw).change(0) for raw in EVENTS)
    assert (insert.operation, insert.key, insert.after) == (
        INSERT, bson.encode({"_id": 1}), bson.encode({"_id": 1, "a": 1}),
    )  # fmt: skip
    assert isinstance(update.detail, Delta)
    assert bson.decode(update.detail.description)["updatedFields"] == {"a": 2}
    assert (update.after, gone.after) == (None, None)
    assert looked_up.after == bson.encode({"_id": 4, "b": 1})
    assert (replace.operation, replace.detail) == (UPDATE, None)
    assert (delete.operation, delete.after) == (DELETE, None)
    assert before.before == bson.encode({"_id": 8})
    assert decode(EVENTS[0]).commit_time == int(WALL.timestamp()) * 1_000_000
    assert decode(EVENTS[6]).commit_time == 1_700_000_000_000_000
    assert old.operation == INSERT


def test_f80_unknown_events_and_fields() -> None:
    strange = event(1, "refineCollectionShardKey", coll="orders", operationDescription={"x": 1}, other=5)
    more = event(2, newField={"a": 1})
    (batch,) = assemble(strange, more)
    changes = [change for transaction in batch.transactions for change in transaction.changes]
    assert [change.operation for change in changes] == [DDL, INSERT]
    assert changes[0].detail == Ddl("refineCollectionShardKey", strange)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (event(1, _id=...), "no _id"),
        (event(1, _id="x"), "wrong type"),
        (event(1, operationType=...), "no operationType"),
        (event(1, documentKey=...), "documentKey"),
        (event(1, documentKey=5), "documentKey is not a document"),
        (event(1, fullDocument=None), "no fullDocument"),
        (event(1, "update", updateDescription=...), "updateDescription"),
        (event(1, wallTime=..., clusterTime=...), "neither wallTime nor clusterTime"),
        (event(1, ns={"db": 5}), "namespace is no text"),
    ],
)
def test_malformed_events_are_refused(raw: bytes, message: str) -> None:
    with pytest.raises(DecodeError, match=message):
        assemble(raw)


anything = st.sampled_from([*EVENTS, *OTHERS])


def plain(kind: Any, events: Sequence[bytes], room: int, tables: dict[bytes, int]) -> tuple[Any, list[Transaction]]:
    """What is taken, and how far it went."""
    taker = kind()
    went = taker.take(events, 0, room, tables)
    found = [*taker.drain()]
    assert not taker
    return went, found


@pytest.mark.parametrize("kind", [PlainEvents, PlainEventsInPython])
def test_plain_events_are_taken_up_to_the_first_that_is_not(kind: Any) -> None:
    """The same function twice where nothing was compiled."""
    orders, left_out = (bson.encode({"db": "shop", "coll": coll}) for coll in ("orders", "tmp"))
    tables = {orders: 3, left_out: -2}
    (at, size, token), found = plain(
        kind, [event(1), event(2, coll="tmp"), event(3, "delete"), event(4, "drop")], 10**6, tables
    )
    assert [(each.position, each.changes[0].table) for each in found] == [
        (bson.encode({"_data": number}), 3) for number in ("0001", "0003")
    ]
    assert (at, size, token) == (3, len(event(1)) + len(event(3, "delete")), bson.encode({"_data": "0003"}))
    (at, _, token), found = plain(kind, [event(1, coll="new")], 10**6, tables)
    assert (at, token, found) == (0, None, []), "its table is not known yet"
    (at, _, _), found = plain(kind, [event(number) for number in range(9)], len(event(1)) * 3, tables)
    assert at == len(found) == 3


@given(
    st.lists(
        st.tuples(anything, st.integers(0, 400), st.binary(max_size=3)) | st.binary().map(lambda b: (b, 0, b"")),
        max_size=3,
    ),
    st.integers(1, 1000),
)
def test_compiled_or_not_the_same_is_taken(parts: list[tuple[bytes, int, bytes]], room: int) -> None:
    damaged = [raw[:at] + other + raw[at + len(other) :] for raw, at, other in parts]
    tables = {bson.encode({"db": "shop", "coll": "orders"}): 0}
    expected = plain(PlainEventsInPython, damaged, room, tables)
    assert plain(PlainEvents, damaged, room, tables) == expected
    with suppress(DecodeError):  # what does not tell its own length cannot be in a reply
        assert plain(PlainEvents, walk.items(array_of(damaged), 0), room, tables) == expected


def array_of(documents: list[bytes]) -> bytes:
    """An array of these bytes, whatever they are."""
    return walk.joined(walk.element(walk.DOCUMENT, b"%d" % number, raw) for number, raw in enumerate(documents))


@given(st.lists(st.sampled_from(EVENTS + OTHERS), max_size=9), st.integers(0, 9), st.integers(1, 2000))
def test_events_are_taken_out_of_a_reply_as_from_a_list(events: list[bytes], at: int, room: int) -> None:
    tables = {bson.encode({"db": "shop", "coll": "orders"}): 0}
    found = []
    for each in (events, walk.items(array_of(events), 0)):
        plain_events = PlainEvents()
        found.append((plain_events.take(each, min(at, len(events)), room, tables), [*plain_events.drain()]))
    assert found[0] == found[1]


@given(anything.flatmap(lambda raw: st.tuples(st.just(raw), st.integers(0, len(raw) - 1))))
def test_truncated_events_raise_nothing_else(cut: tuple[bytes, int]) -> None:
    raw, length = cut
    with pytest.raises(DecodeError):
        assemble(raw[:length])


@given(
    st.tuples(anything, st.integers(0, 400), st.binary(min_size=1, max_size=4)) | st.binary().map(lambda b: (b, 0, b""))
)
def test_arbitrary_bytes_raise_nothing_else(parts: tuple[bytes, int, bytes]) -> None:
    raw, at, other = parts
    changed = raw[:at] + other + raw[at + len(other) :]
    found = quick(changed)
    try:
        thorough = decode(changed)
        assemble(changed)
    except DecodeError:
        return
    assert found is None or found == thorough


def test_f75_events_of_a_transaction_are_one() -> None:
    events = [event(1), within(1, 2), within(1, 3), within(2, 4), event(5)]
    (batch,) = assemble(*events)
    assert [len(transaction.changes) for transaction in batch.transactions] == [1, 2, 1, 1]
    assert batch.transactions[1].end == bson.encode({"_data": "0003"})


def test_f75_transaction_goes_on_in_the_next_reply() -> None:
    """Its last event is given out only when it is known to be the last, or a restart would lie between two halves."""
    assembler = Assembler(SCOPE, START)
    last = bson.encode({"_data": "0003"})
    (batch,) = assemble(event(1), within(1, 2), within(1, 3), post=last, assembler=assembler)
    assert batch.position == bson.encode({"_data": "0001"})
    assert assembler.idle() is None
    (batch,) = assemble(within(1, 4), post=bson.encode({"_data": "0009"}), assembler=assembler)
    assert [len(transaction.changes) for transaction in batch.transactions] == [3]
    assert assembler.idle() == bson.encode({"_data": "0009"})
    assert assembler.idle() is None


def test_f75_transaction_is_over_when_nothing_follows() -> None:
    """On a quiet server the token after an empty reply may still be that of the last event."""
    assembler = Assembler(SCOPE, START)
    last = bson.encode({"_data": "0002"})
    assert assemble(within(1, 2), post=last, assembler=assembler) == []
    assembler.exhausted(last, empty=True)
    batch = assembler.take()
    assert batch is not None
    assert (batch.complete, batch.change_count, batch.position) == (True, 1, last)


def test_f75_transaction_is_not_over_where_others_of_its_events_are_passed() -> None:
    """They are of collections that are not captured, and may fill more than the time of a reply."""
    data = [f"82{1_700_000_000:08X}00000001{number:02X}" for number in range(4)]
    assembler = Assembler(SCOPE, START)
    first, last = (bson.encode({**bson.decode(within(1, 1)), "_id": {"_data": data[number]}}) for number in (0, 3))
    passed, end = (bson.encode({"_data": data[number]}) for number in (1, 2))
    assert assemble(first, post=passed, assembler=assembler) == []
    assembler.exhausted(end, empty=True)
    assert assembler.take() is None
    assert assembler.idle() is None
    (batch,) = assemble(last, post=bson.encode({"_data": "826666666600000001"}), assembler=assembler)
    assert [len(transaction.changes) for transaction in batch.transactions] == [2]
    assert assemble(first, post=passed, assembler=assembler) == []
    assembler.exhausted(passed, empty=True)
    assert assembler.take() is not None, "nothing follows"


def test_f75_large_transaction_is_given_out_in_parts() -> None:
    filling = {"_id": 1, "x": "y" * (PART_BYTES // 4)}
    batches = assemble(*(within(1, number, fullDocument=filling) for number in range(10)), event(10))
    parts = [transaction for batch in batches for transaction in batch.transactions]
    assert [part.complete for part in parts] == [False] * (len(parts) - 2) + [True, True]
    assert [part.first_ordinal for part in parts[:-1]] == [
        sum(len(part.changes) for part in parts[:at]) for at in range(len(parts) - 1)
    ]
    assert sum(len(part.changes) for part in parts) == 11
    assert [batch.complete for batch in batches] == [*[False] * (len(batches) - 1), True]


def test_f76_equal_cluster_times_are_no_duplicates() -> None:
    events = [event(number, clusterTime=Timestamp(5, 5)) for number in range(3)]
    (batch,) = assemble(*events)
    assert batch.change_count == 3


def test_f67_fragments_are_put_together() -> None:
    whole = event(1, "update", fullDocument={"_id": 1, "a": "x"})
    parts = [
        bson.encode({"_id": {"_data": "0001a"}, "splitEvent": {"fragment": 1, "of": 2}, "operationType": "update",
                     "clusterTime": Timestamp(1_700_000_000, 1), "wallTime": WALL}),
        bson.encode({"_id": {"_data": "0001"}, "splitEvent": {"fragment": 2, "of": 2},
                     "fullDocument": {"_id": 1, "a": "x"}, "ns": {"db": "shop", "coll": "orders"},
                     "documentKey": {"_id": 1}, "updateDescription": bson.decode(whole)["updateDescription"]}),
    ]  # fmt: skip
    assert fragment(parts[0], walk.fields(parts[0])) == (1, 2)
    assert bson.decode(join(parts)) == bson.decode(whole)
    assert [b.transactions for b in assemble(*parts)] == [b.transactions for b in assemble(whole)]
    for wrong in ([parts[1]], [parts[0], parts[0]], [parts[0], event(2)]):
        with pytest.raises(DecodeError):
            assemble(*wrong)


def test_f67_fragments_are_asked_for_again_from_the_first() -> None:
    assembler = Assembler(SCOPE, START)
    first = bson.encode({"_id": {"_data": "0001a"}, "splitEvent": {"fragment": 1, "of": 2}})
    assemble(event(0), first, assembler=assembler)
    assert assembler.token == bson.encode({"_data": "0000"})
    assembler.forget_unfinished()
    assert assemble(event(1), assembler=assembler)


def test_what_is_not_captured_is_passed_over() -> None:
    assembler = Assembler(SCOPE, START)
    events = [event(1, coll="tmp1"), event(2, ns={"db": "other", "coll": "orders"}), within(1, 3, coll="tmp1")]
    assert assemble(*events, post=bson.encode({"_data": "0005"}), assembler=assembler) == []
    assert assembler.idle() == bson.encode({"_data": "0005"})


def test_one_table_a_namespace() -> None:
    (batch,) = assemble(event(1), event(2, coll="b"), event(3), event(4, coll="b"))
    assert [table.name for table in batch.tables] == ["orders", "b"]
    assert [transaction.changes[0].table for transaction in batch.transactions] == [0, 1, 0, 1]


def test_f66_renames_by_their_ends() -> None:
    def rename(start: str, end: str) -> bytes:
        return event(1, "rename", coll=start, to={"db": "shop", "coll": end})

    def kinds(raw: bytes) -> list[str]:
        details = [change.detail for b in assemble(raw) for t in b.transactions for change in t.changes]
        return [detail.kind for detail in details if isinstance(detail, Ddl)]

    assert kinds(rename("a", "b")) == ["rename"]
    assert kinds(rename("a", "tmp")) == ["drop"]
    assert kinds(rename("tmp", "tmp2")) == []
    assembler = Assembler(SCOPE, START)
    raw = rename("tmp", "a")
    assert assemble(raw, assembler=assembler) == []
    assert assembler.moved_in is not None
    documents = [bson.encode({"_id": number}) for number in range(3)]
    batches = [
        assembler.moved_batch([], documents[:2], complete=False),
        assembler.moved_batch([], documents[2:], complete=True),
    ]
    assert [batch.transactions[0].first_ordinal for batch in batches] == [0, 3]
    assert batches[0].transactions[0].changes[0].detail == Ddl("drop", raw)
    assert assembler.moved_in is None
    assert assembler.position == bson.encode({"_data": "0001"})


def test_the_id_of_a_document() -> None:
    assert id_only(bson.encode({"a": 1, "_id": {"k": 1}})) == bson.encode({"_id": {"k": 1}})
    with pytest.raises(DecodeError):
        id_only(bson.encode({"a": 1}))


def test_plain_events_of_any_collections_stay_packed() -> None:
    pytest.importorskip("cdc.mongodb._events", reason="there was no C compiler when this was installed")
    events = [event(1), event(2, coll="tmp"), event(3, "update", coll="parts"), event(4, "delete")]
    (batch,) = assemble(*events)
    assert isinstance(batch.transactions, PackedDocuments)
    assert [(each.changes[0].table, each.changes[0].operation) for each in batch.transactions] == [
        (0, INSERT), (1, UPDATE), (0, DELETE),
    ]  # fmt: skip
    assert batch.position == bson.encode({"_data": "0004"})
    (mixed,) = assemble(event(1), event(2, "drop"), event(3))
    assert [each.changes[0].operation for each in mixed.transactions] == [INSERT, DDL, INSERT]
    assert mixed.position == bson.encode({"_data": "0003"})
