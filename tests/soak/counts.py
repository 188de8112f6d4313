"""What a daemon holds at one moment, counted from outside, and whether any of it grows."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Final

Counts = Mapping[str, int]
"""By what is counted."""

FEWEST_HIGHS: Final = 3
"""In a life of few rounds."""

GROWTH: Final = 1.15
"""What the median size of the last third of a life may be, times that of the second: bytes do scatter."""

FEWEST_SIZES: Final = 9
"""Rounds of a life, below which sizes say nothing."""


def leaks(rounds: Sequence[Counts]) -> list[str]:
    """Of the counts at the same quiet point of each round of one process: those that grow, and how.

    A count is a leak if it was beyond all before it in half of the rounds, and has not come down again: what is lost
    with an event of each round rises with each. A pool that finds its bound rises a few times, and then no more; what
    was about to end is not counted at all, for whoever counts waits for it.
    """
    enough = max(FEWEST_HIGHS, len(rounds) // 2)
    return [
        f"{name} grows: {', '.join(map(str, values))}"
        for name, values in series(rounds).items()
        if new_highs(values) >= enough and values[-1] > values[0]
    ]


def growth(rounds: Sequence[Counts]) -> list[str]:
    """The same of sizes, in bytes. The first third of a life is left out: memory is allocated as it is needed."""
    if len(rounds) < FEWEST_SIZES:
        return []
    third = len(rounds) // 3
    found = []
    for name, values in series(rounds).items():
        before, after = median(values[third : 2 * third]), median(values[-third:])
        if after > GROWTH * before:
            found.append(f"{name} grows: from {before:,.0f} to {after:,.0f} bytes")
    return found


def series(rounds: Sequence[Counts]) -> dict[str, list[int]]:
    """By name, round after round; what was not there counts as none."""
    names = sorted({name for each in rounds for name in each})
    return {name: [each.get(name, 0) for each in rounds] for name in names}


def new_highs(values: Sequence[int]) -> int:
    """How often a value is beyond all before it."""
    return sum(value > max(values[:at]) for at, value in enumerate(values) if at)


def process_counts(pid: int) -> Counter[str]:
    """Open descriptors by what they are, threads by the name that the kernel knows, and children (Linux)."""
    process = Path(f"/proc/{pid}")
    found = Counter(_descriptors(process / "fd"))
    found["children"] = 0
    for task in (process / "task").iterdir():
        with suppress(OSError):  # it has just ended
            found[f"threads {(task / 'comm').read_text().strip()}"] += 1
            found["children"] += len((task / "children").read_text().split())
    return found


def _descriptors(folder: Path) -> Iterator[str]:
    for link in folder.iterdir():
        try:
            target, mode = os.readlink(link), link.stat().st_mode  # noqa: PTH115 - it is no path that could be opened
        except OSError:  # it was just closed
            continue
        if target.endswith(" (deleted)"):
            yield "descriptors of deleted files"
        elif stat.S_ISSOCK(mode):
            yield "descriptors of sockets"
        elif stat.S_ISFIFO(mode):
            yield "descriptors of pipes"
        elif stat.S_ISREG(mode):
            yield "descriptors of files"
        else:
            yield "descriptors of others"


def files(folder: Path) -> list[Path]:
    """All below a folder."""
    return sorted(path for path in folder.rglob("*") if not path.is_dir())


def sizes_of(paths: Iterable[Path]) -> int:
    """In bytes, of those that are still there."""
    total = 0
    for path in paths:
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def resident_bytes(pid: int) -> int:
    """Physical memory (Linux)."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
