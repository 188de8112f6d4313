"""The only reader of TOML and environment: a file becomes frozen structs, or a `ConfigError` that names the key."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec

from cdc import http_config
from cdc.change import TableName
from cdc.errors import ConfigError
from cdc.http_config import Http
from cdc.secret import Secret, Token, from_file
from cdc.urls import KINDS, MONGODB, POSTGRES, backup_of, database_of, hosts_of, kind_of, redact, same_postgres_database

__all__ = ["Config", "Http", "Secret", "Token", "load", "parse", "redact"]  # with what is written in terms of it

Count = Annotated[int, msgspec.Meta(ge=1)]
Bytes = Annotated[int, msgspec.Meta(ge=0)]
Seconds = Annotated[float, msgspec.Meta(gt=0)]
Identifier = Annotated[str, msgspec.Meta(pattern="^[a-z][a-z0-9_]{0,39}$")]
"""Names of sources and sinks: they become parts of slot, file and metric names."""


class Daemon(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[daemon]`: what belongs to the process."""

    data_dir: str = "/var/lib/cdc"
    log_format: Literal["auto", "console", "json"] = "auto"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    drain_seconds: Seconds = 20.0


class QueueOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[queue]`: bounds of each source's queue."""

    max_bytes: Bytes = 10 * 1024**3
    min_free_bytes: Bytes = 1024**3
    keep_seconds: Annotated[float, msgspec.Meta(ge=0)] = 0.0


class TableGlobs(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Globs over `schema.table`, or `database.collection`: one is captured if an include matches and no exclude does.

    include: for MongoDB the default is the database of the url, or all there are.
    """

    include: tuple[str, ...] = ("public.*",)
    exclude: tuple[str, ...] = ()

    def match(self, table: TableName) -> bool:
        """Whether the table is captured. Case counts, as it does in the database."""
        name = str(table)
        return any(fnmatchcase(name, glob) for glob in self.include) and not any(
            fnmatchcase(name, glob) for glob in self.exclude
        )


class SourceConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[sources.NAME]`: a database whose changes are captured."""

    name: str = ""
    url: Secret | None = None
    url_file: str | None = None
    tables: TableGlobs = TableGlobs()
    insert_only: tuple[str, ...] = ()
    slot: Annotated[str, msgspec.Meta(pattern="^[a-z0-9_]{0,63}$")] = ""
    publication: Annotated[str, msgspec.Meta(max_length=50)] = ""
    on_gap: Literal["stop", "resync"] = "stop"
    heartbeat_seconds: Annotated[float, msgspec.Meta(ge=0)] = 10.0
    pg_dump: str = "pg_dump"
    full_document: Literal["updateLookup", "whenAvailable", "required", "off"] = "updateLookup"
    full_document_before_change: Literal["off", "whenAvailable", "required"] = "off"
    show_expanded_events: bool = True
    split_large_events: bool = True

    @property
    def kind(self) -> str:
        """What kind of database it is, by its URL: a folder below `cdc`."""
        return (kind_of(self.url.reveal()) if self.url is not None else None) or POSTGRES

    @property
    def owns_publication(self) -> bool:
        """Whether the publication is ours to extend: one that the user named is the user's."""
        return self.publication == f"cdc_{self.name}"


