"""A shop database: its schema, its first rows, and people who buy things in it while tests run."""

from __future__ import annotations

import base64
import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any, Final

import psycopg
from psycopg import errors
from psycopg.types.json import Jsonb

from tests.beside import Threads

Connection = psycopg.Connection[Any]

TABLES: Final = ("customers", "products", "orders", "order_items", "inventory_audits", "import_lines")

MANUAL_BYTES: Final = 6_000
"""Beyond the 2 kB at which a row's values move to TOAST."""

_CITIES: Final = ("Köln", "São Paulo", "Kraków", "東京", "Reykjavík", "O'Fallon", "Back\\slash", "")
_STATUSES: Final = ("new", "paid", "shipped", "cancelled")


def create(connection: Connection) -> None:
    """Create the tables in an empty database, in schema `public`."""
    with connection.transaction():
        connection.execute("SET LOCAL search_path = public")
        connection.execute(Path(__file__).with_name("shop.sql").read_text())


def fill(
    connection: Connection,
    *,
    customers: int = 200,
    products: int = 50,
    orders: int = 500,
    items_per_order: int = 3,
    audits: int = 300,
    seed: int = 1,
) -> None:
    """Fill empty tables by COPY, in one transaction; the same seed makes the same rows."""
    rng = random.Random(seed)
    with connection.transaction():
        _copy(connection, "customers (email, name, balance, tags, preferences)", _customers(rng, customers))
        _copy(connection, "products (sku, name, manual, price, stock, attributes)", _products(rng, products))
        _copy(connection, "orders (customer_id, status, total, note)", _orders(rng, orders, customers))
        _copy(
            connection,
            "order_items (order_id, line, product_id, quantity, price)",
            _items(rng, orders, items_per_order, products),
        )
        _copy(connection, "inventory_audits (product_id, difference, reason)", _audits(rng, audits, products))
    connection.execute("ANALYZE")


def balance_total(connection: Connection) -> Decimal:
    """The sum of all balances: no transaction of the workload changes it, so it is the same in every snapshot."""
    row = connection.execute("SELECT sum(balance) FROM public.customers").fetchone()
    assert row is not None
    return Decimal(row[0])


class Workload(Threads):
    """Customers at work: threads that run mixed transactions until they are stopped.

    rate: transactions a second of all threads together; as many as the server takes without it.
    seed: the same seed chooses the same actions and rows; how the threads interleave stays open.
    counts: committed actions by name, beside `rolled back` and `lost connection`.
    """

    def __init__(self, url: str, *, threads: int = 2, rate: float | None = None, seed: int = 1) -> None:
        super().__init__(
            "shopper", *(partial(self._work, random.Random(f"{seed}:{number}")) for number in range(threads))
        )
        self.counts: Counter[str] = Counter()
        self._url = url
        self._pause_seconds = threads / rate if rate else 0.0

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def transactions(self) -> int:
        """How many have committed."""
        return sum(self.counts[action.__name__] for action, _ in _ACTIONS)

    def _work(self, rng: random.Random, stopping: threading.Event) -> None:
        while not stopping.is_set():
            self._work_while_connected(rng, stopping)

    def _work_while_connected(self, rng: random.Random, stopping: threading.Event) -> None:
        try:
            with psycopg.connect(self._url, autocommit=True) as connection:
                connection.execute("SET search_path = public")
                shopper = Shopper(connection, rng)
                due = time.monotonic()
                while not stopping.is_set():
                    self._act(shopper, rng)
                    due += self._pause_seconds
                    stopping.wait(max(due - time.monotonic(), 0))
        except errors.OperationalError:
            self.counts["lost connection"] += 1
            stopping.wait(0.05)

    def _act(self, shopper: Shopper, rng: random.Random) -> None:
        action = rng.choices(*_CHOICES)[0]
        try:
            with shopper.connection.transaction():
                action(shopper)
        except (_ChangedMind, errors.DeadlockDetected, errors.IntegrityError):
            self.counts["rolled back"] += 1
        else:
            self.counts[action.__name__] += 1


class _ChangedMind(Exception):
    """Rolls a transaction back at its very end."""


