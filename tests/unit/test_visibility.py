"""Who sees what of a change, and that nobody sees what is not theirs."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc.feed.record import ALL, ChangeType, Record, as_json
from cdc.feed.visibility import Limits, view

CREATE, UPDATE, DELETE, EVENT = ChangeType

OURS = Limits(where={"company_id": "ours"})


def change(before: dict[str, Any] | None, after: dict[str, Any] | None, **more: Any) -> Record:
    """A change between two images, whose every field decides who sees it."""
    kind = CREATE if before is None else DELETE if after is None else UPDATE
    images: dict[str, Any] = {
        side: None if image is None else msgspec.json.encode(image)
        for name, image in (("before", before), ("after", after))
        for side in (name, f"scope_{name}")
    }
    record = Record(
        source="shop", position="0/1", entity_type="Product", entity_id="17", channel="products", change_type=kind,
        version=1, changed_at=1, location_id="north", changed=("company_id",), delta=b'{"updatedFields":{}}', **images,
    )  # fmt: skip
    return msgspec.structs.replace(record, **more)


def test_without_limits_all_is_seen_as_it_is() -> None:
    record = change({"a": 1}, {"a": 2})
    assert view(record, Limits()) is record


def test_channels() -> None:
    record = change({"a": 1}, {"a": 2})
    assert view(record, Limits(channels=frozenset({"orders", "products"}))) is record
    assert view(record, Limits(channels=frozenset({"orders"}))) is None
    assert view(record, Limits(channels=frozenset())) is None


def test_channels_and_rows_must_both_fit() -> None:
    record = change({"company_id": "ours"}, {"company_id": "ours"})
    assert view(record, Limits(frozenset({"products"}), OURS.where)) is record
    assert view(record, Limits(frozenset({"orders"}), OURS.where)) is None


def test_what_stays_within_is_seen_as_it_is() -> None:
    record = change({"company_id": "ours", "price": 1}, {"company_id": "ours", "price": 2})
    assert view(record, OURS) is record


def test_what_enters_is_created_and_its_past_is_hidden() -> None:
    seen = view(change({"company_id": "theirs"}, {"company_id": "ours"}), OURS)
    assert seen is not None
    assert (seen.change_type, seen.event_name, seen.after) == (CREATE, "created", b'{"company_id":"ours"}')
    assert (seen.before, seen.delta, seen.changed, seen.scope_before) == (None, None, None, None)


def test_what_leaves_is_deleted_and_its_future_is_hidden() -> None:
    seen = view(change({"company_id": "ours"}, {"company_id": "theirs"}, lookup=True, user_id="their owner"), OURS)
    assert seen is not None
    assert (seen.change_type, seen.event_name, seen.before) == (DELETE, "deleted", b'{"company_id":"ours"}')
    assert (seen.after, seen.delta, seen.changed, seen.scope_after) == (None, None, None, None)
    assert (seen.location_id, seen.user_id, seen.lookup) == (None, None, False)


def test_created_and_deleted_as_they_are() -> None:
    ours = {"company_id": "ours"}
    deleted = change(ours, None)
    assert view(deleted, OURS) is deleted
    created = view(change(None, ours), OURS)
    assert created is not None
    assert (created.change_type, created.after) == (CREATE, b'{"company_id":"ours"}')


def test_what_others_have_is_not_seen() -> None:
    theirs = {"company_id": "theirs"}
    for record in (change(None, theirs), change(theirs, theirs), change(theirs, None)):
        assert view(record, OURS) is None


@pytest.mark.parametrize(
    "scope", [None, b"{}", b'{"company":"ours"}', b'{"company_id":null}', b'{"company_id":["ours"]}']
)
def test_what_is_not_known_is_somebody_elses(scope: bytes | None) -> None:
    for kind in ChangeType:
        record = change({}, {}, change_type=kind, scope_before=scope, scope_after=scope)
        assert view(record, OURS) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [(7, "7"), (12.5, "12.5"), (True, "true"), ("7", "7"), ("ä\n", "ä\n"), ("", "")],
)
def test_fields_are_compared_as_text(value: object, text: str) -> None:
    record = change({"a": value, "b": 1}, {"a": value, "b": 1})
    assert view(record, Limits(where={"a": text, "b": "1"})) is record
    assert view(record, Limits(where={"a": text, "b": "2"})) is None
    assert view(record, Limits(where={"a": f"{text} "})) is None


def test_a_delete_that_says_what_came_after_hides_it() -> None:
    seen = view(change({"company_id": "ours"}, {"company_id": "theirs"}, change_type=DELETE), OURS)
    assert seen is not None
    assert (seen.change_type, seen.after, seen.changed) == (DELETE, None, None)


def test_null_is_no_text() -> None:
    assert view(change(None, {"a": None}), Limits(where={"a": "null"})) is None


def test_the_end_of_a_whole_type_reaches_everybody() -> None:
    truncated = change({"company_id": "theirs"}, None, entity_id=ALL, scope_before=None)
    seen = view(truncated, OURS)
    assert seen is not None
    assert (seen.change_type, seen.entity_id, seen.before, seen.location_id) == (DELETE, ALL, None, None)
    assert view(truncated, Limits(frozenset({"orders"}), OURS.where)) is None


def test_an_entity_whose_id_is_a_star_does_not() -> None:
    assert view(change({"company_id": "theirs"}, None, entity_id=ALL), OURS) is None


def test_a_published_event_keeps_its_name() -> None:
    record = change(None, {"company_id": "ours"}, change_type=EVENT, event="invoice-ready")
    seen = view(record, OURS)
    assert seen is not None
    assert (seen.change_type, seen.event_name) == (EVENT, "invoice-ready")


IMAGES = st.none() | st.fixed_dictionaries(
    {"company_id": st.sampled_from(["ours", "SECRET", None, 1]), "note": st.sampled_from(["a", "b"])}
)


@given(before=IMAGES, after=IMAGES, kind=st.sampled_from(ChangeType))
def test_nobody_sees_an_image_that_is_not_theirs(
    before: dict[str, Any] | None, after: dict[str, Any] | None, kind: ChangeType
) -> None:
    seen = view(change(before, after, change_type=kind), OURS)
    if seen is not None:
        assert b"SECRET" not in msgspec.json.encode(as_json(seen))
        assert "ours" in {image["company_id"] for image in (before, after) if image is not None}


@given(steps=st.lists(IMAGES, min_size=1))
def test_who_follows_one_limit_knows_what_is_within_it(steps: list[dict[str, Any] | None]) -> None:
    """CREATE, UPDATE and DELETE as they are seen add up to the entity as far as it may be seen."""
    known: bytes | None = None
    before: dict[str, Any] | None = None
    for after in steps:
        if before is None and after is None:
            continue
        seen = view(change(before, after), OURS)
        if seen is not None:
            assert (known is None) == (seen.change_type is CREATE)
            known = seen.after
        expected = after if after is not None and after["company_id"] == "ours" else None
        assert known == (None if expected is None else msgspec.json.encode(expected))
        before = after
