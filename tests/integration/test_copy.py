"""The initial copy between real servers."""

from __future__ import annotations

import os
import shlex
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
from structlog.testing import capture_logs

from cdc.change import TableName
from cdc.config import SinkConfig, TableOptions
from cdc.copy import Copy, CopyResult
from cdc.errors import CdcError, FatalError, PermanentError, TransientError
from cdc.position import Position, format_lsn
from cdc.postgres.connection import connect
from cdc.postgres.dump import KEY_KINDS, SchemaDump, dump_schema
from cdc.postgres.loader import PostgresLoader
from cdc.postgres.schema import SchemaTable, read_tables
from cdc.postgres.sequences import SequenceValue, read_sequences
from cdc.postgres.snapshot import PostgresSnapshot, open_snapshot
from cdc.postgres.target import CopyTarget
from cdc.secret import Secret
from cdc.sink import Mirror
from cdc.source import Source
from tests import types
from tests.conftest import NewDatabase
from tests.processes import wait_until
from tests.servers import PASSWORD_ROLE, Database, PostgresServer, binaries

START = Position("queue", 0, 1)
CHECKOUT = Path(__file__).parents[2]


class TableSource:
    """The copying half of a source, over all tables of a database or some of them."""

    def __init__(self, url: str, names: Sequence[str] = (), *, pg_dump: Path | None = None, where: str = "") -> None:
        self.url = url
        self.pg_dump = pg_dump or binaries(18) / "pg_dump"
        self._names = [TableName("public", name) for name in names]
        self._where = where

    def schema(self) -> Mapping[TableName, SchemaTable]:
        with connect(self.url) as connection:
            found = read_tables(connection)
        return {name: table for name, table in found.items() if not self._names or name in self._names}

    def tables(self) -> Sequence[TableName]:
        return list(self.schema())

    def dump_schema(self) -> SchemaDump:
        return dump_schema(self.url, self.tables(), pg_dump=str(self.pg_dump))

    def sequences(self) -> list[SequenceValue]:
        with connect(self.url) as connection:
            return read_sequences(connection, self.tables())

    def snapshot(self) -> PostgresSnapshot:
        tables = self.schema()
        return open_snapshot(self.url, tables, filters=dict.fromkeys(tables, self._where) if self._where else {})


def target(database: Database | str, **options: Any) -> CopyTarget:
    url = database if isinstance(database, str) else database.url
    return CopyTarget(SinkConfig(name="mirror", source="shop", url=Secret(url), **options))


def copying(source: TableSource, mirror: CopyTarget, **options: Any) -> Copy:
    return Copy(cast("Source", source), cast("Mirror", mirror), source.tables(), START, **options)


def copied(source: Database, mirror: Database, *, chunk_bytes: int = 1 << 20, **options: Any) -> CopyResult:
    return copying(TableSource(source.url), target(mirror, **options), chunk_bytes=chunk_bytes).run()


def rows(database: Database, table: str) -> list[tuple[Any, ...]]:
    """All rows as text, in an order that has nothing to do with the table's."""
    return database.execute(f'SELECT t::text FROM {table} AS t ORDER BY t::text COLLATE "C"')


def assert_equal(source: Database, mirror: Database, *tables: str) -> None:
    for table in tables:
        assert rows(source, table) == rows(mirror, table), table


# what arrives


@pytest.mark.parametrize(("source_version", "target_version"), [(18, 18), (16, 18), (16, 16)])
def test_f36_f37_every_type_arrives_byte_for_byte(
    request: pytest.FixtureRequest, new_database: NewDatabase, source_version: int, target_version: int
) -> None:
    source = new_database(request.getfixturevalue(f"postgres{source_version}"))
    mirror = new_database(request.getfixturevalue("target18" if target_version == 18 else "postgres16"))
    with source.connect() as connection:
        types.create_types_schema(connection)
        types.fill(connection)
        expected = types.contents(connection)
    assert copied(source, mirror).finished
    with mirror.connect() as connection:
        assert types.contents(connection) == expected


def test_f52_tables_of_all_sizes(source_db: Database, target_db: Database) -> None:
    source_db.execute(
        """
        CREATE TABLE without_key (a int, b text);
        INSERT INTO without_key SELECT n % 3, 'same' FROM generate_series(1, 1000) n;
        CREATE TABLE empty (id int PRIMARY KEY);
        CREATE TABLE one_row (id int PRIMARY KEY);
        INSERT INTO one_row VALUES (1);
        CREATE TABLE no_columns ();
        INSERT INTO no_columns DEFAULT VALUES;
        CREATE TABLE many (id int PRIMARY KEY, pad text);
        INSERT INTO many SELECT n, repeat('x', 50) FROM generate_series(1, 20000) n;
        DELETE FROM many WHERE id % 7 = 0;
        CREATE TABLE wide (id int PRIMARY KEY, body text);
        INSERT INTO wide SELECT n, repeat(md5(n::text), 50000) FROM generate_series(1, 3) n;
        """
    )
    result = copied(source_db, target_db, chunk_bytes=64 * 1024)
    assert_equal(source_db, target_db, "without_key", "empty", "one_row", "no_columns", "many", "wide")
    assert result.rows == 1000 + 1 + 1 + 20000 - 20000 // 7 + 3
    assert result.finished


