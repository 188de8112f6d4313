"""What an update changed: differences between two documents, and the `updateDescription` made of them.

As servers from 5.0 write them: an operator update tells the paths it modified (an array is given whole, unless elements
were appended or set by index); a pipeline update is compared structurally, which is where `truncatedArrays` comes from.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from . import raw
from .raw import ARRAY, OBJECT, Value

Path = tuple[bytes, ...]


@dataclass(slots=True)
class Difference:
    """What changed in one object or array, in the sections of an oplog entry: deletes, updates, inserts, inner ones."""

    is_array: bool = False
    new_size: int | None = None
    deletes: list[bytes] = field(default_factory=list)
    updates: list[tuple[bytes, Value]] = field(default_factory=list)
    inserts: list[tuple[bytes, Value]] = field(default_factory=list)
    inner: list[tuple[bytes, Difference]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.deletes or self.updates or self.inserts or self.inner or self.new_size is not None)

    def size(self) -> int:
        """About how many bytes an oplog entry would need for it."""
        own = sum(len(name) + len(value[1]) + 2 for name, value in self.updates + self.inserts)
        own += sum(len(name) + 3 for name in self.deletes) + (8 if self.new_size is not None else 0)
        return own + sum(len(name) + 8 + inner.size() for name, inner in self.inner)


@dataclass(slots=True, frozen=True)
class Description:
    """The `updateDescription` of an event, as elements."""

    updated: bytes
    removed: bytes
    truncated: bytes
    ambiguous: bytes


def compare(before: bytes, after: bytes) -> Difference:
    """All that differs between two documents. Fields that moved are deleted and inserted at the end."""
    result = Difference()
    old = list(raw.elements(before))
    new = list(raw.elements(after))
    at_old = at_new = 0
    while at_old < len(old) and at_new < len(new):
        if old[at_old][0] != new[at_new][0]:
            result.deletes.append(old[at_old][0])
            at_old += 1
            continue
        _compare_values(result, old[at_old], new[at_new])
        at_old += 1
        at_new += 1
    result.deletes += [name for name, _, _ in old[at_old:]]
    result.inserts += [(name, (kind, payload)) for name, kind, payload in new[at_new:]]
    inserted = {name for name, _ in result.inserts}
    result.deletes = [name for name in result.deletes if name not in inserted]
    return result


def _compare_values(result: Difference, old: raw.Element, new: raw.Element) -> None:
    if old[1:] == new[1:]:
        return
    name, kind, payload = new
    if old[1] == kind and kind in {OBJECT, ARRAY}:
        inner = compare(old[2], payload) if kind == OBJECT else _compare_arrays(old[2], payload)
        if inner.size() < len(payload):
            result.inner.append((name, inner))
            return
    result.updates.append((name, (kind, payload)))


def _compare_arrays(before: bytes, after: bytes) -> Difference:
    result = Difference(is_array=True)
    old = list(raw.elements(before))
    new = list(raw.elements(after))
    for one, other in zip(old, new, strict=False):
        _compare_values(result, one, other)
    if len(new) < len(old):
        result.new_size = len(new)
    result.inserts += [(name, (kind, payload)) for name, kind, payload in new[len(old) :]]
    return result


def compare_paths(before: bytes, after: bytes, paths: list[Path]) -> Difference:
    """What differs at the given paths, each reported as modified there."""
    return _guided((OBJECT, before), (OBJECT, after), paths)


def _guided(before: Value, after: Value, paths: list[Path]) -> Difference:
    result = Difference(is_array=after[0] == ARRAY)
    grouped: dict[bytes, list[Path]] = {}
    for path in paths:
        grouped.setdefault(path[0], []).append(path[1:])
    for name, rests in grouped.items():
        old = raw.find_value(before[1], name)
        new = raw.find_value(after[1], name)
        if old == new:
            continue
        if new is None:
            result.deletes.append(name)
        elif old is None:
            result.inserts.append((name, new))
        elif all(rests) and old[0] == new[0] and new[0] in {OBJECT, ARRAY}:
            result.inner.append((name, _guided(old, new, rests)))
        else:
            result.updates.append((name, new))
    return result


def describe(difference: Difference) -> Description:
    """The elements of an `updateDescription`: this level's fields first, then those of inner objects."""
    collector = _Collector()
    collector.visit(difference, (), ambiguous=False)
    return Description(
        updated=raw.document(collector.updated),
        removed=raw.array([raw.string(path) for path in collector.removed]),
        truncated=raw.document_array(collector.truncated),
        ambiguous=raw.document(collector.ambiguous),
    )


class _Collector:
    def __init__(self) -> None:
        self.updated: list[raw.Element] = []
        self.removed: list[bytes] = []
        self.truncated: list[bytes] = []
        self.ambiguous: list[raw.Element] = []

    def visit(self, node: Difference, prefix: tuple[bytes | int, ...], *, ambiguous: bool) -> None:
        for name in node.deletes:
            self.removed.append(self._path(node, prefix, name, ambiguous))
        for name, value in node.updates + node.inserts:
            self.updated.append((self._path(node, prefix, name, ambiguous), *value))
        if node.new_size is not None:
            path = _join(prefix)
            self.truncated.append(raw.wrap(raw.string_element(b"field", path) + raw.fields({"newSize": node.new_size})))
            if ambiguous:
                self._note(path, prefix)
        for name, inner in node.inner:
            part = int(name) if node.is_array else name
            self.visit(inner, (*prefix, part), ambiguous=ambiguous or _unclear(node, name, prefix))

    def _path(self, node: Difference, prefix: tuple[bytes | int, ...], name: bytes, ambiguous: bool) -> bytes:
        parts = (*prefix, int(name) if node.is_array else name)
        path = _join(parts)
        if ambiguous or _unclear(node, name, prefix):
            self._note(path, parts)
        return path

    def _note(self, path: bytes, parts: tuple[bytes | int, ...]) -> None:
        values = [raw.encode_value(part) if isinstance(part, int) else raw.string(part) for part in parts]
        self.ambiguous.append((path, ARRAY, raw.array(values)))


def _unclear(node: Difference, name: bytes, prefix: tuple[bytes | int, ...]) -> bool:
    """Whether a dotted path could be read in two ways: a dot in a name, or a number that is no array position."""
    return not node.is_array and (b"." in name or (bool(prefix) and name.isdigit()))


def _join(parts: tuple[bytes | int, ...]) -> bytes:
    return b".".join(str(part).encode() if isinstance(part, int) else part for part in parts)
