"""Strings that must not be shown."""

from __future__ import annotations

from cdc.urls import redact


class Secret:
    """A string that shows itself only when asked: a connection URL with its password."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        """Return the text itself: for a connection, never for a log."""
        return self._text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._text == self._text

    def __hash__(self) -> int:
        return hash(self._text)

    def __repr__(self) -> str:
        return f"Secret({self})"

    def __str__(self) -> str:
        return redact(self._text)


class Token(Secret):
    """A secret of which no part may be shown."""

    __slots__ = ()

    def __str__(self) -> str:
        return "***"
