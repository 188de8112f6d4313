"""The page for operators knows all that they can meet."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from cdc.reload import CHANGEABLE
from cdc.stats import State

PAGE: Final = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()


def first_cells(heading: str) -> set[str]:
    """What stands in code in the first column of a section's table."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return {
        name for row in re.findall(r"^\| (`[^|]*) \|", section, re.MULTILINE) for name in re.findall("`([^`]*)`", row)
    }


def test_every_state_is_explained() -> None:
    assert first_cells("States") == set(State)


def test_f110_every_option_that_a_reload_changes_is_named() -> None:
    assert first_cells("Changing the configuration") == set(CHANGEABLE)
