"""Tells the kernel the names of threads, as Python does by itself from version 3.14 on."""

from __future__ import annotations

import ctypes
import threading
from typing import Any

_PR_SET_NAME = 15
_Thread: Any = threading.Thread
_bootstrap = _Thread._bootstrap_inner


def _bootstrap_by_name(thread: threading.Thread) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_NAME, thread.name.encode(), 0, 0, 0)
    _bootstrap(thread)


_Thread._bootstrap_inner = _bootstrap_by_name
