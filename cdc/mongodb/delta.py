"""What an update event says has changed, as statements of the `update` command. Pure: no I/O.

A statement can name a field by a dotted path only; a field whose own name has dots, begins with a dollar or is empty is
reached by a pipeline of `$setField`. Which it is tells `disambiguatedPaths` (from 6.1 on, with `showExpandedEvents`);
without it a dotted path is taken for one, on the condition that what holds its last field is there: the statement then
matches nothing where that is wrong.

A server puts new fields at the end, in the order of their names (numbers by value), and an event lists them in the
order in which they came. So fields that come in another order are set one statement after the other.

Two things no event tells, and only documents that are looked up have right: that a field which was there was moved to
the end (by a pipeline that takes it away and sets it), and, before 6.1, that `a.b` is a name beside a document `a`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Final, NamedTuple

from cdc.change import Image
from cdc.errors import CdcError, DecodeError
from cdc.mongodb import walk
from cdc.mongodb.equality import id_only

Path = tuple[bytes | int, ...]
"""Names of fields, and indexes into arrays."""

Value = tuple[int, bytes]
"""A value's type and its bytes. Expressions are values too."""

_Found = dict[bytes, tuple[int, int, int]]

_ROOT: Final[Value] = (walk.STRING, walk.string("$$ROOT"))
_TRUE: Final[Value] = (walk.BOOLEAN, b"\x01")
_CONTAINERS: Final = (
    walk.DOCUMENT,
    walk.document(
        walk.element(
            walk.ARRAY,
            b"$type",
            walk.document(
                walk.element(walk.STRING, b"0", walk.string("object")),
                walk.element(walk.STRING, b"1", walk.string("array")),
            ),
        )
    ),
)
_ZERO_TIMESTAMP: Final = re.compile(rb"\x11[^\x00]*\x00{9}")
_DOLLAR: Final = re.compile(rb"[\x01-\x13\x7f\xff]\$[^\x00]*\x00")
_SPECIAL: Final = re.compile(rb"[.$]|\x00[0-9]|\x00\x00")
"""Between names that zeros part: what needs a closer look, as numbers, paths, dollars and empty names do."""
_UPDATED: Final = b"\x03updatedFields\x00"
_EMPTY_PARTS: Final = (
    walk.element(walk.ARRAY, b"removedFields", walk.EMPTY),
    walk.element(walk.ARRAY, b"truncatedArrays", walk.EMPTY),
    walk.element(walk.DOCUMENT, b"disambiguatedPaths", walk.EMPTY),
)
_NOTHING_ELSE: Final = frozenset(b"".join(_EMPTY_PARTS[:count]) + b"\x00" for count in range(1, 4))
"""How a description ends that tells of no more than updated fields."""
_KNOWN: Final = frozenset((b"updatedFields", b"removedFields", b"truncatedArrays", b"disambiguatedPaths"))
_TO_THE_END: Final = 2**31 - 1


class DeltaError(CdcError):
    """The delta cannot be written as statements: read the document again instead."""


class _Field(NamedTuple):
    """A field that changes: its name in the event, where that is, and its new value (`None`: removed)."""

    name: bytes
    path: Path
    value: Value | None


def statements(key: Image, description: Image) -> list[bytes]:
    """The update statements that do to a document what an `updateDescription` says, to be executed in this order.

    key: `{_id: value}`. Each statement matches exactly one document, if that is there and as it was before the update.
    Raises `DeltaError` for what they cannot say, `DecodeError` for malformed bytes.
    """
    if (single := _plain_set(key, description)) is not None:
        return [single]
    found = walk.fields(description)
    if unknown := found.keys() - _KNOWN:
        raise DeltaError(f"an update event says more than is known: {sorted(unknown)}")
    certain = b"disambiguatedPaths" in found
    paths = _disambiguated(description, found)
    result: list[bytes] = []
    if removed := list(_removed(description, found, paths)):
        plain = [field for field in removed if not _is_awkward(field.path)]
        if plain:
            result.append(_operator(key, b"$unset", plain, certain=certain))
        result += [_pipeline(key, field, certain=certain) for field in removed if _is_awkward(field.path)]
    for name, path, size in _truncated(description, found, paths):
        result.append(_truncation(key, name, path, size))
    run: list[_Field] = []
    for field in _updated(description, found, paths):
        if _is_awkward(field.path):
            if run:
                result.append(_operator(key, b"$set", run, certain=certain))
                run = []
            result.append(_pipeline(key, field, certain=certain))
        else:
            if run and not _comes_after(run[-1].path, field.path):
                result.append(_operator(key, b"$set", run, certain=certain))
                run = []
            run.append(field)
    if run:
        result.append(_operator(key, b"$set", run, certain=certain))
    return result


