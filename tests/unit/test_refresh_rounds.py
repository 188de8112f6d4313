"""What a refresh reads ahead."""

from __future__ import annotations

from cdc.change import TableName
from cdc.position import Lsn
from cdc.postgres.refresh_read import KeyedTable, Part
from cdc.postgres.refresh_rounds import AHEAD_BYTES, AHEAD_ROWS, Begun, Ended, ReadParts

NAME = TableName("public", "t")
TABLE = KeyedTable(NAME, NAME, ("id",), ("int4",), ("id",), False, False, (), None)


def part(rows: int, size: int = 0, absent: bytes = b"") -> Part:
    return Part(TABLE, None, [(str(n),) for n in range(rows)], bytes(size), absent)


def test_it_is_bounded_by_rows_and_bytes() -> None:
    ahead = ReadParts()
    ahead.put(part(AHEAD_ROWS // 2))
    assert ahead.has_room(part(AHEAD_ROWS // 2, AHEAD_BYTES))
    assert not ahead.has_room(part(AHEAD_ROWS // 2 + 1))
    assert not ahead.has_room(part(AHEAD_ROWS // 2, absent=b"1\n"))
    assert not ahead.has_room(part(1, AHEAD_BYTES + 1))
    ahead.put(part(1, AHEAD_BYTES))
    assert not ahead.has_room(part(1, 1))
    ahead.take()
    ahead.take()
    assert ahead.has_room(part(AHEAD_ROWS, AHEAD_BYTES))


def test_even_parts_without_rows_are_not_kept_without_end() -> None:
    ahead = ReadParts()
    for _ in range(AHEAD_ROWS):
        ahead.put(part(0))
    assert not ahead.has_room(part(0))


def test_what_is_larger_than_may_be_kept_is_kept_alone() -> None:
    ahead = ReadParts()
    ahead.put(Begun(Lsn(1)))
    assert ahead.has_room(part(2 * AHEAD_ROWS, 2 * AHEAD_BYTES))
    ahead.put(part(2 * AHEAD_ROWS))
    assert not ahead.has_room(part(0))
    assert isinstance(ahead.take(), Begun)
    assert isinstance(ahead.take(), Part)
    ahead.put(Ended())
    assert ahead.take() == Ended()
    assert ahead.take() is None
