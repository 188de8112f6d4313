"""What is special to a feed in a PostgreSQL database."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest

from cdc.errors import FatalError, TransientError
from cdc.feed.place import Place, check, reader, writer
from cdc.feed.record import ChangeType
from cdc.feed.store import FeedReader, Listener
from cdc.feed.tables import tables_of
from cdc.position import Position
from cdc.postgres import feed_reader
from cdc.postgres.feed import SETTINGS
from cdc.postgres.feed_tables import composed, moment
from tests.feed_stores import change, event, opened, patiently, place_at, read_all, write
from tests.processes import wait_until
from tests.servers import Database, PostgresServer


@pytest.fixture
def place(target_db: Database, tmp_path: Path) -> Place:
    return place_at(target_db.url, tmp_path)


def test_the_table_is_for_people_too(place: Place, target_db: Database) -> None:
    with opened(place) as to:
        write(to, change(1, after=b'{"price":12.50}', changed=("price", "a,b"), change_type=ChangeType.UPDATE))
    query = """SELECT id, entity_type, change_type, changed_at = '2025-11-21 21:03:20.000001Z', recorded_at <= now(),
        (after ->> 'price')::numeric::text, changed, before IS NULL FROM data_changes WHERE id > 0 ORDER BY id"""
    assert target_db.execute(query) == [(1, "Product", "UPDATE", True, True, "12.50", ["price", "a,b"], True)]


def test_a_time_is_found_by_a_few_looks(place: Place, target_db: Database) -> None:
    """Also where the planner knows nothing of the table yet."""
    with opened(place):
        pass
    target_db.execute("""
        INSERT INTO data_changes (id, entity_type, entity_id, change_type, changed_at, recorded_at, source, position,
                                  version, channel, lookup, truncated)
        SELECT n, 'T', n, 'UPDATE', now(), to_timestamp(n), 'shop', n, n, 't', false, false
          FROM generate_series(1, 20000) AS n
        """)
    query = composed(tables_of(place.table, schemas=True), feed_reader._QUERIES)["since"]
    with target_db.connect() as connection:
        explained = connection.execute(b"EXPLAIN (ANALYZE, FORMAT JSON) " + query, {"at": moment(10_000_000_000)})
        ((((plan,),),),) = [explained.fetchall()]
    assert max(rows_seen(plan["Plan"])) < 100


def rows_seen(node: dict[str, Any]) -> Iterator[float]:
    """By each step of a plan, those included that it left out."""
    yield (node["Actual Rows"] + node.get("Rows Removed by Filter", 0)) * node["Actual Loops"]
    for child in node.get("Plans", ()):
        yield from rows_seen(child)


def test_everything_works_again_after_the_server_was_restarted(
    place: Place, feed: FeedReader, target18: PostgresServer
) -> None:
    to = writer(place, "shop")
    to.open()
    with feed.listen() as listener:
        published = to.publish(event("e1"))
        assert published is not None
        target18.stop()
        try:
            with pytest.raises(TransientError):
                feed.head()
            with pytest.raises(TransientError):
                to.publish(event("e2"))
            with pytest.raises(TransientError):
                write(to, change(1))
            with pytest.raises(TransientError):
                wait_on(listener)
        finally:
            target18.start()
        assert to.publish(event("e2")) is not None
        patiently(to.open)
        write(to, change(1))
        assert patiently(lambda: listener.wait(0))
        assert patiently(lambda: [record.id for record in read_all(feed)]) == [1, 2, 3]
        to.publish(event("e3"))
        assert listener.wait(60)
    to.close()


def wait_on(listener: Listener) -> None:
    """What came before may wake it still."""
    for _ in range(10):
        listener.wait(10)


def test_connections_that_the_server_ended_are_made_anew(place: Place, feed: FeedReader, target_db: Database) -> None:
    with feed.listen() as listener, opened(place) as to, ThreadPoolExecutor() as threads:
        to.publish(event("e1"))
        assert feed.head() == 1
        while listener.wait(0):
            pass
        waiting = threads.submit(listener.wait, 60)
        target_db.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name ~ '^cdc feed'")
        assert waiting.result(30)
        assert to.publish(event("e2")) is not None
        assert listener.wait(60)
        assert feed.head() == 2
        with pytest.raises(TransientError):
            write(to, change(1))
        to.open()
        write(to, change(1))
        assert [record.id for record in read_all(feed)] == [1, 2, 3]


def test_a_connection_that_listens_is_there_before_news(place: Place, feed: FeedReader, target_db: Database) -> None:
    """LISTEN is done when `listen` returns: else what comes next could be missed."""
    with feed.listen():
        query = "SELECT query FROM pg_stat_activity WHERE application_name = 'cdc feed listener' AND state = 'idle'"
        wait_until(lambda: target_db.execute(query) == [('LISTEN "data_changes"',)])


def test_a_role_that_owns_its_schema_is_enough(place: Place, target_db: Database, tmp_path: Path) -> None:
    target_db.execute(
        """DROP ROLE IF EXISTS feeder; CREATE ROLE feeder LOGIN; CREATE SCHEMA "Feeds" AUTHORIZATION feeder;
        REVOKE ALL ON SCHEMA public FROM PUBLIC; REVOKE TEMPORARY ON DATABASE """
        + f"{target_db.name} FROM PUBLIC"
    )
    url = target_db.server.url(target_db.name, user="feeder")
    mine = place_at(url, tmp_path, "Feeds.Sync_Log")
    try:
        with opened(mine) as to:
            write(to, change(1))
            found = reader(mine)
            found.open()
            with found.listen() as listener:
                to.publish(event("e1"))
                assert listener.wait(60)
            assert [record.id for record in read_all(found)] == [1, 2]
            assert to.prune(None, 2**51, 10) == 2
            found.close()
        assert target_db.value('SELECT count(*) FROM "Feeds"."Sync_Log_pruned"') == 2
        with pytest.raises(FatalError):
            writer(place_at(url, tmp_path, "elsewhere.data_changes"), "shop").open()
    finally:
        target_db.execute("DROP OWNED BY feeder CASCADE; DROP ROLE feeder")


@pytest.mark.parametrize("schema", ["public", "feeds", "not_there"])
def test_what_check_says_puts_it_right(schema: str, target_db: Database, tmp_path: Path) -> None:
    role = f"maker_of_{target_db.name}"
    target_db.execute(f"CREATE ROLE {role} LOGIN; CREATE SCHEMA feeds; REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    try:
        place = place_at(target_db.server.url(target_db.name, user=role), tmp_path, f"{schema}.data_changes")
        (finding,) = check(place)
        assert finding.level == "error"
        target_db.execute(finding.fix.removeprefix("as an owner: "))
        assert [finding.message for finding in check(place)] == [f"{schema}.data_changes can be made"]
    finally:
        target_db.execute(f"DROP OWNED BY {role} CASCADE; DROP ROLE {role}")


def test_a_schema_is_made(place: Place, target_db: Database, tmp_path: Path) -> None:
    with opened(place_at(target_db.url, tmp_path, "feeds.data_changes")) as to:
        write(to, change(1))
    assert target_db.value("SELECT count(*) FROM feeds.data_changes") == 1


def test_commits_are_synchronous_whatever_the_url_says(target_db: Database, tmp_path: Path) -> None:
    url = f"{target_db.url}?options=-c%20synchronous_commit%3Doff%20-c%20default_transaction_isolation%3Dserializable"
    with opened(place_at(url, tmp_path)) as to:
        connection = to._session._connection  # type: ignore[attr-defined]
        assert connection.execute("SHOW synchronous_commit").fetchone() == ("on",)
        write(to, change(1))


@pytest.mark.parametrize("name", ["data_changes", "data_changes_state", "data_changes_pruned"])
def test_a_table_that_is_not_ours_is_left_as_it_is(place: Place, target_db: Database, name: str) -> None:
    target_db.execute(f"CREATE TABLE {name} (id int, mine text); INSERT INTO {name} VALUES (1, 'x')")
    for attempt in (writer(place, "shop").open, reader(place).open):
        with pytest.raises(FatalError, match="is not a feed"):
            attempt()
    assert target_db.execute(f"SELECT * FROM {name}") == [(1, "x")]
    assert target_db.value("SELECT count(*) FROM pg_class WHERE relname LIKE 'data_changes%'") == 1


def test_an_unknown_format_is_left_as_it_is(place: Place, feed: FeedReader, target_db: Database) -> None:
    target_db.execute("UPDATE data_changes_state SET format = 99")
    for attempt in (writer(place, "shop").open, reader(place).open):
        with pytest.raises(FatalError, match="format 99"):
            attempt()
    assert target_db.value("SELECT format FROM data_changes_state") == 99


def test_a_feed_of_which_tables_are_missing_is_refused(place: Place, feed: FeedReader, target_db: Database) -> None:
    target_db.execute("DROP TABLE data_changes_entities")
    with pytest.raises(FatalError, match="data_changes_entities"):
        writer(place, "shop").open()


def test_a_counter_behind_its_rows_is_noticed(place: Place, target_db: Database) -> None:
    with opened(place) as to:
        write(to, change(1), change(2))
        target_db.execute("UPDATE data_changes_state SET last_id = 1")
        with pytest.raises(Exception, match="data_changes_pkey"):
            write(to, change(3), seq=2)


def test_the_lock_is_waited_for_with_an_end(place: Place, feed: FeedReader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SETTINGS, "lock_timeout", "100ms")
    with opened(place, "one") as one, opened(place, "two") as two:
        one.append([change(1, source="one")], [])
        with pytest.raises(TransientError, match="lock timeout"):
            two.states([])
        one.commit(Position("q", 1, 2))


def test_nul_is_shown_by_its_symbol(place: Place, feed: FeedReader) -> None:
    with opened(place) as to:
        write(to, change(1, entity_id="a\0b", user_id="\0"))
    (record,) = read_all(feed)
    assert (record.entity_id, record.user_id) == ("a\N{SYMBOL FOR NULL}b", "\N{SYMBOL FOR NULL}")
    assert list(feed.history("Product", "a\0b", None, 10)) == [record]


def test_pruning_leaves_out_what_another_one_is_pruning(place: Place, feed: FeedReader, target_db: Database) -> None:
    with opened(place) as to, target_db.connect(autocommit=False) as other:
        write(to, change(1), change(2), change(3))
        other.execute("SELECT FROM data_changes WHERE id = 1 FOR UPDATE")
        assert to.prune(None, 2**51, 1) == 1
        assert [record.id for record in read_all(feed)] == [1, 3]
        other.rollback()
        assert to.prune(None, 2**51, 10) == 2
        assert [each.through_id for each in feed.pruned().values()] == [3]


def test_json_with_every_escape_is_valid(place: Place, target_db: Database) -> None:
    with opened(place) as to:
        write(to, change(1, after=b'{"a":"\\u0000\\ud83d","n":1e400}'))
    with target_db.connect() as connection:
        ((text,),) = connection.execute("SELECT after::text FROM data_changes").fetchall()
        assert text == '{"a":"\\u0000\\ud83d","n":1e400}'
        with pytest.raises(psycopg.errors.DataError):
            connection.execute("SELECT after::jsonb FROM data_changes")
