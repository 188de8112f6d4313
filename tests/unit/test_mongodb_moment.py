"""Cluster times out of resume tokens."""

from __future__ import annotations

import bson
import pytest
from bson.timestamp import Timestamp

from cdc.errors import DecodeError
from cdc.mongodb.moment import encode_moment, format_moment, has_passed, moment

EVENT = (
    "8267C867A2000000192B042C0100296E5A1004D3284E04D8914467A2160201812E4C4C463C6F7065726174696F6E54797065003C696E7365"
)
HIGH_WATER_MARK = "8267C867A3000000012B0429296E1404"


@pytest.mark.parametrize(
    ("data", "expected"), [(EVENT, (0x67C867A2, 0x19)), (HIGH_WATER_MARK, (0x67C867A3, 1)), ("82" + "0" * 16, (0, 0))]
)
def test_a_token_begins_with_its_cluster_time(data: str, expected: tuple[int, int]) -> None:
    seconds, increment = expected
    assert moment(bson.encode({"_data": data})) == seconds << 32 | increment
    assert moment(bson.encode({"first": 1, "_data": data})) == seconds << 32 | increment


def test_a_moment_is_a_position_too() -> None:
    position = encode_moment(0x67C867A200000019)
    assert bson.decode(position) == {"clusterTime": Timestamp(0x67C867A2, 0x19)}
    assert moment(position) == 0x67C867A200000019
    assert format_moment(moment(position)) == "1741186978:25"
    assert has_passed(bson.encode({"_data": HIGH_WATER_MARK}), position)
    assert not has_passed(bson.encode({"_data": EVENT}), position), "more may follow at the same moment"


@pytest.mark.parametrize(
    "position",
    [
        7,
        b"",
        b"\x05\0\0\0\0",
        *(bson.encode({"_data": data}) for data in ("", "82", "83" + "0" * 16, "82" + "x" * 16, 5)),
    ],
)
def test_anything_else_is_a_typed_error(position: int | bytes) -> None:
    with pytest.raises(DecodeError):
        moment(position)
