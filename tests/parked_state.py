"""What one version of `cdc` leaves behind of a PostgreSQL mirror that refuses changes, and a later one finds.

    python -m tests.parked_state CHECKOUT tests/data/parked-N.tar.xz

lets the daemon of a checkout write such a state; N is the format of its queue. It holds:

data/: the data directory, with the queue that has the parked changes.
target.sql: the mirror, with the position that they count from, and the constraint that refuses them.

Of `items`, the insert of 7 is dead, and two changes wait behind it; the update of 1 is to be tried again, in hours. The
sink is paused, and one more change waits in the queue.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from tests.command import Cdc
from tests.letters import TOKENS, are_dead, mirror, none_is_parked
from tests.processes import wait_until
from tests.servers import Database, PostgresServer
from tests.state import dump, pack

PARK: Final = 'on_error = "park"\nretry = {{ initial = {seconds}, max = {seconds}, attempts = {attempts} }}'

REFUSE: Final = "ALTER TABLE items ADD CONSTRAINT poison CHECK (name <> 'bad')"


def configure(cdc: Cdc, source: str, target: str, *, attempts: int, seconds: float) -> None:
    """A mirror that parks, and tries so often, with such pauses."""
    cdc.configure(source, target, sink=PARK.format(attempts=attempts, seconds=seconds), http=TOKENS)


def write(cdc: Cdc, source: Database, target: Database) -> None:
    """Run the daemon, twice, and leave it with work to do."""
    source.execute("CREATE TABLE items (id int PRIMARY KEY, name text)")
    source.execute("INSERT INTO items SELECT n, 'item ' || n FROM generate_series(1, 3) AS n")
    configure(cdc, source.url, target.url, attempts=1, seconds=0.05)
    with cdc.running():
        none_is_parked(cdc)
        target.execute(REFUSE)
        source.execute("INSERT INTO items VALUES (7, 'bad')")
        source.execute("UPDATE items SET id = 70 WHERE id = 7")
        source.execute("UPDATE items SET name = 'good' WHERE id = 70")
        are_dead(cdc, 1, 3)
    configure(cdc, source.url, target.url, attempts=5, seconds=36_000)
    with cdc.running():
        source.execute("UPDATE items SET name = 'bad' WHERE id = 1")
        are_dead(cdc, 1, 4)
        assert cdc("pause", "mirror").returncode == 0
        wait_until(lambda: mirror(cdc)["state"] == "paused", what=lambda: cdc.log)
        source.execute("INSERT INTO items VALUES (8, 'waiting')")
        wait_until(lambda: cdc.status()["sources"]["shop"]["changes"]["insert"] == 1, what=lambda: cdc.log)


def main(checkout: Path, archive: Path) -> None:
    """Write a state with servers of its own."""
    with TemporaryDirectory() as name, PostgresServer(18) as postgres:
        os.environ["PATH"] = f"{postgres.bin_dir}:{os.environ['PATH']}"  # pg_dump
        cdc = Cdc(Path(name), checkout)
        source, target = postgres.create_database("shop"), postgres.create_database("shop_backup")
        write(cdc, source, target)
        dump(target, cdc.folder / "target.sql")
        pack(cdc, archive, "target.sql")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]))
