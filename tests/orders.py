"""Orders in MongoDB: the classic case, a database and its backup under another name."""

from __future__ import annotations

import itertools
import random
import threading
from types import TracebackType
from typing import Any, Final, Self

import pymongo

DATABASE: Final = "ordersDB"

_OPEN_ORDERS: Final = 200
_STATES: Final = ("new", "paid", "packed", "sent")


def fill(url: str, count: int) -> None:
    """Write the orders that are there before a mirror is."""
    with pymongo.MongoClient[dict[str, Any]](url) as client:
        orders = client[DATABASE].orders
        orders.create_index("orderNo", unique=True)
        orders.create_index([("customer", 1), ("state", 1)])
        for first in range(0, count, 5_000):
            orders.insert_many([_order(number) for number in range(first, min(first + 5_000, count))])


def spoil(url: str) -> None:
    """Change an order on the mirror, where nobody should write."""
    with pymongo.MongoClient[dict[str, Any]](url) as client:
        client[f"{DATABASE}_backup"].orders.update_one({"orderNo": "ORDER7"}, {"$set": {"total": 0}})


class Workload:
    """Customers in a thread of their own, as a context manager. writes: how many there were so far."""

    def __init__(self, url: str, *, rate: float) -> None:
        self.writes = 0
        self._client = pymongo.MongoClient[dict[str, Any]](url)
        self._pause_seconds = 1 / rate
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="orders")
        self._error: Exception | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._client.close()
        if self._error is not None and error is None:
            raise self._error

    def _work(self) -> None:
        orders, choose = self._client[DATABASE].orders, random.Random(1)
        try:
            for number in itertools.count(1_000_000):
                orders.insert_one(_order(number))
                one = {"_id": number - choose.randrange(_OPEN_ORDERS)}
                item = {"sku": f"sku {choose.randrange(500)}", "count": 1}
                orders.update_one(one, {"$set": {"state": choose.choice(_STATES)}, "$push": {"items": item}})
                orders.delete_one({"_id": number - 2 * _OPEN_ORDERS})
                self.writes += 3
                if self._stop.wait(self._pause_seconds):
                    return
        except Exception as exc:  # noqa: BLE001 - raised at the end
            self._error = exc


def _order(number: int) -> dict[str, Any]:
    return {
        "_id": number,
        "orderNo": f"ORDER{number}",
        "customer": number % 1000,
        "state": "new",
        "total": number % 500 + 0.99,
        "items": [{"sku": f"sku {(number + n) % 500}", "count": n + 1} for n in range(3)],
    }
