"""The events that come by the million become transactions of one change each: one by one, or compiled, and packed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cdc.change import Transaction
from cdc.mongodb.event import quick


class PlainEventsInPython:
    """Inserts, updates, replacements and deletes outside of transactions, as far as they were taken and not drained."""

    def __init__(self) -> None:
        self._transactions: list[Transaction] = []

    def __bool__(self) -> bool:
        return bool(self._transactions)

    def take(
        self, events: Sequence[bytes], at: int, room: int, table_of: dict[bytes, int]
    ) -> tuple[int, int, bytes | None]:
        """Take such events, from index `at` on.

        Stops at any other event, at one whose namespace is not in `table_of`, and when `room` bytes are used up; an
        index below zero is of a table that is left out. Returns the index to go on from, the bytes taken, and the last
        token.
        """
        size, token = 0, None
        while at < len(events) and size < room:
            raw = events[at]
            event = quick(raw)
            if event is None or (table := table_of.get(event.namespace)) is None:
                break
            at += 1
            token = event.token
            if table >= 0:
                size += len(raw)
                self._transactions.append(
                    Transaction(token, token, event.commit_time, 0, 0, True, [event.change(table)])
                )
        return at, size, token

    def drain(self) -> Sequence[Transaction]:
        """All that was taken, in order; it is left empty."""
        transactions, self._transactions = self._transactions, []
        return transactions


if TYPE_CHECKING:
    PlainEvents = PlainEventsInPython
else:
    try:
        from cdc.mongodb._events import PlainEvents
    except ImportError:
        PlainEvents = PlainEventsInPython
