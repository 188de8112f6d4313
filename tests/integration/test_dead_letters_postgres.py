"""What a person does with the parked changes of a PostgreSQL mirror, with a daemon and without (see also
`test_dead_letters`)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.command import Cdc, assert_complaint
from tests.letters import SOON, TOKENS, are_dead, ask, assert_for_admins_only, fates, letters, mirror, none_is_parked
from tests.servers import Database

SCHEMA = """
    CREATE TABLE items (id int PRIMARY KEY, name text);
    CREATE TABLE log (what text);
    ALTER TABLE log REPLICA IDENTITY FULL;
    INSERT INTO items SELECT n, 'item ' || n FROM generate_series(1, 6) n;
"""


class Shop:
    """Two databases, and the command line between them."""

    def __init__(self, cdc: Cdc, source_db: Database, target_db: Database, pg_dump: Path) -> None:
        self.cdc, self.source_db, self.target_db = cdc, source_db, target_db
        source_db.execute(SCHEMA)
        sink = f'on_error = "park"\n{SOON}'
        cdc.configure(source_db.url, target_db.url, source=f'pg_dump = "{pg_dump}"', sink=sink, http=TOKENS)

    def accept(self) -> None:
        """Remove what refuses them."""
        self.target_db.execute("ALTER TABLE items DROP CONSTRAINT poison")

    def poison(self) -> None:
        """Two rows are refused; behind the first wait changes that come out right in their order alone."""
        none_is_parked(self.cdc)
        self.target_db.execute("ALTER TABLE items ADD CONSTRAINT poison CHECK (name <> 'bad')")
        for statement in (
            "INSERT INTO items VALUES (7, 'bad')",
            "INSERT INTO items VALUES (8, 'good')",
            "UPDATE items SET id = 70 WHERE id = 7",
            "INSERT INTO items VALUES (7, 'second')",
            "UPDATE items SET name = 'third' WHERE id = 7",
            "UPDATE items SET name = 'bad' WHERE id = 1",
            "INSERT INTO log VALUES ('flows')",
        ):
            self.source_db.execute(statement)
        are_dead(self.cdc, 2, 5)

    def verify(self) -> dict[str, Any]:
        result = self.cdc("verify", "--json")
        assert result.stdout, result.stderr
        report = json.loads(result.stdout)
        assert (result.returncode == 0) == report["equal"]
        assert isinstance(report, dict)
        return report


def discards(cdc: Cdc) -> list[dict[str, Any]]:
    """What the daemon's log tells of them."""
    return [json.loads(line) for line in cdc.log.splitlines() if '"discarded a parked change"' in line]


@pytest.fixture
def shop(cdc: Cdc, source_db: Database, target_db: Database, pg_dump: Path) -> Shop:
    return Shop(cdc, source_db, target_db, pg_dump)


def test_f89_dead_changes_are_seen_retried_and_discarded(shop: Shop, cdc: Cdc) -> None:
    with cdc.running():
        shop.poison()
        found = letters(cdc)
        first, *behind, other = (each["id"] for each in found)
        assert mirror(cdc)["waiting"] == len(behind)
        assert [each["state"] for each in found] == ["dead", "waiting", "waiting", "waiting", "dead"]
        assert [each["behind"] for each in found] == [None, first, first, first, None]
        assert shop.target_db.execute("SELECT id, name FROM items WHERE id IN (1, 7, 8, 70)") == [
            (1, "item 1"),
            (8, "good"),
        ]
        assert shop.target_db.value("SELECT what FROM log") == "flows"
        table = cdc("dead-letters", "list", "mirror", "--dead").stdout
        assert re.search(first + r' +dead +public.items +insert +{"id": "7"} +2 ', table), table
        assert "poison" in table
        assert behind[0] not in table
        assert '"name": "bad"' in cdc("dead-letters", "show", first).stdout
        assert_for_admins_only(cdc, first)
        report = shop.verify()
        assert not report["equal"]
        assert report["sinks"]["mirror"]["parked"] == 5

        assert fates(cdc, "retry", first, "mirror:1.0") == (1, ["unknown", "refused"])
        are_dead(cdc, 2, 5)
    with cdc.running():
        assert [each["id"] for each in letters(cdc)] == [first, *behind, other], "kept over a restart"
        shop.accept()
        assert fates(cdc, "retry", first) == (0, ["applied"])
        assert [each["id"] for each in letters(cdc)] == [other]
        assert shop.target_db.execute("SELECT id, name FROM items WHERE id > 6 ORDER BY id") == [
            (7, "third"),
            (8, "good"),
            (70, "bad"),
        ]
        assert fates(cdc, "retry", "--all") == (0, ["applied"])
        none_is_parked(cdc)
        assert shop.verify()["equal"]


