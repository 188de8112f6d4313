"""The unit file for systemd: it is understood, it is tight, and it fits the daemon."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from cdc.config import Daemon
from cdc.errors import ConfigError

UNIT: Final = Path(__file__).parents[2] / "deploy" / "cdc.service"

MAX_EXPOSURE: Final = 2.5

ANALYZE: Final = shutil.which("systemd-analyze")

needs_systemd = pytest.mark.skipif(ANALYZE is None, reason="systemd-analyze is not installed")


@pytest.fixture(scope="module")
def service() -> configparser.SectionProxy:
    unit = configparser.ConfigParser(interpolation=None, strict=False, delimiters="=")
    unit.optionxform = str  # type: ignore[assignment, method-assign]  # as the manual has it
    unit.read(UNIT)
    return unit["Service"]


def analyze(*arguments: str) -> str:
    assert ANALYZE is not None
    done = subprocess.run([ANALYZE, *arguments], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@needs_systemd
def test_systemd_understands_every_line(tmp_path: Path) -> None:
    installed = tmp_path / UNIT.name
    installed.write_text(UNIT.read_text().replace("/opt/cdc/bin/cdc", sys.executable))  # which is to be there
    assert analyze("verify", "--man=no", str(installed)) == ""


@needs_systemd
def test_it_is_exposed_to_little() -> None:
    answer = analyze("security", "--offline=true", "--no-pager", str(UNIT))
    found = re.search(r"Overall exposure level for cdc\.service: ([0-9.]+)", answer)
    assert found, answer
    assert float(found[1]) <= MAX_EXPOSURE


def test_it_fits_the_daemon(service: configparser.SectionProxy) -> None:
    assert service["Type"] == "notify"
    assert Path("/var/lib", service["StateDirectory"]) == Path(Daemon().data_dir)
    assert int(service["TimeoutStopSec"]) > Daemon().drain_seconds + 10  # queues are closed after it has drained
    assert int(service["RestartPreventExitStatus"]) == ConfigError.exit_code
