"""Updates: replacements, pipelines and operators, applied to a document's bytes."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import bson

from . import arrays, deltas, mock, numbers, raw
from .deltas import Difference, Path
from .errors import CommandError
from .keys import key_of
from .raw import OBJECT, Value
from .tree import Node, get_path, remove_path, set_path


@dataclass(slots=True)
class Change:
    """The document after an update; `difference` is None for a replacement."""

    document: bytes
    difference: Difference | None


@dataclass(slots=True)
class Update:
    """One update statement's way to change a document."""

    kind: int
    """Type of `u`: an object (replacement or operators) or an array (pipeline)."""

    spec: bytes
    query: dict[str, Any] = field(default_factory=dict)
    array_filters: list[dict[str, Any]] = field(default_factory=list)

    @property
    def is_replacement(self) -> bool:
        """Whether `u` is a document rather than operators or a pipeline."""
        return self.kind == OBJECT and self.spec[5:6] != b"$"

    def apply(self, document: bytes, *, inserting: bool = False) -> Change:
        """The changed document; `CommandError` 66 if that would change `_id`."""
        if self.kind == raw.ARRAY:
            after = _by_pipeline(document, list(raw.array_documents(self.spec)))
            difference = deltas.compare(document, after)
            small = difference.size() < len(after) or not difference
            change = Change(after, difference if small else None)
        elif self.is_replacement:
            change = Change(_replacement(document, stamped(self.spec)), None)
        else:
            change = _Operators(document, self, inserting).run()
        if not inserting:
            _check_id(document, change.document)
        return change


def _replacement(document: bytes, spec: bytes) -> bytes:
    own = raw.find_value(spec, b"_id")
    kept = raw.find_value(document, b"_id")
    if own is not None and kept is not None and key_of(own) != key_of(kept):
        raise _id_changed(own)
    chosen = kept or own
    rest = b"".join(raw.element(*part) for part in raw.elements(spec) if part[0] != b"_id")
    return raw.wrap((raw.element(b"_id", *chosen) if chosen else b"") + rest)


def _by_pipeline(document: bytes, stages: list[bytes]) -> bytes:
    """A literal that is put in the document's place keeps its bytes, names that come twice included."""
    if len(stages) == 1 and (literal := _only(_only(stages[0], b"$replaceWith"), b"$literal")) is not None:
        return _replacement(document, literal)
    return mock.update_by_pipeline(document, [raw.decode(stage) for stage in stages])


def _only(document: bytes | None, name: bytes) -> bytes | None:
    """The document that is all there is in another one, under this name."""
    parts = [] if document is None else list(raw.elements(document))
    return parts[0][2] if [part[:2] for part in parts] == [(name, OBJECT)] else None


def stamped(document: bytes) -> bytes:
    """The document with empty top-level timestamps replaced by the server's time, as inserts and replacements do it."""
    if b"\x11" not in document or raw.NO_TIMESTAMP not in document:
        return document
    now = (int(time.time()) << 32 | 1).to_bytes(8, "little")
    return raw.document(
        (name, kind, now if kind == raw.TIMESTAMP and payload == raw.NO_TIMESTAMP and name != b"_id" else payload)
        for name, kind, payload in raw.elements(document)
    )


def _check_id(before: bytes, after: bytes) -> None:
    one, other = raw.find_value(before, b"_id"), raw.find_value(after, b"_id")
    if one is not None and (other is None or key_of(one) != key_of(other)):
        raise _id_changed(other or raw.NULL_VALUE)


def _id_changed(value: Value) -> CommandError:
    shown = raw.decode_value(value)
    return CommandError(
        66, f"Performing an update on the path '_id' would modify the immutable field '_id' (_id: {shown!r})"
    )