def test_f27_generated_columns_are_computed_by_the_mirror(source_db: Database, target_db: Database) -> None:
    source_db.execute(
        """
        CREATE TABLE made (twice int GENERATED ALWAYS AS (n * 2) STORED, n int PRIMARY KEY,
                           thrice int GENERATED ALWAYS AS (n * 3) VIRTUAL);
        INSERT INTO made (n) VALUES (1), (2)
        """
    )
    copied(source_db, target_db)
    assert rows(target_db, "made") == [("(2,1,3)",), ("(4,2,6)",)]


def test_partitions_are_copied_each_by_itself(source_db: Database, target_db: Database) -> None:
    source_db.execute(
        """
        CREATE TABLE visits (id int, day int, PRIMARY KEY (id, day)) PARTITION BY RANGE (day);
        CREATE INDEX ON visits (day);
        CREATE TABLE visits_1 PARTITION OF visits FOR VALUES FROM (0) TO (10);
        CREATE TABLE visits_2 PARTITION OF visits FOR VALUES FROM (10) TO (20) PARTITION BY LIST (day);
        CREATE TABLE visits_2_rest PARTITION OF visits_2 DEFAULT;
        CREATE TABLE parent (id int PRIMARY KEY);
        CREATE TABLE child (extra text) INHERITS (parent);
        INSERT INTO visits SELECT n, n % 20 FROM generate_series(1, 5000) n;
        INSERT INTO parent VALUES (1);
        INSERT INTO child VALUES (2, 'c');
        """
    )
    assert copied(source_db, target_db, chunk_bytes=32 * 1024).finished
    assert_equal(source_db, target_db, "visits", "visits_1", "visits_2_rest", "ONLY parent", "child")
    invalid = "SELECT count(*) FROM pg_index WHERE NOT indisvalid"
    assert target_db.value(invalid) == 0, "partitions' indexes are attached"


def test_rows_and_columns_that_are_left_out(source_db: Database, target_db: Database) -> None:
    source_db.execute(
        """
        CREATE TABLE people (secret text NOT NULL, id int PRIMARY KEY, name text NOT NULL,
                             number int GENERATED ALWAYS AS IDENTITY, size int GENERATED ALWAYS AS (id * 10) STORED);
        INSERT INTO people (secret, id, name) SELECT 's', n, 'name ' || n FROM generate_series(1, 10) n
        """
    )
    source = TableSource(source_db.url, where="id % 2 = 0 AND id > 4 OR id = 1")
    mirror = target(target_db, tables={"public.people": TableOptions(columns=("name", "id"))})
    assert copying(source, mirror).run().rows == 4
    found = target_db.execute("SELECT secret, id, name, size FROM people ORDER BY id")
    assert found == [(None, n, f"name {n}", n * 10) for n in (1, 6, 8, 10)]


@pytest.mark.parametrize("columns", [("name",), ("id", "absent"), ("id", "size")])
def test_columns_that_cannot_be_mirrored_are_named(
    source_db: Database, target_db: Database, columns: tuple[str, ...]
) -> None:
    source_db.execute("CREATE TABLE people (id int PRIMARY KEY, name text, size int GENERATED ALWAYS AS (id) STORED)")
    with pytest.raises(FatalError, match=r"public\.people.* (id|absent|size)"):
        copied(source_db, target_db, tables={"public.people": TableOptions(columns=columns)})
    assert target_db.value("SELECT to_regclass('people')") is None, "nothing half-done"


SHOP = """
CREATE TYPE mood AS ENUM ('sad', 'glad');
CREATE TABLE customers (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, name text UNIQUE, mood mood);
CREATE TABLE orders (id serial PRIMARY KEY, customer int NOT NULL REFERENCES customers, at date);
CREATE TABLE parts (id int, k int, PRIMARY KEY (id, k)) PARTITION BY LIST (k);
CREATE TABLE parts_1 PARTITION OF parts FOR VALUES IN (1);
CREATE INDEX ON parts (k);
CREATE TABLE keyed (x int NOT NULL, y int);
CREATE UNIQUE INDEX by_x ON keyed (x);
ALTER TABLE keyed REPLICA IDENTITY USING INDEX by_x;
CREATE SEQUENCE numbers;
CREATE FUNCTION forbid() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN RAISE 'fired'; END$$;
CREATE VIEW names AS SELECT name FROM customers;
COMMENT ON INDEX by_x IS 'found by';
COMMENT ON TABLE orders IS 'a; b
c';
INSERT INTO customers (name, mood) SELECT 'c' || n, 'glad' FROM generate_series(1, 50) n;
INSERT INTO orders (customer) SELECT n % 50 + 1 FROM generate_series(1, 200) n;
INSERT INTO parts SELECT n, 1 FROM generate_series(1, 20) n;
INSERT INTO keyed VALUES (1, 1);
SELECT setval('numbers', 77, false);
CREATE TRIGGER forbidden BEFORE INSERT ON orders FOR EACH ROW EXECUTE FUNCTION forbid();
"""

OBJECTS = """
SELECT conname::text FROM pg_constraint WHERE contype IN ('p', 'u', 'f') AND connamespace = 'public'::regnamespace
UNION SELECT format('%s valid: %s identity: %s', indexrelid::regclass, indisvalid, indisreplident)
        FROM pg_index JOIN pg_class c ON c.oid = indrelid WHERE relnamespace = 'public'::regnamespace
UNION SELECT tgname::text FROM pg_trigger WHERE NOT tgisinternal ORDER BY 1
"""


