"""A disk that fills up or fails, and a clock that jumps, for one process and without any privileges."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Final

AVAILABLE: Final = shutil.which("cc") is not None
"""There is no compiler, and so none of this, on every machine."""

_SOURCE: Final = Path(__file__).with_suffix(".c")
_CONTROLS: Final = struct.Struct("=qqqq")


class Interposer:
    """Start the process with `environment`; what is set here holds from then on at once.

    clock_offset_seconds: added to the time of the day. disk_full: writes to files in `disk` fail. fsync_fails: so does
    that. no_room: the system says that the disk has no free block.
    """

    def __init__(self, folder: Path, disk: Path) -> None:
        self.clock_offset_seconds = 0
        self.disk_full = self.fsync_fails = self.no_room = False
        self._file = folder / "controls"
        self._library = folder / "interposer.so"
        self._disk = disk.resolve()
        command = ["cc", "-shared", "-fPIC", "-O1", "-o", str(self._library), str(_SOURCE), "-ldl"]
        subprocess.run(command, check=True, capture_output=True)
        self.apply()

    @property
    def environment(self) -> dict[str, str]:
        """Of the process."""
        return {
            "LD_PRELOAD": str(self._library),
            "CDC_TEST_CONTROLS": str(self._file),
            "CDC_TEST_DISK": f"{self._disk}{os.sep}",
        }

    def apply(self) -> None:
        """Let what was set hold."""
        values = (self.clock_offset_seconds, self.disk_full, self.fsync_fails, self.no_room)
        descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.pwrite(descriptor, _CONTROLS.pack(*values), 0)  # in place: the process has the file mapped
        finally:
            os.close(descriptor)

    def heal(self) -> None:
        """Make everything as it should be."""
        self.clock_offset_seconds = 0
        self.disk_full = self.fsync_fails = self.no_room = False
        self.apply()
