"""A slow, obvious model of what a server does with update statements, and of what its update events say."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cmp_to_key
from typing import Any

import bson

Document = dict[str, Any]
Path = tuple[str | int, ...]


def execute(statement: bytes, document: Document) -> Document | None:
    """The document after an update statement; `None` if the statement does not match it."""
    decoded = bson.decode(statement)
    for name, condition in decoded["q"].items():
        if name != "_id" and not _has_type(document, name, condition["$type"]):
            return None
    update = decoded["u"]
    after = copy.deepcopy(document)
    if isinstance(update, list):
        for stage in update:
            after = evaluate(stage["$replaceWith"], after)
        return {"_id": document["_id"], **{name: value for name, value in after.items() if name != "_id"}}
    if not next(iter(update), "").startswith("$"):
        return update  # type: ignore[no-any-return]
    for operator, fields in update.items():
        for name in sorted(fields, key=cmp_to_key(_compare_paths)):
            _apply(operator, after, name.split("."), fields[name])
    return after


def evaluate(expression: Any, root: Document) -> Any:
    """The value of an expression, of the operators that are used here."""
    if expression == "$$ROOT":
        return root
    if not isinstance(expression, dict):
        return [evaluate(item, root) for item in expression] if isinstance(expression, list) else expression
    ((operator, argument),) = expression.items()
    if operator == "$literal":
        return argument
    if operator == "$arrayElemAt":
        array, index = evaluate(argument, root)
        return array[index]
    if operator == "$slice":
        array, *bounds = evaluate(argument, root)
        assert len(bounds) == 1 or bounds[1] > 0, "the server's condition"
        return array[: bounds[0]] if len(bounds) == 1 else array[bounds[0] : bounds[0] + bounds[1]]
    if operator == "$concatArrays":
        return [item for part in evaluate(argument, root) for item in part]
    field, holder = evaluate(argument["field"], root), evaluate(argument["input"], root)
    if operator == "$getField":
        return holder[field]
    if operator == "$unsetField":
        return {name: value for name, value in holder.items() if name != field}
    assert operator == "$setField", operator
    return {**holder, field: evaluate(argument["value"], root)}


def describe(before: Document, after: Document, *, certain: bool) -> bytes:
    """The `updateDescription` that turns one document into the other. certain: with `disambiguatedPaths`."""
    updated: dict[str, Any] = {}
    removed: list[str] = []
    truncated: list[Document] = []
    ambiguous: dict[str, Any] = {}
    changes: list[tuple[str, Path, Any]] = []
    _compare(before, after, (), changes)
    for kind, path, value in changes:
        name = ".".join(map(str, path))
        if any(isinstance(part, str) and ("." in part or part.isdigit()) for part in path):
            ambiguous[name] = list(path)
        if kind == "set":
            updated[name] = value
        elif kind == "remove":
            removed.append(name)
        else:
            truncated.append({"field": name, "newSize": value})
    description = {"updatedFields": updated, "removedFields": removed, "truncatedArrays": truncated}
    return bson.encode({**description, **({"disambiguatedPaths": ambiguous} if certain else {})})


def _compare(before: Any, after: Any, path: Path, changes: list[tuple[str, Path, Any]]) -> None:
    """In the server's order: what is changed in place, what is new, what has changed inside."""
    inside: list[tuple[Any, Any, Path]] = []
    new: list[tuple[str, Path, Any]] = []
    if isinstance(after, dict):
        pairs: Sequence[tuple[str | int, Any]] = list(after.items())
        known: Any = _in_place(before, after)
        changes += [("remove", (*path, name), None) for name in before if name not in known]
    else:
        if len(after) < len(before):
            changes.append(("truncate", path, len(after)))
        pairs, known = list(enumerate(after)), dict(enumerate(before))
    for name, value in pairs:
        place = (*path, name)
        if name not in known:
            new.append(("set", place, value))
        elif _bytes(known[name]) != _bytes(value):
            if type(known[name]) is type(value) and isinstance(value, dict | list):
                inside.append((known[name], value, place))
            else:
                changes.append(("set", place, value))
    changes += new
    for one, other, place in inside:
        _compare(one, other, place, changes)


def _in_place(before: Document, after: Document) -> Document:
    """The fields that are still where they were; all others are removed, or removed and put at the end."""
    names = iter(after)
    wanted = next(names, None)
    kept = {}
    for name, value in before.items():
        if name == wanted:
            kept[name] = value
            wanted = next(names, None)
    return kept


def _bytes(value: Any) -> bytes:
    return bson.encode({"": value})


def _compare_paths(one: str, other: str) -> int:
    for left, right in zip(one.split("."), other.split("."), strict=False):
        if left != right:
            if left.isdigit() and right.isdigit():
                return int(left) - int(right)
            return -1 if left < right else 1
    raise AssertionError(f"conflict of {one!r} and {other!r}")


def _has_type(document: Any, name: str, types: str | list[str]) -> bool:
    value = document
    for part in name.split("."):
        try:
            value = value[int(part)] if isinstance(value, list) else value[part]
        except (KeyError, IndexError, TypeError, ValueError):
            return False
    found = "object" if isinstance(value, dict) else "array" if isinstance(value, list) else "other"
    return found in ([types] if isinstance(types, str) else types)


def _apply(operator: str, document: Any, path: list[str], value: Any) -> None:
    assert all(part and not part.startswith("$") for part in path), "refused by the server"
    for part in path[:-1]:
        document = document[int(part)] if isinstance(document, list) else document.setdefault(part, {})
    last = path[-1]
    if operator == "$unset":
        document.pop(last, None)
    elif operator == "$push":
        array = document[int(last)] if isinstance(document, list) else document[last]
        del array[value["$slice"] :]
    elif isinstance(document, list):
        index = int(last)
        document += [None] * (index + 1 - len(document))
        document[index] = value
    else:
        document[last] = value
