"""The wire protocol: OP_MSG, and the legacy OP_QUERY with which a driver may say hello.

Source: the manual's "MongoDB Wire Protocol". Decoding is pure; malformed messages are `ProtocolError`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Final

OP_REPLY: Final = 1
OP_QUERY: Final = 2004
OP_MSG: Final = 2013
MAX_MESSAGE_BYTES: Final = 48_000_000

CHECKSUM_PRESENT: Final = 1
MORE_TO_COME: Final = 2

HEADER = struct.Struct("<iiii")
_int32 = struct.Struct("<i").unpack_from
_uint32 = struct.Struct("<I").unpack_from


class ProtocolError(Exception):
    """Bytes that are no message; the connection is closed, as a server does."""


@dataclass(slots=True)
class Message:
    """A command's bytes: the body document and the document sequences, by field name."""

    request_id: int
    opcode: int
    body: bytes
    sequences: dict[bytes, list[bytes]] = field(default_factory=dict)
    more_to_come: bool = False
    database: str | None = None
    """The database of an OP_QUERY; an OP_MSG has it in the field `$db`."""


def decode(request_id: int, opcode: int, payload: bytes) -> Message:
    """One message without its header."""
    try:
        if opcode == OP_MSG:
            return _decode_msg(request_id, payload)
        if opcode == OP_QUERY:
            return _decode_query(request_id, payload)
    except (struct.error, ValueError, IndexError) as exc:
        raise ProtocolError(f"malformed message: {exc}") from exc
    raise ProtocolError(f"opcode {opcode} is not supported")


def _decode_msg(request_id: int, payload: bytes) -> Message:
    flags = _uint32(payload, 0)[0]
    if flags & 0xFFFF & ~3:
        raise ProtocolError(f"unknown required flag bits {flags:#x}")
    end = len(payload) - (4 if flags & CHECKSUM_PRESENT else 0)
    at = 4
    body = None
    sequences: dict[bytes, list[bytes]] = {}
    while at < end:
        kind = payload[at]
        size = _int32(payload, at + 1)[0]
        if size < 5 or at + 1 + size > end:
            raise ProtocolError(f"section of {size} bytes at {at} of {end}")
        section = payload[at + 1 : at + 1 + size]
        if kind == 0:
            body = section
        elif kind == 1:
            name, documents = _decode_sequence(section)
            sequences[name] = documents
        else:
            raise ProtocolError(f"section of unknown kind {kind}")
        at += 1 + size
    if body is None:
        raise ProtocolError("no body section")
    return Message(request_id, OP_MSG, body, sequences, bool(flags & MORE_TO_COME))


def _decode_sequence(section: bytes) -> tuple[bytes, list[bytes]]:
    stop = section.index(b"\0", 4)
    documents = []
    at = stop + 1
    while at < len(section):
        size = _int32(section, at)[0]
        if size < 5:
            raise ProtocolError("document too short in a sequence")
        documents.append(section[at : at + size])
        at += size
    return section[4:stop], documents


def _decode_query(request_id: int, payload: bytes) -> Message:
    stop = payload.index(b"\0", 4)
    database, _, collection = payload[4:stop].decode().partition(".")
    if collection != "$cmd":
        raise ProtocolError("OP_QUERY is only supported for hello")
    at = stop + 9
    size = _int32(payload, at)[0]
    return Message(request_id, OP_QUERY, payload[at : at + size], database=database)


def encode_reply(request_id: int, response_to: int, opcode: int, body: bytes) -> bytes:
    """The bytes of an answer, in the format in which the question came."""
    if opcode == OP_QUERY:
        payload = struct.pack("<iqii", 8, 0, 0, 1) + body
        return HEADER.pack(16 + len(payload), request_id, response_to, OP_REPLY) + payload
    return HEADER.pack(21 + len(body), request_id, response_to, OP_MSG) + b"\0\0\0\0\0" + body
