"""What a traced process wrote to its files and sockets, and what of it would have survived a power cut."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

STRACE: Final = (
    *("strace", "-f", "-qq", "-y", "-xx", "-s", "70000", "--seccomp-bpf"),
    *("-e", "trace=pwrite64,ftruncate,fsync,fdatasync,sendto"),
)
"""Complete data, in hexadecimal. Add `-o FILE` and the command."""

_CALL: Final = re.compile(r"(\d+) +(\w+)\((.*)")
_RESUMED: Final = re.compile(r"(\d+) +<\.\.\. (\w+) resumed>")
_UNFINISHED: Final = " <unfinished ...>"
_RESULT: Final = re.compile(r"= (-?\d+)")
_FILE: Final = re.compile(r"\d+<([^>]*)>")


class Call(NamedTuple):
    """A system call that has ended. start, end: lines of the trace; calls of several threads overlap."""

    name: str
    arguments: str
    result: int
    start: int
    end: int

    @property
    def file(self) -> str:
        """Path of the file, or what strace calls the socket."""
        found = _FILE.match(self.arguments)
        assert found is not None, self.arguments[:100]
        return _unquoted(found[1]).decode()

    @property
    def data(self) -> bytes:
        """The bytes written or sent."""
        return _unquoted(self.arguments.split('"')[1])

    @property
    def last_argument(self) -> int:
        """An offset, or a length."""
        return int(self.arguments.rpartition(")")[0].rpartition(", ")[2])


def parse(lines: Iterable[str]) -> list[Call]:
    """All calls, in the order in which they ended; strace splits a call where threads interleave."""
    waiting: dict[tuple[str, str], tuple[str, int]] = {}
    calls = []
    for at, line in enumerate(lines):
        if (resumed := _RESUMED.match(line)) is not None:
            arguments, start = waiting.pop((resumed[1], resumed[2]))
            calls.append(_call(resumed[2], arguments + line[resumed.end() :], start, at))
        elif (call := _CALL.match(line)) is not None:
            thread, name, arguments = call.groups()
            if arguments.endswith(_UNFINISHED):
                waiting[thread, name] = arguments.removesuffix(_UNFINISHED), at
            else:
                calls.append(_call(name, arguments, at, at))
    return calls


def _call(name: str, arguments: str, start: int, end: int) -> Call:
    before, _, result = arguments.rpartition(") ")
    found = _RESULT.search(result)
    assert found is not None, arguments[-100:]
    return Call(name, f"{before})", int(found[1]), start, end)


class Disk:
    """The files in a folder as they would be after a power cut: only what was synced is there.

    The worst that a disk may do within its promises: nothing that was not synced has reached it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder)
        self._durable: dict[str, bytearray] = defaultdict(bytearray)
        self._pending: dict[str, list[Call]] = defaultdict(list)

    def note(self, call: Call) -> None:
        """Take the next call, in the order of their ends."""
        if call.name == "sendto" or not call.file.startswith(self._folder):
            return
        if not call.name.endswith("sync"):
            self._pending[call.file].append(call)
        elif call.result == 0:
            self._sync(call)

    def write_to(self, folder: Path) -> None:
        """Write the files as they would be found; those that were never synced have none of their bytes."""
        for name, content in self._durable.items():
            (folder / Path(name).name).write_bytes(content)

    def _sync(self, sync: Call) -> None:
        """What was written before the sync began is durable now."""
        pending = self._pending.pop(sync.file, [])
        for call in pending:
            if call.end < sync.start:
                _apply(call, self._durable[sync.file])
            else:
                self._pending[sync.file].append(call)


def _apply(call: Call, content: bytearray) -> None:
    if call.name == "ftruncate":
        del content[call.last_argument :]
        return
    data, offset = call.data, call.last_argument
    assert call.result == len(data), "strace must not shorten what was written"
    content.extend(bytes(max(offset - len(content), 0)))
    content[offset : offset + len(data)] = data


def _unquoted(text: str) -> bytes:
    """strace -xx writes each byte as \\xNN, in some versions also those of a path."""
    if not text.startswith("\\x"):
        return text.encode()
    return bytes.fromhex(text.replace("\\x", ""))


def calls_of(file: Path) -> Iterator[Call]:
    """All calls of a trace file."""
    with file.open(errors="replace") as lines:
        yield from parse(line.rstrip("\n") for line in lines)
