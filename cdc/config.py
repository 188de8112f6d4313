"""What can be configured. `cdc.config_file` reads it, `cdc.config_rules` completes it.

What stands below an option is what its users are told: scripts/reference.py writes docs/configuration.md and the
comments of config.example.toml by it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

import msgspec

from cdc.change import TableName
from cdc.http_config import Http
from cdc.secret import Secret, Token
from cdc.urls import KINDS, MONGODB, POSTGRES, database_of, hosts_of, kind_of, same_postgres_database

Count = Annotated[int, msgspec.Meta(ge=1)]
Bytes = Annotated[int, msgspec.Meta(ge=0)]
Seconds = Annotated[float, msgspec.Meta(gt=0)]
LogLevel = Literal["debug", "info", "warning", "error"]
Identifier = Annotated[str, msgspec.Meta(pattern="^[a-z][a-z0-9_]{0,39}$")]
"""Names of sources and sinks: they become parts of slot, file and metric names."""
Slot = Annotated[str, msgspec.Meta(pattern="^[a-z0-9_]{0,63}$", description="a-z, 0-9 and _, at most 63 of them")]


class Daemon(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[daemon]`: what belongs to the process."""

    data_dir: str = "/var/lib/cdc"
    """Queue, state and lock live here: on a local disk with room for `queue.max_bytes`, and never shared by two
    daemons."""
    log_format: Literal["auto", "console", "json"] = "auto"
    """`auto`: for people on a terminal, JSON elsewhere."""
    log_level: LogLevel = "info"
    """From `debug` over `info` and `warning` to `error`: what is less important is not logged."""
    drain_seconds: Seconds = 20.0
    """After SIGTERM, how long a batch at hand may take; keep it below the service manager's own limit."""


class QueueOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[queue]`: bounds of each source's queue."""

    max_bytes: Bytes = 10 * 1024**3
    """Bytes per source. Beyond them the source is no longer read and its server keeps the changes; nothing is lost."""
    min_free_bytes: Bytes = 1024**3
    """Bytes of free disk that are left alone: a full disk would stop more than this daemon."""
    keep_seconds: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """How long delivered batches stay, so that a sink can be set back. 0: until every sink has them."""


class AlertOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[alerts]`: messages of the daemon itself, where there is no Prometheus to watch it.

    They tell when a source or a sink fails or waits for its server, changes are dead, something is late, or the source
    will soon have forgotten what was not captured; and when that is over.
    """

    webhook: Token | None = None
    """An `https://` or `http://` URL that JSON is posted to; its `text` is for people. Left out: nothing is sent."""
    webhook_file: str | None = None
    """The URL from a file, instead."""
    lag_seconds: Seconds = 300.0
    """What is further behind than this is told of."""
    after_seconds: Annotated[float, msgspec.Meta(ge=0)] = 60.0
    """What lasts no longer than this is not told of."""
    interval_seconds: Seconds = 60.0
    """The time between two messages at least; all that happens meanwhile is in the next one."""


class TableGlobs(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[sources.NAME.tables]`: globs over `schema.table`, or `database.collection`.

    One is captured if an include matches and no exclude does.
    """

    include: tuple[str, ...] = ("public.*",)
    """What is captured. For MongoDB the default is the database of the url, or all there are."""
    exclude: tuple[str, ...] = ()
    """What is not, although it is included."""

    def match(self, table: TableName) -> bool:
        """Whether the table is captured. Case counts, as it does in the database."""
        name = str(table)
        return any(fnmatchcase(name, glob) for glob in self.include) and not any(
            fnmatchcase(name, glob) for glob in self.exclude
        )

    def idle(self, captured: Iterable[TableName]) -> list[str]:
        """The includes that none of the captured tables matches."""
        names = list(map(str, captured))
        return [glob for glob in self.include if not any(fnmatchcase(name, glob) for name in names)]


class SourceConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[sources.NAME]`: a database whose changes are captured.

    Its name (a-z, 0-9, _) becomes part of slot and file names.
    """

    name: str = ""
    url: Secret | None = None
    """`postgresql://`, `mongodb://` or `mongodb+srv://`. A PostgreSQL role needs REPLICATION and SELECT, and the server
    itself: no pooler can carry replication. MongoDB must be a replica set (one server is enough) or sharded, its user
    needs `read`."""
    url_file: str | None = None
    """The url from a file, instead."""
    tables: TableGlobs = TableGlobs()
    insert_only: tuple[str, ...] = ()
    """Globs over `schema.table`: of these only INSERTs are captured, so they need neither a key nor an identity."""
    slot: Slot = ""
    """Replication slot; empty: `cdc_NAME`. Created if it is missing, at the first start only."""
    publication: Annotated[str, msgspec.Meta(max_length=50)] = ""
    """Publication; empty: `cdc_NAME`. Created if it is missing, at the first start only."""
    on_gap: Literal["stop", "resync"] = "stop"
    """What to do when changes are gone for good (slot lost, oplog gone on, target older than the queue): `stop`, or
    `resync`: the stream begins anew, and mirrors are compared and put right beside it. Another database always
    stops."""
    heartbeat_seconds: Annotated[float, msgspec.Meta(ge=0)] = 10.0
    """PostgreSQL: a small message is written to the source's log this often, so that an idle database lets go of its
    WAL. 0: never."""
    pg_dump: str = "pg_dump"
    """The program that reads the schema for a mirror; not older than the server."""
    full_document: Literal["updateLookup", "whenAvailable", "required", "off"] = "updateLookup"
    """MongoDB: what comes with an update besides its delta. `updateLookup`: the document as it is when the event is
    read; `whenAvailable`, `required`: as it was right after the update (6.0, collections with
    changeStreamPreAndPostImages)."""
    full_document_before_change: Literal["off", "whenAvailable", "required"] = "off"
    """MongoDB: documents as they were before a change (6.0, collections with changeStreamPreAndPostImages)."""
    show_expanded_events: bool = True
    """MongoDB: also follow created collections, indexes and validators (6.0; older servers do not tell)."""
    split_large_events: bool = True
    """MongoDB: let the server split events over 16 MB (6.0.9, 7.0; older servers cannot, and the source stops at
    one)."""

    @property
    def kind(self) -> str:
        """What kind of database it is, by its URL: a folder below `cdc`."""
        return (kind_of(self.url.reveal()) if self.url is not None else None) or POSTGRES

    @property
    def owns_publication(self) -> bool:
        """Whether the publication is ours to extend: one that the user named is the user's."""
        return self.publication == f"cdc_{self.name}"


class BatchBounds(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[sinks.NAME.batch]`: how much goes into one target transaction while the sink is behind.

    Larger is faster, smaller is fresher.
    """

    max_changes: Count = 20_000
    """So many changes at most, but always whole source transactions."""
    max_bytes: Count = 4 * 1024**2
    """And so many bytes of them."""


class RetryOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[sinks.NAME.retry]`: when a parked change is tried again."""

    initial: Seconds = 1.0
    """The second time after so many seconds, then after twice as long each time."""
    max: Seconds = 300.0
    """The longest time between two attempts."""
    attempts: Count = 20
    """With the first, which parked it: about an hour. Then it is dead, and waits for `cdc dead-letters retry` or
    `discard`."""

    def __post_init__(self) -> None:
        """Refuse a wait that would shrink."""
        if self.initial > self.max:
            raise ValueError("initial is larger than max")


class TableOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[sinks.NAME.tables."schema.table"]`: what of one table is mirrored; everything, unless told otherwise."""

    columns: tuple[str, ...] | None = None
    """Only these columns; the key's must be among them."""
    where: str | None = None
    """Only these rows: an SQL condition that the source's server applies, the same for all sinks of a source."""


class CopyOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[sinks.NAME.copy]`: how the initial copy runs."""

    workers: Annotated[int, msgspec.Meta(ge=1, le=64)] = 2
    """Tables, or parts of one, at the same time, and then keys and indexes; each worker takes a connection at both
    servers."""
    chunk_bytes: Count = 256 * 1024**2
    """Larger tables are copied in parts; of PostgreSQL only those that one worker would be at long after all others. A
    copy that was killed goes on after the last whole table."""


class SinkConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename={"source": "from"}):
    """`[sinks.NAME]`: a target that changes are delivered to."""

    name: str = ""
    kind: str = ""
    """What the target is: each kind is a file in `sinks/`. Empty: a mirror, of the same kind as the source."""
    source: str
    """The source, by name. Several sources may have feeds (`kind = "data_changes"`) that are one table."""
    url: Secret | None = None
    """Left out, a mirror is on the source's server, in the database of its name with `_backup` behind it, and a feed is
    SQLite, in `daemon.data_dir`."""
    url_file: str | None = None
    """The url from a file, instead."""
    on_error: Literal["", "stop", "park"] = ""
    """A change that the target refuses is never skipped. `stop`: this sink stops until a person has acted. `park`: it
    waits, with what comes later for the same row or document, and is tried again; the rest flows on, so transactions
    are torn meanwhile. Empty: `park` on MongoDB mirrors, else `stop`."""
    schema_changes: Literal["apply", "stop"] = "apply"
    """A PostgreSQL mirror whose source's tables are altered. `apply`: the mirror's are altered likewise, or copied
    again where rows were rewritten. `stop`: the sink stops, and a person alters the mirror (docs/schema-changes.md)."""
    max_parked: Count = 10_000
    """So many changes may be parked before the sink stops: what waits is in `data_dir`, and has to be applied one
    day."""
    max_parked_bytes: Count = 64 * 1024**2
    """And so many bytes of them."""
    retry: RetryOptions = RetryOptions()
    batch: BatchBounds = BatchBounds()
    copy: CopyOptions = CopyOptions()
    rename: dict[str, str] = {}
    """Names in the target: of a whole schema (MongoDB: database), or of one table (collection)."""
    tables: dict[str, TableOptions] = {}
    options: Any = None  # what its kind has besides, as that kind's own struct: set by `load`, never in the file

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
    """A whole configuration file.

    In any string, `${NAME}` is replaced by the environment variable NAME; `$$` is a dollar sign.
    """

    daemon: Daemon = Daemon()
    http: Http = Http()
    queue: QueueOptions = QueueOptions()
    alerts: AlertOptions = AlertOptions()
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
