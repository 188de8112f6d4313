"""Array updates: `$push` and its like, and the paths through arrays (`$`, `$[]`, `$[name]`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from . import mock, raw
from .errors import CommandError
from .keys import key_of
from .raw import ARRAY, OBJECT, Value
from .tree import Node

if TYPE_CHECKING:
    from .updates import Update

Path = tuple[bytes, ...]
Result = tuple[Value | None, int | None]


def _values(before: Value | None, operator: str) -> list[Value]:
    if before is None:
        return []
    if before[0] != ARRAY:
        raise CommandError(2, f"The field must be an array but is of type {before[0]} (in {operator})")
    return [(kind, payload) for _, kind, payload in raw.elements(before[1])]


def _clauses(argument: Value) -> dict[bytes, Value]:
    if argument[0] == OBJECT and argument[1][5:6] == b"$":
        return {name: (kind, payload) for name, kind, payload in raw.elements(argument[1])}
    return {}


def _each(argument: Value, clauses: dict[bytes, Value]) -> list[Value]:
    return _values(clauses[b"$each"], "$each") if b"$each" in clauses else [argument]


def push(before: Value | None, argument: Value) -> Result:
    """Append, with `$each`, `$position`, `$slice` and `$sort`."""
    values = _values(before, "$push")
    size = len(values)
    clauses = _clauses(argument)
    new = _each(argument, clauses)
    position = int(raw.decode_value(clauses[b"$position"])) if b"$position" in clauses else size
    values[position:position] = new
    if b"$sort" in clauses:
        values = _sorted(values, raw.decode_value(clauses[b"$sort"]))
    if b"$slice" in clauses:
        slice_size = int(raw.decode_value(clauses[b"$slice"]))
        values = values[slice_size:] if slice_size < 0 else values[:slice_size]
    plain = clauses.keys() <= {b"$each"} or (clauses.keys() <= {b"$each", b"$position"} and position >= size)
    return (ARRAY, raw.array(values)), size if plain else None


def _sorted(values: list[Value], order: Any) -> list[Value]:
    if not isinstance(order, dict):
        return sorted(values, key=key_of, reverse=int(order) < 0)
    for name, direction in reversed(order.items()):
        path = name.encode().split(b".")

        def field_key(value: Value, path: list[bytes] = path) -> tuple[Any, ...]:
            found = next(raw.values_at(value[1], path), None) if value[0] == OBJECT else None
            return key_of(found or raw.NULL_VALUE)

        values = sorted(values, key=field_key, reverse=int(direction) < 0)
    return values


def add_to_set(before: Value | None, argument: Value) -> Result:
    """Append what is not there yet."""
    values = _values(before, "$addToSet")
    present = {key_of(value) for value in values}
    for value in _each(argument, _clauses(argument)):
        if key_of(value) not in present:
            present.add(key_of(value))
            values.append(value)
    return (ARRAY, raw.array(values)), None


def pop(before: Value | None, argument: Value) -> Result:
    """Remove the last (1) or first (-1) element."""
    if before is None:
        return None, None
    values = _values(before, "$pop")
    return (ARRAY, raw.array(values[1:] if int(raw.decode_value(argument)) < 0 else values[:-1])), None


def pull(before: Value | None, argument: Value) -> Result:
    """Remove the elements that match."""
    if before is None:
        return None, None
    kept = [value for value in _values(before, "$pull") if not _pulled(value, argument)]
    return (ARRAY, raw.array(kept)), None


def _pulled(value: Value, argument: Value) -> bool:
    if argument[0] != OBJECT:
        return key_of(value) == key_of(argument)
    condition = raw.decode(argument[1])
    if any(name.startswith("$") for name in condition):
        return mock.matches({"value": condition}, {"value": raw.decode_value(value)})
    return value[0] == OBJECT and mock.matches_raw(condition, value[1])


def pull_all(before: Value | None, argument: Value) -> Result:
    """Remove the elements that equal one of a list."""
    if before is None:
        return None, None
    doomed = {key_of(value) for value in _values(argument, "$pullAll")}
    return (ARRAY, raw.array([value for value in _values(before, "$pullAll") if key_of(value) not in doomed])), None


def concrete_paths(root: Node, template: Path, update: Update) -> list[Path]:
    """The paths that a path with `$`, `$[]` or `$[name]` stands for in this document."""
    if not any(part.startswith(b"$") for part in template):
        return [template]
    return list(_expand(root, (), template, update))


def _expand(node: Node | None, done: Path, rest: Path, update: Update) -> Iterator[Path]:
    if not rest:
        yield done
        return
    part = rest[0]
    if not part.startswith(b"$"):
        yield from _expand(node.child(part) if node else None, (*done, part), rest[1:], update)
        return
    if node is None or node.kind != ARRAY:
        raise CommandError(
            2, f"The path '{b'.'.join(done).decode()}' must exist in the document to apply array updates"
        )
    for index in _positions(node, done, part, update):
        name = raw.array_name(index)
        yield from _expand(node.child(name), (*done, name), rest[1:], update)


def _positions(node: Node, done: Path, part: bytes, update: Update) -> list[int]:
    decoded = [raw.decode_value(value if isinstance(value, tuple) else value.value()) for value in node.values]
    if part == b"$[]":
        return list(range(len(decoded)))
    if part == b"$":
        return _matched_position(decoded, b".".join(done).decode(), update.query)
    name = part[2:-1].decode()
    for condition in update.array_filters:
        if next(iter(condition)).split(".")[0].lstrip("$") == name or _names(condition, name):
            return [at for at, value in enumerate(decoded) if mock.matches(condition, {name: value})]
    raise CommandError(2, f"No array filter found for identifier '{name}'")


def _names(condition: dict[str, Any], name: str) -> bool:
    inner = next(iter(condition.values()))
    return isinstance(inner, list) and any(next(iter(one)).split(".")[0] == name for one in inner)


def _matched_position(decoded: list[Any], field: str, query: dict[str, Any]) -> list[int]:
    conditions = {key: value for key, value in query.items() if key == field or key.startswith(field + ".")}
    for at, value in enumerate(decoded):
        document: Any = [value]
        for part in reversed(field.split(".")):
            document = {part: document}
        if conditions and mock.matches(conditions, document):
            return [at]
    raise CommandError(2, "The positional operator did not find the match needed from the query.")