def test_indexes_constraints_triggers_and_sequences_are_like_the_sources(
    source_db: Database, target_db: Database
) -> None:
    source_db.execute(SHOP)
    assert copied(source_db, target_db).finished
    assert_equal(source_db, target_db, "customers", "orders", "parts", "keyed", "names")
    assert target_db.execute(OBJECTS) == source_db.execute(OBJECTS)
    for sequence in ("customers_id_seq", "orders_id_seq", "numbers"):
        state = f"SELECT last_value, is_called FROM {sequence}"
        assert target_db.execute(state) == source_db.execute(state)
    assert target_db.value("SELECT reltuples FROM pg_class WHERE relname = 'orders'") == 200, "analyzed"
    assert target_db.value("SELECT obj_description('orders'::regclass)") == "a; b\nc"


def test_identity_columns_accept_replicated_rows_until_the_cut_over(source_db: Database, target_db: Database) -> None:
    source_db.execute(SHOP)
    copied(source_db, target_db)
    identity = "SELECT attidentity::text FROM pg_attribute WHERE attrelid = 'customers'::regclass AND attname = 'id'"
    assert target_db.value(identity) == "d"


def test_renamed_schemas_and_tables(source_db: Database, target_db: Database) -> None:
    source_db.execute(SHOP)
    rename = {
        "public": "shop",
        "public.customers": "crm.people",
        "public.keyed": "shop.orders",
        "public.orders": "shop.keyed",
    }
    assert copied(source_db, target_db, rename=rename).finished
    pairs = [
        ("customers", "crm.people"),
        ("orders", "shop.keyed"),
        ("keyed", "shop.orders"),
        ("parts_1", "shop.parts_1"),
    ]
    for here, there in pairs:
        assert rows(source_db, here) == rows(target_db, there), there
    left = target_db.execute(
        "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p')"
    )
    assert left == []
    foreign = target_db.execute(
        "SELECT conrelid::regclass::text, confrelid::regclass::text FROM pg_constraint WHERE contype = 'f'"
    )
    assert foreign == [("shop.keyed", "crm.people")]
    assert target_db.value("SELECT obj_description('shop.by_x'::regclass)") == "found by"
    assert target_db.value("SELECT nextval('shop.numbers')") == 77
    assert target_db.value("SELECT nextval(pg_get_serial_sequence('shop.keyed', 'id'))") == 201
    assert target_db.value("SELECT nextval(pg_get_serial_sequence('crm.people', 'id'))") == 51
    assert target_db.value("SELECT count(*) FROM pg_index WHERE NOT indisvalid") == 0


def test_what_is_not_captured_leaves_with_all_that_needs_it(source_db: Database, target_db: Database) -> None:
    source_db.execute(
        """
        CREATE TABLE kept (id int PRIMARY KEY);
        CREATE TABLE left_out (id int PRIMARY KEY, note text);
        CREATE TABLE partly (id int PRIMARY KEY, a int REFERENCES kept, b int REFERENCES left_out);
        CREATE VIEW fine AS SELECT id FROM kept;
        CREATE VIEW broken AS SELECT id FROM left_out;
        CREATE VIEW broken_too AS SELECT b.id FROM broken b, fine;
        CREATE FUNCTION needs(left_out) RETURNS int LANGUAGE sql AS 'SELECT 1';
        CREATE SCHEMA cdc; CREATE TABLE cdc.positions (theirs int);
        CREATE UNLOGGED TABLE fleeting (id int);
        CREATE PUBLICATION theirs FOR TABLE kept;
        CREATE FUNCTION watch() RETURNS event_trigger LANGUAGE plpgsql AS 'BEGIN END';
        CREATE EVENT TRIGGER watching ON ddl_command_end EXECUTE FUNCTION watch();
        """
    )
    source = TableSource(source_db.url, ["kept", "partly"])
    assert copying(source, target(target_db)).run().finished
    made = target_db.execute(
        "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'v') ORDER BY 1"
    )
    assert made == [("fine",), ("kept",), ("partly",)]
    assert target_db.execute("SELECT conname FROM pg_constraint WHERE contype = 'f'") == [("partly_a_fkey",)]
    assert target_db.value("SELECT count(*) FROM pg_event_trigger") == 0
    assert target_db.value("SELECT count(*) FROM pg_publication") == 0


def test_a_captured_table_that_needs_one_that_is_not_is_refused(source_db: Database) -> None:
    source_db.execute("CREATE TABLE parent (id int); CREATE TABLE child () INHERITS (parent)")
    with pytest.raises(FatalError, match=r"public\.child cannot be mirrored without .*parent"):
        TableSource(source_db.url, ["child"]).dump_schema()


def test_a_missing_database_is_created_like_the_sources(
    postgres18: PostgresServer, target18: PostgresServer, source_db: Database
) -> None:
    postgres18.psql("CREATE DATABASE latin ENCODING 'LATIN1' LOCALE 'C' LOCALE_PROVIDER libc TEMPLATE template0")
    url, name = postgres18.url("latin"), 'latin "mirror"'
    try:
        Database(postgres18, "latin").execute(
            "CREATE TABLE t (id int PRIMARY KEY, x text); INSERT INTO t VALUES (1, 'ä')"
        )
        mirror = target(target18.url(name))
        assert mirror.copied() == {}
        assert copying(TableSource(url), mirror).run().finished
        made = Database(target18, name)
        assert made.value("SELECT x FROM t") == "ä"
        facts = (
            "SELECT pg_encoding_to_char(encoding), datcollate, datlocprovider::text FROM pg_database WHERE datname = %s"
        )
        assert made.execute(facts, [name]) == source_db.execute(facts, ["latin"])
    finally:
        postgres18.drop_database("latin")
        target18.drop_database(name)


