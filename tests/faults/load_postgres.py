"""A load on which lost, doubled, torn or reordered changes show: see `tests.faults.watch_postgres` for how."""

from __future__ import annotations

import base64
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import psycopg
from psycopg import errors

from tests.beside import Threads

Connection = psycopg.Connection[Any]

TABLES: Final = (
    "accounts",
    "counters",
    "journal",
    "entries",
    "orders",
    "order_lines",
    "twins",
    "seats",
    "places",
    "documents",
    "bulk",
    "scratch",
    "marks",
    "poisoned",
    "shapes",
)

BULK_ROWS: Final = 15_000
"""One transaction changes them all: more than a batch of the queue holds, and more than one of the sink."""

KEYS: Final = 40

OPENING_BALANCE: Final = 1000

SCHEMA: Final = f"""
CREATE TABLE accounts (id int PRIMARY KEY, balance bigint NOT NULL);
CREATE TABLE counters (id int PRIMARY KEY, n bigint NOT NULL);
CREATE TABLE journal (key int PRIMARY KEY, seq bigint NOT NULL);
CREATE TABLE entries (key int NOT NULL, seq bigint NOT NULL);
CREATE TABLE orders (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, lines int NOT NULL);
CREATE TABLE order_lines (order_id bigint, line int, quantity int NOT NULL, PRIMARY KEY (order_id, line));
CREATE TABLE twins (n int, note text);
CREATE TABLE seats (id int PRIMARY KEY, guest text NOT NULL);
CREATE TABLE places (id int PRIMARY KEY, moves bigint NOT NULL, document text NOT NULL);
CREATE TABLE documents (id int PRIMARY KEY, revision bigint NOT NULL, body text NOT NULL);
CREATE TABLE bulk (id int PRIMARY KEY, run bigint NOT NULL, filling text NOT NULL);
CREATE TABLE marks (id text PRIMARY KEY);
CREATE TABLE poisoned (id text PRIMARY KEY, p text, n int);
CREATE TABLE shapes (id int PRIMARY KEY, revision bigint NOT NULL DEFAULT 0, c0 int DEFAULT 0, c1 varchar(10));
CREATE TABLE scratch (id bigint GENERATED ALWAYS AS IDENTITY, line text);
ALTER TABLE entries REPLICA IDENTITY FULL;
ALTER TABLE twins REPLICA IDENTITY FULL;
ALTER TABLE scratch REPLICA IDENTITY FULL;

INSERT INTO accounts SELECT id, {OPENING_BALANCE} FROM generate_series(1, {KEYS}) AS id;
INSERT INTO counters SELECT id, 0 FROM generate_series(1, {KEYS}) AS id;
INSERT INTO journal SELECT key, 0 FROM generate_series(1, {KEYS}) AS key;
INSERT INTO twins SELECT n % 5, NULL FROM generate_series(1, 200) AS n;
INSERT INTO places SELECT id, 0, (SELECT string_agg(md5((id * n)::text), '') FROM generate_series(1, 150) AS n)
  FROM generate_series(1, {KEYS}) AS id;
INSERT INTO documents SELECT id, 0, 'empty' FROM generate_series(1, {KEYS}) AS id;
INSERT INTO bulk SELECT id, 0, md5(id::text) || md5((-id)::text) FROM generate_series(1, {BULK_ROWS}) AS id;
"""


class Load(Threads):
    """Clients that run transactions until they are stopped, also while the server is away now and then.

    rate: transactions a second of all clients together. The same seed chooses the same transactions.
    transactions: how many were acknowledged.
    """

    def __init__(self, url: str, *, seed: int, clients: int = 3, rate: float = 200) -> None:
        super().__init__(
            "client", *(partial(self._work, random.Random(f"{seed}:{number}")) for number in range(clients))
        )
        self.transactions = 0
        self._url = url
        self._pause_seconds = clients / rate
        self._counting = threading.Lock()
        self._clients = clients
        self._turns = threading.BoundedSemaphore(clients)

    @contextmanager
    def resting(self) -> Iterator[None]:
        """No transaction is open meanwhile, and none begins."""
        for _ in range(self._clients):
            self._turns.acquire()
        try:
            yield
        finally:
            self._turns.release(self._clients)

    def _work(self, rng: random.Random, stopping: threading.Event) -> None:
        while not stopping.is_set():
            self._work_while_connected(rng, stopping)

    def _work_while_connected(self, rng: random.Random, stopping: threading.Event) -> None:
        try:
            with psycopg.connect(self._url, autocommit=True) as connection:
                while not stopping.wait(self._pause_seconds):
                    (action,) = rng.choices(_ACTIONS, _WEIGHTS)
                    with self._turns, connection.transaction():
                        action(connection, rng)
                    with self._counting:
                        self.transactions += 1
        except errors.OperationalError:  # the server was killed, or two clients were in each other's way
            stopping.wait(0.05)


def transfer(connection: Connection, rng: random.Random) -> None:
    """The sum of all balances stays."""
    amount = rng.randint(1, 100)
    for account, change in sorted(zip(rng.sample(range(1, KEYS + 1), 2), (amount, -amount), strict=True)):
        connection.execute("UPDATE accounts SET balance = balance + %s WHERE id = %s", [change, account])


def count(connection: Connection, rng: random.Random) -> None:
    """Lost or out of order, the counter would go back."""
    connection.execute("UPDATE counters SET n = n + 1 WHERE id = %s", [_key(rng)])


