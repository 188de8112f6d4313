"""The source's server dies and its standby takes over: the stream goes on only where nothing can be missing."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cdc.errors import ResyncRequired
from tests.mirror import Mirror, running_mirror, wait_for
from tests.processes import run_as
from tests.servers import Database, PostgresServer, give_away

ITEMS = "CREATE TABLE items (id int PRIMARY KEY, n int NOT NULL DEFAULT 0)"


class Pair:
    """A primary that is mirrored, and its standby; the mirror's url names both."""

    def __init__(self, primary: PostgresServer, standby: PostgresServer, mirror: Mirror) -> None:
        self.primary, self.standby, self.mirror = primary, standby, mirror

    def synchronise_slots(self) -> None:
        """Let the standby have our slot too."""
        self.primary.psql("ALTER SYSTEM SET synchronized_standby_slots = 'standby'; SELECT pg_reload_conf()")

        def synchronised() -> bool:
            with self.primary.connect() as primary, self.standby.connect() as standby:
                primary.execute("SELECT pg_log_standby_snapshot()")  # the slot moves by such records
                self.mirror.source.nudge()
                query = "SELECT FROM pg_replication_slots WHERE slot_name = 'cdc_shop' AND synced AND NOT temporary"
                return standby.execute(query).rowcount == 1

        wait_for(synchronised, "the slot to be synchronised")

    def fail_over(self) -> None:
        """Kill the primary and promote the standby."""
        self.primary.kill()
        if not self.standby.running:
            self.standby.start()
        self.standby.psql("SELECT pg_promote()")
        self.mirror.source_db = Database(self.standby, "shop")


class _Either(Database):
    """A database by the url that leads to whichever server is the primary."""

    def __init__(self, database: Database, standby: PostgresServer) -> None:
        super().__init__(database.server, database.name)
        self._standby = standby

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{server.port}" for server in (self.server, self._standby))
        return f"postgresql://postgres@{hosts}/{self.name}?target_session_attrs=read-write"


@pytest.fixture
def pair(target_db: Database, tmp_path: Path, pg_dump: Path) -> Iterator[Pair]:
    with PostgresServer(18) as primary:
        database = primary.create_database("shop")
        standby = PostgresServer(18)
        give_away(standby.folder)
        command: list[str | Path] = [primary.bin_dir / "pg_basebackup", "-D", standby.data_dir, "-d", primary.url()]
        subprocess.run([*command, "-c", "fast", "-R", "-C", "-S", "standby"], check=True, **run_as())
        with (standby.data_dir / "postgresql.conf").open("a") as file:
            file.write(
                f"port = {standby.port}\nunix_socket_directories = '{standby.folder}'\n"
                "hot_standby_feedback = on\nsync_replication_slots = on\n"
            )
        with standby, running_mirror(_Either(database, standby), target_db, tmp_path, pg_dump, ITEMS) as mirror:
            yield Pair(primary, standby, mirror)


def go_on(pair: Pair) -> None:
    pair.synchronise_slots()
    pair.mirror.source_db.execute("INSERT INTO items SELECT g FROM generate_series(1, 100) g")
    pair.mirror.sync()


def lose_the_slot(pair: Pair) -> None:
    pair.standby.psql("ALTER SYSTEM SET sync_replication_slots = off; SELECT pg_reload_conf()")
    pair.mirror.source_db.execute("INSERT INTO items VALUES (-1)")
    pair.mirror.sync()
    wait_for(lambda: replayed(pair), "the standby to have all")


def lose_transactions(pair: Pair) -> None:
    pair.synchronise_slots()
    pair.primary.psql("ALTER SYSTEM RESET synchronized_standby_slots; SELECT pg_reload_conf()")
    pair.standby.stop()
    pair.mirror.source_db.execute("INSERT INTO items VALUES (-1)")
    pair.mirror.sync()
    pair.mirror.capture.pause()
    wait_for(lambda: pair.mirror.capture_stats.state == "paused", "the source to pause")


def replayed(pair: Pair) -> bool:
    end = pair.primary.psql("SELECT pg_current_wal_lsn()").strip()
    return pair.standby.psql(f"SELECT pg_last_wal_replay_lsn() >= '{end}'").strip() == "t"


def test_f11_a_synchronised_slot_lets_the_stream_go_on(pair: Pair) -> None:
    go_on(pair)
    pair.fail_over()
    pair.mirror.source_db.execute("UPDATE items SET n = 1; DELETE FROM items WHERE id > 90")
    pair.mirror.assert_equal("items")
    assert pair.mirror.target_db.value("SELECT count(*) FROM items WHERE n = 1") == 90


@pytest.mark.parametrize(
    ("prepare", "reason"), [(lose_the_slot, "slot cdc_shop is missing"), (lose_transactions, "promoted at")]
)
def test_f11_f12_a_new_primary_that_lacks_something_stops_the_source(
    pair: Pair, prepare: Callable[[Pair], None], reason: str
) -> None:
    prepare(pair)
    pair.fail_over()
    pair.mirror.source_db.execute("INSERT INTO items SELECT g FROM generate_series(1, 1000) g")
    pair.mirror.capture.resume()
    error = pair.mirror.failure()
    assert isinstance(error, ResyncRequired)
    assert reason in str(error)
