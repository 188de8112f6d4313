"""Changes become records: versions, context, masks, limits; what MongoDB's lookups hide is told all the same."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from typing import Any

import bson
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc.change import (
    DDL,
    DELETE,
    INSERT,
    MESSAGE,
    TRUNCATE,
    UPDATE,
    Batch,
    Change,
    Column,
    Ddl,
    Delta,
    Message,
    Table,
    Transaction,
    Truncate,
)
from cdc.config import SourceConfig
from cdc.errors import ConfigError
from cdc.feed.composer import NO_CONTEXT, Composer, Context, Drafter, Key, keys_of
from cdc.feed.event import translator
from cdc.feed.options import EntityOptions, FeedOptions, Mask
from cdc.feed.record import EntityState, Record
from cdc.feed.visibility import Limits, view
from cdc.postgres.row import UNCHANGED, encode_row
from cdc.secret import Secret
from cdc.sink import SinkContext

POSTGRES = SourceConfig(name="shop", url=Secret("postgresql://h/shop"))
MONGODB = SourceConfig(name="shop", url=Secret("mongodb://h/ordersDB"))

PRODUCTS = Table(
    "public",
    "products",
    tuple(
        Column(name, oid, is_key=name == "id") for name, oid in (("id", 23), ("name", 25), ("branch", 25), ("by", 25))
    ),
)
ORDERS = Table("ordersDB", "orders", (), identity="")


class Told:
    """Composes what it is given, transaction by transaction, and remembers the states as a store does."""

    def __init__(self, options: FeedOptions, source: SourceConfig, primary_key: Sequence[str] = ()) -> None:
        context = SinkContext(source=source, primary_key=lambda _: primary_key)
        translate = translator(options, context)
        self.drafter = Drafter(options, translate)
        self.composer = Composer(source.name, options, translate)
        self.states: dict[Key, EntityState] = {}
        self.position = 0

    def __call__(self, *changes: Change, table: Table = PRODUCTS) -> list[Record]:
        self.position += 16
        whole = Transaction(self.position, self.position + 8, 1_700_000_000_000_000, 1, 0, True, list(changes))
        drafts = list(self.drafter.drafts([Batch((table,), [whole], self.position + 8, 100)]))
        records, states = self.composer.compose(
            drafts, {k: self.states[k] for k in keys_of(drafts) if k in self.states}
        )
        self.states |= {(state.entity_type, state.key): state for state in states}
        return records


def of_postgres(**options: Any) -> Told:
    return Told(FeedOptions(**({"location": "branch", "user": "by"} | options)), POSTGRES)


def of_mongodb(full_document: str = "updateLookup", **options: Any) -> Told:
    source = msgspec.structs.replace(MONGODB, full_document=full_document)
    return Told(FeedOptions(**options), source)


def row(*values: str | None) -> bytes:
    return encode_row(tuple(None if value is None else value.encode() for value in values))


def insert(*values: str | None) -> Change:
    return Change(INSERT, 0, None, None, row(*values))


def update(*values: str | None, key: bytes | None = None, before: bytes | None = None) -> Change:
    return Change(UPDATE, 0, key, before, row(*values))


def delete(key: str) -> Change:
    return Change(DELETE, 0, row(key, None, None, None), None, None)


def said(content: bytes, prefix: str = "cdc.context") -> Change:
    return Change(MESSAGE, -1, None, None, None, Message(prefix, content))


def decoded(value: bytes | None) -> Any:
    return None if value is None else msgspec.json.decode(value)


# PostgreSQL


def test_versions_count_and_a_delete_has_the_last_location() -> None:
    told = of_postgres()
    (created,) = told(insert("7", "tea", "north", "ann"))
    (updated,) = told(update("7", "tea", "south", "bob"))
    (deleted,) = told(delete("7"))
    (again,) = told(insert("7", "tea", "north", None))
    assert [each.version for each in (created, updated, deleted, again)] == [1, 2, 3, 4]
    assert [each.change_type for each in (created, updated, deleted, again)] == ["CREATE", "UPDATE", "DELETE", "CREATE"]
    assert (created.entity_type, created.entity_id, created.channel) == ("products", "7", "products")
    assert (updated.location_id, updated.user_id) == ("south", "bob")
    assert (deleted.location_id, deleted.user_id) == ("south", None), "who changed it last did not delete it"
    assert decoded(created.after) == {"id": 7, "name": "tea", "branch": "north", "by": "ann"}
    assert decoded(deleted.before) == {"id": 7}


def test_all_changes_of_a_transaction_have_places_of_their_own() -> None:
    records = of_postgres()(insert("1", "a", "n", "x"), insert("2", "b", "n", "x"), delete("1"))
    assert [record.position for record in records] == ["0/10:0", "0/10:1", "0/10:2"]


def test_a_changed_key_ends_one_entity_and_begins_another() -> None:
    told = of_postgres()
    told(insert("1", "a", "n", "x"))
    ended, begun = told(update("2", "a", "n", "x", key=row("1", None, None, None)))
    assert (ended.change_type, ended.entity_id, ended.version) == ("DELETE", "1", 2)
    assert (begun.change_type, begun.entity_id, begun.version) == ("CREATE", "2", 1)
    assert ended.position != begun.position


def test_full_images_tell_what_changed_and_keep_large_values() -> None:
    table = msgspec.structs.replace(
        PRODUCTS, identity="f", columns=tuple(msgspec.structs.replace(c, is_key=True) for c in PRODUCTS.columns)
    )
    told = Told(FeedOptions(), POSTGRES, primary_key=("id",))
    change = Change(UPDATE, 0, None, row("1", "a", "north", "x"), encode_row((b"1", UNCHANGED, b"south", b"x")))
    (record,) = told(change, table=table)
    assert (record.entity_id, record.changed) == ("1", ("branch",))
    assert decoded(record.after) == {"id": 1, "name": "a", "branch": "south", "by": "x"}
    assert decoded(record.before) == {"id": 1, "name": "a", "branch": "north", "by": "x"}


def test_what_did_not_travel_is_left_out_and_not_null() -> None:
    change = Change(UPDATE, 0, None, None, encode_row((b"1", UNCHANGED, b"south", None)))
    (record,) = of_postgres()(change)
    assert decoded(record.after) == {"id": 1, "branch": "south", "by": None}
    assert record.changed is None


def test_columns_may_have_any_name_and_values_may_be_empty() -> None:
    columns = tuple(Column(name, 25, is_key=name == "%b") for name in ("%b", "100%", 'a"b', "{}"))
    (record,) = of_postgres()(insert("1", "", "%s", None), table=Table("public", "odd", columns))
    assert record.after == b'{"%b":"1","100%":"","a\\"b":"%s","{}":null}'


def test_several_key_columns_become_an_array() -> None:
    table = Table("public", "lines", (Column("a", 23, is_key=True), Column("b", 25, is_key=True)))
    (record,) = of_postgres()(insert("1", 'x"y'), table=table)
    assert record.entity_id == '["1","x\\"y"]'


def test_a_truncate_concerns_all_entities() -> None:
    told = of_postgres()
    told(insert("1", "a", "n", "x"))
    (record,) = told(Change(TRUNCATE, 0, None, None, None, Truncate((0,), False, False)))
    assert (record.change_type, record.entity_id, record.entity_type) == ("DELETE", "*", "products")


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_context_message_speaks_for_its_transaction(place: int) -> None:
    told = of_postgres(location="", user="")
    changes = [insert("1", "a", "n", "x"), insert("2", "b", "n", "x")]
    changes.insert(place, said(b'{"userId": "u5", "locationId": 17, "more": true}'))
    assert {(record.user_id, record.location_id) for record in told(*changes)} == {("u5", "17")}
    (later,) = told(update("1", "a", "n", "x"))
    assert (later.user_id, later.location_id) == (None, "17"), "who did it is over, where it belongs is not"


def test_a_later_message_speaks_for_what_follows_it() -> None:
    records = of_postgres()(
        said(b'{"userId": "u1"}'), insert("1", "a", "n", "x"), said(b'{"userId": "u2"}'), insert("2", "a", "n", "x")
    )
    assert [record.user_id for record in records] == ["u1", "u2"]


def test_other_messages_and_unreadable_ones_change_nothing() -> None:
    records = of_postgres()(said(b"{"), said(b'{"userId": "u"}', prefix="other"), insert("1", "a", "n", "x"))
    assert [record.user_id for record in records] == ["x"]


def test_a_context_goes_on_with_a_transaction_that_comes_in_parts() -> None:
    told = of_postgres()
    parts = [
        Transaction(16, 24, 0, 1, 0, False, [said(b'{"userId": "u5"}')]),
        Transaction(16, 24, 0, 1, 1, True, [insert("1", "a", "n", "x")]),
    ]
    batches = [Batch((PRODUCTS,), [part], 24, 100) for part in parts]
    assert [draft.context for draft in told.drafter.drafts(batches)] == [Context(user_id="u5")]
    first, second = batches
    assert list(told.drafter.drafts([first])) == []
    assert [draft.context for draft in told.drafter.drafts([second])] == [Context(user_id="u5")]
    assert list(told.drafter.drafts([first])) == []
    told.drafter.forget()
    assert [draft.context for draft in told.drafter.drafts([second])] == [NO_CONTEXT]


def test_columns_are_picked_and_masked() -> None:
    entity = EntityOptions(type="Product", channel="goods", exclude=("by",), mask={"name": "sha256", "id": "redact"})
    (record,) = of_postgres(entities={"public.products": entity})(insert("7", "tea", "north", "ann"))
    assert (record.entity_type, record.channel, record.user_id) == ("Product", "goods", "ann")
    shown = decoded(record.after)
    assert shown.keys() == {"id", "name", "branch"}
    assert shown["id"] == "***"
    assert shown["name"] == f"sha256:{sha256(b'tea').hexdigest()}"


def test_a_masked_null_stays_null() -> None:
    entity = EntityOptions(mask={"name": "redact"})
    (record,) = of_postgres(entities={"public.products": entity})(insert("7", None, "north", "ann"))
    assert decoded(record.after)["name"] is None


def test_a_large_payload_is_left_out() -> None:
    (record,) = of_postgres(max_payload_bytes=1024, scope=("branch",))(insert("7", "x" * 2000, "north", "ann"))
    assert (record.truncated, record.before, record.after) == (True, None, None)
    assert (record.location_id, decoded(record.scope_after)) == ("north", {"branch": "north"})


def test_scopes_follow_the_row() -> None:
    told = of_postgres(scope=("branch", "missing"))
    told(insert("7", "a", "north", "x"))
    (moved,) = told(update("7", "a", "south", "x"))
    (deleted,) = told(delete("7"))
    assert (decoded(moved.scope_before), decoded(moved.scope_after)) == ({"branch": "north"}, {"branch": "south"})
    assert (decoded(deleted.scope_before), deleted.scope_after) == ({"branch": "south"}, None)


def test_who_had_an_entity_before_it_was_deleted_hears_nothing_of_the_next() -> None:
    told = of_postgres(scope=("branch",))
    told(insert("7", "a", "north", "x"))
    told(delete("7"))
    (again,) = told(insert("7", "b", "south", "y"))
    assert (again.scope_before, decoded(again.scope_after)) == (None, {"branch": "south"})
    assert view(again, Limits(where={"branch": "north"})) is None


def keyless() -> Table:
    columns = tuple(msgspec.structs.replace(column, is_key=True) for column in PRODUCTS.columns)
    return msgspec.structs.replace(PRODUCTS, identity="f", columns=columns)


def test_a_row_without_key_is_named_by_nothing_that_is_hidden() -> None:
    told = of_postgres(entities={"public.products": EntityOptions(exclude=("by",), mask={"name": "redact"})})
    records = told(insert("7", "tea", "north", "ann"), table=keyless())
    records += told(update("7", "ale", "north", "bob", before=row("7", "tea", "north", "ann")), table=keyless())
    everything = b"".join(map(msgspec.json.encode, [*records, *told.states.values()]))
    assert b"tea" not in everything
    assert [each.entity_id for each in records] == ['["7","***","north"]'] * 2
    assert [each.version for each in records] == [1, 2]


@pytest.mark.parametrize("mask", ["sha256", "redact"])
def test_a_masked_key_is_masked_in_the_name_of_its_entity(mask: Mask) -> None:
    told = of_postgres(entities={"public.products": EntityOptions(mask={"id": mask})})
    records = told(insert("secret", "tea", "north", None)) + told(delete("secret"))
    assert b"secret" not in b"".join(map(msgspec.json.encode, [*records, *told.states.values()]))
    assert {each.entity_id for each in records} == {decoded(records[0].after)["id"]}
    told(insert("other", "tea", "south", None))
    assert told(insert("secret", "tea", "north", None))[0].version == 3, "entities stay apart, whatever they are called"


def test_nothing_but_all_entities_is_called_a_star() -> None:
    told = of_postgres()
    (created,) = told(insert("*", "tea", "north", None))
    (deleted,) = told(delete("*"))
    (truncated,) = told(Change(TRUNCATE, 0, None, None, None, Truncate((0,), False, False)))
    assert [each.entity_id for each in (created, deleted, truncated)] == ['"*"', '"*"', "*"]
    key = bson.encode({"_id": "*"})
    assert of_mongodb()(Change(DELETE, 0, key, None, None), table=ORDERS)[0].entity_id == '"*"'


def test_names_fit_into_an_index() -> None:
    told = of_postgres()
    first, second = (told(insert("x" * 3000 + end, "a", "n", "x"))[0].entity_id for end in "ab")
    assert first != second
    assert len(first) < 1000


def test_scopes_are_as_people_write_them() -> None:
    table = Table(
        "public", "flags", tuple(Column(*c) for c in (("id", 23, True), ("on", 16, False), ("c", 1042, False)))
    )
    told = of_postgres(scope=("on", "c"))
    assert decoded(told(insert("1", "t", "ab  "), table=table)[0].scope_after) == {"on": "true", "c": "ab"}
    assert decoded(told(insert("2", "f", None), table=table)[0].scope_after) == {"on": "false", "c": None}


# MongoDB


def document(**fields: Any) -> bytes:
    return bson.encode({"_id": 1, **fields})


def inserted(**fields: Any) -> Change:
    return Change(INSERT, 0, document(), None, document(**fields))


def updated(after: bytes | None, **description: Any) -> Change:
    return Change(UPDATE, 0, document(), None, after, Delta(bson.encode(description)))


def set_to(lookup: bytes | None, **fields: Any) -> Change:
    return updated(lookup, updatedFields=fields, removedFields=[], truncatedArrays=[])


def test_four_steps_of_an_order_are_four_different_rows() -> None:
    """Though all of them were looked up when the last one was done."""
    told = of_mongodb()
    last = document(status="delivered", steps=4)
    records = told(inserted(status="new"), table=ORDERS)
    records += [
        record
        for status in ("paid", "packed", "sent", "delivered")
        for record in told(set_to(last, status=status), table=ORDERS)
    ]
    assert [decoded(each.after)["status"] for each in records] == ["new", "paid", "packed", "sent", "delivered"]
    assert [decoded(each.before)["status"] for each in records[1:]] == ["new", "paid", "packed", "sent"]
    assert not any(each.lookup for each in records)
    assert all("steps" not in decoded(each.after) for each in records), "that came later than any of these"
    assert [each.version for each in records] == [1, 2, 3, 4, 5]
    assert records[1].changed == ("status",)
    assert decoded(records[1].delta) == {
        "updatedFields": {"status": "paid"},
        "removedFields": [],
        "truncatedArrays": [],
    }


def test_of_an_unknown_document_the_lookup_is_told_and_marked() -> None:
    last = document(status="delivered", customer="c")
    records = [r for status in ("paid", "sent") for r in of_mongodb()(set_to(last, status=status), table=ORDERS)]
    assert [decoded(each.after) for each in records] == [
        {"_id": 1, "status": "paid", "customer": "c"},
        {"_id": 1, "status": "sent", "customer": "c"},
    ]
    assert all(each.lookup for each in records)
    assert all(each.before is None for each in records)


def test_a_document_that_was_gone_when_it_was_looked_up_is_told_by_its_delta() -> None:
    (record,) = of_mongodb()(set_to(None, status="paid"), table=ORDERS)
    assert decoded(record.after) == {"_id": 1, "status": "paid"}
    assert record.lookup


def test_a_lookup_never_becomes_the_truth_but_a_replacement_does() -> None:
    told = of_mongodb()
    lookup = document(status="sent", n=9)
    assert told(set_to(lookup, status="paid"), table=ORDERS)[0].lookup
    (replaced,) = told(Change(UPDATE, 0, document(), None, document(status="new")), table=ORDERS)
    assert not replaced.lookup
    (after,) = told(set_to(lookup, status="paid"), table=ORDERS)
    assert decoded(after.after) == {"_id": 1, "status": "paid"}
    assert not after.lookup


def test_post_images_are_exact() -> None:
    (record,) = of_mongodb("whenAvailable")(set_to(document(status="paid", n=1), status="paid"), table=ORDERS)
    assert not record.lookup
    assert decoded(record.after) == {"_id": 1, "status": "paid", "n": 1}


def test_a_deleted_document_is_told_as_it_was_last_known() -> None:
    told = of_mongodb(location="store.id", scope=("company",))
    told(inserted(store={"id": 5}, company="a"), table=ORDERS)
    (record,) = told(Change(DELETE, 0, document(), None, None), table=ORDERS)
    assert (record.location_id, decoded(record.scope_before)) == ("5", {"company": "a"})
    assert decoded(record.before) == {"_id": 1, "store": {"id": 5}, "company": "a"}


def test_what_is_known_ends_with_its_collection() -> None:
    told = of_mongodb()
    told(inserted(status="new"), table=ORDERS)
    (dropped,) = told(Change(DDL, 0, None, None, None, Ddl("drop", bson.encode({}))), table=ORDERS)
    assert (dropped.change_type, dropped.entity_id) == ("DELETE", "*")
    (record,) = told(set_to(document(status="paid", n=1), status="paid"), table=ORDERS)
    assert record.lookup


def test_a_rename_tells_of_both_names() -> None:
    event = bson.encode({"to": {"db": "ordersDB", "coll": "archive"}})
    ended, begun = of_mongodb()(Change(DDL, 0, None, None, None, Ddl("rename", event)), table=ORDERS)
    assert (ended.entity_type, ended.change_type) == ("orders", "DELETE")
    assert (begun.entity_type, begun.change_type, begun.entity_id) == ("archive", "CREATE", "*")


def test_masks_hold_in_documents_deltas_and_parts_of_fields() -> None:
    entity = EntityOptions(mask={"card": "redact"}, exclude=("secret",))
    told = of_mongodb(entities={"ordersDB.orders": entity})
    full = document(card={"number": "4111"}, secret="geheim", status="new")
    records = told(inserted(card={"number": "4111"}, secret="geheim", status="new"), table=ORDERS)
    records += told(set_to(full, **{"card.number": "4111", "secret": "geheim", "status": "paid"}), table=ORDERS)
    records += told(updated(full, updatedFields={}, removedFields=["card.number", "secret"]), table=ORDERS)
    everything = b"".join(msgspec.json.encode(record) for record in records)
    everything += b"".join(state.known or b"" for state in told.states.values())
    assert b"4111" not in everything
    assert b"geheim" not in everything
    assert decoded(records[1].after) == {"_id": 1, "card": "***", "status": "paid"}
    assert [each.changed for each in records[1:]] == [("card", "status"), ("card",)]


def test_a_masked_field_of_which_a_part_is_removed_has_another_digest() -> None:
    told = of_mongodb(entities={"ordersDB.orders": EntityOptions(mask={"card": "sha256"})})
    told(inserted(card={"number": "4111", "cvc": "123"}), table=ORDERS)
    (record,) = told(updated(document(card={"number": "4111"}), removedFields=["card.cvc"]), table=ORDERS)
    (expected,) = of_mongodb(entities={"ordersDB.orders": EntityOptions(mask={"card": "sha256"})})(
        inserted(card={"number": "4111"}), table=ORDERS
    )
    assert record.after == expected.after


def test_a_masked_id_is_masked_everywhere() -> None:
    told = of_mongodb(entities={"ordersDB.orders": EntityOptions(mask={"_id": "sha256"}, exclude=("region",))})
    key = bson.encode({"_id": "secret", "region": "hidden"})  # of a sharded collection
    (record,) = told(Change(DELETE, 0, key, None, None), table=ORDERS)
    everything = b"".join(map(msgspec.json.encode, [record, *told.states.values()]))
    assert not [word for word in (b"secret", b"secret".hex().encode(), b"hidden") if word in everything]
    assert decoded(record.before) == {"_id": record.entity_id}


def test_keys_fit_into_an_index() -> None:
    told = of_mongodb()
    for end in "ab":
        told(Change(DELETE, 0, bson.encode({"_id": "\u00fc" * 2000 + end}), None, None), table=ORDERS)
    assert len(told.states) == 2
    assert max(len(state.key) for state in told.states.values()) < 1000


@given(st.data())
def test_overlaid_deltas_give_what_the_server_has(data: st.DataObject) -> None:
    """Known documents follow their deltas: fields set, nested, removed, arrays cut and written."""
    told = of_mongodb()
    truth: dict[str, Any] = {"_id": 1, "a": {"x": 1}, "list": [1, 2, 3]}
    told(Change(INSERT, 0, document(), None, bson.encode(truth)), table=ORDERS)
    for _ in range(data.draw(st.integers(1, 4))):
        number = data.draw(st.integers(0, 9))
        description: dict[str, Any] = {"updatedFields": {}, "removedFields": [], "truncatedArrays": []}
        kind = data.draw(st.sampled_from(["set", "nested", "remove", "cut", "item", "append"]))
        if kind == "set":
            truth["b"] = description["updatedFields"]["b"] = number
        elif kind == "nested":
            truth["a"]["x"] = description["updatedFields"]["a.x"] = number
        elif kind == "remove" and "b" in truth:
            del truth["b"]
            description["removedFields"].append("b")
        elif kind == "cut" and truth["list"]:
            size = data.draw(st.integers(0, len(truth["list"]) - 1))
            del truth["list"][size:]
            description["truncatedArrays"].append({"field": "list", "newSize": size})
        elif kind == "item" and truth["list"]:
            index = data.draw(st.integers(0, len(truth["list"]) - 1))
            truth["list"][index] = description["updatedFields"][f"list.{index}"] = number
        elif kind == "append":
            description["updatedFields"][f"list.{len(truth['list'])}"] = number
            truth["list"].append(number)
        (record,) = told(updated(document(wrong=True), **description), table=ORDERS)
        assert decoded(record.after) == truth
        assert not record.lookup


# options


@pytest.mark.parametrize(
    ("entities", "words"),
    [
        ({"orders": "Order"}, "not schema.table"),
        ({"a.x": EntityOptions(type="T", retention="1h"), "a.y": "T"}, "another table of type 'T'"),
        ({"a.x": EntityOptions(columns=("a",), exclude=("b",))}, "not together with columns"),
        ({"a.x": EntityOptions(location="branch", mask={"branch": "redact"})}, "tells location"),
    ],
)
def test_contradictions_are_refused(entities: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        FeedOptions(entities=entities)


@pytest.mark.parametrize(
    "entity", [{"exclude": ("card.number",)}, {"mask": {"card.number": "redact"}}, {"columns": ("card.number",)}]
)
def test_nobody_is_led_to_believe_that_a_part_of_a_field_is_hidden(entity: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"card\.number"):
        of_mongodb(entities={"ordersDB.orders": EntityOptions(**entity)})
    of_postgres(entities={"public.orders": EntityOptions(**entity)})  # a column may have that name


def test_a_type_is_kept_for_its_own_time() -> None:
    options = FeedOptions(entities={"a.x": EntityOptions(type="Order", retention="never"), "a.y": "Product"})
    assert options.retentions == {"Order": None, "Product": 86400.0}
    assert options.default_retention == 86400.0
