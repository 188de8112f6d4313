"""Parked changes on a terminal."""

from __future__ import annotations

import io
from datetime import UTC, datetime, timedelta

from rich.console import Console

from cdc.letter import Letter
from cdc.letter_table import render

ERROR = 'UPDATE of public.customers is refused by the mirror: violates check constraint "short" (23514)'


def letter(number: int, **others: object) -> Letter:
    facts: dict[str, object] = {
        "id": f"mirror:{number}.0",
        "sink": "mirror",
        "state": "waiting",
        "behind": None,
        "tables": ("public.customers",),
        "operation": "update",
        "key": {"id": "7"},
        "error": "",
        "attempts": 0,
        "next_attempt_at": None,
        "parked_at": datetime.now(UTC) - timedelta(minutes=3),
        "size": 142,
    }
    return Letter(**(facts | others))  # type: ignore[arg-type]


def test_rows_stay_whole_and_errors_stand_below_however_narrow_the_terminal_is() -> None:
    letters = [
        letter(32777304, state="dead", error=ERROR, attempts=20),
        letter(32777520, behind="mirror:32777304.0", key={"id": "x" * 500}),
    ]
    out = io.StringIO()
    Console(file=out, width=40).print(render(letters), soft_wrap=True)
    head, dead, error, waiting = out.getvalue().splitlines()
    assert head.split() == ["id", "state", "table", "change", "key", "tries", "age", "next"]
    assert dead.startswith('mirror:32777304.0  dead     public.customers  update  {"id": "7"} ')
    assert error.strip() == ERROR
    assert waiting.endswith("behind mirror:32777304.0")
    assert len(waiting) < 200
    assert waiting.index("behind") == head.index("next")
