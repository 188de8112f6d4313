"""Strings that must not be shown."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from cdc.errors import ConfigError
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


_S = TypeVar("_S", bound=Secret)


def from_file(kind: type[_S], key: str, secret: _S | None, file: str | None) -> _S | None:
    """The secret itself, or what `file` holds; `None` if neither is given.

    key: the option's name, for the `ConfigError` where both are given or the file cannot be read.
    """
    if secret is not None and file is not None:
        raise ConfigError(f"{key}: excludes {key.rpartition('.')[2]}_file", hint="keep one of them")
    if file is None:
        return secret
    try:
        return kind(Path(file).read_text(encoding="utf-8").strip())
    except OSError as exc:
        raise ConfigError(f"{key}_file: {file}: {exc.strerror}", hint="it must be readable by this user") from exc
    except UnicodeDecodeError:
        raise ConfigError(f"{key}_file: {file}: not text", hint="write it as UTF-8") from None


def place_of(key: str, file: str | None) -> str:
    """Where a secret stands, for an error about what it holds."""
    return key if file is None else f"{key}_file: {file}"