def test_f89_a_discarded_change_is_logged_and_can_be_put_right(shop: Shop, cdc: Cdc) -> None:
    with cdc.running():
        shop.poison()
        first, *_, other = (each["id"] for each in letters(cdc))
        assert_complaint(cdc("dead-letters", "discard", other, "--reason", " "), 1, "what to discard, and why", "ID")
        assert fates(cdc, "discard", other, "--reason", "asked for by the shop", "--yes") == (0, ["discarded"])
        body = {"ids": [first], "reason": "of no use", "by": "ann"}
        _, answer = ask(cdc, "admin-token", "/api/dead-letters/discard", body)
        assert [each["fate"] for each in answer["outcomes"]] == ["discarded"]
        logged = discards(cdc)
        assert [(each["id"], each["reason"]) for each in logged] == [
            (other, "asked for by the shop"),
            (first, "of no use"),
        ]
        assert [each["by"].endswith("(operator)") for each in logged] == [True, True]
        assert logged[1]["by"] == "ann (operator)"
        are_dead(cdc, 1, 3)  # the update that moves the row needs all of it: refused as well, with two behind it
        shop.accept()
        assert fates(cdc, "retry", "--all")[0] == 0
        none_is_parked(cdc)
        assert [each["table"] for each in shop.verify()["sinks"]["mirror"]["tables"] if not each["equal"]] == [
            "public.items"
        ]
        assert cdc("sync", "mirror", "public.items", "--id", "1").returncode == 0
        assert shop.verify()["equal"]


def test_f89_without_a_daemon(shop: Shop, cdc: Cdc) -> None:
    with cdc.running():
        shop.poison()
    before = sorted((file.name, file.read_bytes()) for file in cdc.data_dir.iterdir())
    found = letters(cdc)
    first, *_, other = (each["id"] for each in found)
    file = cdc.folder / "letters.jsonl"
    assert cdc("dead-letters", "export", "mirror", "--output", str(file)).stdout == f"5 changes written to {file}\n"
    exported = [json.loads(line) for line in file.read_text().splitlines()]
    assert [each["id"] for each in exported] == [each["id"] for each in found]
    assert exported[0]["contents"]["change"]["after"] == {"id": "7", "name": "bad"}
    assert "behind" in cdc("dead-letters", "show", found[1]["id"]).stdout
    assert sorted((file.name, file.read_bytes()) for file in cdc.data_dir.iterdir()) == before, "only looked at"

    discarded = cdc("dead-letters", "discard", other, "--reason", "of no use", "--yes")
    assert discarded.stdout == f"{other}  discarded\n"
    assert "of no use" in discarded.stderr
    shop.accept()
    assert fates(cdc, "retry", first) == (0, ["due"])
    assert fates(cdc, "retry", "--all", "mirror") == (0, ["due"]), "as before"
    cdc.file.write_text(f'{cdc.file.read_text()}\n[sinks.changes]\nkind = "data_changes"\nfrom = "shop"\n')
    assert fates(cdc, "retry", "--all", "changes") == (0, []), "those of another sink"
    with cdc.running():
        none_is_parked(cdc)
        (told,) = discards(cdc)
        assert (told["id"], told["reason"]) == (other, "of no use"), "which only a terminal had shown until now"
        assert cdc("sync", "mirror", "public.items", "--id", "1").returncode == 0
        assert shop.verify()["equal"]