class BatchBounds(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much goes into one transaction on the target while the sink is behind."""

    max_changes: Count = 20_000
    max_bytes: Count = 4 * 1024**2


class RetryOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[sinks.NAME] retry`: how a parked change is tried again.

    initial, max: seconds until the second attempt, and at most until a later one. attempts: the first, which parked
    it, included; about an hour. Then it is dead.
    """

    initial: Seconds = 1.0
    max: Seconds = 300.0
    attempts: Count = 20

    def __post_init__(self) -> None:
        """Refuse a wait that would shrink."""
        if self.initial > self.max:
            raise ValueError("initial is larger than max")


class TableOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[sinks.NAME.tables."schema.table"]`: what of one table is mirrored."""

    columns: tuple[str, ...] | None = None
    where: str | None = None


class CopyOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[sinks.NAME.copy]`: how the initial copy runs."""

    workers: Annotated[int, msgspec.Meta(ge=1, le=64)] = 2
    chunk_bytes: Count = 256 * 1024**2


class SinkConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename={"source": "from"}):
    """`[sinks.NAME]`: a target that changes are delivered to.

    options: what its kind has besides, as that kind's own struct: set by `load`, and never written in the file.
    """

    name: str = ""
    kind: str = ""
    source: str
    url: Secret | None = None
    url_file: str | None = None
    on_error: Literal["", "stop", "park"] = ""
    schema_changes: Literal["apply", "stop"] = "apply"
    max_parked: Count = 10_000
    max_parked_bytes: Count = 64 * 1024**2
    retry: RetryOptions = RetryOptions()
    batch: BatchBounds = BatchBounds()
    copy: CopyOptions = CopyOptions()
    rename: dict[str, str] = {}
    tables: dict[str, TableOptions] = {}
    options: Any = None

    @property
    def is_mirror(self) -> bool:
        """Whether it holds a copy of its source; other sinks only follow the stream."""
        return self.kind in KINDS.values()

    def own_tables_in(self, source: SourceConfig) -> Iterator[TableName]:
        """Tables that this sink makes for itself, if its database is the source's."""
        if self.is_mirror or self.url is None or source.url is None:
            return
        ours, theirs = self.url.reveal(), source.url.reveal()
        if kind_of(ours) != source.kind:
            return
        if source.kind == MONGODB and hosts_of(ours) & hosts_of(theirs):
            database = database_of(ours) or "cdc"
        elif source.kind == POSTGRES and same_postgres_database(ours, theirs):
            database = "public"
        else:
            return
        for name in getattr(self.options, "own_tables", ()):
            schema, dot, table = name.rpartition(".")
            yield TableName(schema if dot else database, table)

    def target_name(self, table: TableName) -> TableName:
        """Where a source table is mirrored to: renamed as a table, else by its schema, else unchanged."""
        if (renamed := self.rename.get(str(table))) is not None:
            schema, _, name = renamed.partition(".")
            return TableName(schema, name)
        return TableName(self.rename.get(table.schema, table.schema), table.name)

    def table(self, table: TableName) -> TableOptions:
        """The table's own options, or the defaults."""
        return self.tables.get(str(table), TableOptions())


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole configuration file."""

    daemon: Daemon = Daemon()
    http: Http = Http()
    queue: QueueOptions = QueueOptions()
    sources: dict[Identifier, SourceConfig]
    sinks: dict[Identifier, SinkConfig] = {}

    def sinks_of(self, source: str) -> list[SinkConfig]:
        """The sinks that are fed from a source."""
        return [sink for sink in self.sinks.values() if sink.source == source]

    def own_tables(self, source: SourceConfig) -> frozenset[TableName]:
        """What our sinks keep for themselves in a source's own database: captured, it would go in circles."""
        return frozenset(table for sink in self.sinks.values() for table in sink.own_tables_in(source))

    def mirrors_of(self, source: str) -> list[SinkConfig]:
        """The mirrors of a source."""
        return [sink for sink in self.sinks_of(source) if sink.is_mirror]

    def row_filter(self, source: str, table: TableName) -> str | None:
        """The `where` of a table, which all sinks of a source share (checked by `load`)."""
        for sink in self.mirrors_of(source):
            return sink.table(table).where
        return None


OptionsOf = Callable[[str], type[msgspec.Struct] | None]
"""The struct of the options that a kind of sink has of its own. Raises `ConfigError` for an unknown kind."""


def load(path: Path, environment: Mapping[str, str] | None = None, *, options_of: OptionsOf | None = None) -> Config:
    """Read and check a file. Raises `ConfigError` naming the file, the key and the reason.

    options_of: knows the kinds of sinks; without it, there are mirrors only.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise ConfigError(
            f"{path}: {exc.strerror or exc}", hint="name the file with --config, or write it from config.example.toml"
        ) from exc
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
        raise ConfigError(_readable(str(exc), raw), hint=_ALL_OPTIONS) from exc
    http = http_config.complete(config.http)
    sources = {name: _complete_source(name, source) for name, source in config.sources.items()}
    sinks = {name: _complete_sink(name, sink, options.get(name), sources) for name, sink in config.sinks.items()}
    config = msgspec.structs.replace(config, http=http, sources=sources, sinks=sinks)
    _check_filters(config)
    return msgspec.structs.replace(
        config, sources={name: _without(source, config.own_tables(source)) for name, source in sources.items()}
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
            raise ConfigError(_readable(str(exc), {}, f"sinks.{name}"), hint=_ALL_OPTIONS) from exc
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


_ALL_OPTIONS: Final = "config.example.toml lists every option"


def _readable(message: str, raw: dict[str, Any], section: str = "") -> str:
    """Turn msgspec's `... - at `$.sources[...].url`` into `sources.shop.url: ...`. section: what it calls `$`."""
    reason, _, where = message.partition(" - at `")
    path = where.rstrip("`").lstrip("$.")
    if section:
        path = f"{section}.{path}".rstrip(".")
    if where.startswith("key`"):  # a dict key that breaks its pattern: msgspec says only that it is one
        return f"{where.rpartition('.')[2].rstrip('`')}: names consist of a-z, 0-9 and _, and start with a letter"
    for part in ("sources", "sinks"):
        members = raw.get(part)
        if path.startswith(f"{part}[...]") and isinstance(members, dict):
            rest = path[len(f"{part}[...]") :]
            path = f"{part}.{_culprit(members, part, reason)}{rest}"
    return f"{path}: {reason}" if path else reason


def _culprit(members: dict[str, Any], section: str, reason: str) -> str:
    """Find which member of `[sources.*]` or `[sinks.*]` a message is about: msgspec does not name dict keys."""
    kind = SourceConfig if section == "sources" else SinkConfig
    for name, member in members.items():
        try:
            msgspec.convert(member, kind, dec_hook=_decode_hook)
        except msgspec.ValidationError as exc:
            if str(exc).startswith(reason):
                return str(name)
    return "|".join(map(str, members))


def _complete_source(name: str, source: SourceConfig) -> SourceConfig:
    url = from_file(Secret, f"sources.{name}.url", source.url, source.url_file)
    if url is None:
        raise ConfigError(f"sources.{name}.url: missing", hint="set url or url_file")
    if kind_of(url.reveal()) is None:
        raise ConfigError(
            f"sources.{name}.url: no database has the scheme {url.reveal().partition('://')[0][:20]!r}",
            hint=f"one of: {', '.join(f'{scheme}://' for scheme in KINDS)}",
        )
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


def _without(source: SourceConfig, tables: frozenset[TableName]) -> SourceConfig:
    """Tables of our own are not captured; a change stream leaves them out by itself (`cdc.mongodb.scope`)."""
    if not tables or source.kind != POSTGRES:
        return source
    exclude = (*source.tables.exclude, *sorted(escape(str(table)) for table in tables))
    return msgspec.structs.replace(source, tables=msgspec.structs.replace(source.tables, exclude=exclude))


def _complete_sink(
    name: str, sink: SinkConfig, options: msgspec.Struct | None, sources: dict[str, SourceConfig]
) -> SinkConfig:
    if sink.source not in sources:
        raise ConfigError(
            f"sinks.{name}.from: no source is called {sink.source!r}", hint=f"one of: {', '.join(sources)}"
        )
    if name in sources:
        raise ConfigError(
            f"sinks.{name}: a source has the same name", hint="`cdc pause NAME` and `cdc drop NAME` must know which"
        )
    if sink.options is not None:
        raise ConfigError(f"sinks.{name}.options: unknown option", hint=_ALL_OPTIONS)
    url = from_file(Secret, f"sinks.{name}.url", sink.url, sink.url_file)
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
    if sink.on_error == "park":
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


def _check_filters(config: Config) -> None:
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
