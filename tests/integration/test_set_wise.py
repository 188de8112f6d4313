"""Many changes in one transaction: written set-wise, or one by one where they are few, with the same outcome."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from cdc.postgres.row import UNCHANGED, decode_row
from cdc.postgres.staging import FIND_BY_INDEX
from tests.mirror import Mirror, running_mirror
from tests.servers import Database

DOCUMENTS = (
    "CREATE TABLE documents (id int PRIMARY KEY, n int, body text, extra text)",
    "ALTER TABLE documents ALTER body SET STORAGE EXTERNAL, ALTER extra SET STORAGE EXTERNAL",
)
LARGE = "repeat(md5(g::text), 100), repeat(md5((-g)::text), 100)"
"""Two values of 3,200 bytes, stored outside the row: nothing compresses them in columns that are EXTERNAL."""

Start = Callable[..., Mirror]


@pytest.fixture
def start(source_db: Database, target_db: Database, tmp_path: Path, pg_dump: Path) -> Iterator[Start]:
    """Starts a mirror of a schema."""
    with ExitStack() as stack:
        yield lambda *schema: stack.enter_context(running_mirror(source_db, target_db, tmp_path, pg_dump, *schema))


def run(mirror: Mirror, *statements: str) -> None:
    """Run statements in one transaction."""
    with mirror.source_db.connect() as connection, connection.transaction():
        for statement in statements:
            connection.execute(statement)


def unchanged_values(mirror: Mirror) -> int:
    """How many values of updated rows did not travel, of all that the queue still has."""
    return sum(
        decode_row(change.after).count(UNCHANGED)
        for stored in mirror.queue.read(mirror.queue.stats().pruned_seq, max_bytes=10**8, timeout_seconds=0)
        for transaction in stored.batch.transactions
        for change in transaction.changes
        if change.after is not None
    )


@pytest.fixture
def documents(start: Start) -> Mirror:
    mirror = start(*DOCUMENTS)
    mirror.queue.register("a sink that never moves")  # so that all can be looked at afterwards
    return mirror


@pytest.mark.parametrize("rows", [3, 300])
def test_f22_large_values_that_do_not_travel_are_left_alone(documents: Mirror, rows: int) -> None:
    run(documents, f"INSERT INTO documents SELECT g, 0, {LARGE} FROM generate_series(1, {rows}) g")
    documents.assert_equal("documents")
    run(documents, "UPDATE documents SET n = n + 1")
    documents.assert_equal("documents")
    assert unchanged_values(documents) == 2 * rows, "the values travelled: the test proves nothing"
    run(
        documents,
        "UPDATE documents SET body = 'short' WHERE id % 2 = 0",
        "UPDATE documents SET extra = NULL WHERE id % 3 = 0",
        "UPDATE documents SET n = n + 1",
    )
    documents.assert_equal("documents")
    assert documents.delivery_stats.fallbacks == documents.delivery_stats.missing_rows == 0


@pytest.mark.parametrize("rows", [3, 300])
def test_f22_the_insert_and_an_update_without_its_large_values_meet_in_one_batch(documents: Mirror, rows: int) -> None:
    run(
        documents,
        f"INSERT INTO documents SELECT g, 0, {LARGE} FROM generate_series(1, {rows}) g",
        "UPDATE documents SET n = n + 1",
        "UPDATE documents SET n = n + 1, extra = 'changed' WHERE id % 2 = 0",
        "UPDATE documents SET n = n + 1",
    )
    documents.assert_equal("documents")
    assert unchanged_values(documents) > 2 * rows, "the values travelled: the test proves nothing"
    assert documents.delivery_stats.fallbacks == documents.delivery_stats.missing_rows == 0


@pytest.mark.parametrize("rows", [3, 300])
def test_f22_f23_large_values_survive_a_change_of_the_key(documents: Mirror, rows: int) -> None:
    run(documents, f"INSERT INTO documents SELECT g, 0, {LARGE} FROM generate_series(1, {rows}) g")
    run(documents, "UPDATE documents SET id = id + 1000", "UPDATE documents SET n = 1 WHERE id % 2 = 0")
    documents.assert_equal("documents")
    assert unchanged_values(documents) > 2 * rows, "the values travelled: the test proves nothing"
    assert documents.delivery_stats.fallbacks == documents.delivery_stats.missing_rows == 0


@pytest.mark.parametrize("rows", [3, 300])
def test_f22_identity_full_tells_what_an_update_leaves_out(start: Start, rows: int) -> None:
    mirror = start(*DOCUMENTS, "ALTER TABLE documents REPLICA IDENTITY FULL")
    run(mirror, f"INSERT INTO documents SELECT g, 0, {LARGE} FROM generate_series(1, {rows}) g")
    run(mirror, "UPDATE documents SET n = 1", "UPDATE documents SET id = id + 1000 WHERE id % 2 = 0")
    mirror.assert_equal("documents")
    assert mirror.delivery_stats.missing_rows == 0


@pytest.mark.parametrize("rows", [3, 300])
def test_f100_a_missing_row_whose_update_is_incomplete_is_read_from_the_source(documents: Mirror, rows: int) -> None:
    run(documents, f"INSERT INTO documents SELECT g, 0, {LARGE} FROM generate_series(1, {rows}) g")
    documents.assert_equal("documents")
    documents.target_db.execute("DELETE FROM documents WHERE id % 3 = 0 AND id < 40")
    run(documents, "UPDATE documents SET n = 1", "DELETE FROM documents WHERE id = 3")
    documents.assert_equal("documents")
    assert unchanged_values(documents) == 2 * rows, "the values travelled: nothing needs to be read"
    gone = 1  # deleted at the source by the time that it is read
    assert documents.delivery_stats.healed_rows == min(rows, 39) // 3 - gone


@pytest.mark.parametrize("rows", [3, 300])
def test_f25_truncate_stands_between_the_rows_before_and_after_it(start: Start, rows: int) -> None:
    mirror = start("CREATE TABLE a (id int PRIMARY KEY, n int)", "CREATE TABLE b (id int PRIMARY KEY, n int)")
    for start_id in (0, 10_000):  # no key comes twice: nothing makes it give up the fast way
        first, second = (f"generate_series({start_id + k}, {start_id + k + rows}) g" for k in (1, 5000))
        run(
            mirror,
            f"INSERT INTO a SELECT g, 1 FROM {first}",
            f"INSERT INTO b SELECT g, 1 FROM {first}",
            "UPDATE a SET n = 2",
            "TRUNCATE a",
            f"INSERT INTO a SELECT g, 3 FROM {second}",
            "UPDATE b SET n = 4",
        )
        mirror.assert_equal("a", "b")
        run(mirror, f"INSERT INTO b SELECT g, 5 FROM {second}", "TRUNCATE a, b", "INSERT INTO b VALUES (0, 6)")
        mirror.assert_equal("a", "b")
        run(mirror, "TRUNCATE b")
    assert mirror.delivery_stats.fallbacks == 0


def test_an_update_looks_its_rows_up_and_reads_no_index_from_end_to_end(target_db: Database) -> None:
    target_db.execute("CREATE TABLE t (id bigint PRIMARY KEY, n int)")
    target_db.execute("INSERT INTO t SELECT g, 0 FROM generate_series(1, 100000) g")
    target_db.execute("ANALYZE t")
    with target_db.connect() as connection:
        connection.execute(FIND_BY_INDEX)
        connection.execute("CREATE TEMPORARY TABLE s AS SELECT * FROM t WITH NO DATA")
        connection.execute("INSERT INTO s SELECT g * 7, 1 FROM generate_series(1, 10000) g")
        update = "UPDATE t SET n = s.n FROM (SELECT * FROM s ORDER BY id) AS s WHERE t.id = s.id"
        plan = "\n".join(line for (line,) in connection.execute(f"EXPLAIN {update}").fetchall())
    assert "Nested Loop" in plan, plan
    assert "Index Scan using t_pkey" in plan, plan
