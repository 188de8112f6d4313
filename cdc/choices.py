"""Which values a type allows, where there are only some: what msgspec's errors leave out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

from msgspec import inspect

_STEP: Final = re.compile(r"\.(?P<field>\w+)|\[(?:\d+|\.\.\.)\]")


def hint_of(message: str, kind: Any) -> str:
    """`one of: a, b`, for msgspec's `Invalid enum value 'c' - at `$.path``; empty for other messages.

    kind: the type that was to be made. The empty value, which stands for a default, is not told.
    """
    reason, _, where = message.partition(" - at `")
    if not reason.startswith("Invalid enum value "):
        return ""
    types = list(_alternatives(inspect.type_info(kind)))
    for step in _STEP.finditer(where.rstrip("`")):
        types = [found for each in types for inner in _below(each, step["field"]) for found in _alternatives(inner)]
    values = dict.fromkeys(str(value) for each in types for value in _values(each) if value not in {"", None})
    return f"one of: {', '.join(values)}" if values else ""


def _alternatives(kind: inspect.Type) -> Iterator[inspect.Type]:
    """The types of a union, without what annotates them."""
    if isinstance(kind, inspect.Metadata):
        yield from _alternatives(kind.type)
    elif isinstance(kind, inspect.UnionType):
        for each in kind.types:
            yield from _alternatives(each)
    else:
        yield kind


def _below(kind: inspect.Type, field: str | None) -> Iterator[inspect.Type]:
    """A struct's field, or what a collection consists of."""
    if field is not None:
        if isinstance(kind, inspect.StructType):
            yield from (each.type for each in kind.fields if each.encode_name == field)
    elif isinstance(kind, inspect.DictType):
        yield kind.value_type
    elif isinstance(kind, inspect.CollectionType):
        yield kind.item_type


def _values(kind: inspect.Type) -> Iterator[object]:
    if isinstance(kind, inspect.LiteralType):
        yield from kind.values
    elif isinstance(kind, inspect.EnumType):
        yield from (member.value for member in kind.cls)
