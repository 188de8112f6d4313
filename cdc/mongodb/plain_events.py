"""The events that come by the million become transactions of one change each; in Python, or compiled."""

from __future__ import annotations

from collections.abc import Sequence

from cdc.change import Transaction
from cdc.mongodb.event import quick


def take_plain_in_python(
    events: Sequence[bytes], at: int, room: int, table_of: dict[bytes, int], transactions: list[Transaction]
) -> tuple[int, int, bytes | None]:
    """Take inserts, updates, replacements and deletes outside of transactions, from index `at` on.

    Stops at any other event, at one whose namespace is not in `table_of`, and when `room` bytes are used up; an index
    below zero is of a table that is left out. Returns the index to go on from, the bytes taken, and the last token.
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
            transactions.append(Transaction(token, token, event.commit_time, 0, 0, True, [event.change(table)]))
    return at, size, token


try:
    from cdc.mongodb import _events
except ImportError:
    take_plain = take_plain_in_python
else:
    take_plain = _events.take_plain
