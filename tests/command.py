"""`cdc` as its users run it: a process with a configuration file."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from cdc.directory import Address, read_address
from tests.processes import kill_tree, wait_until

CHECKOUT = Path(__file__).parents[1]
NOWHERE = "postgresql://me:geheim@127.0.0.1:1/shop"


def status_of_running(data_dir: Path) -> dict[str, Any] | None:
    """What a daemon says itself, if one does: to start a command for each look takes far longer."""
    try:
        with urlopen(f"{(data_dir / 'http').read_text()}/status", timeout=60) as answer:
            return read_status(answer.read())
    except (OSError, HTTPException):  # no daemon, or none that tells everybody
        return None


def read_status(text: str | bytes) -> dict[str, Any]:
    status = json.loads(text)
    assert isinstance(status, dict)
    return status


class Cdc:
    """Runs `cdc` with one configuration file, from this checkout or another."""

    def __init__(self, folder: Path, checkout: Path = CHECKOUT) -> None:
        self.folder = folder
        self.checkout = checkout
        self.file = folder / "cdc.toml"
        self.data_dir = folder / "data"

    def configure(self, source_url: str, target_url: str = "", **options: str) -> None:
        """A source `shop` and a sink `mirror`; `options` are raw TOML, by section."""
        url = f'url = "{target_url}"' if target_url else ""
        self.file.write_text(
            f"""
            [daemon]
            data_dir = "{self.data_dir}"
            {options.get("daemon", "")}
            [http]
            address = "127.0.0.1:0"
            {options.get("http", "")}
            [queue]
            min_free_bytes = 0
            {options.get("queue", "")}
            [sources.shop]
            url = "{source_url}"
            {options.get("source", "")}
            [sinks.mirror]
            from = "shop"
            {url}
            {options.get("sink", "")}
            """
        )

    @property
    def surrounded(self) -> str:
        """What a configuration says of its surroundings: a data directory, any free port, a disk however full."""
        return f"""
            [daemon]
            data_dir = "{self.data_dir}"
            [http]
            address = "127.0.0.1:0"
            [queue]
            min_free_bytes = 0
            """

    def configure_sources(self, urls: Mapping[str, str]) -> None:
        """Sources alone, by their names."""
        sources = "".join(f'[sources.{name}]\nurl = "{url}"\n' for name, url in urls.items())
        self.file.write_text(
            f"""
            {self.surrounded}
            {sources}
            """
        )

    def __call__(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.command(*arguments), check=False, timeout=60, **self.surroundings(environment))

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, str(self.checkout / "cli.py"), "--config", str(self.file), *arguments]

    def surroundings(self, environment: dict[str, str] | None = None) -> dict[str, Any]:
        return {
            "cwd": self.folder,
            "env": {**os.environ, "PYTHONPATH": str(self.checkout), "COLUMNS": "200", **(environment or {})},
            "text": True,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
        }

    @contextmanager
    def running(self, **environment: str) -> Iterator[subprocess.Popen[str]]:
        """`cdc run`, ended by SIGTERM; its log is in the file `log`."""
        surroundings = self.surroundings(environment)
        with (self.folder / "log").open("a") as log:
            surroundings["stderr"] = log
            process = subprocess.Popen(self.command("run"), **surroundings)
        try:
            wait_until(
                lambda: (self.data_dir / "http").exists() or process.poll() is not None,
                what=lambda: f"the daemon to start: {self.log}",
            )
            yield process
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=30)
        finally:
            kill_tree(process.pid)
            process.wait()
            if process.stdout:
                process.stdout.close()

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    @property
    def address(self) -> Address:
        """Where the running daemon answers."""
        return read_address(self.data_dir)

    def status(self) -> dict[str, Any]:
        """What `cdc status --json` prints."""
        return status_of_running(self.data_dir) or read_status(self("status", "--json").stdout)

    def wait_for_sink(self, state: str) -> None:
        wait_until(
            lambda: self.status()["sinks"]["mirror"]["state"] == state,
            timeout_seconds=60,
            what=lambda: f"sink to be {state}: {self.status()}\n{self.log}",
        )


def assert_complaint(result: subprocess.CompletedProcess[str], code: int, error: str, hint: str = "") -> None:
    """One line for the error, one for the hint, nothing else: no traceback, nothing on standard output."""
    assert result.returncode == code, result.stderr
    lines = result.stderr.splitlines()
    assert re.match(f"error: .*{error}", lines[0]), result.stderr
    assert lines[1:] == [] or re.match(f"hint: .*{hint}", lines[1]), result.stderr
    assert len(lines) == (2 if hint else len(lines)) <= 2, result.stderr
    assert result.stdout == ""
