"""Projections that keep the bytes of what they keep: inclusion and exclusion, also of inner fields."""

from __future__ import annotations

from typing import Any

from . import mock, raw
from .errors import CommandError

Spec = dict[bytes, Any]
"""Field name -> True, or the specification for what is inside it."""


def project(document: bytes, projection: dict[str, Any]) -> bytes:
    """The projected document. Anything but inclusion and exclusion goes through mongomock, which may change types."""
    if not projection:
        return document
    flags = {name: value for name, value in projection.items() if isinstance(value, (bool, int, float))}
    if len(flags) != len(projection):
        return raw.encode(mock.run_stage([raw.decode(document)], {"$project": projection})[0])
    others = {bool(value) for name, value in flags.items() if name != "_id"}
    if len(others) > 1:
        raise CommandError(31254, "Cannot do exclusion on a field in inclusion projection")
    including = others.pop() if others else bool(flags["_id"])
    wanted = {name: value for name, value in flags.items() if bool(value) == including}
    if including and flags.get("_id", 1):
        wanted["_id"] = 1
    return _apply(document, _tree(wanted), including=including)


def _tree(names: dict[str, Any]) -> Spec:
    tree: Spec = {}
    for name in names:
        node = tree
        *path, last = name.encode().split(b".")
        for part in path:
            inner = node.setdefault(part, {})
            if inner is True:
                break
            node = inner
        else:
            node[last] = True
    return tree


def _apply(document: bytes, spec: Spec, *, including: bool, in_array: bool = False) -> bytes:
    kept: list[raw.Element] = []
    for name, kind, payload in raw.elements(document):
        rule = spec if in_array else spec.get(name)
        if rule is None or rule is True:
            if (rule is True) == including:
                kept.append((name, kind, payload))
        elif kind == raw.OBJECT:
            kept.append((name, kind, _apply(payload, rule, including=including)))
        elif kind == raw.ARRAY:
            kept.append((name, kind, _apply(payload, rule, including=including, in_array=True)))
        elif not including:
            kept.append((name, kind, payload))
    if in_array:
        return raw.array([(kind, payload) for _, kind, payload in kept])
    return raw.document(kept)
