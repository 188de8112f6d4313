"""Small parts of applying changes to MongoDB."""

from __future__ import annotations

from typing import Any

import bson
import pytest

from cdc.mongodb.apply import _at


@pytest.mark.parametrize(
    ("path", "value"),
    [("a", {"b": [1, {"c": "x"}]}), ("a.b", [1, {"c": "x"}]), ("a.b.1.c", "x"), ("d", 5), ("d.e", None), ("z.y", None)],
)
def test_f82_what_a_document_would_have_in_an_index(path: str, value: Any) -> None:
    image = bson.encode({"_id": 1, "a": {"b": [1, {"c": "x"}]}, "d": 5})
    assert bson.encode({path: value})[4:-1] == _at(image, path.encode())
