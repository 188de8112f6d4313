"""Finding the changes that a target refuses among those that it takes. What becomes of them is up to `cdc.parking`.

A target that cannot undo halts at the change that it refuses, and it goes on behind that: nothing is applied twice. To
one that can, what was refused as a whole is applied in pieces, and those that are refused in smaller ones, down to
single changes. It is cut between transactions first, where a target checks what it has put off (deferred constraints).
A transaction whose rest does not pass that check, because of what was taken out of it, is not split at all: then all of
it is refused.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Final, Protocol

import msgspec
import structlog

from cdc.change import Batch, TableName, Transaction
from cdc.errors import CdcError, FatalError, PermanentError
from cdc.parts import Item, Part, batches_of, emptied, parts_of
from cdc.position import Position, SourcePosition, format_position
from cdc.queue import Stored
from cdc.sink import Applied, Halted, Parking, Refused, Sink

PIECES: Final = 6
"""So many are made of what is refused. Each level of cutting takes about as long as applying all of it once: few levels
are better than few pieces, above all where many changes are refused."""

FEW_CHANGES: Final = 100
"""Among so many it is believed that the one which a sink names is the only one to be refused."""

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

    def apply(
        self, work: Iterable[tuple[Transaction, list[Item]]], position: Position, refused: PermanentError | None
    ) -> None:
        """Apply what was refused as a whole, without moving the position. refused: how, if it was just now.

        Raises `PermanentError` where a transaction turned out to be inseparable: the sink is to be opened again, and
        this called with all that it then has not.
        """
        todo = deque(part for part in parts_of(work) if part.items)
        if isinstance(refused, Halted):
            todo = deque(self._behind(todo, refused))
            refused = None
        elif len(todo) > 1:
            refused = None
        while todo:
            left = self._narrow(todo.popleft(), position, refused)
            todo.extendleft(reversed(left))
            refused = None

    def finish(self, pieces: Sequence[Stored], position: Position) -> Applied:
        """Let the target make visible what was applied. Raises what `apply` does."""
        batches = [_positions(piece.batch, piece.batch.transactions) for piece in pieces]
        try:
            return self._sink.apply(batches, position)
        except PermanentError as exc:
            last = next((batch.transactions[-1] for batch in reversed(batches) if batch.transactions), None)
            raise self._found_inseparable(last, exc) from exc

    def _narrow(self, part: Part, position: Position, refused: PermanentError | None) -> Sequence[Part]:
        """Apply a part; return what is left of it, in pieces."""
        items = self._lot.wait_behind(part.items)
        if len(items) < 2:
            refused = None
        if items and (error := refused or self._refusal(items, part.before, position)) is not None:
            if isinstance(error, Halted):
                return self._behind([Part(items, part.before)], error)
            if len(items) > 1:
                return list(_parts(part, _pieces(items, error)))
            self._lot.refused(items[0], error)
        if part.items:
            self._end(part.last or part.items[-1], items, position)
        return ()

    def _behind(self, parts: Iterable[Part], halted: Halted) -> Sequence[Part]:
        """Park the change that the target has halted at; return what is not applied."""
        left = list(parts)
        for number, (items, before, last) in enumerate(left):
            for at, item in enumerate(items):
                if item.change is halted.change:
                    self._lot.refused(item, halted)
                    rest = [each for each in items[at + 1 :] if not _is_about(each, halted.ahead)]
                    return [Part(rest, before, last), *left[number + 1 :]]
        raise FatalError(
            f"the target refuses a change that it was not given: {halted}", hint="this is a bug"
        ) from halted

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


def _is_about(item: Item, tables: Collection[TableName]) -> bool:
    change = item.change
    return change.table >= 0 and item.stored.batch.tables[change.table].qualified in tables


def _pieces(items: Sequence[Item], error: PermanentError) -> Iterator[Sequence[Item]]:
    """Two or more, cut: between transactions, if there are several."""
    numbers = range(1, len(items))
    cuts = [number for number in numbers if items[number].transaction is not items[number - 1].transaction] or numbers
    named = error.change if isinstance(error, Refused) and len(items) <= FEW_CHANGES else None
    at = next((number for number, item in enumerate(items) if item.change is named), None)
    if at is None:
        step = -(-len(cuts) // (PIECES - 1))
        cuts = cuts[step - 1 :: step]
    else:  # right before what is refused, and right behind it
        behind = bisect_right(cuts, at)
        cuts = cuts[max(behind - 1, 0) : behind + 1]
    return (items[start:end] for start, end in pairwise([0, *cuts, len(items)]))


def _parts(part: Part, pieces: Iterable[Sequence[Item]]) -> Iterator[Part]:
    """A part, cut into pieces of what is left of it: each still ends where the next one begins."""
    pieces = list(pieces)
    place_of = {item.id: number for number, item in enumerate(part.items)}
    for piece, following in pairwise([*pieces, ()]):
        last = part.items[place_of[following[0].id] - 1] if following else part.last or part.items[-1]
        yield Part(piece, part.before, last)


def _positions(batch: Batch, transactions: Sequence[Transaction]) -> Batch:
    """These transactions of a batch, empty."""
    return msgspec.structs.replace(batch, transactions=list(map(emptied, transactions)))
