"""Parked changes for a terminal."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, Final

import msgspec
from rich.console import Group, RenderableType
from rich.text import Text

from cdc.letter import Letter
from cdc.status_table import duration

_HEADINGS: Final = ("id", "state", "table", "change", "key", "tries", "age", "next")
_KEY_CHARACTERS: Final = 60
_COLORS: Final = {"dead": "red", "retrying": "yellow", "waiting": "cyan"}


def render(letters: Sequence[Letter]) -> RenderableType:
    """A line for each, in the order of the source, and its error below. Not to be wrapped: see `soft_wrap`."""
    if not letters:
        return Text("nothing is parked", style="green")
    now = datetime.now(UTC)
    rows = [_HEADINGS, *(_cells(each, now) for each in letters)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    head, *rest = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    lines = [Text(head, style="bold")]
    for each, line in zip(letters, rest, strict=True):
        lines.append(Text(line, style=_COLORS[each.state]))
        if each.error:
            lines.append(Text(f"    {each.error}"))
    return Group(*lines)


def _cells(letter: Letter, now: datetime) -> Sequence[str]:
    key = _text(letter.key)
    return (
        letter.id,
        letter.state,
        ", ".join(letter.tables),
        letter.operation,
        key if len(key) <= _KEY_CHARACTERS else f"{key[: _KEY_CHARACTERS - 1]}…",
        str(letter.attempts or ""),
        duration((now - letter.parked_at).total_seconds()),
        _next(letter, now),
    )


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
