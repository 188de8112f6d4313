"""A document that can be changed in place: only what an update touches is taken apart, all else keeps its bytes."""

from __future__ import annotations

from . import raw
from .errors import CommandError
from .raw import ARRAY, OBJECT, Value

MAX_PADDING = 1_500_000
"""The server's limit for the nulls that fill an array up to a position."""


class Node:
    """An object or array taken apart one level deep; its values are `Node`s themselves where they were taken apart."""

    __slots__ = ("kind", "names", "values")

    def __init__(self, value: Value) -> None:
        self.kind, payload = value
        self.names: list[bytes] = []
        self.values: list[Node | Value] = []
        for name, kind, inner in raw.elements(payload):
            self.names.append(name)
            self.values.append((kind, inner))

    def position(self, name: bytes) -> int | None:
        """Where the field of that name is; in an array its index, if there is such an element."""
        if self.kind == ARRAY:
            if name.isdigit() and int(name) < len(self.values):
                return int(name)
            return None
        try:
            return self.names.index(name)
        except ValueError:
            return None

    def get(self, name: bytes) -> Node | Value | None:
        """The value of that name."""
        at = self.position(name)
        return None if at is None else self.values[at]

    def child(self, name: bytes) -> Node | None:
        """The container of that name, taken apart; None if there is none or it is a scalar."""
        at = self.position(name)
        if at is None:
            return None
        value = self.values[at]
        if isinstance(value, Node):
            return value
        if value[0] not in {OBJECT, ARRAY}:
            return None
        node = self.values[at] = Node(value)
        return node

    def put(self, name: bytes, value: Node | Value) -> None:
        """Set or append; an array is filled up with nulls."""
        at = self.position(name)
        if at is not None:
            self.values[at] = value
            return
        if self.kind == ARRAY:
            missing = int(name) - len(self.values)
            if missing > MAX_PADDING:
                raise CommandError(2, f"can't backfill more than {MAX_PADDING} elements")
            self.values += [raw.NULL_VALUE] * missing
        self.names.append(name)
        self.values.append(value)

    def remove(self, name: bytes) -> None:
        """Drop a field; an array's element becomes null."""
        at = self.position(name)
        if at is None:
            return
        if self.kind == ARRAY:
            self.values[at] = raw.NULL_VALUE
        else:
            del self.names[at], self.values[at]

    def value(self) -> Value:
        """The bytes."""
        values = [part.value() if isinstance(part, Node) else part for part in self.values]
        if self.kind == ARRAY:
            return ARRAY, raw.array(values)
        return OBJECT, raw.document([(name, *part) for name, part in zip(self.names, values, strict=True)])


def value_of(part: Node | Value) -> Value:
    """The bytes of a part, taken apart or not."""
    return part.value() if isinstance(part, Node) else part


def get_path(root: Node, path: tuple[bytes, ...]) -> Value | None:
    """The value at a path, or None."""
    node = root
    for name in path[:-1]:
        child = node.child(name)
        if child is None:
            return None
        node = child
    found = node.get(path[-1])
    return None if found is None else value_of(found)


def set_path(root: Node, path: tuple[bytes, ...], value: Value) -> None:
    """Set a value, creating objects on the way; `CommandError` 28 PathNotViable where a scalar stands in the way."""
    node = root
    for name in path[:-1]:
        child = node.child(name)
        if child is None:
            if node.get(name) is not None:
                raise _not_viable(node, name, path)
            _check_index(node, name, path)
            child = Node((OBJECT, raw.EMPTY))
            node.put(name, child)
        node = child
    _check_index(node, path[-1], path)
    node.put(path[-1], value)


def remove_path(root: Node, path: tuple[bytes, ...]) -> None:
    """Remove what is at a path, if anything."""
    node = root
    for name in path[:-1]:
        child = node.child(name)
        if child is None:
            return
        node = child
    node.remove(path[-1])


def _check_index(node: Node, name: bytes, path: tuple[bytes, ...]) -> None:
    if node.kind == ARRAY and not name.isdigit():
        shown = b".".join(path).decode("utf-8", "replace")
        raise CommandError(28, f"Cannot create field '{name.decode()}' in an array (path '{shown}')")


def _not_viable(node: Node, name: bytes, path: tuple[bytes, ...]) -> CommandError:
    at = path.index(name)
    inner = path[at + 1].decode("utf-8", "replace")
    shown = raw.decode_value(value_of(node.get(name) or raw.NULL_VALUE))
    return CommandError(28, f"Cannot create field '{inner}' in element {{{name.decode()}: {shown!r}}}")
