"""What of a configuration can change while the daemon runs, and what takes a restart."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any, Final, TypeVar

import msgspec

from cdc.config import Config, SinkConfig, SourceConfig
from cdc.errors import ConfigError

_Side = TypeVar("_Side", SourceConfig, SinkConfig)

CHANGEABLE: Final = (
    "daemon.log_level",
    "daemon.log_format",
    "daemon.drain_seconds",
    "http.tokens",
    "queue.*",
    "sinks.*.batch.*",
    "sinks.*.max_parked",
    "sinks.*.max_parked_bytes",
    "sinks.*.retry.*",
    "sinks.*.retention",
    "sinks.*.entities.*.retention",
)
"""Globs over the names of options."""


def changes(running: Config, wanted: Config) -> list[str]:
    """The options that differ, by name. Raises `ConfigError` if one of them takes a restart: then none is to change."""
    found = list(_differences("", running, wanted))
    renewed = with_passwords(running, wanted)
    fixed = [
        name for name in _differences("", renewed, wanted) if not any(fnmatchcase(name, glob) for glob in CHANGEABLE)
    ]
    if _ways_in(running) != _ways_in(wanted):
        fixed.append("http.tokens (the first, the last, or other fields in `where`)")
    if fixed:
        raise ConfigError(
            f"a change takes a restart: {', '.join(fixed)}", hint="restart the daemon, or undo that and reload again"
        )
    return found


def with_passwords(running: Config, wanted: Config) -> Config:
    """The running one, with the passwords of wanted urls that are the same in all else."""
    sources = {name: _with_password(source, wanted.sources.get(name)) for name, source in running.sources.items()}
    sinks = {name: _with_password(sink, wanted.sinks.get(name)) for name, sink in running.sinks.items()}
    return msgspec.structs.replace(running, sources=sources, sinks=sinks)


def _with_password(running: _Side, wanted: _Side | None) -> _Side:
    # as a string, a url is without its password
    if wanted is None or str(running.url) != str(wanted.url):
        return running
    return msgspec.structs.replace(running, url=wanted.url)


def reconnecting(before: Config, after: Config) -> list[str]:
    """The sources and sinks whose passwords differ; a sink also connects to its source."""
    sources = [name for name, source in after.sources.items() if source.url != before.sources[name].url]
    sinks = [name for name, sink in after.sinks.items() if sink.url != before.sinks[name].url or sink.source in sources]
    return [*sources, *sinks]


def _ways_in(config: Config) -> tuple[bool, tuple[str, ...]]:
    """What is decided about tokens when the daemon starts: whether any are needed, and what a feed keeps for them."""
    return config.http.guarded, config.http.row_limits


def _differences(name: str, one: Any, other: Any) -> Iterator[str]:
    if one == other:
        return
    if isinstance(one, msgspec.Struct) and type(one) is type(other):
        for field in msgspec.structs.fields(one):
            # the options that only its kind knows stand beside those of all sinks
            part = name if field.name == "options" else _below(name, field.encode_name)
            yield from _differences(part, getattr(one, field.name), getattr(other, field.name))
    elif isinstance(one, dict) and isinstance(other, dict):
        for key in dict.fromkeys((*one, *other)):
            yield from _differences(_below(name, key), one.get(key), other.get(key))
    else:
        yield name


def _below(name: str, part: str) -> str:
    return f"{name}.{part}" if name else part
