"""Transactions as one run of bytes: what is handed on, stored and read again at once, and seldom looked into.

A source that is behind hands on tens of thousands of rows a second. Made into objects one by one, to be written down,
read and made again behind the queue, each costs more than all that its target does with it. Packed they are one value,
which is taken apart only where somebody looks at the transactions as such; the rest goes by the summary.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Final, overload

from cdc.change import Operation, Summarized, Summary, Transaction
from cdc.errors import DecodeError

NEVER_PACKED: Final = (0,) * (len(Operation) - 3)
"""Counts of what is neither insert, update nor delete."""

_lock = threading.Lock()


class Packed(Summarized):
    """Equal to a list of the same. Whoever looks at the transactions gets the same objects every time."""

    __slots__ = ("_count", "_summary", "_transactions", "data")

    def __init__(self, data: bytes, count: int, summary: Summary) -> None:
        """count: of transactions, as `data` says; it is compared when they are looked at."""
        self.data = data
        self._count = count
        self._summary = summary
        self._transactions: list[Transaction] | None = None

    @property
    def summary(self) -> Summary:
        """What stands at the beginning."""
        return self._summary

    @abstractmethod
    def unpacked(self) -> list[Transaction]:
        """All of them, as new objects. Raises `DecodeError`."""

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Transaction]:
        return iter(self._kept())

    @overload
    def __getitem__(self, index: int) -> Transaction: ...
    @overload
    def __getitem__(self, index: slice) -> list[Transaction]: ...
    def __getitem__(self, index: int | slice) -> Transaction | list[Transaction]:
        return self._kept()[index]

    def __eq__(self, other: object) -> bool:
        if isinstance(other, type(self)):
            return self.data == other.data
        return self._kept() == other if isinstance(other, list) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._kept()!r})"

    def once(self) -> Sequence[Transaction]:
        """Taken apart anew, unless somebody has looked at them: objects weigh four times as much as their bytes."""
        return self._all() if self._transactions is None else self._transactions

    def _kept(self) -> list[Transaction]:
        if self._transactions is None:
            found = self._all()
            with _lock:
                self._transactions = self._transactions or found
        return self._transactions

    def _all(self) -> list[Transaction]:
        found = self.unpacked()
        if len(found) != self._count:
            raise DecodeError(f"{self._count} packed transactions should be {len(found)}")
        return found


def truncated(data: bytes) -> DecodeError:
    """What is raised for bytes that end too early."""
    return DecodeError(f"packed transactions truncated at byte {len(data)}")
