"""The table of contents of a pg_dump archive: entries, what they depend on, and the SQL of each. Pure."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

_NEVER: Final = frozenset({1262, 1417, 1418, 2328, 3466, 6100, 6104, 6106, 6237})
"""Catalogs whose objects no mirror takes: databases, foreign servers, user mappings (they hold passwords), foreign data
wrappers, event triggers, subscriptions, publications and their members."""


class TocEntry(NamedTuple):
    """A line of an archive's table of contents. `catalog` and `oid` are 0 where it stands for no object."""

    dump_id: int
    catalog: int
    oid: int
    label: str
    depends_on: tuple[int, ...]


def parse_toc(listing: str) -> list[TocEntry]:
    """Parse what `pg_restore --list --verbose` prints."""
    entries: list[TocEntry] = []
    for line in listing.splitlines():
        if (found := re.match(r"(\d+); (\d+) (\d+) (.*)", line)) is not None:
            dump_id, catalog, oid = int(found[1]), int(found[2]), int(found[3])
            entries.append(TocEntry(dump_id, catalog, oid, found[4], ()))
        elif line.startswith(";\tdepends on:"):
            depends_on = tuple(int(number) for number in line.partition(":")[2].split())
            entries[-1] = entries[-1]._replace(depends_on=depends_on)
    return entries


def select_entries(toc: Sequence[TocEntry], unwanted: Collection[tuple[int, int]]) -> list[TocEntry]:
    """Leave out the unwanted objects, (catalog, OID), and transitively all that depends on one of them."""
    excluded = {e.dump_id for e in toc if e.catalog in _NEVER or (e.catalog, e.oid) in unwanted}
    excluded = reach(excluded, reverse({entry.dump_id: entry.depends_on for entry in toc}))
    return [entry for entry in toc if entry.dump_id not in excluded]


def reach(start: Iterable[int], edges: Mapping[int, Iterable[int]]) -> set[int]:
    """All that can be reached from `start`, itself included."""
    reached = set(start)
    left = list(reached)
    while left:
        new = set(edges.get(left.pop(), ())) - reached
        reached |= new
        left += new
    return reached


def reverse(edges: Mapping[int, Iterable[int]]) -> dict[int, list[int]]:
    """The same edges, walked the other way."""
    reversed_edges: dict[int, list[int]] = {}
    for number, others in edges.items():
        for other in others:
            reversed_edges.setdefault(other, []).append(number)
    return reversed_edges


def split_script(script: str, entries: Iterable[TocEntry]) -> Iterator[tuple[TocEntry, str]]:
    """Cut a verbose script of these entries, in this order, into the SQL of each that has any.

    What stands before the first is dropped: session settings, among them some that an older server does not know.
    """
    starts: list[tuple[TocEntry, int]] = []
    at = 0
    for entry in entries:
        start = script.find(f"--\n-- TOC entry {entry.dump_id} (class {entry.catalog} OID {entry.oid})\n", at)
        if start >= 0:  # encoding and properties of the database are listed, and not printed
            starts.append((entry, start))
            at = start
    ends = [start for _, start in starts[1:]] + [len(script)]
    for (entry, start), end in zip(starts, ends, strict=True) if starts else ():
        yield entry, script[start:end].strip()