class Shopper:
    """The transactions of the workload; each method is the inside of one."""

    def __init__(self, connection: Connection, rng: random.Random) -> None:
        self.connection = connection
        self._rng = rng

    def sign_up(self) -> None:
        """An insert that leaves most columns to their defaults."""
        address = f"{self._rng.getrandbits(64):x}@new.example"
        self._run("INSERT INTO customers (email, name) VALUES (%s, %s)", address, self._rng.choice(_CITIES))

    def place_order(self) -> None:
        """Rows in two tables, a counter, and what the trigger adds."""
        order = self._run("INSERT INTO orders (customer_id) VALUES (%s) RETURNING id", self._any("customers"))
        for line in range(1, self._rng.randint(2, 5)):
            product, quantity = self._any("products"), self._rng.randint(1, 9)
            self._run(
                "INSERT INTO order_items SELECT %s, %s, id, %s, price FROM products WHERE id = %s",
                *(order, line, quantity, product),
            )
            self._run("UPDATE products SET stock = stock - %s WHERE id = %s", quantity, product)
        self._run(
            "UPDATE orders SET total = (SELECT sum(amount) FROM order_items WHERE order_id = id) WHERE id = %s", order
        )

    def move_order_on(self) -> None:
        """A small update."""
        status = self._rng.choice(_STATUSES)
        self._run("UPDATE orders SET status = %s, note = note WHERE id = %s", status, self._any("orders"))

    def delete_order(self) -> None:
        """A delete that cascades."""
        self._run("DELETE FROM orders WHERE id = %s", self._any("orders"))

    def renumber_lines(self) -> None:
        """Primary keys change, several rows at once."""
        self._run("UPDATE order_items SET line = -line WHERE order_id = %s", self._any("orders"))

    def reprice_product(self) -> None:
        """An update that leaves the TOASTed column alone."""
        self._run("UPDATE products SET price = price + 0.01 WHERE id = %s", self._any("products"))

    def rewrite_manual(self) -> None:
        """An update of the TOASTed column, with a second one to the same row that leaves it alone."""
        product = self._any("products")
        self._run("UPDATE products SET manual = %s WHERE id = %s", _manual(self._rng), product)
        self._run("UPDATE products SET attributes = attributes || '{\"edited\": true}' WHERE id = %s", product)

    def transfer(self) -> None:
        """Money moves between two customers: the sum stays."""
        pair = sorted((self._any("customers") or 0, self._any("customers") or 0))
        amount = Decimal(self._rng.randint(1, 10_000)) / 100
        if pair[0] != pair[1]:
            self._run("UPDATE customers SET balance = balance - %s WHERE id = %s", amount, pair[0])
            self._run("UPDATE customers SET balance = balance + %s WHERE id = %s", amount, pair[1])

    def change_email(self) -> None:
        """A unique column that is no key changes; its value may have been another row's."""
        first, second = self._any("customers"), self._any("customers")
        self._run("UPDATE customers SET email = %s WHERE id = %s", f"{self._rng.getrandbits(64):x}", first)
        self._run(
            "UPDATE customers SET email = %s, tags = tags || ARRAY['moved', NULL] WHERE id = %s", f"{first}@x", second
        )

    def audit_twice(self) -> None:
        """Two equal rows without a key."""
        row = (self._any("products"), self._rng.randint(-3, 3))
        for _ in range(2):
            self._run("INSERT INTO inventory_audits (product_id, difference, reason) VALUES (%s, %s, NULL)", *row)

    def forget_one_audit(self) -> None:
        """Exactly one of several equal rows goes, another changes."""
        chosen = "WHERE ctid = (SELECT ctid FROM inventory_audits WHERE product_id = %s LIMIT 1 FOR UPDATE SKIP LOCKED)"
        self._run(f"DELETE FROM inventory_audits {chosen}", self._any("products"))
        self._run(f"UPDATE inventory_audits SET difference = 0 {chosen}", self._any("products"))

    def undo_a_part(self) -> None:
        """A savepoint that is rolled back in the middle, one in it that was released."""
        self._run("INSERT INTO import_lines (line) VALUES ('kept before')")
        with self.connection.transaction() as savepoint:
            self._run("INSERT INTO import_lines (line) VALUES ('must never be seen')")
            with self.connection.transaction():
                self._run("DELETE FROM import_lines")
            raise psycopg.Rollback(savepoint)
        self._run("INSERT INTO import_lines (line) VALUES ('kept after')")

    def change_mind(self) -> None:
        """A whole transaction that is rolled back."""
        self.place_order()
        raise _ChangedMind

    def start_import_over(self) -> None:
        """TRUNCATE between rows."""
        self._run("INSERT INTO import_lines (line) VALUES ('lives shortly')")
        self._run("TRUNCATE import_lines RESTART IDENTITY")
        self._run("INSERT INTO import_lines (line) SELECT 'line ' || n FROM generate_series(1, 5) AS n")

    def _any(self, table: str) -> int | None:
        """The id of some row."""
        point = self._rng.random()
        found: int | None = self._run(
            f"SELECT id FROM {table} WHERE id >= (SELECT (max(id) * %s)::bigint FROM {table}) ORDER BY id LIMIT 1",
            point,
        )
        return found

    def _run(self, query: str, *parameters: object) -> Any:
        """The first value that a statement returns, if it returns any."""
        cursor = self.connection.execute(query, parameters)
        row = cursor.fetchone() if cursor.description else None
        return None if row is None else row[0]


