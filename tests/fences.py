"""What containers and service managers put around a command: where it cannot write, and who it is."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tests.processes import UNPRIVILEGED_USER

_FENCED: Final = """
while [ "$1" != -- ]; do mount --bind "$1" "$1"; shift; done; shift
mount -o remount,bind,ro /
exec "$@"
"""


def read_only_but(folder: Path, *writable: Path, mapping: Sequence[str] = ("--map-root-user",)) -> list[str]:
    """What is put before a command so that it can write nowhere else; nothing where the system does not allow that.

    folder: of the test, which then cannot be written. mapping: of users, as unshare(1) has it; without any it takes
    root, and other users can be had inside.
    """
    command = ["unshare", "--mount", *mapping, "sh", "-ec", _FENCED, "sh", *map(str, writable), "--"]
    touched = subprocess.run([*command, "touch", str(folder / "probe")], capture_output=True, text=True, check=False)
    return command if "Read-only file system" in touched.stderr else []


def unprivileged() -> list[str]:
    """What is put before a command so that another user runs it, without any capability; nothing but for root."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        return []
    user = pwd.getpwnam(UNPRIVILEGED_USER)
    return ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups",
            "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all"]  # fmt: skip
