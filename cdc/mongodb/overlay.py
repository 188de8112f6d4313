"""What an update event says has changed, laid over a document that is known. Pure.

The statements of `cdc.mongodb.delta` let a server do the same; this is for those who have no server to ask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from copy import deepcopy
from typing import Any

Document = dict[str, Any]


class Unclear(Exception):
    """The description does not fit the document: one of them is not what it is taken for."""


def overlaid(document: Mapping[str, Any], description: Mapping[str, Any], *, strict: bool = True) -> Document:
    """The document after the update. description: `updateDescription`, decoded.

    Raises `Unclear` where it does not fit; unless `strict`, such a part is left out.
    """
    result = deepcopy(dict(document))
    ambiguous = description.get("disambiguatedPaths") or {}
    for each in description.get("truncatedArrays") or ():
        with nullcontext() if strict else suppress(Unclear):
            _truncate(_reach(result, _path(each["field"], ambiguous)), each["newSize"])
    for name in description.get("removedFields") or ():
        with nullcontext() if strict else suppress(Unclear):
            *holder, last = _path(name, ambiguous)
            _remove(_reach(result, holder), last)
    for name, value in (description.get("updatedFields") or {}).items():
        with nullcontext() if strict else suppress(Unclear):
            *holder, last = _path(name, ambiguous)
            _put(_reach(result, holder), last, value)
    return result


def changed_fields(description: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the fields that an update touched, dotted where they are nested."""
    names = [
        *(description.get("updatedFields") or ()),
        *(description.get("removedFields") or ()),
        *(each["field"] for each in description.get("truncatedArrays") or ()),
    ]
    return tuple(dict.fromkeys(names))


def root(name: str, description: Mapping[str, Any]) -> str:
    """The field of the document itself that a name leads to or into."""
    return str(_path(name, description.get("disambiguatedPaths") or {})[0])


def _path(name: str, ambiguous: Mapping[str, Sequence[str | int]]) -> Sequence[str | int]:
    """What is not listed as ambiguous has neither dots nor numbers in its names: a number is an array's index then."""
    if (path := ambiguous.get(name)) is not None:
        return path
    first, *rest = name.split(".")
    return (first, *(int(part) if part.isdigit() else part for part in rest))


def _reach(holder: Any, path: Sequence[str | int]) -> Any:
    for part in path:
        try:
            holder = holder[_key(holder, part)]
        except (KeyError, IndexError, TypeError) as exc:
            raise Unclear(str(part)) from exc
    return holder


def _truncate(array: Any, size: int) -> None:
    if not isinstance(array, list) or len(array) < size:
        raise Unclear
    del array[size:]


def _put(holder: Any, last: str | int, value: Any) -> None:
    key = _key(holder, last)
    if isinstance(holder, dict) or key < len(holder):
        holder[key] = value
    elif key == len(holder):
        holder.append(value)
    else:
        raise Unclear(str(last))


def _remove(holder: Any, last: str | int) -> None:
    key = _key(holder, last)
    if not isinstance(holder, dict) or key not in holder:
        raise Unclear(str(last))
    del holder[key]


def _key(holder: Any, part: str | int) -> Any:
    """Before 6.1 a server does not tell whether a number is an index or a name: what is there tells."""
    if isinstance(holder, dict):
        return str(part)
    if isinstance(holder, list) and isinstance(part, int):
        return part
    raise Unclear(str(part))
