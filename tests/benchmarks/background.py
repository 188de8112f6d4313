"""Long statements in a server beside what else is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Final, TypeVar

from tests.processes import wait_until
from tests.servers import Database

T = TypeVar("T")

_END: Final = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()
"""


@contextmanager
def beside(database: Database, call: Callable[[], T]) -> Iterator[Future[T]]:
    """Run a function that executes statements in that database while the block runs, and wait for it.

    If the block fails or is interrupted, everybody who is connected to the database is sent away: else such an end
    would wait for a statement that may never end.
    """
    with ThreadPoolExecutor(1, "beside") as thread:
        future = thread.submit(call)
        try:
            yield future
        except BaseException:
            # again and again: it may be connecting just now
            wait_until(lambda: (database.execute(_END), future.done())[1], what="a statement to end")
            raise
