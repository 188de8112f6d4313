"""Finding the changes that a target refuses among those that it takes. What becomes of them is up to `cdc.parking`.

What was refused as a whole is applied in halves, and halves of those that are refused, down to single changes. It is
cut between transactions first, where a target checks what it has put off (deferred constraints). A transaction whose
rest does not pass that check, because of what was taken out of it, is not split at all: then all of it is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import msgspec
import structlog

from cdc.change import Batch, Transaction
from cdc.errors import CdcError, FatalError, PermanentError
from cdc.parts import Item, Part, batches_of, emptied, parts_of
from cdc.position import Position, SourcePosition, format_position
from cdc.queue import Stored
from cdc.sink import Applied, Parking, Sink

log = structlog.get_logger()


class Lot(Protocol):
    """Where changes are parked."""

    def wait_behind(self, items: Iterable[Item]) -> Sequence[Item]:
        """Park what has to wait; return the rest."""
        ...

    def refused(self, item: Item, error: PermanentError) -> None:
        """Park a change that the target refuses by itself."""
        ...

    def applied(self, applied: Applied) -> None:
        """Count what was done."""
        ...


class ParkingSink(Sink, Parking, Protocol):
    """A sink whose changes can be parked."""


class Narrowing:
    """Of one sink; lives in its delivery's thread, over several connections to the target."""

    def __init__(self, sink: ParkingSink, lot: Lot) -> None:
        self._sink = sink
        self._lot = lot
        self._inseparable: dict[SourcePosition, PermanentError] = {}

    def passed(self) -> None:
        """A position is stored: what was found out about transactions before it is of no more use."""
        self._inseparable.clear()

    def apply(self, work: Iterable[tuple[Transaction, list[Item]]], position: Position) -> None:
        """Apply what was refused as a whole, without moving the position.

        Raises `PermanentError` where a transaction turned out to be inseparable: the sink is to be opened again, and
        this called with all that it then has not.
        """
        for part in parts_of(work):
            self._narrow(part, position)

    def finish(self, pieces: Sequence[Stored], position: Position) -> Applied:
        """Let the target make visible what was applied. Raises what `apply` does."""
        batches = [_positions(piece.batch, piece.batch.transactions) for piece in pieces]
        try:
            return self._sink.apply(batches, position)
        except PermanentError as exc:
            last = next((batch.transactions[-1] for batch in reversed(batches) if batch.transactions), None)
            raise self._found_inseparable(last, exc) from exc

    def _narrow(self, part: Part, position: Position) -> None:
        items = self._lot.wait_behind(part.items)
        if items and (error := self._refusal(items, part.before, position)) is not None:
            if len(items) > 1:
                for half in _halves(items):
                    self._narrow(Part(half, part.before), position)
                return
            self._lot.refused(items[0], error)
        if part.items:
            self._end(part.items[-1], items, position)

    def _refusal(self, items: Sequence[Item], before: Transaction | None, position: Position) -> PermanentError | None:
        """Why the target does not take these; `None` if it has."""
        for item in items:
            if (error := self._inseparable.get(item.transaction.position)) is not None:
                return error
        try:
            self._lot.applied(self._sink.apply_part(batches_of(items, before), position))
        except PermanentError as exc:
            return exc
        return None

    def _end(self, last: Item, applied: Sequence[Item], position: Position) -> None:
        """Let the target check what it has put off, if a transaction ends with `last` and has lost some changes."""
        transaction = last.transaction
        if not transaction.complete or last.change is not transaction.changes[-1]:
            return
        if sum(item.transaction is transaction for item in applied) == len(transaction.changes):
            return  # it was told so
        try:
            self._sink.apply_part([_positions(last.stored.batch, [transaction])], position)
        except PermanentError as exc:
            raise self._found_inseparable(transaction, exc) from exc

    def _found_inseparable(self, transaction: Transaction | None, error: PermanentError) -> CdcError:
        if transaction is None or transaction.position in self._inseparable:
            return FatalError(str(error), hint=error.hint)
        log.info("inseparable", position=format_position(transaction.position), error=str(error))
        self._inseparable[transaction.position] = error
        return error


def _halves(items: Sequence[Item]) -> tuple[Sequence[Item], Sequence[Item]]:
    """Cut two or more in the middle: between two transactions, if there are."""
    numbers = [
        number for number, item in enumerate(items) if number and item.transaction is not items[number - 1].transaction
    ]
    middle = numbers[len(numbers) // 2] if numbers else len(items) // 2
    return items[:middle], items[middle:]


def _positions(batch: Batch, transactions: Sequence[Transaction]) -> Batch:
    """These transactions of a batch, empty."""
    return msgspec.structs.replace(batch, transactions=list(map(emptied, transactions)))