class _Operators:
    """One run of an operator update."""

    def __init__(self, document: bytes, update: Update, inserting: bool) -> None:
        self._before = document
        self._update = update
        self._inserting = inserting
        self._root = Node((OBJECT, document))
        self._touched: list[Path] = []

    def run(self) -> Change:
        steps = self._steps()
        _check_conflicts([path for path, _, _ in steps])
        for template, operator, argument in steps:
            for path in arrays.concrete_paths(self._root, template, self._update):
                self._apply(operator, path, argument)
        after = self._root.value()[1]
        return Change(after, deltas.compare_paths(self._before, after, self._touched))

    def _steps(self) -> list[tuple[Path, bytes, Value]]:
        steps = []
        for operator, kind, payload in raw.elements(self._update.spec):
            if operator not in _OPERATORS:
                raise CommandError(9, f"Unknown modifier: {operator.decode()}")
            if kind != OBJECT:
                raise CommandError(9, f"Modifiers operate on fields but we found type {kind} instead")
            for name, inner_kind, inner in raw.elements(payload):
                path = tuple(name.split(b"."))
                if b"" in path:
                    raise CommandError(56, f"The update path '{name.decode()}' contains an empty field name")
                steps.append((path, operator, (inner_kind, inner)))
        # servers from 5.0 go through the fields in this order, whatever the order in the update
        return sorted(steps, key=lambda step: [(0, int(p), p) if p.isdigit() else (1, 0, p) for p in step[0]])

    def _apply(self, operator: bytes, path: Path, argument: Value) -> None:
        if operator == b"$setOnInsert" and not self._inserting:
            return
        if operator == b"$rename":
            self._rename(path, argument)
            return
        before = get_path(self._root, path)
        if operator == b"$unset":
            if before is not None:
                remove_path(self._root, path)
                self._touched.append(path)
            return
        after, appended_from = _OPERATORS[operator](before, argument)
        if after is None or after == before:
            return
        set_path(self._root, path, after)
        if appended_from is None or before is None:
            self._touched.append(path)
        else:
            count = sum(1 for _ in raw.elements(after[1]))
            self._touched += [(*path, raw.array_name(index)) for index in range(appended_from, count)]

    def _rename(self, path: Path, argument: Value) -> None:
        value = get_path(self._root, path)
        if value is None:
            return
        target = tuple(argument[1][4:-1].split(b"."))
        remove_path(self._root, path)
        remove_path(self._root, target)
        set_path(self._root, target, value)
        self._touched += [path, target]


def _check_conflicts(paths: list[Path]) -> None:
    ordered = sorted(paths)
    for one, other in itertools.pairwise(ordered):
        if other[: len(one)] == one:
            shown = b".".join(other).decode("utf-8", "replace")
            at = b".".join(one).decode("utf-8", "replace")
            raise CommandError(40, f"Updating the path '{shown}' would create a conflict at '{at}'")


_Result = tuple[Value | None, int | None]
"""The new value, or None to leave it; and the index from which an array was only appended to."""


def _set(_before: Value | None, argument: Value) -> _Result:
    return argument, None


def _min(before: Value | None, argument: Value) -> _Result:
    return (argument if before is None or key_of(argument) < key_of(before) else None), None


def _max(before: Value | None, argument: Value) -> _Result:
    return (argument if before is None or key_of(argument) > key_of(before) else None), None


def _inc(before: Value | None, argument: Value) -> _Result:
    return (argument if before is None else numbers.add(before, argument)), None


def _mul(before: Value | None, argument: Value) -> _Result:
    return numbers.multiply(before or (raw.INT32, b"\0" * 4), argument), None


def _current_date(_before: Value | None, argument: Value) -> _Result:
    if argument[0] == OBJECT and raw.decode(argument[1]).get("$type") == "timestamp":
        return raw.encode_value(bson.Timestamp(int(time.time()), 1)), None
    return (raw.DATE, raw.pack_int64(int(time.time() * 1000))), None


_OPERATORS: Final[dict[bytes, Callable[[Value | None, Value], _Result]]] = {
    b"$set": _set,
    b"$setOnInsert": _set,
    b"$unset": _set,
    b"$rename": _set,
    b"$min": _min,
    b"$max": _max,
    b"$inc": _inc,
    b"$mul": _mul,
    b"$currentDate": _current_date,
    b"$push": arrays.push,
    b"$addToSet": arrays.add_to_set,
    b"$pop": arrays.pop,
    b"$pull": arrays.pull,
    b"$pullAll": arrays.pull_all,
}