# what the target may hold before


def test_f102_user_made_tables_that_fit_are_taken(source_db: Database, target_db: Database) -> None:
    source_db.execute("CREATE TABLE a (id int PRIMARY KEY, b varchar(5)); INSERT INTO a VALUES (1, 'x')")
    target_db.execute("CREATE TABLE a (b text, more int DEFAULT 7, id bigint PRIMARY KEY)")
    assert copied(source_db, target_db).finished
    assert rows(target_db, "a") == [("(x,7,1)",)]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ("id int", r"public\.a: column b \(text\) is missing"),
        ("id smallint, b text", r"public\.a: column id is smallint, at the source integer"),
        ("id int, b text GENERATED ALWAYS AS ('x') STORED", r"public\.a: column b is generated"),
    ],
)
def test_f102_user_made_tables_that_do_not_fit_are_named(
    source_db: Database, target_db: Database, columns: str, message: str
) -> None:
    source_db.execute("CREATE TABLE a (id int PRIMARY KEY, b text)")
    target_db.execute(f"CREATE TABLE a ({columns})")
    with pytest.raises(FatalError, match=message):
        copied(source_db, target_db)


def test_f102_a_missing_table_is_named(source_db: Database, target_db: Database) -> None:
    source_db.execute("CREATE TABLE a (id int); CREATE TABLE b (id int)")
    target_db.execute("CREATE TABLE a (id int)")
    with pytest.raises(FatalError, match=r"missing on the target: public\.b$"):
        copied(source_db, target_db)


def test_rows_of_the_user_are_never_removed(source_db: Database, target_db: Database) -> None:
    source_db.execute("CREATE TABLE a (id int)")
    target_db.execute("CREATE TABLE a (id int); INSERT INTO a VALUES (5)")
    with pytest.raises(FatalError, match=r"public\.a on the target has rows"):
        copied(source_db, target_db)
    assert rows(target_db, "a") == [("(5)",)]


def test_a_type_of_the_user_in_the_way_undoes_everything(source_db: Database, target_db: Database) -> None:
    source_db.execute("CREATE TABLE a (id int); CREATE TYPE mood AS ENUM ('x')")
    target_db.execute("CREATE TYPE mood AS ENUM ('y')")
    with pytest.raises(PermanentError, match='creating the tables on the target: type "mood" already exists'):
        copied(source_db, target_db)
    assert target_db.value("SELECT to_regclass('a')") is None
    assert target(target_db).stored_position() is None


def test_the_start_position_is_stored_once(source_db: Database, target_db: Database) -> None:
    source_db.execute("CREATE TABLE a (id int)")
    mirror, schema = target(target_db), TableSource(source_db.url).dump_schema()
    assert mirror.stored_position() is None
    for start in (Position("first", 3, 0x16B374D848), Position("second", 4, 5)):
        mirror.prepare_copy([TableName("public", "a")], start, schema)
    assert mirror.stored_position() == Position("first", 3, 0x16B374D848)


def test_f99_triggers_and_foreign_keys_of_the_target_keep_still(source_db: Database, target_db: Database) -> None:
    source_db.execute("CREATE TABLE a (id int PRIMARY KEY); CREATE TABLE b (a int REFERENCES a)")
    source_db.execute("INSERT INTO a VALUES (1); INSERT INTO b SELECT 1 FROM generate_series(1, 1000)")
    target_db.execute(
        """
        CREATE TABLE a (id int PRIMARY KEY); CREATE TABLE b (a int REFERENCES a);
        CREATE FUNCTION forbid() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN RAISE 'fired'; END$$;
        CREATE TRIGGER forbidden BEFORE INSERT ON a FOR EACH ROW EXECUTE FUNCTION forbid()
        """
    )
    result = copying(TableSource(source_db.url), target(target_db), workers=1).run()  # b, the larger one, comes first
    assert result.finished
    assert_equal(source_db, target_db, "a", "b")


def test_a_role_that_may_not_silence_triggers_is_warned_once(source_db: Database, target_db: Database) -> None:
    source_db.execute("CREATE TABLE a (id int); CREATE TABLE b (id int)")
    with (
        role(
            target_db, "LOGIN", "GRANT ALL ON SCHEMA public TO {role}; GRANT CREATE ON DATABASE {database} TO {role}"
        ) as url,
        capture_logs() as logs,
    ):
        assert copying(TableSource(source_db.url), target(url), workers=2).run().finished
    assert len([line for line in logs if line["log_level"] == "warning"]) == 1


# which point of time


def test_f47_f48_f49_visible_if_and_only_if_committed_before_the_position(
    postgres: PostgresServer, source_db: Database
) -> None:
    """Writers insert and delete while snapshots are taken; what each one sees is compared with the log itself."""
    source_db.execute("CREATE TABLE t (id int PRIMARY KEY)")
    source_db.execute("CREATE PUBLICATION p FOR TABLE t")
    source_db.execute("SELECT pg_create_logical_replication_slot('witness', 'pgoutput')")
    source, seen = TableSource(source_db.url), []
    with writers(source_db, 4):
        for _ in range(6):
            with closing(source.snapshot()) as snapshot, closing(snapshot.connect()) as connection:
                ids = {row[0] for row in connection.execute("SELECT id FROM public.t").fetchall()}
                seen.append((snapshot.position, ids))
    history = committed(source_db)
    assert len({position for position, _ in seen}) == len(seen)
    for position, ids in seen:
        expected: set[int] = set()
        for commit, inserted, deleted in history:
            if commit < position:
                expected = (expected | inserted) - deleted
        assert ids == expected, format_lsn(position)


