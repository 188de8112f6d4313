"""Answers: JSON by msgspec, errors as `{"error", "hint"}`."""

from __future__ import annotations

import msgspec
from starlette.responses import Response


class Failure(msgspec.Struct, frozen=True):
    """What went wrong, and what to do about it (which may be empty)."""

    error: str
    hint: str = ""


def answer(value: object, status: int = 200) -> Response:
    """A JSON answer."""
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def failure(status: int, error: str, hint: str = "") -> Response:
    """An error that a person can act on."""
    return answer(Failure(error, hint), status)
