"""What mongomock does for this server: matching documents with a filter, and aggregation stages."""

from __future__ import annotations

import copy
from typing import Any

from mongomock import aggregate as mock_aggregate
from mongomock import filtering as mock_filtering
from mongomock import helpers as mock_helpers

from . import raw
from .errors import CommandError

_filtering: Any = mock_filtering
_aggregate: Any = mock_aggregate
_helpers: Any = mock_helpers


def matches(condition: dict[str, Any], document: dict[str, Any]) -> bool:
    """Whether a decoded document matches a filter; `CommandError` 2 for a filter that is wrong or not emulated."""
    if not condition:
        return True
    try:
        return bool(_filtering.filter_applies(condition, document))
    except TypeError:
        return False  # values that Python does not order; the server would not match across types either
    except Exception as exc:
        raise CommandError(2, f"filter not understood: {exc}") from exc


def matches_raw(condition: dict[str, Any], document: bytes) -> bool:
    """Whether a document matches."""
    return not condition or matches(condition, raw.decode(document))


def run_stage(documents: list[dict[str, Any]], stage: dict[str, Any]) -> list[dict[str, Any]]:
    """One aggregation stage over decoded documents."""
    if "$replaceWith" in stage:
        stage = {"$replaceRoot": {"newRoot": stage["$replaceWith"]}}
    if "$unset" in stage:
        names = stage["$unset"] if isinstance(stage["$unset"], list) else [stage["$unset"]]
        stage = {"$project": dict.fromkeys(names, 0)}
    try:
        found = _aggregate.process_pipeline(copy.deepcopy(documents), None, [stage], None)
        return list(found)
    except NotImplementedError as exc:
        raise CommandError(40324, f"stage not emulated: {exc}") from exc
    except Exception as exc:
        raise CommandError(2, f"stage failed: {exc}") from exc


def update_by_pipeline(document: bytes, pipeline: list[dict[str, Any]]) -> bytes:
    """The document after the stages of a pipeline update; what they left alone keeps its bytes."""
    before = raw.decode(document)
    after = [before]
    for stage in pipeline:
        if not set(stage) <= {"$set", "$addFields", "$unset", "$project", "$replaceRoot", "$replaceWith"}:
            raise CommandError(2, f"{next(iter(stage))} is not allowed to be used within an update")
        after = run_stage(after, stage)
    return _merge(document, before, after[0])


def _merge(document: bytes, before: dict[str, Any], after: dict[str, Any]) -> bytes:
    originals = {
        name.decode("utf-8", "surrogateescape"): (kind, payload) for name, kind, payload in raw.elements(document)
    }
    merged: list[raw.Element] = []
    if "_id" in originals and "_id" in after:  # stays where it is, whatever the stages made of it
        after = {"_id": after["_id"], **after}
    for name, value in after.items():
        merged.append((name.encode("utf-8", "surrogateescape"), *_merged(originals.get(name), before.get(name), value)))
    return raw.document(merged)


def _merged(original: raw.Value | None, before: Any, value: Any) -> raw.Value:
    if original is not None:
        if type(before) is type(value) and before == value:
            return original
        if isinstance(before, dict) and isinstance(value, dict):
            return raw.OBJECT, _merge(original[1], before, value)
        if isinstance(before, list) and isinstance(value, list):
            originals = [element[1:] for element in raw.elements(original[1])]
            padding = len(value) - len(originals)
            pairs = zip([*originals, *[None] * padding], [*before, *[None] * padding], value, strict=False)
            return raw.ARRAY, raw.array([_merged(one, other, new) for one, other, new in pairs])
    return raw.encode_value(value)
