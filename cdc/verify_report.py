"""What a comparison of a source with its mirror found out, and how it is shown: the same for all databases."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import msgspec
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

_SHOWN_TABLES: Final = 60
_SHOWN_KEY_CHARACTERS: Final = 160


class Keys(msgspec.Struct, frozen=True):
    """Rows that differ in one way: how many, and the keys of the first of them."""

    count: int = 0
    keys: tuple[str, ...] = ()


class TableReport(msgspec.Struct, frozen=True):
    """What was found out about a table.

    missing: rows that only the source has; extra: only the mirror; different: both, with other values.
    changing: rows that were written each time they were compared, so that nothing is known about them.
    counted: False where there are more of them than the counts say.
    problem: why it could not be compared; empty otherwise.
    definition: how the mirror's table is made in another way, a line each (where that is compared).
    """

    table: str
    source_rows: int
    target_rows: int
    equal: bool
    ranges: int
    differing_ranges: int
    missing: Keys
    extra: Keys
    different: Keys
    counted: bool
    seconds: float
    problem: str = ""
    changing: Keys = Keys()
    definition: tuple[str, ...] = ()


class VerifyReport(msgspec.Struct, frozen=True):
    """What was found out about all tables.

    exact: both sides were seen at the same `position`, so a difference is one; or, without a position, what differed
    was read again when the mirror had passed what the source showed. Otherwise a difference may be a change that is
    not applied yet; the mirror was then `lag_bytes` behind, where that is known.
    parked: changes that the sink has parked: their rows on the mirror are older than at the source.
    """

    equal: bool
    exact: bool
    tables: tuple[TableReport, ...]
    seconds: float
    position: str | None = None
    lag_bytes: int | None = None
    parked: int = 0


def render(report: VerifyReport) -> RenderableType:
    """A table for a terminal: what differs first, bounded in lines and width."""
    shown = sorted(report.tables, key=lambda table: (table.equal, table.table))
    grid = Table(box=None, pad_edge=False, header_style="bold")
    grid.add_column("table", overflow="fold")
    grid.add_column("source rows", justify="right")
    grid.add_column("mirror rows", justify="right")
    grid.add_column("result")
    for table in shown[:_SHOWN_TABLES]:
        rows = ("", "") if table.problem else (f"{table.source_rows:,}", f"{table.target_rows:,}")
        grid.add_row(Text(table.table), *rows, _result(table))
    if len(shown) > _SHOWN_TABLES:
        hidden = shown[_SHOWN_TABLES:]
        equal = sum(table.equal for table in hidden)
        grid.add_row(f"and {len(hidden)} more", "", "", f"{equal} equal, {len(hidden) - equal} different")
    keys = [line for table in shown[:_SHOWN_TABLES] if not table.equal for line in _key_lines(table)]
    return Group(grid, *keys, _summary(report), *_parked(report))


def _parked(report: VerifyReport) -> Iterator[Text]:
    if report.parked:
        count = "1 change is" if report.parked == 1 else f"{report.parked:,} changes are"
        note = "" if report.equal else ": rows that differ may be theirs"
        yield Text(f"{count} parked{note}", style="yellow")


def _result(table: TableReport) -> Text:
    if table.equal:
        return Text("equal", style="green")
    if table.problem:
        return Text(table.problem, style="red")
    found = [f"{kind.count:,} {name}" for name, kind in _kinds(table) if kind.count]
    found += ["made in another way"] if table.definition else []
    return Text(("" if table.counted else "at least ") + (", ".join(found) or "some rows differ"), style="red")


def _kinds(table: TableReport) -> list[tuple[str, Keys]]:
    return [
        ("missing", table.missing),
        ("extra", table.extra),
        ("different", table.different),
        ("still changing", table.changing),
    ]


def _key_lines(table: TableReport) -> Iterator[Text]:
    for line in table.definition:
        yield Text(f"  {table.table}: {_printable(line)}")
    for name, kind in _kinds(table):
        for key in kind.keys:
            cut = key if len(key) <= _SHOWN_KEY_CHARACTERS else f"{key[:_SHOWN_KEY_CHARACTERS]}..."
            yield Text(f"  {table.table} {name}: {_printable(cut)}")
        if kind.count > len(kind.keys):
            yield Text(f"  {table.table} {name}: and {kind.count - len(kind.keys):,} more")


def _printable(key: str) -> str:
    """A key is data: escape what could move a terminal's cursor."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in key)


def _summary(report: VerifyReport) -> Text:
    text = "all tables are equal" if report.equal else "the mirror differs"
    if report.exact and report.position is None:
        return Text(f"{text}; what differed at first was compared again beyond the lag")
    if report.exact:
        return Text(f"{text} at {report.position}")
    lag = "" if report.lag_bytes is None else f", which is {report.lag_bytes:,} bytes behind the source"
    note = "" if report.equal else "; differences may be changes that are not applied yet"
    return Text(f"{text}; not exact: compared with the mirror as it stands{lag}{note}")
