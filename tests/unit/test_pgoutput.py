"""The decoder on messages made by hand, and on arbitrary bytes."""

import contextlib
from struct import pack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc.change import Column, Table
from cdc.errors import DecodeError
from cdc.postgres import pgoutput
from cdc.postgres.pgoutput import decode
from cdc.postgres.row import UNCHANGED, Value, decode_row, encode_row


def text(value: str) -> bytes:
    return value.encode() + b"\0"


def row(*values: Value) -> bytes:
    return encode_row(values)


MESSAGES = {
    "begin": (b"B" + pack(">QqI", 100, 5, 7), pgoutput.Begin(100, 946_684_800_000_005, 7)),
    "commit": (b"C" + pack(">BQQq", 0, 100, 120, 5), pgoutput.Commit(100, 120, 946_684_800_000_005)),
    "origin": (b"O" + pack(">Q", 9) + text("other"), pgoutput.Origin(9, "other")),
    "relation": (
        b"R"
        + pack(">I", 16400)
        + text("public")
        + text("orders")
        + b"d"
        + pack(">H", 2)
        + b"\1"
        + text("id")
        + pack(">Ii", 23, -1)
        + b"\0"
        + text("état")
        + pack(">Ii", 25, -1),
        pgoutput.Relation(
            16400, Table("public", "orders", (Column("id", 23, True), Column("état", 25, False)), "d", 16400)
        ),
    ),
    "relation in pg_catalog": (
        b"R" + pack(">I", 1) + text("") + text("t") + b"n" + pack(">H", 0),
        pgoutput.Relation(1, Table("pg_catalog", "t", (), "n", 1)),
    ),
    "type": (b"Y" + pack(">I", 16500) + text("public") + text("mood"), pgoutput.TypeName(16500, "public", "mood")),
    "insert": (b"I" + pack(">I", 1) + b"N" + row(b"1", None, b""), pgoutput.Insert(1, row(b"1", None, b""))),
    "insert of a long value": (
        b"I" + pack(">I", 1) + b"N" + row(b"x" * 200_000, b"y"),
        pgoutput.Insert(1, row(b"x" * 200_000, b"y")),
    ),
    "update": (
        b"U" + pack(">I", 1) + b"N" + row(b"1", UNCHANGED),
        pgoutput.Update(1, None, None, row(b"1", UNCHANGED)),
    ),
    "update of the key": (
        b"U" + pack(">I", 1) + b"K" + row(b"1", None) + b"N" + row(b"2", b"a"),
        pgoutput.Update(1, row(b"1", None), None, row(b"2", b"a")),
    ),
    "update, identity full": (
        b"U" + pack(">I", 1) + b"O" + row(b"1", None) + b"N" + row(b"2", b"a"),
        pgoutput.Update(1, None, row(b"1", None), row(b"2", b"a")),
    ),
    "delete": (b"D" + pack(">I", 1) + b"K" + row(b"1", None), pgoutput.Delete(1, row(b"1", None), None)),
    "delete, identity full": (b"D" + pack(">I", 1) + b"O" + row(b"1", None), pgoutput.Delete(1, None, row(b"1", None))),
    "truncate": (b"T" + pack(">IBII", 2, 3, 16400, 16401), pgoutput.Truncate((16400, 16401), True, True)),
    "message": (
        b"M" + pack(">BQ", 1, 77) + text("cdc.context") + pack(">I", 2) + b"{}",
        pgoutput.LogicalMessage(True, 77, "cdc.context", b"{}"),
    ),
}


def read(data: bytes) -> None:
    """Decode a message and the rows in it."""
    message = decode(data)
    for name in ("key", "before", "after"):
        image = getattr(message, name, None)
        if image is not None:
            decode_row(image)


@pytest.mark.parametrize("name", MESSAGES)
def test_decodes(name: str) -> None:
    data, message = MESSAGES[name]
    assert decode(data) == message
    assert decode(b"x" * 25 + data, 25) == message


@pytest.mark.parametrize("name", MESSAGES)
def test_every_truncation_and_every_extra_byte_is_a_decode_error(name: str) -> None:
    data, _ = MESSAGES[name]
    lengths = range(len(data)) if len(data) < 1000 else [*range(20), 65_543, len(data) - 1]
    for length in lengths:
        with pytest.raises(DecodeError):
            read(data[:length])
    with pytest.raises(DecodeError):
        read(data + b"\0")


@pytest.mark.parametrize("kind", "SEcAbPKrp")
def test_f42_streamed_and_prepared_transactions_are_refused_by_name(kind: str) -> None:
    with pytest.raises(DecodeError, match="was not asked for"):
        decode(kind.encode() + b"\0" * 40)


def test_an_old_row_ends_where_the_new_one_begins() -> None:
    long, large = b"x" * 300, b"y" * 70_000
    update = decode(b"U" + pack(">I", 1) + b"O" + row(long, None, b"", large) + b"N" + row(b"1", UNCHANGED, b"2", b"3"))
    assert isinstance(update, pgoutput.Update)
    assert update.before is not None
    assert (decode_row(update.before), decode_row(update.after)) == (
        (long, None, b"", large),
        (b"1", UNCHANGED, b"2", b"3"),
    )


@given(st.binary(max_size=300))
def test_arbitrary_bytes_give_a_message_or_a_decode_error(data: bytes) -> None:
    with contextlib.suppress(DecodeError):
        read(data)


@given(st.sampled_from(sorted(MESSAGES)), st.data())
def test_damaged_messages_give_a_message_or_a_decode_error(name: str, draw: st.DataObject) -> None:
    data = bytearray(MESSAGES[name][0][:2000])
    for _ in range(draw.draw(st.integers(1, 4))):
        data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    with contextlib.suppress(DecodeError):
        read(bytes(data[: draw.draw(st.integers(0, len(data)))]))
