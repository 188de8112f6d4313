"""Batches whose content follows from their number, so that a test knows what it should read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from struct import pack

from cdc.change import DELETE, INSERT, UPDATE, Batch, Change, Column, Delta, Table, Transaction
from cdc.postgres.row import encode_row

TABLE = Table("public", "orders", (Column("id", 23, is_key=True), Column("note", 25, is_key=False)))
STRIDE = 16
"""Transaction `n` starts its commit record at `n * STRIDE`."""


def end_of(number: int) -> int:
    """The position after transaction `number`."""
    return number * STRIDE + 8


def batch(number: int, *, size: int = 100, part: int = 0, complete: bool = True) -> Batch:
    """Transaction `number`, or its part `part`; its only row holds `row-<number>-<part>.` and about `size` bytes."""
    note = f"row-{number}-{part}.".encode().ljust(size, b".")
    change = Change(0, 0, None, None, encode_row((str(number).encode(), note)))
    transaction = Transaction(number * STRIDE, end_of(number), 0, number, part, complete, [change])
    return Batch((TABLE,), [transaction], end_of(number if complete else number - 1), size)


def transaction(number: int, *, parts: int = 1, size: int = 100) -> Iterator[Batch]:
    """Transaction `number` as `parts` batches, of which only the last is complete."""
    for part in range(parts):
        yield batch(number, size=size, part=part, complete=part == parts - 1)


def idle(position: int | bytes) -> Batch:
    """A batch that only moves the position."""
    return Batch((), [], position, 0)


def packed(transactions: list[Transaction]) -> bytes:
    """As the compiled reader of a stream writes them."""
    changes = [change for transaction in transactions for change in transaction.changes]
    counts = (sum(change.operation == operation for change in changes) for operation in (INSERT, UPDATE, DELETE))
    last = transactions[-1]
    data = pack("<5I", len(transactions), len(transactions), *counts)
    data += pack("<QQq?", transactions[0].position, last.position, last.commit_time, True)
    for each in transactions:
        data += pack("<QQqIII?", each.position, each.end, each.commit_time, each.xid, each.first_ordinal,
                     len(each.changes), each.complete)  # fmt: skip
        for change in each.changes:
            images = (change.key, change.before, change.after)
            parts = sum(1 << bit for bit, image in enumerate(images) if image is not None)
            data += pack("<BHB", change.operation, change.table, parts)
            data += b"".join(pack("<I", len(image)) + image for image in images if image is not None)
    return data


def packed_documents(transactions: Sequence[Transaction]) -> bytes:
    """As the compiled reader of a change stream writes them."""
    changes = [change for transaction in transactions for change in transaction.changes]
    pieces = []
    for transaction, change in zip(transactions, changes, strict=True):
        assert isinstance(transaction.position, bytes)
        assert change.key is not None
        assert change.detail is None or isinstance(change.detail, Delta)
        parts = (change.after is not None) | (change.detail is not None) << 1
        head = pack("<BBHq", change.operation, parts, change.table, transaction.commit_time // 1000)
        delta = change.detail.description if change.detail else b""
        pieces.append(head + transaction.position + change.key + (change.after or b"") + delta)
    counts = (sum(change.operation == operation for change in changes) for operation in (INSERT, UPDATE, DELETE))
    return pack("<4I", *counts, 16 + sum(map(len, pieces[:-1]))) + b"".join(pieces)
