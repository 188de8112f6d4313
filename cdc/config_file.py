"""The only reader of TOML and environment: a file becomes frozen structs, or a `ConfigError` that names the key."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from cdc import http_config
from cdc.choices import hint_of, is_of_form, path_of
from cdc.config import Config
from cdc.config_rules import ALL_OPTIONS, check_filters, complete_alerts, complete_sink, complete_source, without_own
from cdc.errors import ConfigError
from cdc.secret import Secret
from cdc.urls import KINDS

OptionsOf = Callable[[str], type[msgspec.Struct] | None]
"""The struct of the options that a kind of sink has of its own. Raises `ConfigError` for an unknown kind."""


def load(path: Path, environment: Mapping[str, str] | None = None, *, options_of: OptionsOf | None = None) -> Config:
    """Read and check a file. Raises `ConfigError` naming the file, the key and the reason.

    options_of: knows the kinds of sinks; without it, there are mirrors only.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        hint = "name the file with --config, or write it from config.example.toml"
        if isinstance(exc, PermissionError):
            hint = (
                "let the user that runs cdc read it; what nobody else may see belongs into files of its own (url_file)"
            )
        raise ConfigError(f"{path}: {exc.strerror or exc}", hint=hint) from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path}: not valid TOML: {exc}", hint="see config.example.toml") from exc
    try:
        return parse(raw, environment if environment is not None else os.environ, options_of=options_of)
    except ConfigError as exc:
        raise ConfigError(f"{path}: {exc}", hint=exc.hint) from exc


def parse(raw: dict[str, Any], environment: Mapping[str, str], *, options_of: OptionsOf | None = None) -> Config:
    """Turn decoded TOML into a `Config`; the file's name is for the caller to add."""
    expanded = _expand(raw, environment, "")
    options = _take_options(expanded.get("sinks"), options_of or _mirrors_only)
    try:
        config = msgspec.convert(expanded, Config, dec_hook=_decode_hook)
    except msgspec.ValidationError as exc:
        raise _refusal(exc, expanded, Config) from exc
    http = http_config.complete(config.http)
    alerts = complete_alerts(config.alerts)
    sources = {name: complete_source(name, source) for name, source in config.sources.items()}
    sinks = {name: complete_sink(name, sink, options.get(name), sources) for name, sink in config.sinks.items()}
    config = msgspec.structs.replace(config, http=http, alerts=alerts, sources=sources, sinks=sinks)
    check_filters(config)
    return msgspec.structs.replace(
        config, sources={name: without_own(source, config.own_tables(source)) for name, source in sources.items()}
    )


def _mirrors_only(kind: str) -> None:
    if kind not in KINDS.values():
        raise ConfigError(f"no sink is of kind {kind!r}", hint=f"one of: {', '.join(sorted(set(KINDS.values())))}")


def _take_options(sinks: Any, options_of: OptionsOf) -> dict[str, msgspec.Struct]:
    """Take out of each sink's section what only its kind knows, as that kind's struct."""
    taken: dict[str, msgspec.Struct] = {}
    for name, section in sinks.items() if isinstance(sinks, dict) else ():
        kind = section.get("kind") if isinstance(section, dict) else None
        if not isinstance(kind, str) or not kind:
            continue
        try:
            struct = options_of(kind)
        except ConfigError as exc:
            raise ConfigError(f"sinks.{name}.kind: {exc}", hint=exc.hint) from exc
        if struct is None:
            continue
        known = {field.encode_name for field in msgspec.structs.fields(struct)}
        own = {key: section.pop(key) for key in known & section.keys()}
        try:
            taken[name] = msgspec.convert(own, struct)
        except msgspec.ValidationError as exc:
            raise _refusal(exc, own, struct, f"sinks.{name}") from exc
        except ConfigError as exc:
            raise ConfigError(f"sinks.{name}.{exc}", hint=exc.hint) from exc
    return taken


def _expand(value: Any, environment: Mapping[str, str], key: str) -> Any:
    """Replace `${NAME}` in every string; `$$` stands for one dollar."""
    if isinstance(value, dict):
        return {name: _expand(item, environment, f"{key}.{name}" if key else name) for name, item in value.items()}
    if isinstance(value, list):
        return [_expand(item, environment, key) for item in value]
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        name = match[1]
        if name not in environment:
            # no colon behind the key: what follows `token:` would be struck out as a secret
            raise ConfigError(f"{key} needs the environment variable {name}", hint=f"export {name}, or write $$ for $")
        return environment[name]

    return re.sub(r"\$\$|\$\{([A-Za-z_][A-Za-z0-9_]*)\}", replace, value)


def _decode_hook(kind: type, value: object) -> object:
    if issubclass(kind, Secret) and isinstance(value, str):
        return kind(value)
    raise TypeError(f"Expected `str`, got `{type(value).__name__}`")  # msgspec adds the path


def _refusal(
    error: msgspec.ValidationError, value: dict[str, Any], kind: type[msgspec.Struct], section: str = ""
) -> ConfigError:
    """Turn msgspec's `... - at `$.sources[...].url`` into `sources.shop.url: ...`.

    value: what is no `kind`. section: what the message calls `$`.
    """
    message = str(error)
    reason, _, where = message.partition(" - at `")
    if where.startswith("key`"):  # a dict key that breaks its pattern: msgspec says only that it is one
        part = where.rpartition(".")[2].rstrip("`")
        return ConfigError(f"{part}: names consist of a-z, 0-9 and _, and start with a letter", hint=ALL_OPTIONS)
    path = path_of(message, value, lambda each: msgspec.convert(each, kind, dec_hook=_decode_hook))
    place = f"{section}.{path}".strip(".")
    hint = hint_of(message, kind)
    if hint and is_of_form(reason):
        reason = "not of the expected form"
    return ConfigError(f"{place}: {reason}" if place else reason, hint=hint or ALL_OPTIONS)