def keep_journal(connection: Connection, rng: random.Random) -> None:
    """A row in a table without key for each step: doubled or lost, they would not fit together."""
    connection.execute(
        """WITH step AS (UPDATE journal SET seq = seq + 1 WHERE key = %s RETURNING key, seq)
           INSERT INTO entries SELECT key, seq FROM step""",
        [_key(rng)],
    )


def order(connection: Connection, rng: random.Random) -> None:
    """An order and its lines are never seen apart."""
    connection.execute(
        """WITH placed AS (INSERT INTO orders (lines) VALUES (%s) RETURNING id, lines)
           INSERT INTO order_lines SELECT id, line, line FROM placed, generate_series(1, lines) AS line""",
        [rng.randint(1, 6)],
    )


def cancel_orders(connection: Connection, rng: random.Random) -> None:
    """Nor do they go apart."""
    connection.execute(
        """WITH gone AS (DELETE FROM orders WHERE id IN (SELECT id FROM orders ORDER BY id LIMIT %s) RETURNING id)
           DELETE FROM order_lines WHERE order_id IN (SELECT id FROM gone)""",
        [rng.randint(1, 8)],
    )


def add_twins(connection: Connection, rng: random.Random) -> None:
    """Equal rows without a key."""
    connection.execute("INSERT INTO twins SELECT %s, NULL FROM generate_series(1, 2)", [rng.randrange(5)])


def part_twins(connection: Connection, rng: random.Random) -> None:
    """Of several equal rows exactly one goes, and one changes."""
    chosen = "WHERE ctid = (SELECT ctid FROM twins WHERE n = %s LIMIT 1 FOR UPDATE SKIP LOCKED)"
    connection.execute(f"DELETE FROM twins {chosen}", [rng.randrange(5)])
    connection.execute(f"UPDATE twins SET note = %s {chosen}", [rng.choice(["changed", None]), rng.randrange(5)])


def take_seat(connection: Connection, rng: random.Random) -> None:
    """A key is deleted and inserted again, sometimes within one transaction."""
    seat = _key(rng)
    connection.execute("DELETE FROM seats WHERE id = %s", [seat])
    if rng.random() < 0.7:
        guest = f"guest {rng.getrandbits(32):x}"
        connection.execute("INSERT INTO seats VALUES (%s, %s) ON CONFLICT (id) DO NOTHING", [seat, guest])


def move(connection: Connection, rng: random.Random) -> None:
    """Two rows swap their keys, and keep a TOASTed value that does not travel."""
    _one_at_a_time(connection)
    first, second = rng.sample(range(1, KEYS + 1), 2)
    for old, new in ((first, -first), (second, first), (-first, second)):
        connection.execute("UPDATE places SET id = %s, moves = moves + 1 WHERE id = %s", [new, old])


def revise(connection: Connection, rng: random.Random) -> None:
    """A TOASTed value is written anew, or left alone by an update of its row."""
    document = _key(rng)
    if rng.random() < 0.5:
        body = base64.b64encode(rng.randbytes(6_000)).decode()
        connection.execute("UPDATE documents SET body = %s WHERE id = %s", [body, document])
    connection.execute("UPDATE documents SET revision = revision + 1 WHERE id = %s", [document])


def reshape(connection: Connection, rng: random.Random) -> None:
    """Rows of a table whose columns come and go, but for two of them."""
    row = _key(rng)
    if rng.random() < 0.2:
        connection.execute("DELETE FROM shapes WHERE id = %s", [row])
    connection.execute(
        "INSERT INTO shapes (id) VALUES (%s) ON CONFLICT (id) DO UPDATE SET revision = shapes.revision + 1", [row]
    )


def change_everything(connection: Connection, rng: random.Random) -> None:
    """A transaction that is larger than a batch."""
    _one_at_a_time(connection)
    if rng.random() < 0.5:
        connection.execute("UPDATE bulk SET run = run + 1")
    else:
        connection.execute("CREATE TEMP TABLE kept ON COMMIT DROP AS SELECT * FROM bulk")
        connection.execute("DELETE FROM bulk")
        connection.execute("INSERT INTO bulk SELECT id, run + 1, filling FROM kept")


def scribble(connection: Connection, rng: random.Random) -> None:
    """TRUNCATE between rows."""
    if rng.random() < 0.2:
        connection.execute("INSERT INTO scratch (line) VALUES ('lives shortly')")
        connection.execute("TRUNCATE scratch RESTART IDENTITY")
    connection.execute("INSERT INTO scratch (line) VALUES (%s)", [f"{rng.getrandbits(32):x}"])


_CHOICES: Final[Sequence[tuple[Callable[[Connection, random.Random], None], float]]] = (
    (transfer, 20),
    (count, 20),
    (keep_journal, 20),
    (order, 10),
    (cancel_orders, 8),
    (add_twins, 6),
    (part_twins, 8),
    (take_seat, 8),
    (move, 5),
    (revise, 5),
    (scribble, 5),
    (reshape, 6),
    (change_everything, 0.4),
)
_ACTIONS: Final = [action for action, _ in _CHOICES]
_WEIGHTS: Final = [weight for _, weight in _CHOICES]


def _one_at_a_time(connection: Connection) -> None:
    """Until the end of the transaction, keep out the others that move keys."""
    connection.execute("SELECT pg_advisory_xact_lock(1)")


def _key(rng: random.Random) -> int:
    return rng.randint(1, KEYS)
