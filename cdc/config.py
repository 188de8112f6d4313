"""What can be configured. `cdc.config_file` reads it, `cdc.config_rules` completes it."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

import msgspec

from cdc.change import TableName
from cdc.http_config import Http
from cdc.secret import Secret
from cdc.urls import KINDS, MONGODB, POSTGRES, database_of, hosts_of, kind_of, same_postgres_database

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
    def parks(self) -> bool:
        """Whether changes that the target refuses wait beside the stream; else it stops."""
        return self.on_error == "park"

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
