"""Rows as JSON objects."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from cdc.feed.record import Json
from cdc.postgres.json_values import Encode
from cdc.postgres.row import UNCHANGED, Row

Shown = tuple[int, bytes, Encode]
"""A column's place in the row, its `"name":`, and what encodes its values."""


class JsonObjectInPython:
    """What some columns of a table look like. `JsonObject` is the same, compiled where it can be."""

    def __init__(self, columns: Iterable[Shown]) -> None:
        self._columns = list(columns)

    def of(self, values: Row) -> Json:
        """`{"name":value,...}` of a row, without what did not travel."""
        found = [
            prefix + (show(value) if isinstance(value := values[index], bytes) else b"null")
            for index, prefix, show in self._columns
            if values[index] is not UNCHANGED
        ]
        return b"{%s}" % b",".join(found)


if TYPE_CHECKING:
    JsonObject = JsonObjectInPython
else:
    try:
        from cdc.postgres._feed import JsonObject
    except ImportError:
        JsonObject = JsonObjectInPython