_ACTIONS: Final[Sequence[tuple[Callable[[Shopper], None], int]]] = (
    (Shopper.place_order, 20),
    (Shopper.move_order_on, 20),
    (Shopper.transfer, 15),
    (Shopper.reprice_product, 10),
    (Shopper.audit_twice, 6),
    (Shopper.forget_one_audit, 6),
    (Shopper.sign_up, 5),
    (Shopper.rewrite_manual, 5),
    (Shopper.delete_order, 5),
    (Shopper.renumber_lines, 4),
    (Shopper.change_email, 3),
    (Shopper.undo_a_part, 3),
    (Shopper.change_mind, 3),
    (Shopper.start_import_over, 1),
)
_CHOICES: Final = tuple(zip(*_ACTIONS, strict=True))


def _copy(connection: Connection, target: str, rows: Iterable[Sequence[object]]) -> None:
    with connection.cursor() as cursor, cursor.copy(f"COPY public.{target} FROM STDIN") as copy:
        for row in rows:
            copy.write_row(row)


def _customers(rng: random.Random, count: int) -> Iterable[Sequence[object]]:
    for number in range(1, count + 1):
        city = rng.choice(_CITIES)
        preferences = Jsonb({"city": city, "newsletter": rng.random() < 0.5, "sizes": [rng.randint(30, 50), None]})
        tags = rng.sample(["vip", "new", "wholesale", 'quote"d', ""], rng.randint(0, 3))
        yield (
            f"customer{number}@shop.example",
            f"Müller {number} {city}",
            rng.randint(0, 99_999) / 100,
            tags,
            preferences,
        )


def _products(rng: random.Random, count: int) -> Iterable[Sequence[object]]:
    for number in range(1, count + 1):
        manual = None if number % 10 == 0 else _manual(rng)
        yield (
            f"SKU-{number:06}",
            f"Product {number}",
            manual,
            rng.randint(100, 99_999) / 100,
            1000,
            Jsonb({"n": number}),
        )


def _orders(rng: random.Random, count: int, customers: int) -> Iterable[Sequence[object]]:
    for number in range(count):
        note = "line 1\nline 2\t\\N" if number % 7 == 0 else None
        yield rng.randint(1, customers), rng.choice(_STATUSES), rng.randint(0, 99_999) / 100, note


def _items(rng: random.Random, orders: int, lines: int, products: int) -> Iterable[Sequence[object]]:
    for order, line in itertools.product(range(1, orders + 1), range(1, lines + 1)):
        yield order, line, rng.randint(1, products), rng.randint(1, 9), rng.randint(100, 9_999) / 100


def _audits(rng: random.Random, count: int, products: int) -> Iterable[Sequence[object]]:
    for _ in range(count):
        yield rng.randint(1, products), rng.randint(-3, 3), rng.choice(("counted", "broken", None))


def _manual(rng: random.Random) -> str:
    return base64.b64encode(rng.randbytes(MANUAL_BYTES)).decode()
