"""What all stores have in common: the names of their tables, their format, rows, and how far one scan looks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec

from cdc.errors import ConfigError, FatalError
from cdc.feed.record import ChangeType, Record
from cdc.feed.store import SCAN_ROWS, Scan, Wanted

FORMAT: Final = 1
"""Of all tables of a feed; stored in `<name>_state`. Any change to them needs a new one."""

LOCK_SECONDS: Final = 10
"""How long a writer waits for another one's transaction to end, before it says so by a `TransientError`."""

Convert = Callable[[Any], Any]

COLUMNS: Final = Record.__struct_fields__
"""The columns of the main table have the names of a record's fields."""

_CHANGE_TYPES: Final = {each.value: each for each in ChangeType}

_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,39}")
"""Short enough that PostgreSQL's 63 bytes hold it with what is put behind it."""


class Tables(msgspec.Struct, frozen=True):
    """The names of one feed's tables; plain identifiers all.

    schema: `None` for the store's default.
    entities: an `EntityState` for each entity of each source. positions: where each source stands.
    pruned: what retention has removed, by entity type and channel.
    state: one row: format, the last id, and when it was recorded.
    """

    schema: str | None
    main: str
    entities: str
    positions: str
    pruned: str
    state: str


def tables_of(name: str, *, schemas: bool = False) -> Tables:
    """The tables of a feed by its configured name. Raises `ConfigError` for one that is no plain identifier.

    schemas: whether `schema.table` is allowed.
    """
    schema, dot, main = name.rpartition(".")
    if not _NAME.fullmatch(main) or (dot and not (schemas and _NAME.fullmatch(schema))):
        what = "[schema.]table" if schemas else "a name"
        raise ConfigError(
            f"a feed's table cannot be called {name[:80]!r}",
            hint=f"use {what} of at most 40 letters, digits and underscores, a letter first",
        )
    names = (f"{main}_{what}" for what in ("entities", "positions", "pruned", "state"))
    return Tables(schema or None, main, *names)


def check_format(found: object, where: str) -> None:
    """Raise `FatalError` for tables that another version of cdc has made."""
    if found != FORMAT:
        raise FatalError(
            f"the tables of {where} have format {found}, this version of cdc knows format {FORMAT}",
            hint="run the version of cdc that made them, or name another table",
        )


def not_ours(where: str) -> FatalError:
    """For a table that is there, and that no feed has made."""
    return FatalError(
        f"{where} exists, and is not a feed of cdc", hint="rename it, or name another table: it is left as it is"
    )


class Codec:
    """Between records and rows, where a store keeps a column's values in another form. NULL is `None` everywhere."""

    def __init__(self, kept: Mapping[str, Convert], read: Mapping[str, Convert]) -> None:
        """kept, read: by column, to what the store keeps and back. Other columns are kept as they are."""
        self._kept = [(COLUMNS.index(name), convert) for name, convert in kept.items()]
        self._read = list(({"change_type": _CHANGE_TYPES.__getitem__} | dict(read)).items())

    def row(self, record: Record) -> list[Any]:
        """A record's values in the order of `COLUMNS`."""
        values = list(msgspec.structs.astuple(record))
        for index, convert in self._kept:
            if (value := values[index]) is not None:
                values[index] = convert(value)
        return values

    def columns(self, records: Sequence[Record]) -> dict[str, Sequence[Any]]:
        """The values of records by column, as far as there are some."""
        found: dict[str, Sequence[Any]] = {**given(COLUMNS, map(msgspec.structs.astuple, records))}
        for index, convert in self._kept:
            if (values := found.get(name := COLUMNS[index])) is not None:
                found[name] = [None if value is None else convert(value) for value in values]
        return found

    def record(self, row: Iterable[Any]) -> Record:
        """The record with these values, in the order of `COLUMNS`."""
        values = dict(zip(COLUMNS, row, strict=True))
        for name, convert in self._read:
            if (value := values[name]) is not None:
                values[name] = convert(value)
        return Record(**values)


def given(names: Sequence[str], rows: Iterable[Sequence[Any]]) -> dict[str, tuple[Any, ...]]:
    """The values of rows by column, without columns that are NULL in all: to name one costs as much as its values."""
    columns = dict(zip(names, zip(*rows, strict=True), strict=True))
    nulls = (None,) * len(columns[names[0]])
    return {name: values for name, values in columns.items() if values != nulls}


class Window(msgspec.Struct, frozen=True):
    """The rows that one scan looks at: those up to `end`. more: whether there are rows behind it."""

    end: int
    more: bool

    @classmethod
    def of(cls, after: int, last: int | None, *, more: bool) -> Window:
        """The window behind `after`. last: its last row, or if there are more, the first one behind it."""
        if last is None:
            return cls(after, more=False)
        return cls(last - 1 if more else last, more)

    def scan(self, found: Sequence[Record], limit: int) -> Scan:
        """What a scan answers that found these, the first of the window, one more than `limit` if there are so many."""
        if len(found) > limit:
            return Scan(found[:limit], found[limit - 1].id, more=True)
        return Scan(found, self.end, self.more)


def rows_to_look_at(wanted: Wanted, limit: int) -> int:
    """How many rows a window has: where all are wanted no more need be looked at than are answered."""
    return min(limit, SCAN_ROWS) if wanted == Wanted() else SCAN_ROWS
