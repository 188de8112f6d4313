"""A parked change as people see it: nothing of it is lost, and nothing is re-interpreted."""

from __future__ import annotations

import datetime as dt
from typing import Any

import bson
import msgspec
import pytest
from bson.json_util import loads

from cdc.change import DDL, DELETE, INSERT, TRUNCATE, UPDATE, Batch, Change, Column, Ddl, Table, Transaction, Truncate
from cdc.kinds import describe
from cdc.postgres.row import UNCHANGED, encode_row

ORDERS = Table("public", "orders", (Column("id", 23, True), Column("note", 25, False), Column("big", 25, False)), "d")


def described(kind: str, change: Change, table: Table = ORDERS) -> tuple[str, Any, Any]:
    found = describe(kind, Batch((table,), [Transaction(1, 2, 0, 0, 0, True, [change])], 2, 0))
    return found.operation, found.key, msgspec.json.decode(found.change)


def test_rows_by_column_as_the_source_writes_them() -> None:
    after = encode_row((b"7", None, b"\xc3\xbc"))
    assert described("postgres", Change(INSERT, 0, None, None, after)) == (
        "insert", {"id": "7"}, {"after": {"id": "7", "note": None, "big": "ü"}},
    )  # fmt: skip


def test_a_key_that_changed_is_the_one_before() -> None:
    key, after = encode_row((b"7", None, None)), encode_row((b"8", b"x", UNCHANGED))
    assert described("postgres", Change(UPDATE, 0, key, None, after)) == (
        "update", {"id": "7"}, {"after": {"id": "8", "note": "x"}},
    )  # fmt: skip


def test_a_truncate_names_its_tables() -> None:
    change = Change(TRUNCATE, 0, None, None, None, Truncate((0,), cascade=True, restart_identity=False))
    assert described("postgres", change)[2] == {
        "truncate": {"tables": ["public.orders"], "cascade": True, "restartIdentity": False}
    }


def test_a_change_of_shape_tells_the_shape() -> None:
    change = Change(DDL, 0, None, None, None, Ddl("shape", b'{"oid": 5, "columns": []}'))
    assert described("postgres", change)[2] == {"ddl": {"kind": "shape", "shape": {"oid": 5, "columns": []}}}


@pytest.mark.parametrize(
    "value",
    [1, bson.Int64(1), 1.0, bson.Decimal128("1.0"), float("inf"), bson.ObjectId(), bson.Binary(b"x", 4), None,
     dt.datetime(2026, 1, 1, tzinfo=dt.UTC), bson.Timestamp(1, 2), bson.MinKey(), {"a": [1, "ü"]}],
)  # fmt: skip
def test_documents_keep_their_types(value: Any) -> None:
    document = bson.encode({"_id": 1, "value": value})
    operation, key, change = described("mongodb", Change(INSERT, 0, bson.encode({"_id": 1}), None, document))
    assert (operation, key) == ("insert", {"_id": 1})
    assert bson.encode(loads(msgspec.json.encode(change["after"]))) == document


def test_a_damaged_text_and_an_event_of_a_whole_collection_can_be_shown() -> None:
    broken = bson.encode({"_id": 1, "text": "ab"}).replace(b"ab\0", b"a\xff\0")
    assert (
        described("mongodb", Change(DELETE, 0, bson.encode({"_id": 1}), broken, None))[2]["before"]["text"] == "a\\xff"
    )
    drop = Change(DDL, 0, None, None, None, Ddl("drop", bson.encode({"operationType": "drop"})))
    assert described("mongodb", drop) == ("ddl", None, {"ddl": {"operationType": "drop"}})
