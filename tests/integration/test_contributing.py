"""CONTRIBUTING.md tells how to add a sink in one file: that is done here, word for word."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.command import CHECKOUT, Cdc, assert_complaint
from tests.documents import code_block, example_sink
from tests.processes import kill_tree, wait_until
from tests.servers import Database
from tests.unit.test_layout import violations

PAGE = CHECKOUT / "CONTRIBUTING.md"


@pytest.fixture
def cdc(tmp_path: Path) -> Cdc:
    """The command line of a checkout to which the file was added."""
    checkout = tmp_path / "checkout"
    shutil.copytree(CHECKOUT / "sinks", checkout / "sinks")
    shutil.copy(CHECKOUT / "cli.py", checkout)
    (checkout / "cdc").symlink_to(CHECKOUT / "cdc")
    example_sink(checkout / "sinks")
    return Cdc(tmp_path, checkout)


def configure(cdc: Cdc, source_url: str, path: Path) -> None:
    section = code_block(PAGE, "toml").replace("/var/lib/cdc/shop.jsonl", str(path))
    cdc.configure(source_url)
    text, _, _ = cdc.file.read_text().partition("[sinks.mirror]")
    cdc.file.write_text(text + section)


def told(path: Path) -> list[dict[str, Any]]:
    """Changes that a reader may see: what a position stands behind."""
    lines = path.read_text().splitlines() if path.exists() else []
    while lines and '{"position":' not in lines[-1][:12]:
        lines.pop()
    return [line for line in map(json.loads, lines) if "operation" in line]


def test_example_keeps_the_rules_of_the_house(tmp_path: Path) -> None:
    path = example_sink(tmp_path)
    assert violations("sinks.jsonl", path.read_text()) == []
    for check in (["check", "--ignore", "ARG002"], ["format", "--check"]):  # a protocol's arguments may be unused
        command = [sys.executable, "-m", "ruff", *check, "--config", str(CHECKOUT / "pyproject.toml"), str(path)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr


def test_example_is_a_sink_like_any_other(cdc: Cdc, source_db: Database) -> None:
    source_db.execute("CREATE TABLE items (id int PRIMARY KEY, name text)")
    path = cdc.folder / "items.jsonl"
    configure(cdc, source_db.url, path)
    result = cdc("check")
    assert result.returncode == 0, result.stdout + result.stderr
    with cdc.running() as daemon:
        wait_until(lambda: cdc.status()["sinks"]["lines"]["state"] == "running", what=lambda: cdc.log)
        source_db.execute("INSERT INTO items SELECT n, 'before' FROM generate_series(1, 3) n")
        wait_until(lambda: len(told(path)) == 3, what=lambda: cdc.log)
        kill_tree(daemon.pid)
    (cdc.data_dir / "http").unlink()
    with path.open("a") as file:
        file.write('{"table":"public.items","operation":"insert","key":{"id"')  # as a kill might leave it
    source_db.execute("UPDATE items SET name = 'after'")
    source_db.execute("DELETE FROM items WHERE id = 2")
    with cdc.running():
        wait_until(lambda: len(told(path)) >= 7, what=lambda: cdc.log)
    seen = told(path)
    assert [(each["operation"], each["key"]["id"]) for each in seen] == [
        *(("insert", key) for key in "123"),
        *(("update", key) for key in "123"),
        ("delete", "2"),
    ]
    assert seen[3]["change"]["after"] == {"id": "1", "name": "after"}
    assert cdc("drop", "lines", "--yes").returncode == 0
    assert told(path) == seen, "what was written stays"
    assert_complaint(cdc("prune"), 1, "no feed to prune", "data_changes")


def test_missing_option_of_the_example_is_named(cdc: Cdc, source_db: Database) -> None:
    configure(cdc, source_db.url, Path("x"))
    cdc.file.write_text(cdc.file.read_text().replace('path = "x"', ""))
    assert_complaint(cdc("check"), 2, "sinks.lines.*path", "example")