def _plain_set(key: Image, description: Image) -> bytes | None:
    """The common case: fields are set, and one statement can name them all, in this order. `None` for any other."""
    if not description.startswith(_UPDATED, 4) or len(description) < 28:
        return None
    start = 4 + len(_UPDATED)
    end = start + walk.int32_at(description, start)
    if description[end:] not in _NOTHING_ELSE or walk.document_end(description) != len(description):
        return None
    names = list(walk.fields(description, start))
    if not names or _SPECIAL.search(b"\x00".join((b"", *names, b""))):
        return None
    if len(names) > 1 and any(one >= other for one, other in pairwise(names)):
        return None
    size = end - start
    return b"%b\x03q\x00%b\x03u\x00%b\x03$set\x00%b\x00\x00" % (
        walk.int32(size + len(key) + 22), key, walk.int32(size + 11), description[start:end],
    )  # fmt: skip


def replacement(key: Image, image: Image) -> list[bytes]:
    """The statements that make a document just this, whether there is one or not.

    A replacement cannot have top-level fields that begin with a dollar, and gets the server's time for a top-level
    timestamp of zero. A pipeline takes everything as it is; but if it has to insert, that too may put in the time.
    """
    if _is_simple(image):
        return [
            b"%b\x03q\x00%b\x03u\x00%b\x08upsert\x00\x01\x00" % (walk.int32(20 + len(key) + len(image)), key, image)
        ]
    stage = _of(b"$replaceWith", _of(b"$literal", (walk.DOCUMENT, image)))
    statement = _statement(key, (walk.ARRAY, walk.document(walk.element(*_named(b"0", stage)))), upsert=True)
    return [statement, statement]


def replacements_in_python(documents: Iterable[tuple[Image, Image]]) -> list[bytes]:
    """The statements of many replacements, each of a document key (whatever else is in it) and a document."""
    return [statement for key, image in documents for statement in replacement(id_only(key), image)]


def deletion(key: Image) -> bytes:
    """The statement of the `delete` command that deletes a document."""
    return b"%b\x03q\x00%b\x10limit\x00\x01\x00\x00\x00\x00" % (walk.int32(19 + len(key)), key)


def is_insertable_in_python(image: Image) -> bool:
    """Whether the `insert` command keeps a document as it is: it puts the time into top-level timestamps of zero."""
    if not _ZERO_TIMESTAMP.search(image):
        return True
    return not any(
        each.kind == walk.TIMESTAMP and each.name != b"_id" and not any(image[each.start : each.end])
        for each in walk.elements(image)
    )


def _is_simple(image: Image) -> bool:
    # fields are looked at only where the bytes could be what is looked for
    if b"$" in image and _DOLLAR.search(image) and any(each.name[:1] == b"$" for each in walk.elements(image)):
        return False
    return is_insertable_in_python(image)


# reading the event


def _part(description: Image, found: _Found, name: bytes, kind: int) -> Iterator[walk.Element]:
    place = found.get(name)
    if place is None or place[0] == walk.NULL:
        return iter(())
    if place[0] != kind:
        raise DecodeError(f"{name.decode()} has the type 0x{place[0]:02x}")
    return walk.elements(description, place[1])


def _disambiguated(description: Image, found: _Found) -> dict[bytes, Path]:
    paths = {}
    for each in _part(description, found, b"disambiguatedPaths", walk.DOCUMENT):
        parts: list[bytes | int] = []
        for part in walk.elements(description, each.start):
            if part.kind == walk.STRING:
                parts.append(description[part.start + 4 : part.end - 1])
            elif part.kind in {walk.INT32, walk.INT64}:
                parts.append(int.from_bytes(description[part.start : part.end], "little", signed=True))
            else:
                raise DecodeError(f"a path with a part of type 0x{part.kind:02x}")
        paths[each.name] = tuple(parts)
    return paths


def _path(name: bytes, paths: dict[bytes, Path]) -> Path:
    """What is not listed as ambiguous has no field that is called like a number: that is an array's index then."""
    if (path := paths.get(name)) is not None:
        return path
    first, *rest = name.split(b".")
    return (first, *(int(part) if part.isdigit() else part for part in rest))


def _updated(description: Image, found: _Found, paths: dict[bytes, Path]) -> Iterator[_Field]:
    for each in _part(description, found, b"updatedFields", walk.DOCUMENT):
        yield _Field(each.name, _path(each.name, paths), (each.kind, description[each.start : each.end]))


def _removed(description: Image, found: _Found, paths: dict[bytes, Path]) -> Iterator[_Field]:
    for each in _part(description, found, b"removedFields", walk.ARRAY):
        if each.kind != walk.STRING:
            raise DecodeError("a removed field is no string")
        name = description[each.start + 4 : each.end - 1]
        yield _Field(name, _path(name, paths), None)


def _truncated(description: Image, found: _Found, paths: dict[bytes, Path]) -> Iterator[tuple[bytes, Path, int]]:
    for each in _part(description, found, b"truncatedArrays", walk.ARRAY):
        item = description[each.start : each.end]
        name, size = walk.find(item, b"field"), walk.find(item, b"newSize")
        if name is None or name.kind != walk.STRING or size is None or size.kind not in {walk.INT32, walk.INT64}:
            raise DecodeError("a truncated array without field or newSize")
        text = item[name.start + 4 : name.end - 1]
        yield text, _path(text, paths), int.from_bytes(item[size.start : size.end], "little", signed=True)


