"""What other sinks of a source have of the resync of one, or of a gap that all of them have."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from cdc.feed.gap import find_gap
from cdc.feed.store import Wanted
from tests.beside import Threads
from tests.conftest import NewDatabase
from tests.feed import FeedDaemon, after, assert_ordered
from tests.gaps import ANEW, MISSED, SCHEMA, Run, drop_slot, lose_slot
from tests.processes import wait_until
from tests.servers import Database, PostgresServer

LOAD = "CREATE TABLE load (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, n int)"
BLOCKED = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"


def add_sink(run: Run, name: str, options: str) -> None:
    run.cdc.file.write_text(f'{run.cdc.file.read_text()}\n[sinks.{name}]\nfrom = "shop"\n{options}\n')


def test_another_mirror_goes_on_beside_a_resync(run: Run, new_database: NewDatabase, target18: PostgresServer) -> None:
    """The resync is held up at its first row. The queue keeps all that comes until it is through, and no longer."""
    other_db = new_database(target18)
    add_sink(run, "other", f'url = "{other_db.url}"')
    run.source_db.execute(LOAD)

    def write(stop: threading.Event) -> None:
        with run.source_db.connect() as connection:
            while not stop.wait(0.004):
                connection.execute("INSERT INTO load (n) VALUES (0)")
                connection.execute("UPDATE load SET n = n + 1 WHERE id % 10 = (SELECT max(id) % 10 FROM load)")

    with run.running(), Threads("load", write) as load, run.target_db.connect() as blocker:
        run.wait_until_resynced()
        run.wait_for_state("other", "running")
        run.target_db.execute("UPDATE items SET name = 'stale ' || id WHERE id % 5 = 0; DELETE FROM keyless")
        untouched = other_db.execute("SELECT xmin::text, * FROM items ORDER BY id")
        with blocker.transaction():
            blocker.execute("LOCK TABLE items IN SHARE MODE")
            run.client.resync("mirror", [], yes=False)
            run.wait_until_resyncing()
            wait_until(lambda: run.target_db.value(BLOCKED), what=lambda: f"{run.status()}")
            before = run.status()
            end = before["sources"]["shop"]["queue"]["last_seq"] + 50
            wait_until(lambda: run.status()["sinks"]["other"]["seq"] >= end, what=lambda: f"{run.status()}")
            meanwhile = run.status()
        stands = before["sinks"]["mirror"]["seq"]
        assert meanwhile["sinks"]["mirror"]["seq"] == stands < end
        assert meanwhile["sources"]["shop"]["queue"]["pruned_seq"] <= stands
        assert (meanwhile["sinks"]["other"]["state"], meanwhile["sinks"]["other"]["resync"]) == ("running", None)
        run.wait_until_resynced()
        load.stop()
        assert other_db.execute("SELECT xmin::text, * FROM items ORDER BY id") == untouched
        run.assert_right()
        wait_until(
            lambda: run.status()["sources"]["shop"]["queue"]["pruned_seq"] >= end, what=lambda: f"{run.status()}"
        )
    assert run.cdc.log.count("resync begins") == 1


@pytest.mark.parametrize(("on_gap", "lose"), [("stop", drop_slot), ("resync", lose_slot)])
def test_f8_f9_f104_a_gap_beside_a_feed(
    tmp_path: Path,
    source_db: Database,
    target_db: Database,
    pg_dump: Path,
    on_gap: str,
    lose: Callable[[Database], None],
) -> None:
    """The mirror is made right. Readers of the feed get what was captured before and after, each once.

    F104: nothing in the feed tells of what is missing in between; the log does.
    """
    cdc = FeedDaemon(tmp_path, source_db.url)
    source_db.execute(SCHEMA)
    run = Run(cdc, source_db, target_db, pg_dump)
    run.configure(source_db, source=f'on_gap = "{on_gap}"')
    add_sink(run, "changes", 'kind = "data_changes"')
    with run.running():
        run.wait_until_resynced()
        run.wait_for_state("changes", "running")
        source_db.execute("UPDATE items SET name = 'first' WHERE id = 99")
        (first,) = cdc.wait_for(lambda seen: seen)
        run.client.pause("changes")
        run.wait_for_state("changes", "paused")
        source_db.execute("UPDATE items SET name = 'kept' WHERE id = 99")
        run.wait_for_row("kept")
    lose(source_db)
    source_db.execute(MISSED)
    with run.running():
        if on_gap == "stop":
            told = run.follow(run.failed("shop")["hint"], "resync", "shop")
            assert "its sinks all have the gap: mirror, changes" in told
        run.wait_until_anew(1)
        run.client.resume("changes")
        run.assert_right()
        records = cdc.wait_for(lambda seen: after(seen[-1])["name"] == "new 1")
    assert [after(record)["name"] for record in records] == ["first", "kept", "new 1"]
    assert_ordered(records)
    assert find_gap(cdc.reader, first.id, Wanted()) is None
    assert (cdc.log.count(ANEW), cdc.log.count("changes are missing in this feed")) == (1, 1)
