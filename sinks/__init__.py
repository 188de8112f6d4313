"""Sinks: one file each, found by its name in the configuration."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from cdc.errors import ConfigError


def load(kind: str) -> type[Any]:
    """The sink class of a kind: `data_changes` is `DataChangesSink` in `sinks/data_changes.py`.

    It is called with the sink's `SinkConfig` and a `cdc.sink.SinkContext`. Raises `ConfigError` for an unknown kind.
    """
    name = f"{__name__}.{kind}"
    try:
        module = import_module(name)
    except ModuleNotFoundError as exc:
        if exc.name != name:
            raise
        raise ConfigError(f"no sink is of kind {kind!r}", hint="each kind is a file in sinks/") from exc
    found = getattr(module, "".join(part.capitalize() for part in kind.split("_")) + "Sink")
    assert isinstance(found, type)
    return found


def options_of(kind: str) -> type[Any] | None:
    """The struct of the options that a kind has besides those of all sinks: its class's `Options`, if it has one."""
    found: type[Any] | None = getattr(load(kind), "Options", None)
    return found