@contextmanager
def writers(database: Database, count: int) -> Iterator[None]:
    """Transactions that insert a row and delete the one before, committing all the time."""
    stop = threading.Event()
    begun = threading.Barrier(count + 1)

    def write(number: int) -> None:
        with database.connect() as connection:
            for step in range(1_000_000):
                with connection.transaction():
                    row = number * 1_000_000 + step
                    connection.execute("INSERT INTO t VALUES (%s)", [row])
                    if step % 3 == 0:
                        connection.execute("DELETE FROM t WHERE id = %s", [row - 1])
                if step == 3:
                    begun.wait()
                if stop.is_set():
                    return

    threads = [threading.Thread(target=write, args=(number,)) for number in range(1, count + 1)]
    for thread in threads:
        thread.start()
    begun.wait()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def committed(database: Database) -> list[tuple[int, set[int], set[int]]]:
    """(LSN of the commit record, ids inserted, ids deleted) of each transaction, in commit order."""
    found: list[tuple[int, set[int], set[int]]] = []
    for (data,) in database.execute(
        """SELECT data FROM pg_logical_slot_get_binary_changes('witness', NULL, NULL,
                                                               'proto_version', '1', 'publication_names', 'p')"""
    ):
        message = bytes(data)
        if message[:1] == b"B":
            found.append((struct.unpack_from(">Q", message, 1)[0], set(), set()))
        elif message[:1] in (b"I", b"D"):
            (length,) = struct.unpack_from(">I", message, 9)  # one column: relation, N or K, count, t, length
            _, inserted, deleted = found[-1]
            (inserted if message[:1] == b"I" else deleted).add(int(message[13 : 13 + length]))
    return found


def test_the_slot_is_gone_once_the_snapshot_is_open(source_db: Database) -> None:
    source_db.execute("CREATE TABLE t (id int)")
    with closing(TableSource(source_db.url).snapshot()):
        slots = "SELECT count(*) FROM pg_replication_slots WHERE database = current_database()"
        wait_until(lambda: source_db.value(slots) == 0, what="the temporary slot to go")


@pytest.mark.parametrize("rewrite", ["TRUNCATE t", "ALTER TABLE t ALTER id TYPE bigint", "VACUUM FULL t"])
def test_a_table_rewritten_before_it_is_locked_is_noticed(
    source_db: Database, monkeypatch: pytest.MonkeyPatch, rewrite: str
) -> None:
    source_db.execute("CREATE TABLE t (id int); INSERT INTO t VALUES (1)")
    lock = PostgresSnapshot._lock_tables

    def late(snapshot: PostgresSnapshot) -> Any:
        source_db.execute(rewrite)
        return lock(snapshot)

    monkeypatch.setattr(PostgresSnapshot, "_lock_tables", late)
    with pytest.raises(TransientError, match=r"public\.t was rewritten"):
        TableSource(source_db.url).snapshot()
    assert no_sessions(source_db, "cdc-snapshot")


