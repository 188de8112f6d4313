"""What a sink promises.

A sink blocks and is not thread-safe: `cdc.delivery` gives each one a thread of its own. It raises typed errors and
never waits or retries by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from operator import is_
from pathlib import Path
from typing import Final, NamedTuple, Protocol, runtime_checkable

import msgspec

from cdc.change import Batch, Change, Image, Table, TableName
from cdc.config import SinkConfig, SourceConfig
from cdc.errors import PermanentError
from cdc.position import Position, SourcePosition
from cdc.preflight import Finding
from cdc.source import Chunk
from cdc.stats import ResyncStatus as ResyncStatus  # noqa: PLC0414 - for those who implement `Refreshing`


class Applied(msgspec.Struct, frozen=True):
    """What an `apply` did.

    changes: changes taken (those below a table's copy position are taken and skipped).
    missing_rows: updates and deletes whose row was not there.
    healed_rows: rows put right, from the change itself or by reading the source again.
    fallback: whether the set-wise way failed and the ordered one was taken.
    rows: written for them, where several changes of a row may be written as one; `None` if nobody has counted.
    """

    changes: int
    missing_rows: int = 0
    healed_rows: int = 0
    fallback: bool = False
    rows: int | None = None


def are_same(batches: Sequence[Batch], others: Sequence[Batch]) -> bool:
    """Whether they are the very same objects: so a sink knows what it has prepared."""
    return len(batches) == len(others) and all(map(is_, batches, others))


Reread = Callable[[Table, Image], Image | None]
"""Read one row from the source again, by its key: the row as it is now, or `None` if it is gone.

Raises `TableGone` where that can be told.
"""


class TableGone(PermanentError):
    """The table of a row that was to be read again is not there any more: nobody can tell what became of the row."""


@dataclass(frozen=True, slots=True)
class SinkContext:
    """What a sink is given besides its own configuration. All of it is for those that need it.

    data_dir: for what a sink keeps on this machine.
    reread: asks the source for a row. primary_key: asks it for the columns of a table's primary key, if it has one.
    shapes: asks the catalog of a PostgreSQL source for the `cdc.postgres.shape.TableShape` of each OID that is there.
    dump_schema: see `cdc.source.Source`.
    row_limits: fields by which tokens of the HTTP interface are limited to rows.
    """

    source: SourceConfig | None = None
    data_dir: Path | None = None
    reread: Reread | None = None
    primary_key: Callable[[TableName], Sequence[str]] | None = None
    shapes: Callable[[Collection[int]], Sequence[object]] | None = None
    dump_schema: Callable[[], object] | None = None
    row_limits: tuple[str, ...] = ()


class NeedsFilling(Exception):
    """Raised by a sink whose target cannot take what comes next before it was filled again (tables are to be copied).

    Nothing of the open target transaction is visible then, and what the sink wants to be filled with is durable.
    """


class Refused(PermanentError):
    """What the target was given is refused, and the sink can say more of it.

    change: the one at fault, once those before it are applied; `None` if that is not known.
    undone: nothing of what was given is applied, and the sink is as it was before: it need not be opened again.
    """

    def __init__(self, message: str, *, hint: str = "", change: Change | None = None, undone: bool = False) -> None:
        super().__init__(message, hint=hint)
        self.change = change
        self.undone = undone


class Halted(PermanentError):
    """The target refuses a change, and cannot undo those before it: they stay. The sink need not be opened again.

    change: the one that is refused. Those behind it are not applied, unless they are about tables that are `ahead`: of
        these all was applied, up to the next change of tables as such (DDL).
    """

    def __init__(self, message: str, *, hint: str, change: Change, ahead: Collection[TableName] = ()) -> None:
        super().__init__(message, hint=hint)
        self.change = change
        self.ahead = ahead


class Sink(Protocol):
    """A target that changes are delivered to."""

    name: str

    @property
    def consistent(self) -> bool:
        """Whether the target shows one moment of the source; after a copy without snapshot `upkeep` makes it so."""
        ...

    def open(self) -> Position | None:
        """Connect and return the position stored in the target; `None` if it was never written to."""
        ...

    def prepare(self, batches: Sequence[Batch]) -> None:
        """Called from another thread while `apply` runs: what it will probably get next. May do nothing."""
        ...

    def apply(self, batches: Sequence[Batch], position: Position) -> Applied:
        """Apply in order; when `batches` end with a complete transaction, all becomes visible at once, with `position`.

        Otherwise the target transaction stays open for the next call. Transactions that commit below the
        position stored in the target have been filtered out by the caller. After an error nothing of the open
        target transaction is visible, and the sink must be opened again (but see `Refused`).
        """
        ...

    def upkeep(self, position: SourcePosition) -> None:
        """Do what has waited for the target to reach `position`, such as building the last indexes.

        Called now and then between two transactions; may take its time, but returns at once when nothing is due.
        """
        ...

    def close(self) -> None:
        """Disconnect; what was not complete is rolled back. Safe to call twice."""
        ...


class Subject(NamedTuple):
    """What a change is about: those about the same must stay in order.

    tables: one, or all that a change without keys concerns; an empty name stands for all tables of a schema.
    keys: two changes of a table have one in common if they may be about the same row, and so does a later change that
        wants what an earlier one took (a value of a unique index); `None`: all rows.
    """

    tables: tuple[TableName, ...]
    keys: tuple[bytes, ...] | None


class QuickLook(NamedTuple):
    """Tells of changes, quickly, that they are certain to be about none of some rows.

    is_free: whether that is so. False may also mean that it takes longer to find out.
    marks: of these byte strings at least one stands in the images of every change that is not free, so that where none
        is no change has to be looked at; `None` where there are no such strings.
    """

    is_free: Callable[[Change], bool]
    marks: frozenset[bytes] | None = None


NEVER_FREE: Final = QuickLook(lambda _change: False)
"""At tables whose changes have to be looked at one by one."""


class Ahead(NamedTuple):
    """Says of a target that is further than its position: all up to a transaction is applied.

    position: that transaction's; batch `seq` or an earlier one holds it.
    """

    position: SourcePosition
    seq: int


@runtime_checkable
class Adjustable(Protocol):
    """A sink of whose own options some may change while it runs: those that `cdc.reload` names."""

    def adjust(self, config: SinkConfig) -> None:
        """Go on with these. From any thread."""
        ...


@runtime_checkable
class Parking(Protocol):
    """What a sink offers besides, so that a change which its target refuses can be parked and tried again.

    all_or_nothing: whether what is refused leaves nothing behind. Else `Halted` tells how far it was applied, and what
        was done changes nothing when it is done again, in order; a change of tables as such then comes by itself.
    """

    all_or_nothing: bool

    def ahead(self) -> Ahead | None:
        """As `open` found it; `None` where the position says all."""
        ...

    def settled(self) -> Collection[tuple[SourcePosition, int]]:
        """What the last `apply_parked` applied, before `open`: each change's position and its ordinal there.

        Empty where a change that is applied once more changes nothing. Only positions that are numbers are told.
        """
        ...

    def subject_of(self, tables: Sequence[Table], change: Change) -> Subject:
        """What a change is about. tables: those of its batch."""
        ...

    def free_of(self, table: Table, keys: Set[bytes]) -> QuickLook:
        """What tells of changes of a table's rows that their `Subject.keys` are none of these.

        It is used for each change beside parked ones, as long as `keys` stay the same.
        """
        ...

    def apply_part(self, batches: Sequence[Batch], position: Position) -> Applied:
        """Apply a part of what `apply` could not, without moving the position: `apply` then gets it emptied of changes.

        Parts come in order. Only the last transaction of one may go on in the next, and is incomplete then; an empty
        complete one says that it does not. A change of tables as such (DDL) comes by itself, behind an empty
        transaction that tells the position before it; or with others of its transaction. After a `PermanentError`
        the sink stays open, and the same may be applied again in smaller parts.

        position: as `apply` would have got it.
        """
        ...

    def apply_parked(self, batches: Sequence[Batch]) -> Applied:
        """Apply parked changes, each in a batch of its own, which the position has passed, in order.

        They are visible at once and durable, and are not forgotten (see `settled`) before the next call: so a caller
        that died before it could forget them itself can tell. After a `PermanentError` the sink stays open, and the
        same may be applied again in smaller parts.
        """
        ...


@runtime_checkable
class Refreshing(Protocol):
    """What a mirror offers besides, whose tables can be read again while the stream goes on."""

    def refresh(self, position: SourcePosition) -> ResyncStatus | None:
        """Do a part of it, if there is one to be done; how far it is, or `None` where nothing is left to do.

        Called between two transactions, again and again; all up to `position` is applied. Raises `NeedsFilling` where
        a table can only be copied again.
        """
        ...


class StreamSink(Sink, Protocol):
    """A sink that is no mirror: nothing is copied into it, it begins with the stream."""

    def stored_position(self) -> Position | None:
        """The position stored in the target; `None` if it has not begun. Needs no `open`."""
        ...

    def begin(self, position: Position) -> None:
        """Store the position at which it begins. Durable. Needs no `open`."""
        ...

    def forget(self) -> None:
        """Remove its position from the target; what it has written stays. Needs no `open`."""
        ...

    def check(self) -> Iterator[Finding]:
        """Look for what would keep it from its work. Changes nothing."""
        ...


@runtime_checkable
class Pruning(Protocol):
    """What a sink offers besides that removes what is older than its readers need."""

    def prune(self, seconds_to_keep: float | None, entity_type: str | None) -> int:
        """Remove now, beside a running daemon or without one; returns how many changes. Needs no `open`.

        seconds_to_keep: whatever the sink's own retention says; `None` to do what that says. entity_type: of this type
        alone; only with seconds_to_keep.
        """
        ...


class Loader(Protocol):
    """One worker's connection for the initial copy."""

    def load(self, table: TableName, blocks: Iterable[bytes], *, binary: bool, whole: bool) -> int:
        """Write one chunk and return its number of rows. Where it fails, it may be written again.

        whole: it is all of what this run copies of the table.
        """
        ...

    def close(self) -> None:
        """Disconnect. Safe to call twice."""
        ...


class Resync(msgspec.Struct, frozen=True):
    """What a resync does. refreshed: read again beside the stream; copied_again: emptied, and copied before it."""

    refreshed: tuple[TableName, ...]
    copied_again: tuple[TableName, ...]


class Mirror(Sink, Protocol):
    """A sink that holds a copy of the source: it can be filled, and compared."""

    keeps_parts: bool
    """Whether a copy that was killed goes on with what is left of a table, rather than with the table anew."""

    def stored_position(self) -> Position | None:
        """The position stored in the target; `None` if it was never written to. Needs no `open`."""
        ...

    def mirror_only(self, tables: Collection[TableName]) -> None:
        """Mirror no other tables from now on. What is left out stays as it is, and is copied again if it comes back."""
        ...

    def copied(self) -> Mapping[TableName, SourcePosition]:
        """Tables whose copy is complete, and the position at which each is right (its snapshot's `end`)."""
        ...

    def prepare_copy(self, tables: Sequence[TableName], start: Position, schema: object) -> None:
        """Create what is missing, empty the tables that are not `copied`, store `start` where no position is.

        schema: what `Source.dump_schema` of the same kind of database returned.
        """
        ...

    def column_types(self, table: TableName) -> dict[str, str]:
        """Column name -> type name on the target, of the columns that the copy writes, in the order it writes them."""
        ...

    def pending(self, table: TableName, position: SourcePosition, chunks: Callable[[], Sequence[Chunk]]) -> list[Chunk]:
        """What is left to copy of a table that is not complete: all `chunks`, or what a killed run has not finished.

        position: that of the snapshot which `chunks` splits the table by.
        """
        ...

    def loader(self) -> Loader:
        """Open a connection for a copy worker."""
        ...

    def chunk_copied(self, chunk: Chunk, rows: int) -> None:
        """Record, where parts of tables can be kept, that `load` wrote one."""
        ...

    def table_copied(self, table: TableName, position: SourcePosition, rows: int) -> None:
        """Record durably that a table is complete; it is right when the mirror is at `position` (a snapshot's `end`).

        rows: written by this run.
        """
        ...

    def build_keys(self) -> None:
        """Build what the stream finds rows by (primary keys, identity indexes). Safe to call twice."""
        ...

    def set_sequences(self, sequences: object) -> None:
        """Set the mirror's sequences to what `Source.sequences` of the same kind of database returned."""
        ...

    def finish_copy(self, position: SourcePosition) -> bool:
        """Build what has waited for the mirror to be consistent: indexes, constraints, triggers.

        position: the mirror stands there. Returns False while a table's copy position is still ahead, or something
        waits for the stream: call again later.
        Killed in the middle, it goes on where it was.
        """
        ...

    def want_resync(self, tables: Collection[TableName] | None, end: Position, *, anew: bool = False) -> Resync:
        """Order that tables (`None`: all) become right again, whatever the mirror holds. Durable; needs no `open`.

        end: of what is captured. What the tables are read from holds all before it, so nothing of that which was parked
        is applied any more: there may be a gap behind it. anew: let the mirror stand there from now on, together with
        the order. Raises `UnknownTable`, and orders nothing, for tables that it does not mirror.
        """
        ...

    def rewind(self, position: Position) -> None:
        """Store an earlier position: what follows it is delivered once more. Durable; needs no `open`."""
        ...
