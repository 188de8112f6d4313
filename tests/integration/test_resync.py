"""A mirror's tables are read again and put right beside the stream."""

from __future__ import annotations

import random
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from psycopg.errors import SerializationFailure, UniqueViolation

from cdc.change import Batch
from cdc.postgres import ddl_capture, refresh_read, refresh_rounds
from cdc.postgres.apply import Applier
from cdc.postgres.connection import connect
from tests.mirror import Mirror, filled_mirror, running_mirror
from tests.processes import wait_until
from tests.servers import Database

SCHEMA = """
    CREATE TABLE items (id int PRIMARY KEY, name text, price numeric, big text, doc json);
    ALTER TABLE items ALTER big SET STORAGE EXTERNAL;
    CREATE TABLE names (name text PRIMARY KEY, n int, mail text UNIQUE);
    CREATE TABLE pairs (a text, b int, n int, PRIMARY KEY (b, a)) PARTITION BY HASH (b);
    CREATE TABLE pairs_0 PARTITION OF pairs FOR VALUES WITH (MODULUS 2, REMAINDER 0);
    CREATE TABLE pairs_1 PARTITION OF pairs FOR VALUES WITH (MODULUS 2, REMAINDER 1);
    CREATE TABLE keyless (n int, t text);
    ALTER TABLE keyless REPLICA IDENTITY FULL;
"""
TABLES = ("items", "names", "pairs", "keyless")
ROWS = 600
BIG = 3000


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many rounds of many parts, each between two batches, though there are few rows."""
    monkeypatch.setattr(refresh_read, "PART_ROWS", 40)
    monkeypatch.setattr(refresh_rounds, "AHEAD_ROWS", 80)
    monkeypatch.setattr(refresh_rounds, "ROUND_SECONDS", 0.3)
    monkeypatch.setattr("cdc.delivery.REFRESH_SECONDS", 0.0)


@pytest.fixture
def mirror(source_db: Database, target_db: Database, tmp_path: Path, pg_dump: Path) -> Iterator[Mirror]:
    with running_mirror(source_db, target_db, tmp_path, pg_dump, SCHEMA) as mirror:
        source_db.execute(
            f"""
            INSERT INTO items SELECT n, 'item ' || n, n + 0.10, repeat(md5(n::text), {BIG // 32}), '{{"a": 1}}'
              FROM generate_series(1, {ROWS}) n;
            INSERT INTO names SELECT 'Name ' || n, n, 'm' || n FROM generate_series(1, {ROWS}) n;
            INSERT INTO pairs SELECT chr(97 + n % 5), n, n FROM generate_series(1, {ROWS}) n;
            INSERT INTO keyless SELECT n % 10, 'k' FROM generate_series(1, 20) n;
            """
        )
        mirror.assert_equal(*TABLES)
        yield mirror


def resync(mirror: Mirror, *tables: str) -> None:
    """As `cdc resync` orders it: written down while the sink stands still, and found when it goes on."""
    mirror.stop()
    mirror.want_resync(*tables)
    mirror.refill()


def wait_until_done(mirror: Mirror) -> None:
    stats = mirror.delivery_stats
    wait_until(
        lambda: mirror.error or (stats.state == "running" and mirror.sink.consistent),
        what=lambda: f"the end of the resync: {stats}",
    )
    assert mirror.error is None, mirror.error


def spoil(target: Database) -> None:
    """What a mirror may look like that has missed changes."""
    target.execute(
        """
        SET session_replication_role = replica;
        DELETE FROM items WHERE id % 7 = 0;
        UPDATE items SET name = 'stale', big = 'stale' WHERE id % 5 = 0;
        UPDATE items SET doc = '{"a":1}' WHERE id = 1;
        INSERT INTO items (id, name) SELECT n, 'gone' FROM generate_series(-50, 0) n;
        INSERT INTO items (id, name) SELECT n, 'gone' FROM generate_series(100000, 100100) n;
        DELETE FROM names WHERE n % 3 = 0;
        UPDATE names SET mail = 'x' || n;
        UPDATE names SET mail = 'm' || (n + 1) WHERE n % 3 = 1;
        INSERT INTO names SELECT 'gone ' || n, n, 'm' || n FROM generate_series(1, 600, 3) n ON CONFLICT DO NOTHING;
        UPDATE pairs SET n = -1;
        INSERT INTO keyless VALUES (5, 'alien');
        """
    )


@contextmanager
def writing(database: Database, seed: int) -> Iterator[None]:
    stop = threading.Event()

    def write() -> None:
        rng = random.Random(seed)
        with database.connect() as connection:
            while not stop.wait(0.004):
                one, other = rng.randrange(1, ROWS), rng.randrange(1, ROWS)
                statement = rng.choice(STATEMENTS)
                with suppress(SerializationFailure, UniqueViolation), connection.transaction():
                    connection.execute(statement.replace("%1", str(one)).replace("%2", str(other)).encode())

    threads = [threading.Thread(target=write) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


STATEMENTS = [
    "UPDATE items SET price = price + 1 WHERE id = %1",
    "UPDATE items SET name = 'n%2' WHERE id BETWEEN %1 AND %1 + 3",
    f"UPDATE items SET big = repeat(md5('%2'), {BIG // 32}) WHERE id = %1",
    "DELETE FROM items WHERE id = %1",
    f"INSERT INTO items VALUES (%1, 'new', %2, repeat(md5('%2'), {BIG // 32}), '[]') ON CONFLICT DO NOTHING",
    "UPDATE items SET id = -id WHERE id = %1 AND NOT EXISTS (SELECT FROM items WHERE id = -%1)",
    "UPDATE items SET id = -id WHERE id = -%1 AND NOT EXISTS (SELECT FROM items WHERE id = %1)",
    "UPDATE names SET mail = NULL WHERE name = 'Name %1'; UPDATE names SET mail = 'm%1' WHERE name = 'Name %2'"
    " AND NOT EXISTS (SELECT FROM names WHERE mail = 'm%1')",
    "DELETE FROM names WHERE n = %1; INSERT INTO names VALUES ('name %2', %2) ON CONFLICT DO NOTHING",
    "UPDATE pairs SET n = %2 WHERE b = %1",
    "UPDATE pairs SET b = b + 1000 WHERE b = %1 AND NOT EXISTS (SELECT FROM pairs WHERE b = %1 + 1000)",
    "INSERT INTO keyless VALUES (%1, 'new')",
    "DELETE FROM keyless WHERE n = %1",
]


@pytest.mark.parametrize("seed", [1, 2])
def test_whatever_the_mirror_holds_it_becomes_right_beside_the_stream(
    mirror: Mirror, source_db: Database, target_db: Database, seed: int
) -> None:
    spoil(target_db)
    with writing(source_db, seed):
        resync(mirror)
        assert not mirror.sink.consistent or mirror.delivery_stats.state != "running"
        wait_until_done(mirror)
    mirror.assert_equal(*TABLES)
    assert target_db.value("SELECT count(*) FROM cdc.resyncs") == 0


def test_nothing_is_written_where_nothing_differs(mirror: Mirror, target_db: Database) -> None:
    before = target_db.execute("SELECT max(xmin::text::bigint) FROM items")
    resync(mirror, "items")
    wait_until_done(mirror)
    assert target_db.execute("SELECT max(xmin::text::bigint) FROM items") == before


def test_it_goes_on_where_it_was_when_it_is_interrupted(mirror: Mirror, target_db: Database) -> None:
    """The position of the stream and the last key are stored together: what is done is not done again."""
    target_db.execute("UPDATE names SET n = -1; UPDATE items SET name = 'stale'")
    resync(mirror, "items", "names")
    wait_until(lambda: target_db.value("SELECT max(rows) FROM cdc.resyncs WHERE done_key IS NOT NULL"))
    mirror.stop()
    (done,) = target_db.execute("SELECT done_key[1]::int, rows FROM cdc.resyncs WHERE source_table = 'items'")
    assert done == (done[1], done[1])
    target_db.execute(f"UPDATE items SET name = 'since' WHERE id = {done[0]}")
    mirror.refill()
    wait_until_done(mirror)
    assert target_db.execute("SELECT id FROM items WHERE name IN ('since', 'stale')") == [(done[0],)]
    mirror.assert_equal("names")


def test_a_table_that_is_emptied_meanwhile(mirror: Mirror, source_db: Database, target_db: Database) -> None:
    target_db.execute("UPDATE items SET name = 'stale'; INSERT INTO items (id) VALUES (-5)")
    resync(mirror, "items")
    wait_until(lambda: target_db.value("SELECT max(rows) FROM cdc.resyncs WHERE done_key IS NOT NULL"))
    source_db.execute("TRUNCATE items; INSERT INTO items (id) SELECT generate_series(300, 900)")
    wait_until_done(mirror)
    mirror.assert_equal("items")


def test_values_that_did_not_travel_are_taken_from_the_snapshot(
    mirror: Mirror, source_db: Database, target_db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the row has got another key since, or several; the values of others stay the stream's."""
    target_db.execute("UPDATE items SET big = 'stale', name = 'stale'")
    reading = threading.Event()
    read = refresh_read.RangeReader.parts

    def parts(reader: refresh_read.RangeReader, after: tuple[str, ...] | None) -> Iterator[refresh_read.Part]:
        if not reading.is_set():
            source_db.execute(
                f"""
                UPDATE items SET price = 1 WHERE id = 1;
                UPDATE items SET id = -2 WHERE id = 2;
                UPDATE items SET id = 1002 WHERE id = -2;
                UPDATE items SET big = repeat(md5('x'), {BIG // 32}) WHERE id = 3;
                UPDATE items SET price = 2 WHERE id = 3;
                DELETE FROM items WHERE id = 4;
                INSERT INTO items (id, name) VALUES (4, 'again');
                """
            )
            mirror.sync()
            reading.set()
        yield from read(reader, after)

    monkeypatch.setattr(refresh_read.RangeReader, "parts", parts)
    resync(mirror, "items")
    wait_until_done(mirror)
    assert reading.is_set()
    mirror.assert_equal("items")


def test_f89_values_that_did_not_travel_beside_a_change_that_is_refused(
    source_db: Database, target_db: Database, tmp_path: Path, pg_dump: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is refused as a whole comes again in pieces: a row that moved has moved once."""
    with running_mirror(source_db, target_db, tmp_path, pg_dump, SCHEMA, sink={"on_error": "park"}) as mirror:
        source_db.execute(f"INSERT INTO items SELECT n, 'item ' || n FROM generate_series(1, {ROWS}) n")
        source_db.execute(f"UPDATE items SET big = repeat(md5(id::text), {BIG // 32}) WHERE id < 9")
        mirror.assert_equal("items")
        target_db.execute("UPDATE items SET big = 'stale'")
        target_db.execute("ALTER TABLE names ADD CONSTRAINT poison CHECK (name <> 'poison')")
        reading = threading.Event()
        read = refresh_read.RangeReader.parts

        def parts(reader: refresh_read.RangeReader, after: tuple[str, ...] | None) -> Iterator[refresh_read.Part]:
            if not reading.is_set():
                source_db.execute("UPDATE items SET id = -id WHERE id < 9; INSERT INTO names VALUES ('poison')")
                source_db.execute(
                    "UPDATE items SET id = 2000 - id WHERE id < -4; UPDATE items SET price = 1 WHERE id < 0"
                )
                mirror.sync()
                reading.set()
            yield from read(reader, after)

        monkeypatch.setattr(refresh_read.RangeReader, "parts", parts)
        # the source cannot be asked for what a stale row lacks: by then it has moved on
        monkeypatch.setattr(mirror.sink, "_reread", lambda _table, _image: None)
        resync(mirror, "items")
        wait_until_done(mirror)
        assert reading.is_set()
        assert mirror.delivery_stats.parked == 1
        mirror.assert_equal("items")


@pytest.mark.parametrize(
    ("alter", "name"),
    [
        ("ALTER TABLE few DROP COLUMN note, ADD COLUMN more int DEFAULT 3", "few"),
        ("ALTER TABLE few RENAME n TO note2", "few"),
        ("ALTER TABLE few RENAME TO renamed", "renamed"),
        ("DROP TABLE few", None),
    ],
)
def test_f29_f32_a_table_is_altered_meanwhile(
    mirror: Mirror,
    source_db: Database,
    target_db: Database,
    monkeypatch: pytest.MonkeyPatch,
    alter: str,
    name: str | None,
) -> None:
    """The mirror alters its table between two parts that were read of it before."""
    monkeypatch.setattr("cdc.postgres.source.CATALOG_SECONDS", 0.1)
    with connect(source_db.url) as connection:
        ddl_capture.execute(connection, ddl_capture.installation("postgres"))
    source_db.execute("CREATE TABLE few (id int PRIMARY KEY, n int, note text)")
    wait_until(lambda: mirror.error or mirror.fillings, what="the new table to be copied")
    monkeypatch.setattr("cdc.postgres.source.CATALOG_SECONDS", 3600.0)  # the triggers alone are to tell
    source_db.execute("INSERT INTO few SELECT g, g, 'x' FROM generate_series(1, 100) g")
    mirror.sync()
    wait_until(lambda: not target_db.execute("SELECT 1 FROM cdc.post_data WHERE NOT done"), what="all to be built")
    target_db.execute("UPDATE few SET n = -1")
    mirror.stop()
    mirror.want_resync("few")
    with target_db.connect() as blocker, blocker.transaction():
        blocker.execute("SELECT FROM cdc.positions FOR UPDATE")
        mirror.refill()
        blocked = "SELECT pid FROM pg_stat_activity WHERE application_name ~ '^cdc sink' AND wait_event_type = 'Lock'"
        wait_until(lambda: target_db.execute(blocked), what="the first part to be written")
        source_db.execute(alter)  # the round is over, but not all is written
        end = source_db.value("SELECT pg_current_wal_lsn() - '0/0'")
        mirror.source.nudge()
        wait_until(lambda: (mirror.queue.position or 0) >= end, what="the schema change to be captured")
    wait_until_done(mirror)
    mirror.assert_equal(*([name] if name else []))


def test_a_row_moves_among_those_that_are_done(mirror: Mirror, source_db: Database, target_db: Database) -> None:
    """And leaves behind, at its old place, what did not travel: no later round would find it there."""
    target_db.execute("UPDATE items SET big = 'stale'")
    resync(mirror, "items")
    wait_until(lambda: target_db.value("SELECT max(rows) FROM cdc.resyncs WHERE done_key IS NOT NULL"))
    for id_ in (ROWS, ROWS - 1):
        source_db.execute(f"UPDATE items SET id = -id WHERE id = {id_}")
    wait_until_done(mirror)
    mirror.assert_equal("items")


def test_only_transactions_that_need_care_take_it(
    mirror: Mirror, source_db: Database, target_db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What moves in part among stale rows is applied by itself, but not the many rows that come beside it."""
    slow: list[int] = []
    carefully = Applier.carefully

    def noted(applier: Applier, batches: Sequence[Batch], *, late: bool) -> None:
        slow.extend(batch.change_count for batch in batches)
        carefully(applier, batches, late=late)

    monkeypatch.setattr(Applier, "carefully", noted)
    target_db.execute("UPDATE items SET big = 'stale'")
    mirror.stop()
    source_db.execute("UPDATE pairs SET n = -n")
    source_db.execute("UPDATE items SET id = -5 WHERE id = 5")
    source_db.execute("UPDATE names SET n = -n")
    resync(mirror)
    wait_until_done(mirror)
    assert slow == [1]
    mirror.assert_equal(*TABLES)


def test_tables_without_a_usable_key_are_copied_again(mirror: Mirror, source_db: Database, target_db: Database) -> None:
    mirror.stop()
    target_db.execute("ALTER TABLE names DROP CONSTRAINT names_mail_key, ADD UNIQUE (mail) DEFERRABLE")
    target_db.execute("UPDATE names SET n = 0; UPDATE keyless SET n = 0; UPDATE items SET name = ''")
    ordered = mirror.want_resync()
    assert [table.name for table in ordered.refreshed] == ["items", "pairs"]
    assert [table.name for table in ordered.copied_again] == ["keyless", "names"]
    mirror.refill()
    wait_until_done(mirror)
    mirror.assert_equal(*TABLES)


def test_columns_filters_and_other_names(
    source_db: Database, target_db: Database, tmp_path: Path, pg_dump: Path
) -> None:
    """What is not mirrored stays as it is; what the filter leaves out is removed."""
    source_db.execute(
        "CREATE EXTENSION citext; CREATE TABLE a (word citext, n int, secret text, PRIMARY KEY (word, n))"
    )
    source_db.execute("INSERT INTO a SELECT 'Word ' || n, n, 's' FROM generate_series(1, 200) n")
    sink = {"rename": {"public.a": "other.b"}, "tables": {"public.a": {"columns": ["word", "n"], "where": "n > 50"}}}
    with filled_mirror(source_db, target_db, tmp_path, pg_dump, sink=sink) as mirror:
        mirror.sync()
        target_db.execute("UPDATE other.b SET secret = 'mine'; INSERT INTO other.b VALUES ('word 7', 7)")
        target_db.execute("DELETE FROM other.b WHERE word > 'Word 8'; UPDATE other.b SET word = upper(word::text)")
        mirror.stop()
        mirror.want_resync("a")
        mirror.refill()
        wait_until_done(mirror)
        wanted = source_db.execute("SELECT word::text, n FROM a WHERE n > 50 ORDER BY 2")
        assert target_db.execute("SELECT word::text, n FROM other.b ORDER BY 2") == wanted
        assert target_db.value("SELECT count(*) FROM other.b WHERE secret = 'mine'") > 0


def test_null_is_a_value_where_an_index_says_so(mirror: Mirror, source_db: Database, target_db: Database) -> None:
    """A stale row holds the only NULL of a unique index; it stands in the way of what is read, and of the stream."""
    for database in (source_db, target_db):
        database.execute("ALTER TABLE names DROP CONSTRAINT names_mail_key, ADD UNIQUE NULLS NOT DISTINCT (n, mail)")
    source_db.execute("UPDATE names SET mail = NULL WHERE n = 2")
    mirror.assert_equal("names")
    target_db.execute("DELETE FROM names WHERE n IN (2, 600); INSERT INTO names VALUES ('zz', 2), ('zzz', 600)")
    mirror.stop()
    source_db.execute("UPDATE names SET mail = NULL WHERE n = 600")
    resync(mirror, "names")
    wait_until_done(mirror)
    mirror.assert_equal("names")


def test_a_column_that_the_mirror_does_not_have_yet_is_waited_for(mirror: Mirror, target_db: Database) -> None:
    """As where a schema change is still in the queue. Other tables do not wait for it."""
    target_db.execute("UPDATE items SET name = 'stale'; ALTER TABLE items DROP COLUMN doc; UPDATE names SET n = -1")
    resync(mirror, "items", "names")
    wait_until(lambda: mirror.error or "no column doc yet" in told(mirror), what=lambda: told(mirror))
    mirror.assert_equal("names")
    assert target_db.execute("SELECT DISTINCT name FROM items") == [("stale",)]
    target_db.execute("ALTER TABLE items ADD COLUMN doc json")
    wait_until_done(mirror)
    mirror.assert_equal("items")


POISON = "ALTER TABLE items ADD CONSTRAINT poison CHECK (id NOT IN (77, 78, 400)) NOT VALID"


def test_f98_a_row_that_only_the_mirror_refuses_stops_it_with_its_key(mirror: Mirror, target_db: Database) -> None:
    target_db.execute("UPDATE items SET name = 'stale'")
    target_db.execute(POISON)
    resync(mirror, "items")
    failure = mirror.failure()
    assert re.search(r"public.items: row \(id\) = \(77\) .*poison", str(failure))
    assert "constraint" in getattr(failure, "hint", "")
    assert target_db.execute("SELECT min(id) FROM items WHERE name = 'stale'") == [(77,)]
    target_db.execute("ALTER TABLE items DROP CONSTRAINT poison")
    mirror.stop()
    mirror.refill()
    wait_until_done(mirror)
    mirror.assert_equal("items")


def test_f89_rows_that_only_the_mirror_refuses_keep_nothing_else_from_becoming_right(
    source_db: Database, target_db: Database, tmp_path: Path, pg_dump: Path
) -> None:
    """They are told, also after a restart, and tried again; other rows, tables and the stream do not wait for them."""
    sink = {"on_error": "park"}
    with running_mirror(source_db, target_db, tmp_path, pg_dump, SCHEMA, sink=sink) as mirror:
        source_db.execute(f"INSERT INTO items SELECT n, 'item ' || n FROM generate_series(1, {ROWS}) n")
        source_db.execute("INSERT INTO names SELECT 'Name ' || n, n FROM generate_series(1, 50) n")
        mirror.assert_equal("items", "names")
        target_db.execute("UPDATE items SET name = 'stale'; UPDATE names SET n = -1")
        target_db.execute("INSERT INTO items (id) SELECT generate_series(-9, 0); INSERT INTO items (id) VALUES (10000)")
        target_db.execute(POISON)
        resync(mirror, "items", "names")
        stale = "SELECT array_agg(id ORDER BY id) FROM items WHERE name = 'stale' OR id < 1 OR id > 1000"
        marks = "SELECT source_table, done_key FROM cdc.resyncs"
        for restarted in (False, True):
            wait_until(lambda: mirror.error or target_db.value(stale) == [77, 78, 400], what="the others to be right")
            wait_until(lambda: mirror.error or "= (400) as at" in told(mirror), what=lambda: told(mirror))
            wait_until(lambda: mirror.error or target_db.execute(marks) == [("items", ["76"])], what="names to be done")
            source_db.execute(f"INSERT INTO names VALUES ('new {restarted}')")
            mirror.assert_equal("names")
            assert mirror.delivery_stats.state == "resyncing"
            if not restarted:
                mirror.restart()
        target_db.execute("ALTER TABLE items DROP CONSTRAINT poison")
        wait_until_done(mirror)
        mirror.assert_equal("items")


def told(mirror: Mirror) -> str:
    """What `cdc status` says of what keeps a resync from its end."""
    status = mirror.delivery_stats.resync
    return (status and status.error) or ""
