"""The table that is replicated: its shape, its backlog, and whether two copies of it are equal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import psycopg

from tests.servers import Database

PUBLICATION: Final = "bench"
TRANSACTION_UPDATES: Final = 100
"""Of those updates that do not come alone."""
LAST_ID: Final = 0
"""The row that the last transaction of a backlog inserts: where it is visible, everything is."""
MARK_ID: Final = -1
"""The row that is inserted in the midst of a backlog, if it is to be marked."""

SCHEMA: Final = """
CREATE TABLE item (
    id bigint PRIMARY KEY, quantity int, name text, price numeric, changed_at timestamptz, note text, active bool
)
"""

INSERT: Final = "INSERT INTO item VALUES (%s, 1, 'a new item', 1.25, now(), 'written while it is watched', true)"

_BACKLOG: Final = """
CREATE PROCEDURE write_backlog(inserts int, per_transaction int, updates int, together int, mark int)
LANGUAGE plpgsql AS $$
BEGIN
    FOR start IN 1 .. inserts BY per_transaction LOOP
        INSERT INTO item
        SELECT id, id % per_transaction, 'item ' || id, id * 1.25, now(), md5(id::text), id % 2 = 0
          FROM generate_series(start, start + per_transaction - 1) AS id;
        COMMIT;
    END LOOP;
    FOR number IN 1 .. updates LOOP
        UPDATE item SET quantity = quantity + 1, price = price + 1, changed_at = now()
         WHERE id = 1 + number * 7919::bigint % inserts;
        IF number > together OR number % {updates} = 0 THEN
            COMMIT;
        END IF;
        IF number = mark THEN
            INSERT INTO item (id) VALUES (-1);
            COMMIT;
        END IF;
    END LOOP;
END $$
""".replace("{updates}", str(TRANSACTION_UPDATES))

_FINGERPRINT: Final = "SELECT count(*), sum(hashtextextended(item::text, 0)) FROM item"


class BenchFailed(Exception):
    """A run did not do what it measures; the message says what."""


@dataclass(frozen=True)
class Backlog:
    """Inserts, `transaction_rows` in a transaction, then updates of single rows scattered over all of them.

    together: so many of the updates come `TRANSACTION_UPDATES` in a transaction, before those that have one each.
    mark: after so many updates comes the row `MARK_ID`; 0: never.
    """

    inserts: int
    updates: int
    transaction_rows: int = 1_000
    together: int = 0
    mark: int = 0

    @property
    def rows(self) -> int:
        """Changes in all."""
        return self.inserts + self.updates

    def write(self, database: Database) -> None:
        """Commit it at the source. Durable at the end, and not at every transaction: nobody measures the writing."""
        with database.connect() as connection:
            connection.execute("SET synchronous_commit = off")
            connection.execute(_BACKLOG)
            arguments = [self.inserts, self.transaction_rows, self.updates, self.together, self.mark]
            connection.execute("CALL write_backlog(%s, %s, %s, %s, %s)", arguments)
            connection.execute("SET synchronous_commit = on")
            connection.execute(INSERT, [LAST_ID])


def create_source(database: Database) -> None:
    """An empty table, published."""
    database.execute(SCHEMA)
    database.execute(f"CREATE PUBLICATION {PUBLICATION} FOR TABLE item")


def has_row(connection: psycopg.Connection[tuple[bool]], row_id: int) -> bool:
    """Whether a row of the backlog is visible there, and so everything before it."""
    # not prepared: the plan for a table that is still empty reads all of it
    row = connection.execute("SELECT EXISTS (SELECT FROM item WHERE id = %s)", [row_id], prepare=False).fetchone()
    return row is not None and row[0]


def require_equal(source: Database, target: Database) -> None:
    """Raise `BenchFailed` unless both tables hold the same rows: their number, and a hash over each row's text."""
    (expected,), (found,) = source.execute(_FINGERPRINT), target.execute(_FINGERPRINT)
    if found != expected:
        raise BenchFailed(f"{target.name} differs from its source: rows and hash are {found}, should be {expected}")