def _is_awkward(path: Path) -> bool:
    """Whether a dotted path cannot name it."""
    return any(isinstance(part, bytes) and (not part or part[:1] == b"$" or b"." in part) for part in path)


def _comes_after(one: Path, other: Path) -> bool:
    """Whether a server sets `other` after `one` in a single statement. False where that depends on more than names."""
    for left, right in zip(one, other, strict=False):
        if left != right:
            numbers = [int(part) for part in (left, right) if isinstance(part, int) or part.isdigit()]
            if len(numbers) == 2:
                return numbers[0] < numbers[1] and len(str(numbers[0])) == len(str(numbers[1]))
            return not isinstance(left, int) and not isinstance(right, int) and left < right
    return False  # one holds the other, which is a conflict


# building statements


def _named(name: bytes, value: Value) -> tuple[int, bytes, bytes]:
    return value[0], name, value[1]


def _of(name: bytes, value: Value) -> Value:
    """`{name: value}`."""
    return walk.DOCUMENT, walk.document(walk.element(*_named(name, value)))


def _call(name: bytes, **arguments: Value) -> Value:
    """`{name: {argument: value, ...}}`."""
    parts = (walk.element(*_named(argument.encode(), value)) for argument, value in arguments.items())
    return _of(name, (walk.DOCUMENT, walk.joined(parts)))


def _array(*values: Value) -> Value:
    items = (walk.element(*_named(b"%d" % index, value)) for index, value in enumerate(values))
    return walk.ARRAY, walk.joined(items)


def _statement(key: Image, update: Value, guards: Sequence[bytes] = (), *, upsert: bool = False) -> bytes:
    condition = walk.joined((key[4:-1], *(walk.element(*_named(guard, _CONTAINERS)) for guard in guards)))
    parts = [walk.element(walk.DOCUMENT, b"q", condition), walk.element(*_named(b"u", update))]
    if upsert:
        parts.append(walk.element(*_named(b"upsert", _TRUE)))
    return walk.joined(parts)


def _operator(key: Image, operator: bytes, fields: Sequence[_Field], *, certain: bool) -> bytes:
    parts = (walk.element(*_named(field.name, field.value or _TRUE)) for field in fields)
    return _statement(
        key,
        (walk.DOCUMENT, walk.document(walk.element(walk.DOCUMENT, operator, walk.joined(parts)))),
        () if certain else _guards(fields),
    )


def _guards(fields: Sequence[_Field]) -> list[bytes]:
    parents = (field.name.rpartition(b".")[0] for field in fields)
    return list(dict.fromkeys(parent for parent in parents if parent))


def _truncation(key: Image, name: bytes, path: Path, size: int) -> bytes:
    if _is_awkward(path):
        raise DeltaError("an array is cut whose name cannot be written as a path")
    each = walk.element(walk.ARRAY, b"$each", walk.EMPTY)
    cut = walk.document(each, walk.element(walk.INT32, b"$slice", walk.int32(size)))
    push = walk.document(walk.element(walk.DOCUMENT, name, cut))
    update = walk.document(walk.element(walk.DOCUMENT, b"$push", push))
    guard = walk.element(walk.DOCUMENT, name, walk.document(walk.element(walk.STRING, b"$type", walk.string("array"))))
    condition = walk.joined((key[4:-1], guard))  # $push would make an array where there is none
    return walk.document(walk.element(walk.DOCUMENT, b"q", condition), walk.element(walk.DOCUMENT, b"u", update))


def _pipeline(key: Image, field: _Field, *, certain: bool) -> bytes:
    if len(field.path) > 1 and not certain:
        raise DeltaError("a path may be a name with dots: the server does not tell")
    value = None if field.value is None else _of(b"$literal", field.value)
    stage = _of(b"$replaceWith", _put(_ROOT, field.path, value))
    return _statement(key, _array(stage))


def _put(holder: Value, path: Path, value: Value | None) -> Value:
    """The expression for `holder` with the value at a path below it; without that field, if it is `None`."""
    part, rest = path[0], path[1:]
    if isinstance(part, int):
        if value is None and not rest:
            raise DeltaError("an array's item is removed")
        item = _put(_of(b"$arrayElemAt", _array(holder, _number(part))), rest, value) if rest else value
        assert item is not None
        before = [_of(b"$slice", _array(holder, _number(part)))] if part else []
        behind = _of(b"$slice", _array(holder, _number(part + 1), _number(_TO_THE_END)))
        return _of(b"$concatArrays", _array(*before, _array(item), behind))
    name = _of(b"$literal", (walk.STRING, walk.int32(len(part) + 1) + part + b"\x00"))
    if rest:
        value = _put(_call(b"$getField", field=name, input=holder), rest, value)
    if value is None:
        return _call(b"$unsetField", field=name, input=holder)
    return _call(b"$setField", field=name, input=holder, value=value)


def _number(number: int) -> Value:
    return walk.INT32, walk.int32(number)


try:
    from cdc.mongodb import _mirror
except ImportError:
    is_insertable, replacements = is_insertable_in_python, replacements_in_python
else:
    is_insertable, replacements = _mirror.is_insertable, _mirror.replacements
