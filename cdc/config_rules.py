"""What a configuration is completed by, and what must hold in it beyond the types of its fields."""

from __future__ import annotations

import re
from glob import escape
from typing import Final

import msgspec

from cdc import kinds
from cdc.change import TableName
from cdc.config import AlertOptions, Config, SinkConfig, SourceConfig, TableGlobs
from cdc.errors import CdcError, ConfigError
from cdc.secret import Secret, Token, from_file, place_of
from cdc.urls import KINDS, MONGODB, POSTGRES, backup_of, database_of, kind_of

ALL_OPTIONS: Final = "config.example.toml lists every option"


_SCHEMES: Final = f"one of: {', '.join(f'{scheme}://' for scheme in KINDS)}"


def complete_alerts(options: AlertOptions) -> AlertOptions:
    """Read the secret that is in a file. Raises `ConfigError` where it is no URL of a webhook."""
    webhook = from_file(Token, "alerts.webhook", options.webhook, options.webhook_file)
    if webhook is not None and not re.match(r"https?://[^/\s]+[^\s]*$", webhook.reveal()):
        place = place_of("alerts.webhook", options.webhook_file)
        raise ConfigError(f"{place}: not an URL", hint="https:// or http://, without blanks")
    return msgspec.structs.replace(options, webhook=webhook)


def check_url(place: str, url: Secret) -> None:
    """Raises `ConfigError` for what cannot be read.

    Nothing of it is quoted: it may be a password, from the wrong file or with special characters in it.
    A scheme of no database is left to the sink's kind.
    """
    text, kind = url.reveal(), kind_of(url.reveal())
    if "://" not in text and "=" not in text:
        raise ConfigError(f"{place}: {'not an url' if text else 'empty'}", hint=_SCHEMES)
    if "://" in text and len(text.splitlines()) > 1:
        raise ConfigError(f"{place}: more than one line", hint="one url, in one line")
    try:
        if kind is not None:
            kinds.check_url(kind, text)
    except CdcError as exc:
        raise ConfigError(f"{place}: {exc}", hint=exc.hint) from None


def _kind_at(place: str, url: Secret) -> str:
    """The kind of the database that an URL leads to. Raises `ConfigError` where there is none."""
    kind = kind_of(url.reveal())
    if kind is None:
        scheme = url.reveal().partition("://")[0][:20]
        raise ConfigError(f"{place}: no database has the scheme {scheme!r}", hint=_SCHEMES)
    return kind


def complete_source(name: str, source: SourceConfig) -> SourceConfig:
    """Fill in what follows from the rest. Raises `ConfigError` for what does not fit together."""
    url = from_file(Secret, f"sources.{name}.url", source.url, source.url_file)
    if url is None:
        raise ConfigError(f"sources.{name}.url: missing", hint="set url or url_file")
    place = place_of(f"sources.{name}.url", source.url_file)
    check_url(place, url)
    _kind_at(place, url)
    source = msgspec.structs.replace(source, name=name, url=url)
    _check_kind(name, source)
    if source.kind == MONGODB:
        if source.tables.include == TableGlobs().include:
            database = database_of(url.reveal())
            include = ("*",) if database is None else (f"{escape(database)}.*",)
            source = msgspec.structs.replace(source, tables=msgspec.structs.replace(source.tables, include=include))
        return source
    default = f"cdc_{name}"
    return msgspec.structs.replace(source, slot=source.slot or default, publication=source.publication or default)


_ONLY_OF: Final = {
    "insert_only": POSTGRES, "slot": POSTGRES, "publication": POSTGRES, "heartbeat_seconds": POSTGRES,
    "pg_dump": POSTGRES, "full_document": MONGODB, "full_document_before_change": MONGODB,
    "show_expanded_events": MONGODB, "split_large_events": MONGODB,
}  # fmt: skip
"""Options of a source that mean something to one kind of database only."""


def _check_kind(name: str, source: SourceConfig) -> None:
    """Refuse options of another kind of database: whoever wrote them expects something of them."""
    defaults = SourceConfig()
    for option, kind in _ONLY_OF.items():
        if kind != source.kind and getattr(source, option) != getattr(defaults, option):
            raise ConfigError(
                f"sources.{name}.{option}: only for {kind}, and the url leads to {source.kind}", hint="remove it"
            )


def without_own(source: SourceConfig, tables: frozenset[TableName]) -> SourceConfig:
    """Tables of our own are not captured; a change stream leaves them out by itself (`cdc.mongodb.scope`)."""
    if not tables or source.kind != POSTGRES:
        return source
    exclude = (*source.tables.exclude, *sorted(escape(str(table)) for table in tables))
    return msgspec.structs.replace(source, tables=msgspec.structs.replace(source.tables, exclude=exclude))


