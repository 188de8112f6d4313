"""The test servers themselves: they recover, and they never stay behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil

from tests.conftest import NewDatabase
from tests.processes import ended, wait_until
from tests.servers import Database, PostgresServer

CHECKOUT = Path(__file__).parents[2]

START_AND_HANG = """
import time
from tests.servers import PostgresServer
server = PostgresServer().start()
print(server.pid, server.data_dir, flush=True)
time.sleep(600)
"""


def test_a_killed_server_keeps_what_was_committed(postgres: PostgresServer, source_db: Database) -> None:
    source_db.execute("CREATE TABLE kept AS SELECT 1 AS id")
    postgres.kill()
    assert not postgres.running
    postgres.start()
    assert source_db.value("SELECT id FROM kept") == 1


def test_servers_of_a_killed_interpreter_end_with_the_next_one() -> None:
    hanging = subprocess.Popen([sys.executable, "-c", START_AND_HANG], cwd=CHECKOUT, stdout=subprocess.PIPE, text=True)
    assert hanging.stdout is not None
    pid, data_dir = hanging.stdout.readline().split()
    server = psutil.Process(int(pid))
    hanging.kill()
    hanging.communicate()
    assert not ended(server)
    next_one = "from tests.servers import PostgresServer; PostgresServer()"
    subprocess.run([sys.executable, "-c", next_one], cwd=CHECKOUT, check=True)
    assert ended(server)  # at once: without its folder it would notice, and end, only after a while
    assert not Path(data_dir).exists()


def test_a_database_is_dropped_with_a_slot_that_is_being_read(
    postgres18: PostgresServer, new_database: NewDatabase
) -> None:
    database = new_database(postgres18)
    slot = ["--slot=being_read", "--create-slot", "--start", "--if-not-exists", "--file=-", "--no-loop"]
    reader = subprocess.Popen([postgres18.bin_dir / "pg_recvlogical", f"--dbname={database.url}", *slot])
    wait_until(lambda: database.execute("SELECT 1 FROM pg_replication_slots WHERE slot_name = 'being_read' AND active"))
    database.drop()
    reader.wait(timeout=30)
    assert postgres18.psql("SELECT count(*) FROM pg_replication_slots WHERE slot_name = 'being_read'") == "0\n"


def test_members_of_the_password_role_are_not_trusted(postgres18: PostgresServer, source_db: Database) -> None:
    source_db.execute("CREATE ROLE careful LOGIN PASSWORD 'right' IN ROLE needs_password")
    try:
        refused = subprocess.run(
            [postgres18.bin_dir / "psql", "-c", "", postgres18.url(source_db.name, user="careful", password="wrong")],
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        assert "password authentication failed" in refused.stderr
    finally:
        source_db.execute("DROP ROLE careful")
