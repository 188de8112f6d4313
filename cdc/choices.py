"""What msgspec's errors leave out: which values a type allows, where there are only some, and the keys of dicts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import msgspec
from msgspec import inspect

from cdc.errors import CdcError

_STEP: Final = re.compile(r"\.(?P<field>\w+)|\[(?P<index>\d+)\]|\[\.\.\.\]")


def hint_of(message: str, kind: Any) -> str:
    """`one of: a, b`, for msgspec's `Invalid enum value 'c' - at `$.path``; of a pattern, what its type says of itself.

    Empty for other messages. kind: the type that was to be made. The empty value, which stands for a default, is not
    told.
    """
    reason, _, where = message.partition(" - at `")
    is_choice, is_form = reason.startswith("Invalid enum value "), is_of_form(reason)
    if not is_choice and not is_form:
        return ""
    types = [inspect.type_info(kind)]
    for step in _STEP.finditer(where.rstrip("`")):
        types = [found for each in types for plain in _alternatives(each) for found in _below(plain, step["field"])]
    if is_form:
        return next((text for each in types for text in _descriptions(each)), "")
    plain = [found for each in types for found in _alternatives(each)]
    values = dict.fromkeys(str(value) for each in plain for value in _values(each) if value not in {"", None})
    return f"one of: {', '.join(values)}" if values else ""


def is_of_form(reason: str) -> bool:
    """Whether a text was to match a pattern, which tells people little."""
    return " matching regex " in reason


def path_of(message: str, value: Any, convert: Callable[[Any], object]) -> str:
    """`sinks.main.mask."a.b"`, for the `$.sinks[...].mask[...]` of msgspec's message about `value`.

    convert: what raised it. Which key it is, it tells itself, given a value without the others.
    """
    path: list[str | int] = []
    for step in _STEP.finditer(message.partition(" - at `")[2]):
        if step["field"] or step["index"]:
            path.append(step["field"] or int(step["index"]))
            continue
        alone = {key: _replaced(value, path, {key: member}) for key, member in _at(value, path).items()}
        key = next((key for key, each in alone.items() if _message(convert, each) == message), None)
        if key is None:
            path.append("...")
            break
        path.append(key)
        value = alone[key]
    return "".join(map(_shown, path)).removeprefix(".")


def _message(convert: Callable[[Any], object], value: Any) -> str:
    try:
        convert(value)
    except msgspec.ValidationError as exc:
        return str(exc)
    except CdcError as exc:  # what a struct finds wrong with itself
        return str(exc)
    return ""


def _at(value: Any, path: Sequence[str | int]) -> Any:
    for step in path:
        value = value[step]
    return value


def _replaced(value: Any, path: Sequence[str | int], by: Any) -> Any:
    """A copy with something else at a path; what is not on the way is shared."""
    if not path:
        return by
    first, inner = path[0], _replaced(value[path[0]], path[1:], by)
    if isinstance(value, dict):
        return {**value, first: inner}
    return [inner if number == first else each for number, each in enumerate(value)]


def _shown(step: str | int) -> str:
    if isinstance(step, int):
        return f"[{step}]"
    return f".{step}" if re.fullmatch(r"[\w-]+|\.\.\.", step, re.ASCII) else f".{json.dumps(step, ensure_ascii=False)}"


def _alternatives(kind: inspect.Type) -> Iterator[inspect.Type]:
    """The types of a union, without what annotates them."""
    if isinstance(kind, inspect.Metadata):
        yield from _alternatives(kind.type)
    elif isinstance(kind, inspect.UnionType):
        for each in kind.types:
            yield from _alternatives(each)
    else:
        yield kind


def _descriptions(kind: inspect.Type) -> Iterator[str]:
    """What the annotations of a type, or of those of a union, say to people."""
    if isinstance(kind, inspect.Metadata):
        if kind.extra_json_schema and "description" in kind.extra_json_schema:
            yield str(kind.extra_json_schema["description"])
        yield from _descriptions(kind.type)
    elif isinstance(kind, inspect.UnionType):
        for each in kind.types:
            yield from _descriptions(each)


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
