"""Every "resync required" has a way out: the command that the hint names, word for word."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import psycopg
import pymongo
import pytest

from tests.command import Cdc, assert_complaint
from tests.conftest import NewDatabase
from tests.gaps import ANEW, MISSED, MISSED_AGAIN, SCHEMA, Daemon, Run, drop_slot, lose_slot, read_slot
from tests.mongo import at
from tests.mongod.fixture import NewStandIn
from tests.processes import kill_tree, wait_until
from tests.servers import Database, PostgresServer


def test_f8_f9_a_slot_that_is_gone_ahead_or_lost(run: Run) -> None:
    """F8, F9: dropped by somebody, read by somebody, given up by the server: one after the other."""
    for spoil, error in ((drop_slot, "is missing"), (read_slot, "ahead"), (lose_slot, "is lost")):
        spoil(run.source_db)
        run.source_db.execute(MISSED)
        with run.running():
            source = run.failed("shop")
            assert re.match(f"resync required: .*{error}", source["error"])
            assert "feeds go on behind the gap" in source["hint"]
            assert "begins anew; its sinks all have the gap: mirror" in run.follow(source["hint"], "resync", "shop")
            run.assert_right()
        run.source_db.execute("DELETE FROM items; INSERT INTO items SELECT n, 'x' || n FROM generate_series(1, 99) n")


def test_f8_a_source_may_begin_anew_by_itself(run: Run) -> None:
    run.configure(run.source_db, source='on_gap = "resync"')
    run.source_db.execute(f"SELECT pg_drop_replication_slot('{run.source_db.name}')")
    run.source_db.execute(MISSED)
    with run.running():
        wait_until(lambda: "resync begins" in run.cdc.log, what=lambda: run.cdc.log)
        run.assert_right()
    assert "the stream begins anew" in run.cdc.log


@pytest.mark.parametrize("on_gap", ["resync", "stop"])
def test_f8_f9_the_slot_is_dropped_again_while_the_mirror_is_still_put_right(run: Run, on_gap: str) -> None:
    run.configure(run.source_db, source=f'on_gap = "{on_gap}"')
    run.target_db.execute("UPDATE items SET name = 'stale' WHERE id = 100")
    with run.running(), run.target_db.connect() as writer:
        run.wait_until_resynced()
        with writer.transaction():
            writer.execute("LOCK TABLE items IN SHARE MODE")  # it cannot be put right meanwhile
            for count, missed in enumerate((MISSED, MISSED_AGAIN), 1):
                drop_slot_in_use(run.source_db, missed)
                if on_gap == "stop":
                    run.follow(run.failed("shop")["hint"], "resync", "shop")
                run.wait_until_anew(count)
                run.wait_until_resyncing()
        run.assert_right()
    assert run.cdc.log.count(ANEW) == 2


PARKS = 'on_error = "park"\nretry = {max = 1, attempts = 1000}'


def test_f8_f89_what_was_parked_before_a_gap_is_not_applied_to_what_is_put_right(run: Run) -> None:
    """It would be done to rows that have changed in the gap: also while the rest of their table is still refused."""
    run.configure(run.source_db, sink=PARKS)
    source, target = run.source_db, run.target_db
    target.execute("ALTER TABLE items ADD CONSTRAINT poison CHECK (name <> 'poison')")
    target.execute("ALTER TABLE items ADD CONSTRAINT more CHECK (id < 500)")
    with run.running() as process:
        source.execute("UPDATE items SET name = 'poison' WHERE id = 1")
        source.execute("UPDATE items SET id = 102 WHERE id = 1")
        run.wait_until_parked(2)
        missed = "UPDATE items SET name = 'mine' WHERE id = 102; INSERT INTO items VALUES (1, 'new'), (500, 'more')"
        drop_slot_in_use(source, missed)
        run.follow(run.failed("shop")["hint"], "resync", "shop")
        run.wait_until_resyncing()
        kill_tree(process.pid)
        process.wait()
    (run.cdc.data_dir / "http").unlink()
    with run.running():
        run.wait_for_row("new")
        run.wait_for_row("mine")
        target.execute("ALTER TABLE items DROP CONSTRAINT poison")
        run.wait_until_parked(0)
        found = target.execute("SELECT id, name FROM items WHERE id IN (1, 102) ORDER BY id")
        assert found == [(1, "new"), (102, "mine")]
        target.execute("ALTER TABLE items DROP CONSTRAINT more")
        run.cdc("pause", "mirror")
        run.cdc("resume", "mirror")
        run.assert_right()


def drop_slot_in_use(database: Database, missed: str) -> None:
    """Faster than the daemon connects again; `missed` is not in the next one."""

    def dropped() -> bool:
        database.execute(
            f"SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = '{database.name}'"
        )
        with suppress(psycopg.errors.ObjectInUse):
            database.execute(f"SELECT pg_drop_replication_slot('{database.name}'); {missed}")
            return True
        return False

    wait_until(dropped)


def test_f12_another_cluster_takes_a_person(run: Run, postgres16: PostgresServer, new_database: NewDatabase) -> None:
    other = new_database(postgres16)
    other.execute(SCHEMA)
    other.execute(MISSED)
    run.configure(other, source='on_gap = "resync"')
    with run.running():
        source = run.failed("shop")
        assert "another cluster" in source["error"]
        assert_complaint(run.cdc("resync", "mirror"), 1, "another cluster", "cdc resync shop --yes")
        run.follow(source["hint"], "resync", "shop", "--yes")
        run.source_db = other
        run.assert_right()


def test_f115_a_target_restored_to_before_what_is_kept_or_emptied(run: Run) -> None:
    run.target_db.execute("UPDATE cdc.positions SET position = '0/1', seq = 0; DELETE FROM items WHERE id > 90")
    with run.running():
        sink = run.failed("mirror")
        assert re.match("resync required: sink mirror: the target stands at .*, the queue begins at", sink["error"])
        run.follow(sink["hint"], "resync", "mirror")
        run.assert_right()
    run.target_db.execute("DROP SCHEMA cdc CASCADE; DROP TABLE items, keyless")
    with run.running():
        sink = run.failed("mirror")
        assert "no position" in sink["error"]
        assert_complaint(run.cdc("resync", "mirror"), 1, "no position", "--yes")
        run.follow(sink["hint"], "resync", "mirror", "--yes")
        run.assert_right("2")


def test_without_a_daemon_it_is_done_when_one_starts(run: Run) -> None:
    run.source_db.execute(f"SELECT pg_drop_replication_slot('{run.source_db.name}')")
    run.source_db.execute(MISSED)
    ordered = run.cdc("resync", "shop")
    assert ordered.returncode == 0, ordered.stderr
    assert "`cdc run`" in ordered.stderr
    assert "resync: ordered" in run.cdc("status").stdout
    with run.running():
        wait_until(lambda: "resync begins" in run.cdc.log, what=lambda: run.cdc.log)
        run.assert_right()


def test_what_is_ordered_shows_before_it_can_begin(run: Run) -> None:
    """The sink has failed, and is paused; after a restart of the daemon it still is."""
    run.target_db.execute("UPDATE items SET name = 'stale' WHERE id = 100")
    run.target_db.execute("ALTER TABLE items ADD CHECK (name <> 'bad')")
    with run.running():
        run.wait_until_resynced()
        run.source_db.execute("INSERT INTO items VALUES (500, 'bad')")
        run.failed("mirror")
        assert run.status()["sinks"]["mirror"]["resync"] is None
        run.client.pause("mirror")
        run.client.resync("mirror", [], yes=False)
        run.wait_until_ordered()
        run.client.resync("mirror", ["public.keyless"], yes=False)  # takes nothing back
        assert "resync: ordered" in run.cdc("status").stdout
    run.target_db.execute("ALTER TABLE items DROP CONSTRAINT items_name_check")
    with run.running():
        run.wait_until_ordered()
        run.client.resume("mirror")
        run.assert_right()


def test_one_table_of_a_running_mirror(run: Run) -> None:
    run.target_db.execute("DELETE FROM items WHERE id > 50; DELETE FROM keyless")
    with run.running():
        run.wait_until_resynced()
        assert run.cdc("resync", "mirror", "public.items").returncode == 0
        run.wait_for_row("item 100")
        run.wait_until_resynced()
        report = json.loads(run.cdc("verify", "--json").stdout)
        assert not report["equal"], "the other table was not asked for"
        assert_complaint(run.cdc("resync", "mirror", "items"), 1, "not a table", "schema.table")
        assert_complaint(run.cdc("resync", "mirror", "public.itmes"), 1, "no table public.itmes", "public.items")
        run.client.resync("mirror", ["public.itmes"], yes=False)
        wait_until(lambda: "resync refused" in run.cdc.log, what=lambda: run.cdc.log)
        wait_until(lambda: run.status()["sinks"]["mirror"]["state"] == "running", what=lambda: run.cdc.log)
        assert run.cdc("resync", "mirror").returncode == 0
        run.wait_until_resynced()
        run.assert_right()


def test_a_feed_that_misses_nothing_is_not_resynced(run: Run) -> None:
    run.cdc.file.write_text(run.cdc.file.read_text() + '\n[sinks.feed]\nkind = "data_changes"\nfrom = "shop"\n')
    with run.running():
        run.wait_until_resynced()
        assert_complaint(run.cdc("resync", "feed"), 1, "feed: nothing is known to be missing", "cursor")
        assert "mirror: resync ordered" in run.cdc("resync", "shop").stdout
        wait_until(lambda: "resync begins" in run.cdc.log, what=lambda: run.cdc.log)
        run.assert_right()
        assert "changes are missing" not in run.cdc.log


def test_a_failed_sink_tries_again_when_it_is_told_to(run: Run) -> None:
    run.target_db.execute("ALTER TABLE items ADD CHECK (name <> 'bad')")
    with run.running():
        run.source_db.execute("INSERT INTO items VALUES (500, 'bad')")
        assert "cdc resume" in run.failed("mirror")["hint"]
        run.target_db.execute("ALTER TABLE items DROP CONSTRAINT items_name_check")
        assert run.cdc("resume", "mirror").returncode == 0
        run.wait_for_row("bad")
        run.assert_right()


def keep(cdc: Cdc) -> None:
    """Let changes stay in the queue."""
    cdc.file.write_text(cdc.file.read_text().replace("[queue]", "[queue]\nkeep_seconds = 3600"))


def test_replay(run: Run) -> None:
    keep(run.cdc)
    with run.running():
        run.wait_until_resynced()
        assert_complaint(run.cdc("replay", "mirror", "--from", "1"), 1, "not kept any more", "keep_seconds")
        first = run.status()["sources"]["shop"]["queue"]["last_seq"] + 1
        run.source_db.execute("UPDATE items SET name = 'x' WHERE id = 2")
        run.wait_for_row("x")
        later = datetime.now(UTC).isoformat()
        run.source_db.execute("UPDATE items SET name = NULL WHERE id = 2")
        run.source_db.execute("UPDATE items SET name = 'x' WHERE id = 3; DELETE FROM items WHERE id = 4")
        run.source_db.execute("UPDATE items SET id = 300 WHERE id = 5; INSERT INTO items VALUES (5, 'last')")
        run.wait_for_row("last")
        assert_complaint(run.cdc("replay", "mirror", "--from", "99999999"), 1, "is not there yet", "the last one is")
        dry = run.cdc("replay", "mirror", "--from", str(first), "--dry-run")
        assert "6 changes would be" in dry.stdout, dry
        dry = run.cdc("replay", "mirror", "--from", later, "--dry-run")
        assert "5 changes would be" in dry.stdout, dry
        done = run.cdc("replay", "mirror", "--from", str(first))
        assert "6 changes are" in done.stdout, done
        wait_until(lambda: run.status()["sinks"]["mirror"]["changes"]["update"] >= 8, what=lambda: run.cdc.log)
        run.assert_right()
        assert run.target_db.value("SELECT count(*) FROM cdc.replays") == 0


def test_replay_to_a_mongodb_mirror(cdc: Cdc, new_stand_in: NewStandIn) -> None:
    server = new_stand_in()
    cdc.configure(at(server.url, "shop"))
    keep(cdc)
    with pymongo.MongoClient[dict[str, Any]](server.url) as client, cdc.running():
        source, mirror = client.shop, client.shop_backup
        run = Daemon(cdc)
        cdc.wait_for_sink("running")
        first = run.status()["sources"]["shop"]["queue"]["last_seq"] + 1
        source.items.insert_many([{"_id": n} for n in range(3)])
        source.items.update_one({"_id": 1}, {"$set": {"name": "x"}})
        source.items.delete_one({"_id": 2})
        source.items.insert_one({"_id": "last"})
        wait_until(lambda: mirror.items.find_one({"_id": "last"}), what=lambda: cdc.log)
        mirror.items.delete_many({})
        done = cdc("replay", "mirror", "--from", str(first))
        assert " changes are" in done.stdout, done
        wait_until(lambda: mirror.items.find_one({"_id": "last"}), what=lambda: cdc.log)
        cdc.wait_for_sink("running")
        verified = cdc("verify")
        assert verified.returncode == 0, verified.stdout


def test_f59_history_lost_on_mongodb(cdc: Cdc, new_stand_in: NewStandIn) -> None:
    """F59: documents change while nobody captures, and the server forgets about it; unique values move."""
    server = new_stand_in()
    cdc.configure(at(server.url, "shop"))
    with pymongo.MongoClient[dict[str, Any]](server.url) as client:
        source, mirror = client.shop, client.shop_backup
        source.items.create_index("name", unique=True)
        source.items.insert_many([{"_id": n, "name": f"item {n}", "n": n} for n in range(100)])
        with cdc.running():
            cdc.wait_for_sink("running")
            wait_until(lambda: mirror.items.count_documents({}) == 100)
        source.items.delete_many({"_id": {"$lt": 40}})
        source.items.update_one({"_id": 50}, {"$unset": {"name": ""}})
        source.items.update_one({"_id": 60}, {"$set": {"name": "item 50"}})
        source.items.insert_many([{"_id": n, "name": f"item {n - 1000}"} for n in range(1000, 1040)])
        server.command("cdcTestTruncateOplog")
        with cdc.running():
            run = Daemon(cdc)
            failed = run.failed("shop")
            assert "286" in failed["error"]
            run.follow(failed["hint"], "resync", "shop")
            wait_until(lambda: mirror.items.count_documents({"_id": {"$gte": 1000}}), what=lambda: cdc.log)
            assert mirror.items.count_documents({"_id": 99}), "what is there stays"
            run.wait_until_resynced()
            source.items.insert_one({"_id": "new", "name": "new"})
            wait_until(lambda: mirror.items.count_documents({"_id": "new"}), what=lambda: cdc.log)
            wait_until(lambda: "name_1" in mirror.items.index_information(), what=lambda: cdc.log)  # built at the end
            verified = cdc("verify")
            assert verified.returncode == 0, verified.stdout
            assert "name_1" in mirror.items.index_information()