def complete_sink(
    name: str, sink: SinkConfig, options: msgspec.Struct | None, sources: dict[str, SourceConfig]
) -> SinkConfig:
    """The same for a sink. options: of its kind."""
    if sink.source not in sources:
        raise ConfigError(
            f"sinks.{name}.from: no source is called {sink.source!r}", hint=f"one of: {', '.join(sources)}"
        )
    if name in sources:
        raise ConfigError(
            f"sinks.{name}: a source has the same name", hint="`cdc pause NAME` and `cdc drop NAME` must know which"
        )
    if sink.options is not None:
        raise ConfigError(f"sinks.{name}.options: unknown option", hint=ALL_OPTIONS)
    url = from_file(Secret, f"sinks.{name}.url", sink.url, sink.url_file)
    if url is not None:
        check_url(place_of(f"sinks.{name}.url", sink.url_file), url)
    source = sources[sink.source]
    sink = msgspec.structs.replace(sink, name=name, kind=sink.kind or source.kind, url=url, options=options)
    return _complete_mirror(sink, source) if sink.is_mirror else _complete_follower(sink)


def _complete_follower(sink: SinkConfig) -> SinkConfig:
    """A sink that is no mirror. Its URL is for its kind to judge."""
    defaults = SinkConfig(source=sink.source)
    for option in ("copy", "rename", "tables"):
        if getattr(sink, option) != getattr(defaults, option):
            raise ConfigError(
                f"sinks.{sink.name}.{option}: only for mirrors, and this is {sink.kind}", hint="remove it"
            )
    if sink.parks:
        raise ConfigError(f"sinks.{sink.name}.on_error: {sink.kind} keeps everything in order", hint="write 'stop'")
    return msgspec.structs.replace(sink, on_error="stop")


def _complete_mirror(sink: SinkConfig, source: SourceConfig) -> SinkConfig:
    name = sink.name
    for table, renamed in sink.rename.items():
        if ("." in table) != ("." in renamed):
            raise ConfigError(
                f"sinks.{name}.rename.{table}: {renamed!r} is not of the same form",
                hint='rename a schema ("public" = "shop") or a table ("public.a" = "shop.b")',
            )
    if sink.kind != source.kind:
        raise ConfigError(f"sinks.{name}.kind: {source.name!r} is {source.kind}: a mirror is of the same kind", hint="")
    place = place_of(f"sinks.{name}.url", sink.url_file)
    if sink.url is not None and (found := _kind_at(place, sink.url)) != sink.kind:
        raise ConfigError(
            f"{place}: leads to {found}, and a mirror of {source.name!r} is {sink.kind}", hint=f"a url of {sink.kind}"
        )
    sink = msgspec.structs.replace(sink, url=sink.url or _backup_url(name, source))
    return _complete_mongodb_sink(sink, source) if sink.kind == MONGODB else _complete_postgres_sink(sink)


def _complete_postgres_sink(sink: SinkConfig) -> SinkConfig:
    return msgspec.structs.replace(sink, on_error=sink.on_error or "stop")  # parking tears transactions


def _complete_mongodb_sink(sink: SinkConfig, source: SourceConfig) -> SinkConfig:
    """Where both URLs name a database, one is mirrored to the other."""
    if sink.tables:
        raise ConfigError(f"sinks.{sink.name}.tables: only for {POSTGRES}", hint="a collection is mirrored as a whole")
    sink = msgspec.structs.replace(sink, on_error=sink.on_error or "park")
    ours, theirs = (database_of(each.url.reveal()) if each.url else None for each in (source, sink))
    if ours is None or theirs is None or ours == theirs:
        return sink
    return msgspec.structs.replace(sink, rename={ours: theirs, **sink.rename})


def _backup_url(name: str, source: SourceConfig) -> Secret:
    """The source's URL with `_backup` behind the database name: a mirror on the same server."""
    assert source.url is not None
    try:
        backup = backup_of(source.url.reveal())
    except ValueError as exc:
        raise ConfigError(f"sources.{source.name}.url: {exc}", hint="special characters are written as %XX") from exc
    if backup is None:
        raise ConfigError(
            f"sinks.{name}.url: missing, and the url of source {source.name!r} names no database to derive it from",
            hint=f"set url for the sink, or write the source's as {source.kind}://user@host/database",
        )
    return Secret(backup)


def check_filters(config: Config) -> None:
    """One publication serves all sinks of a source, so a table has one row filter."""
    for source in config.sources:
        sinks = config.mirrors_of(source)
        for table in {table for sink in sinks for table in sink.tables}:
            schema, _, name = table.partition(".")
            wheres = {sink.table(TableName(schema, name)).where for sink in sinks}
            if len(wheres) > 1:
                raise ConfigError(
                    f'sinks.*.tables."{table}".where: differs between the sinks of source {source!r}',
                    hint="row filters are applied by the source's server: give each filter a source (slot) of its own",
                )
