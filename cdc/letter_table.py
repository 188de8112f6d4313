"""Parked changes for a terminal."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, Final

import msgspec
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from cdc.letter import Letter
from cdc.status_table import duration

_COLORS: Final = {"dead": "red", "retrying": "yellow", "waiting": "cyan"}


def render(letters: Sequence[Letter]) -> RenderableType:
    """A line for each, in the order of the source."""
    if not letters:
        return Text("nothing is parked", style="green")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("id", "state", "table", "change", "key", "tries", "next", "age"):
        table.add_column(column, no_wrap=column == "id", justify="right" if column in {"tries", "age"} else "left")
    table.add_column("error", overflow="fold")
    now = datetime.now(UTC)
    for each in letters:
        table.add_row(
            Text(each.id),
            Text(each.state, style=_COLORS[each.state]),
            Text(", ".join(each.tables)),
            Text(each.operation),
            Text(_text(each.key)),
            str(each.attempts or ""),
            Text(_next(each, now)),
            duration((now - each.parked_at).total_seconds()),
            Text(each.error),
        )
    return table


def lines(letter: Letter) -> Iterator[str]:
    """One, with its contents."""
    now = datetime.now(UTC)
    yield f"id:        {letter.id}"
    yield f"state:     {letter.state}, {_next(letter, now)}" if letter.state != "dead" else "state:     dead"
    yield f"change:    {letter.operation} of {', '.join(letter.tables)}"
    yield f"key:       {_text(letter.key)}"
    yield f"error:     {letter.error or 'never tried'}"
    yield f"attempts:  {letter.attempts}"
    yield f"parked at: {letter.parked_at:%Y-%m-%d %H:%M:%S} UTC"
    if letter.contents is not msgspec.UNSET:
        yield f"committed: {letter.contents.committed_at:%Y-%m-%d %H:%M:%S.%f} UTC, at {letter.contents.position}"
        yield msgspec.json.format(bytes(letter.contents.change), indent=2).decode()


def _next(letter: Letter, now: datetime) -> str:
    if letter.behind is not None:
        return f"behind {letter.behind}"
    if letter.next_attempt_at is None:
        return ""
    seconds = (letter.next_attempt_at - now).total_seconds()
    return f"in {duration(seconds)}" if seconds >= 1 else "now"


def _text(key: dict[str, Any] | None) -> str:
    return "" if key is None else json.dumps(key, ensure_ascii=False)
