"""Tells the kernel the names of threads, without their numbers: it keeps 15 characters."""

from __future__ import annotations

import ctypes
import re
import threading
from typing import Any

_PR_SET_NAME = 15
_NUMBER = re.compile(r"[-_]?\d+")
_Thread: Any = threading.Thread
_bootstrap = _Thread._bootstrap_inner


def _bootstrap_by_name(thread: threading.Thread) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_NAME, _NUMBER.sub("", thread.name).encode(), 0, 0, 0)
    _bootstrap(thread)


_Thread._bootstrap_inner = _bootstrap_by_name
