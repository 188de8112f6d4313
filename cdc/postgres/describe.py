"""A change by column, in the source's own text, for people. Looked up by `cdc.kinds`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from cdc.change import Batch, Change, Ddl, Message, Operation, Table, Truncate
from cdc.letter import Described
from cdc.postgres.row import UNCHANGED, Row, decode_key, decode_row

_encode: Final = msgspec.json.Encoder().encode


def describe(batch: Batch) -> Described:
    """The only change of a batch. Columns that did not travel are left out."""
    change = batch.transactions[0].changes[0]
    table = batch.tables[change.table] if change.table >= 0 else None
    key = None if table is None else _key(table, change)
    return Described(
        operation=Operation(change.operation).name.lower(),
        key=key,
        change=msgspec.Raw(_encode(_content(batch.tables, table, change))),
    )


def _key(table: Table, change: Change) -> dict[str, str | None] | None:
    """What the row was found by, else what an insert has in the key's columns."""
    if change.key is not None:
        return _columns(table, decode_key(change.key))
    image = change.before or change.after
    if image is None:
        return None
    keys = {column.name for column in table.columns if column.is_key}
    return {name: value for name, value in _columns(table, decode_row(image)).items() if name in keys} or None


def _content(tables: Sequence[Table], table: Table | None, change: Change) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if table is not None:
        for name, image in (("before", change.before), ("after", change.after)):
            if image is not None:
                found[name] = _columns(table, decode_row(image))
    if isinstance(change.detail, Truncate):
        found["truncate"] = {
            "tables": [str(tables[index].qualified) for index in change.detail.tables],
            "cascade": change.detail.cascade,
            "restartIdentity": change.detail.restart_identity,
        }
    elif isinstance(change.detail, Ddl):
        found["ddl"] = {"kind": change.detail.kind, "shape": msgspec.Raw(change.detail.description)}
    elif isinstance(change.detail, Message):
        found["message"] = {"prefix": change.detail.prefix, "content": _text(change.detail.content)}
    return found


def _columns(table: Table, row: Row) -> dict[str, str | None]:
    return {
        column.name: None if value is None else _text(value)
        for column, value in zip(table.columns, row, strict=True)
        if value is not UNCHANGED
    }


def _text(value: bytes) -> str:
    return value.decode("utf-8", "backslashreplace")
