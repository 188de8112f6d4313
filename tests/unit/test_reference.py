"""What is told about options and metrics is made of their definitions, and up to date."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]


def test_references_are_what_the_definitions_say() -> None:
    """docs/configuration.md, docs/metrics.md and the comments of config.example.toml."""
    command = [sys.executable, "scripts/reference.py", "--check"]
    result = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
