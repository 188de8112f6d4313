"""Logging: one line a fact, to stderr; for people on a terminal, as JSON elsewhere. Never a value, never a secret."""

from __future__ import annotations

import logging
import re
import sys
from contextlib import suppress
from typing import Any, Final, Literal, TextIO

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

Format = Literal["auto", "console", "json"]

_URL_PASSWORD: Final = re.compile(r"(\b[a-z][a-z0-9+.-]*://[^\s:/@]*:)\S*(?=@)", re.IGNORECASE)
_NAMED_SECRET: Final = re.compile(
    r"(\b\w*(?:password|secret|token)\s*[=:]\s*)('(?:[^'\\]|\\.)*'|[^\s&'\"]+)", re.IGNORECASE
)


def configure(log_format: Format = "auto", level: str = "info", stream: TextIO | None = None) -> None:
    """Set up structlog, and the standard library's logging (uvicorn, asyncio) through the same processors."""
    stream = sys.stderr if stream is None else stream
    for_people = log_format == "console" or (log_format == "auto" and stream.isatty())
    threshold = logging.getLevelNamesMapping()[level.upper()]
    renderer = _console(stream) if for_people else structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[*_processors(), renderer],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=lambda *_: _Writer(stream),
        cache_logger_on_first_use=False,
    )
    _configure_standard_library(renderer, threshold, stream)


class _Writer(structlog.WriteLogger):
    """Writes a line at once: libpq, and whoever else has the descriptor, would come between it and its end.

    What cannot be written is dropped: no work stops because the log's disk is full, or nobody reads its pipe.
    """

    def msg(self, message: str) -> None:
        """Write a line."""
        with suppress(OSError):
            super().msg(message)

    log = debug = info = warn = warning = msg
    fatal = failure = err = error = critical = exception = msg


def redact(text: str) -> str:
    """The text with the passwords of URLs, and whatever is written as `password=...`, struck out."""
    return _NAMED_SECRET.sub(r"\1***", _URL_PASSWORD.sub(r"\1***", text))


def redact_event(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Strike out secrets in everything that is about to be written."""
    return {key: _redact_value(value) for key, value in event.items()}


def _redact_value(value: Any) -> Any:
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, int | float | None):
        return value
    if isinstance(value, list | tuple):
        return [_redact_value(item) for item in value]
    return redact(str(value))


def _processors() -> list[Processor]:
    return [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,  # before redaction: a traceback quotes messages
        redact_event,
    ]


def _console(stream: TextIO) -> Processor:
    return structlog.dev.ConsoleRenderer(
        colors=stream.isatty(), exception_formatter=structlog.dev.plain_traceback, pad_event_to=0
    )


def _configure_standard_library(renderer: Processor, threshold: int, stream: TextIO) -> None:
    remove_meta = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(foreign_pre_chain=_processors(), processors=[remove_meta, renderer])
    )
    logging.basicConfig(handlers=[handler], level=max(threshold, logging.WARNING), force=True)
    # it warns of what it ignores while an error is on its way: we tell of the error
    logging.getLogger("psycopg").setLevel(logging.ERROR)
