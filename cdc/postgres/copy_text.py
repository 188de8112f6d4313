"""Rows in COPY's text format. Values are text already; only what COPY would misread is escaped. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

from cdc.change import Image
from cdc.postgres.row import UNCHANGED, Row, Value, short_texts


def plain_text_in_python(images: Collection[Image], width: int) -> tuple[bytes, Collection[Image]]:
    """Those rows that are nothing but short texts without special characters, as text; and the others.

    Nine of ten rows are like that, and this is what the daemon does most: no row is made of them. `plain_text` is
    the same compiled, where there was a compiler; that one also writes rows with NULLs, long and special values.
    """
    lines: list[bytes] = []
    others: list[Image] = []
    for image in images:
        values = short_texts(image)
        if values is not None and len(values) == width:
            lines.append(b"\t".join(values))
        else:
            others.append(image)
    text = _lines(lines)
    if lines and not _is_plain(text, len(lines), width, backslashes=0):
        return b"", images
    return text, others


def copy_text(rows: Sequence[Row]) -> bytes:
    """Rows without UNCHANGED columns."""
    if not rows:
        return b""
    nulls = 0
    lines = []
    for row in rows:
        if None in row:
            nulls += row.count(None)
            lines.append(b"\t".join([b"\\N" if value is None else value for value in row]))  # type: ignore[misc]
        else:
            lines.append(b"\t".join(row))  # type: ignore[arg-type]
    text = _lines(lines)
    if _is_plain(text, len(rows), len(rows[0]), backslashes=nulls):
        return text
    return b"".join([b"\t".join(map(_escaped, row)) + b"\n" for row in rows])


def _lines(lines: list[bytes]) -> bytes:
    return b"\n".join([*lines, b""])


def _is_plain(text: bytes, rows: int, width: int, *, backslashes: int) -> bool:
    """Whether all special bytes are those that were put in here; nearly always they are."""
    return (
        text.count(b"\\") == backslashes
        and text.count(b"\n") == rows
        and text.count(b"\t") == rows * (width - 1)
        and b"\r" not in text
    )


def _escaped(value: Value) -> bytes:
    if value is None:
        return b"\\N"
    assert value is not UNCHANGED
    return value.replace(b"\\", b"\\\\").replace(b"\t", b"\\t").replace(b"\n", b"\\n").replace(b"\r", b"\\r")


try:
    from cdc.postgres import _copy_text
except ImportError:
    plain_text = plain_text_in_python
else:
    plain_text = _copy_text.plain_text

COMPILED: Final = plain_text is not plain_text_in_python
