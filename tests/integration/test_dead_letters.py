"""What a person does with parked changes: at the command line, with a daemon and without, and over HTTP."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pymongo
import pytest

from tests.command import Cdc, assert_complaint
from tests.integration.test_mongo_mirror import Shop
from tests.letters import SOON, TOKENS, are_dead, ask, assert_for_admins_only, fates, letters, mirror, none_is_parked
from tests.mongo import raw_documents


@pytest.fixture
def shop(cdc: Cdc, mongodb: str, mongodb_client: pymongo.MongoClient[dict[str, Any]]) -> Iterator[Shop]:
    found = Shop(cdc, mongodb, mongodb_client)
    found.source.orders.insert_one({"_id": "first", "n": 1})
    found.source.old.insert_one({"_id": "first", "n": 1})
    found.configure(sink=SOON, http=TOKENS)
    yield found
    for database in (found.source, found.mirror):
        mongodb_client.drop_database(database)


def poison(shop: Shop) -> None:
    """Dead: an order, with a change behind it, and a document of a collection that is dropped behind that."""
    shop.wait_for(lambda: mirror(shop.cdc)["state"] == "running", "the mirror")
    shop.mirror.orders.create_index("n", unique=True)
    shop.mirror.old.create_index("n", unique=True)
    shop.source.orders.insert_one({"_id": 7, "n": 1, "text": "ü"})
    shop.source.orders.update_one({"_id": 7}, {"$set": {"seen": True}})
    shop.source.old.insert_one({"_id": "second", "n": 1})
    shop.source.old.drop()
    are_dead(shop.cdc, 2, 4)


def test_f89_dead_changes_are_seen_retried_and_discarded(shop: Shop, cdc: Cdc) -> None:
    with cdc.running():
        poison(shop)
        found = letters(cdc)
        first, second, third, fourth = (each["id"] for each in found)
        assert [each["state"] for each in found] == ["dead", "waiting", "dead", "waiting"]
        assert [each["behind"] for each in found] == [None, first, None, third]
        table = cdc("dead-letters", "list", "mirror", "--dead").stdout
        assert re.search(first + r' +dead .* insert +{"_id": 7} +2 ', table), table
        assert third in table
        assert fourth not in table
        shown = cdc("dead-letters", "show", first).stdout
        assert '"text": "ü"' in shown, shown

        assert_for_admins_only(cdc, first)
        assert ask(cdc, "admin-token", f"/api/dead-letters/{first}")[1]["key"] == {"_id": 7}

        assert fates(cdc, "retry", first, "mirror:9999.0") == (1, ["refused", "unknown"])
        are_dead(cdc, 2, 4)
        shop.mirror.orders.drop_index("n_1")
        assert fates(cdc, "retry", first, second) == (0, ["applied", "applied"])
        assert raw_documents(shop.source, "orders") == raw_documents(shop.mirror, "orders")

        assert "old" in shop.mirror.list_collection_names()
        assert cdc("dead-letters", "discard", third, "--reason", "of no use").returncode == 1, "nobody said yes"
        assert fates(cdc, "discard", third, "--reason", "of no use", "--yes") == (0, ["discarded"])
        none_is_parked(cdc)  # also the drop that waited
        assert "old" not in shop.mirror.list_collection_names()
        assert "of no use" in cdc.log
        assert "(operator)" in cdc.log
        assert mirror(cdc)["discarded"] == 1


def test_f89_without_a_daemon(shop: Shop, cdc: Cdc) -> None:
    with cdc.running():
        poison(shop)
    before = sorted((file.name, file.read_bytes()) for file in cdc.data_dir.iterdir())
    found = letters(cdc)
    _, second, third, _ = (each["id"] for each in found)
    assert_complaint(cdc("dead-letters", "show", "mirror:99.0"), 1, "there is no parked change mirror:99.0", "see")
    assert '"seen": true' in cdc("dead-letters", "show", second).stdout
    file = cdc.folder / "letters.jsonl"
    assert cdc("dead-letters", "export", "--output", str(file)).stdout == f"4 changes written to {file}\n"
    assert_complaint(cdc("dead-letters", "export", "--output", str(file)), 1, "File exists", "name a file")
    assert [json.loads(line)["id"] for line in file.read_text().splitlines()] == [each["id"] for each in found]
    assert sorted((file.name, file.read_bytes()) for file in cdc.data_dir.iterdir()) == before, "only looked at"

    shop.mirror.orders.drop_index("n_1")
    assert fates(cdc, "retry", "--all") == (0, ["due", "due"])
    discarded = cdc("dead-letters", "discard", third, "--reason", "of no use", "--yes")
    assert discarded.stdout == f"{third}  discarded\n"
    assert "of no use" in discarded.stderr
    with cdc.running():
        none_is_parked(cdc)
    assert raw_documents(shop.source, "orders") == raw_documents(shop.mirror, "orders")
    assert "old" not in shop.mirror.list_collection_names()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("list", "nobody"), "no sink is called"),
        (("show", "everything"), "not the id of a parked change"),
        (("retry",), "it is not said what to try again"),
        (("retry", "--all", "nobody"), "no sink is called"),
        (("retry", "--all", "mirror", "mirror:1.0"), "it is not said what to try again"),
        (("discard", "--reason", "x"), "it is not said what to discard"),
    ],
)
def test_what_is_not_understood(cdc: Cdc, arguments: tuple[str, ...], error: str) -> None:
    cdc.configure("mongodb://127.0.0.1:1/shop")
    assert_complaint(cdc("dead-letters", *arguments), 1, error, ".")