def test_whom_the_snapshot_waits_for_is_logged(source_db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cdc.postgres.slot.WAIT_LOG_SECONDS", 0.05)
    source_db.execute("CREATE TABLE t (id int)")
    with source_db.connect() as old, capture_logs() as logs:
        old.execute("BEGIN")
        old.execute("INSERT INTO t VALUES (1)")
        opened: list[PostgresSnapshot] = []
        pid = old.info.backend_pid
        opening = threading.Thread(target=lambda: opened.append(TableSource(source_db.url).snapshot()))
        opening.start()
        wait_until(lambda: any("waits for a transaction" in line["event"] for line in logs), what="the log line")
        old.execute("COMMIT")
        opening.join()
    opened[0].close()
    (line,) = [line for line in logs if "waits for" in line["event"]]
    assert line["pid"] == pid


def is_frozen(database: Database, table: str) -> bool:
    """Whether VACUUM has little to do: the page that is being filled last may be left."""
    database.execute(f"ANALYZE {table}")
    query = "SELECT relallvisible > 0.9 * relpages FROM pg_class WHERE oid = %s::regclass"
    return bool(database.value(query, [table]))


def test_rows_come_as_vacuum_would_leave_them(source_db: Database, target_db: Database) -> None:
    """Or the first who reads them would write all pages again."""
    for table in ("a", "b"):
        source_db.execute(f"CREATE TABLE {table} (id int PRIMARY KEY, pad text)")
        source_db.execute(f"INSERT INTO {table} SELECT n, repeat('x', 100) FROM generate_series(1, 9999) n")
    copied(source_db, target_db, chunk_bytes=64 * 1024)
    assert_equal(source_db, target_db, "a", "b")
    assert is_frozen(target_db, "a")
    assert is_frozen(target_db, "b")


@pytest.mark.parametrize(
    ("made", "beside"),
    [
        ("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (0)", ""),
        ("CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE u (id int REFERENCES t)", ""),
        ("CREATE TABLE t (id int) PARTITION BY LIST (id); CREATE TABLE u PARTITION OF t DEFAULT", ""),
        ("CREATE TABLE t (id int PRIMARY KEY)", "SELECT FROM t"),
    ],
    ids=["rows", "a reference", "partitions", "a reader"],
)
def test_rows_come_also_where_a_table_cannot_be_made_anew(target_db: Database, made: str, beside: str) -> None:
    target_db.execute(made)
    table, config = TableName("public", "t"), SinkConfig(name="mirror", source="shop", url=Secret(target_db.url))
    before = target_db.value("SELECT count(*) FROM t")
    with target_db.connect() as reader, closing(connect(target_db.url)) as connection:
        reader.execute(f"BEGIN; {beside}")
        loader = PostgresLoader(connection, config, {table: {"id": "integer"}}, {table})
        assert loader.load(table, [b"1\n2\n"], binary=False, whole=True) == 2
    assert target_db.value("SELECT count(*) FROM t") == before + 2


# interruptions


def test_f50_killed_in_the_middle_it_goes_on_also_after_a_vacuum_full(source_db: Database, target_db: Database) -> None:
    source_db.execute(
        """
        CREATE TABLE first (id int PRIMARY KEY, pad text);
        INSERT INTO first SELECT n, repeat('x', 1000) FROM generate_series(1, 30000) n;
        CREATE TABLE later (id int PRIMARY KEY, pad text);
        INSERT INTO later SELECT n, repeat('y', 1000) FROM generate_series(1, 20000) n;
        INSERT INTO later VALUES (-1);
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-m", __name__, source_db.url, target_db.url],
        cwd=CHECKOUT,
        env=os.environ | {"PYTHONPATH": str(CHECKOUT)},
    )
    mirror = target(target_db)
    try:
        wait_until(lambda: len(mirror.copied()) == 1, what="the first table to be copied")
        arriving = "SELECT sum(tuples_processed) FROM pg_stat_progress_copy WHERE relid = 'later'::regclass"
        wait_until(lambda: target_db.value(arriving), what="the first rows of the other")
        assert process.poll() is None
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert list(mirror.copied()) == [TableName("public", "first")]
    source_db.execute("DELETE FROM first WHERE id = 1")
    source_db.execute("DELETE FROM later WHERE id % 5 = 0")
    source_db.execute("VACUUM FULL later")
    result = copying(TableSource(source_db.url), mirror, chunk_bytes=1 << 20).run()
    assert result.copied == (TableName("public", "later"),)
    assert result.complete
    assert_equal(source_db, target_db, "later")
    assert target_db.value("SELECT count(*) FROM first") == 30000, "it was not copied again"


def test_f51_a_lost_snapshot_ends_the_run_and_finished_tables_stay(source_db: Database, target_db: Database) -> None:
    source_db.execute(
        """
        CREATE TABLE large (id int); INSERT INTO large SELECT n FROM generate_series(1, 20000) n;
        CREATE TABLE small (id int); INSERT INTO small VALUES (1)
        """
    )
    mirror = target(target_db)
    remember = mirror.table_copied

    def lose(table: TableName, position: int, count: int) -> None:
        remember(table, position, count)
        terminated = """SELECT count(pg_terminate_backend(pid, 5000)) FROM pg_stat_activity
                         WHERE application_name = 'cdc-snapshot' AND datname = current_database()"""
        assert source_db.value(terminated) == 1

    mirror.table_copied = lose  # type: ignore[method-assign, assignment]
    with pytest.raises(TransientError, match="the snapshot is lost"):
        copying(TableSource(source_db.url), mirror, workers=1).run()
    assert list(target(target_db).copied()) == [TableName("public", "large")]
    assert (
        target_db.value("SELECT count(*) FROM pg_constraint WHERE contype = 'p' AND conrelid = 'large'::regclass") == 0
    )
    result = copying(TableSource(source_db.url), target(target_db)).run()
    assert result.copied == (TableName("public", "small"),)
    assert_equal(source_db, target_db, "large", "small")


def test_f51_a_new_worker_cannot_join_a_lost_snapshot(source_db: Database) -> None:
    source_db.execute("CREATE TABLE t (id int)")
    snapshot = TableSource(source_db.url).snapshot()
    snapshot.close()
    snapshot.close()
    with pytest.raises(TransientError, match="the snapshot is lost"):
        snapshot.reader()


def test_a_source_that_dies_is_a_transient_error(new_database: NewDatabase, target_db: Database) -> None:
    server = PostgresServer(18)
    with server:
        source = server.create_database("dying")
        source.execute(
            """CREATE TABLE t (id int, pad text);
               INSERT INTO t SELECT n, repeat('x', 900) FROM generate_series(1, 50000) n"""
        )
        copy = copying(TableSource(source.url), target(target_db), chunk_bytes=1 << 20)
        failed: list[BaseException] = []

        def run() -> None:
            try:
                copy.run()
            except CdcError as exc:
                failed.append(exc)

        worker = threading.Thread(target=run)
        worker.start()
        wait_until(lambda: copy.progress.snapshot().rows > 0, what="the first chunk")
        server.kill()
        worker.join()
    assert isinstance(failed[0], TransientError)


def test_a_target_that_refuses_a_row_rolls_its_chunk_back(source_db: Database, target_db: Database) -> None:
    source_db.execute("CREATE TABLE t (id int); INSERT INTO t SELECT n FROM generate_series(1, 1000) n")
    target_db.execute("CREATE TABLE t (id int CHECK (id < 900))")
    with pytest.raises(PermanentError, match=r"copying public\.t: .*t_id_check"):
        copied(source_db, target_db)
    assert rows(target_db, "t") == []
    target_db.execute("ALTER TABLE t DROP CONSTRAINT t_id_check")
    assert copied(source_db, target_db).complete


def test_an_unfinished_table_that_a_finished_one_refers_to_starts_again(
    source_db: Database, target_db: Database
) -> None:
    schema = "CREATE TABLE a (id int PRIMARY KEY); CREATE TABLE b (id int PRIMARY KEY, a int REFERENCES a);"
    source_db.execute(schema + "INSERT INTO a VALUES (1); INSERT INTO b VALUES (1, 1)")
    target_db.execute(schema)
    copied(source_db, target_db)
    target_db.execute("UPDATE cdc.tables SET position = NULL WHERE source_table = 'a'")
    result = copied(source_db, target_db)
    assert result.copied == (TableName("public", "a"),)
    assert_equal(source_db, target_db, "a", "b")


def test_emptying_a_table_leaves_those_that_inherit_from_it(source_db: Database, target_db: Database) -> None:
    source_db.execute("CREATE TABLE parent (id int); CREATE TABLE child () INHERITS (parent)")
    source_db.execute("INSERT INTO parent VALUES (1); INSERT INTO child VALUES (2)")
    copied(source_db, target_db)
    target_db.execute("UPDATE cdc.tables SET position = NULL WHERE source_table = 'parent'")
    assert copied(source_db, target_db).copied == (TableName("public", "parent"),)
    assert_equal(source_db, target_db, "ONLY parent", "child")


# what is built afterwards


def test_keys_come_at_once_and_the_rest_when_the_stream_has_passed_every_table(
    source_db: Database, target_db: Database
) -> None:
    source_db.execute(SHOP)
    mirror, source = target(target_db), TableSource(source_db.url)
    mirror.prepare_copy(source.tables(), START, source.dump_schema())
    for number, table in enumerate(source.tables()):
        mirror.table_copied(table, 1000 + number, 0)
    last = 1000 + len(source.tables()) - 1
    mirror.build_keys()
    pending = "SELECT DISTINCT kind FROM cdc.post_data WHERE NOT done"
    assert not {kind for (kind,) in target_db.execute(pending)} & set(KEY_KINDS)
    assert target_db.value("SELECT indisreplident FROM pg_index WHERE indexrelid = 'by_x'::regclass")
    assert not mirror.finish_copy(last - 1)
    assert ("FK CONSTRAINT",) in target_db.execute(pending)
    assert mirror.finish_copy(last)
    assert target_db.execute(pending) == []


def test_nothing_is_built_while_a_table_is_incomplete(source_db: Database, target_db: Database) -> None:
    source_db.execute("CREATE TABLE a (id int UNIQUE)")
    mirror, source = target(target_db), TableSource(source_db.url)
    mirror.prepare_copy(source.tables(), START, source.dump_schema())
    assert not mirror.finish_copy(2**63)
    assert target_db.value("SELECT count(*) FROM pg_index WHERE indrelid = 'a'::regclass") == 0


def test_building_goes_on_after_an_error_and_repeats_nothing(source_db: Database, target_db: Database) -> None:
    source_db.execute(
        """
        CREATE TABLE a (id int PRIMARY KEY, x int UNIQUE, y int);
        CREATE UNIQUE INDEX broken ON a (y);
        CREATE INDEX last ON a (y)
        """
    )
    mirror, source = target(target_db), TableSource(source_db.url)
    mirror.prepare_copy(source.tables(), START, source.dump_schema())
    mirror.table_copied(TableName("public", "a"), 5, 0)
    target_db.execute("INSERT INTO a VALUES (1, 1, 1), (2, 2, 1)")
    with pytest.raises(PermanentError, match="building INDEX broken on the target"):
        mirror.finish_copy(5)
    assert target_db.value("SELECT to_regclass('a_x_key')") is not None
    target_db.execute("DELETE FROM a WHERE id = 2")
    assert mirror.finish_copy(5)
    assert target_db.value("SELECT to_regclass('last')") is not None
    assert mirror.finish_copy(5)


def test_a_table_that_is_in_use_keeps_no_other_from_being_built(source_db: Database, target_db: Database) -> None:
    source_db.execute(
        """
        CREATE TABLE a (id int PRIMARY KEY, x int UNIQUE);
        CREATE INDEX ON a (x, id);
        CREATE TABLE b (id int PRIMARY KEY, a_id int REFERENCES a);
        CREATE INDEX ON b (a_id)
        """
    )
    mirror, source = target(target_db), TableSource(source_db.url)
    mirror.prepare_copy(source.tables(), START, source.dump_schema())
    for table in source.tables():
        mirror.table_copied(table, 5, 0)
    about_a = """SELECT count(*) FROM cdc.post_data
                  WHERE NOT done AND kind <> 'ANALYZE' AND relations = '[["public", "a"]]'"""
    with ThreadPoolExecutor(1) as thread, target_db.connect() as user:
        with user.transaction():
            user.execute("INSERT INTO b VALUES (1, NULL)")
            finished = thread.submit(mirror.finish_copy, 5)
            wait_until(lambda: target_db.value(about_a) == 0)
            assert not finished.done()
        assert finished.result()


# pg_dump, passwords, privileges


def test_pg_dump_that_is_missing_or_too_old_is_named_with_the_fix(
    postgres18: PostgresServer, source_db: Database, tmp_path: Path
) -> None:
    source_db.execute("CREATE TABLE a (id int)")
    with pytest.raises(FatalError, match="not found, and the server is PostgreSQL 18") as caught:
        TableSource(source_db.url, pg_dump=tmp_path / "pg_dump").dump_schema()
    assert "postgresql-client-18" in caught.value.hint
    with pytest.raises(FatalError, match=r"is version 16\.\d+, the server is PostgreSQL 18") as caught:
        TableSource(source_db.url, pg_dump=binaries(16) / "pg_dump").dump_schema()
    assert "postgresql-client-18" in caught.value.hint


def test_f113_the_password_is_in_no_command_line_and_no_error(source_db: Database, tmp_path: Path) -> None:
    source_db.execute("CREATE TABLE a (id int)")
    recorder = tmp_path / "pg_dump"
    recorder.write_text(
        f'#!/bin/sh\necho "$@" >> {shlex.quote(str(tmp_path))}/arguments\nexec {binaries(18)}/pg_dump "$@"\n'
    )
    recorder.chmod(0o755)
    (tmp_path / "pg_restore").symlink_to(binaries(18) / "pg_restore")
    with role(source_db, "LOGIN PASSWORD 'geheim'", "GRANT {needs} TO {role}", password="geheim") as url:
        with pytest.raises(FatalError, match="password authentication failed"):
            connect(url.replace("geheim", "falsch"))
        with pytest.raises(FatalError, match=r"pg_dump failed: .*permission denied for table a") as caught:
            TableSource(url, pg_dump=recorder).dump_schema()
        assert "geheim" not in str(caught.value)
        source_db.execute("GRANT SELECT ON a TO PUBLIC")
        assert TableSource(url, pg_dump=recorder).dump_schema().tables
    arguments = (tmp_path / "arguments").read_text()
    assert "--schema-only" in arguments
    assert "geheim" not in arguments


def test_f118_row_security_is_an_error_and_never_half_a_table(source_db: Database, target_db: Database) -> None:
    source_db.execute(
        """
        CREATE TABLE a (id int); INSERT INTO a SELECT generate_series(1, 10);
        ALTER TABLE a ENABLE ROW LEVEL SECURITY; CREATE POLICY some_rows ON a USING (id < 5);
        GRANT SELECT ON a TO PUBLIC
        """
    )
    with role(source_db, "LOGIN REPLICATION") as url, pytest.raises(FatalError, match="row-level security"):
        copying(TableSource(url), target(target_db)).run()
    assert target(target_db).copied() == {}
    assert copied(source_db, target_db).complete
    assert rows(source_db, "a") == rows(target_db, "a")


def test_what_the_role_may_not_read_is_left_out_with_all_that_depends_on_it(
    source_db: Database, target_db: Database
) -> None:
    """pg_dump would fail to lock it; and does not list what it has not dumped."""
    source_db.execute(
        """
        CREATE SCHEMA closed; CREATE TABLE closed.pay (id int PRIMARY KEY);
        CREATE TABLE "Not mine" (id int PRIMARY KEY);
        CREATE TABLE a (id int PRIMARY KEY, pay int REFERENCES closed.pay, CHECK (id > 0)); INSERT INTO a VALUES (1);
        CREATE VIEW of_pay AS SELECT id FROM closed.pay; CREATE VIEW of_view AS SELECT id FROM of_pay;
        CREATE VIEW of_mine AS SELECT id FROM "Not mine"; CREATE VIEW of_a AS SELECT id FROM a;
        CREATE FUNCTION pay_of(closed.pay) RETURNS int LANGUAGE sql AS 'SELECT 1'; GRANT SELECT ON a TO PUBLIC
        """
    )
    with role(source_db, "LOGIN REPLICATION") as url:
        copying(TableSource(url, ["a"]), target(target_db)).run()
    assert rows(source_db, "a") == rows(target_db, "a")
    made = "SELECT relname::text FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'v')"
    assert sorted(target_db.execute(made)) == [("a",), ("of_a",)]
    constraints = "SELECT contype::text FROM pg_constraint WHERE conrelid = 'a'::regclass AND contype <> 'n' ORDER BY 1"
    assert target_db.execute(constraints) == [("c",), ("p",)]


@contextmanager
def role(database: Database, attributes: str, grants: str = "", password: str | None = None) -> Iterator[str]:
    """A role that exists for a moment; its URL."""
    name = f"role_of_{database.name}"
    for needed in {name, PASSWORD_ROLE} - {found for (found,) in database.execute("SELECT rolname FROM pg_roles")}:
        database.execute(f"CREATE ROLE {needed} {attributes if needed == name else ''}")
    database.execute(f"SELECT; {grants.format(role=name, database=database.name, needs=PASSWORD_ROLE)}")
    try:
        yield database.server.url(database.name, user=name, password=password)
    finally:
        database.execute(f"DROP OWNED BY {name} CASCADE; DROP ROLE {name}")


def no_sessions(database: Database, application: str) -> bool:
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = %s"
    none = wait_until(lambda: database.value(query, [application]) == 0, what=f"the sessions of {application} to end")
    return bool(none)


if __name__ == "__main__":  # the process that a test kills
    for_ever = "CASE id WHEN -1 THEN pg_sleep(600) IS NULL ELSE true END"
    copying(TableSource(sys.argv[1], where=for_ever), target(sys.argv[2]), workers=1).run()
