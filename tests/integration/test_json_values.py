"""Values in the feed look as PostgreSQL's own `to_jsonb` shows them."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import pytest

from cdc.postgres.connection import connect
from cdc.postgres.json_values import encoder
from tests.servers import Database

VALUES = {
    "boolean": ["t", "f"],
    "smallint": ["-1"],
    "bigint": ["9223372036854775807"],
    "numeric": ["0.10", "-12345678901234567890.123456789012345", "NaN", "Infinity", "1e-20"],
    "real": ["1.5", "1e+20", "-0", "NaN"],
    "double precision": ["0.1", "1e-07", "-Infinity"],
    "text": ["", 'quote " and \\ and \n and ü and 🎉', "null"],
    "char(5)": ["ab"],
    "bytea": [r"\x00ff"],
    "uuid": ["a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"],
    "date": ["2026-11-21", "infinity", "0044-03-15 BC"],
    "time": ["24:00:00"],
    "timestamp": ["2026-11-21 10:15:30.123456", "infinity", "12026-01-01 00:00:00", "0044-03-15 10:00:00 BC"],
    "timestamptz": ["2026-11-21 10:15:30+00", "2026-11-21 10:15:30.5+05:30", "-infinity", "1800-01-01 00:00:00+00"],
    "interval": ["1 day 02:00:00"],
    "json": ['{"b": 1.50,\n "a": [null, true, 12345678901234567890.10]}', '"text"', "null"],
    "jsonb": ['{"b": 1.50, "a": [null, true]}'],
    "inet": ["10.0.0.1/8"],
    "point": ["(1,2)"],
    "int[]": ["{1,2,NULL}", "{}", "{{1,2},{3,4}}"],
    "text[]": ['{a,"b,c","d\\"e",NULL,"NULL",""}'],
    "numeric[]": ["{1.50,2}", "{NaN,-Infinity,1e-20}", "[0:1]={1,2}"],
    "double precision[]": ["{0.1,1e+300,NaN,Infinity}"],
    "boolean[]": ["{t,f}"],
    "bytea[]": [r'{"\\x00ff"}'],
    "date[]": ["{2026-11-21,infinity}"],
    "timestamptz[]": ["{2026-11-21 10:15:30+00,infinity}"],
    "interval[]": ["{1 day 02:00:00}"],
    "box[]": ["{(1,1),(0,0);(2,2),(1,1)}"],
    "json[]": ['{"{\\"b\\": 1.50}",NULL,"[1,2]","{}"}'],
    "jsonb[]": ['{"{\\"a\\": 12345678901234567890.10}"}', '{"{\\"a\\": \\"}{,\\"}"}'],
    "int4range[]": ['{"[1,5)"}'],
    "uuid[]": ["{a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11}"],
    "tsvector": ["'a':1 'b':2"],
    "int4range": ["[1,5)"],
}


@pytest.mark.parametrize("type_name", VALUES)
def test_values_are_as_to_jsonb_shows_them(type_name: str, source_db: Database) -> None:
    with connect(source_db.url) as connection:
        for value in VALUES[type_name]:
            oid, text, shown = connection.execute(
                f"SELECT '{type_name}'::regtype::oid::int, format('%%s', v), to_jsonb(v)::text"
                f" FROM (SELECT CAST(%s AS {type_name})) AS x (v)",
                [value],
            ).fetchone() or (0, "", "")
            assert decoded(encoder(oid)(text.encode())) == decoded(shown.encode()), value


def decoded(value: bytes) -> Any:
    """Numbers with all their digits."""
    return as_decimals(json.loads(value, parse_float=Decimal))


def as_decimals(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: as_decimals(item) for name, item in value.items()}
    if isinstance(value, list):
        return [as_decimals(item) for item in value]
    return Decimal(value) if isinstance(value, int) and not isinstance(value, bool) else value


def test_unknown_types_are_their_text() -> None:
    assert encoder(99_999)(b'a "b"') == b'"a \\"b\\""'


def test_bytes_that_are_no_text_do_no_harm() -> None:
    assert encoder(25)(b"\xff") == b'"\xef\xbf\xbd"'
    assert encoder(1007)(b"{not an array") == b'"{not an array"'
    assert encoder(114)(b"{broken") == b'"{broken"'
    assert encoder(1700)(b"1e") == b'"1e"'
