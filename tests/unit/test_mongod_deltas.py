"""The stand-in's differences between documents: applied to the old document they give the new one."""

from __future__ import annotations

from typing import Any

import bson
from hypothesis import given
from hypothesis import strategies as st

from tests.mongod import deltas, raw

Json = dict[str, Any]

names = st.sampled_from(["a", "b", "c", "d"])
values = st.recursive(
    st.integers(0, 3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=8,
)
documents = st.dictionaries(names, values, max_size=4)


def applied(before: Any, difference: deltas.Difference) -> Any:
    """What an oplog entry with this difference makes of a document."""
    if difference.is_array:
        after: Any = dict(enumerate(before[: difference.new_size]))
    else:
        after = {name: value for name, value in before.items() if name.encode() not in difference.deletes}
    for name, value in difference.updates + difference.inserts:
        after.pop(name.decode(), None) if (name, value) in difference.inserts and not difference.is_array else None
        after[_key(name, difference)] = raw.decode_value(value)
    for name, inner in difference.inner:
        after[_key(name, difference)] = applied(after[_key(name, difference)], inner)
    return list(after.values()) if difference.is_array else after


def _key(name: bytes, difference: deltas.Difference) -> Any:
    return int(name) if difference.is_array else name.decode()


@given(documents, documents)
def test_a_difference_leads_from_one_document_to_the_other(before: Json, after: Json) -> None:
    difference = deltas.compare(bson.encode(before), bson.encode(after))
    result = applied(before, difference)
    assert result == after
    assert list(result) == list(after)
    assert bool(difference) == (bson.encode(before) != bson.encode(after))


@given(documents, documents)
def test_a_description_names_what_changed(before: Json, after: Json) -> None:
    described = deltas.describe(deltas.compare(bson.encode(before), bson.encode(after)))
    for path, value in bson.decode(described.updated).items():
        found: Any = after
        for part in path.split("."):
            found = found[int(part)] if isinstance(found, list) else found[part]
        assert found == value
