"""`[sinks.NAME]` of `kind = "data_changes"`: which entities are told of, what of them, and for how long."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Final, Literal

import msgspec

from cdc.change import TableName
from cdc.errors import ConfigError

NEVER: Final = "never"

SUFFIXES: Final = ("", "_entities", "_positions", "_pruned", "_state")
"""Of the tables that a feed consists of."""

_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}

Duration = Annotated[
    str,
    msgspec.Meta(pattern=rf"^({NEVER}|[0-9]+[smhd])$", description=f"`90s`, `30m`, `24h`, `7d`, or `{NEVER}`"),
]

Table = Annotated[
    str,
    msgspec.Meta(
        pattern=r"^([a-z_][a-z0-9_]{0,39}\.)?[a-z_][a-z0-9_]{0,39}$",
        description="a-z, 0-9 and _, at most 40 of them, and a schema's name before it where one is wanted",
    ),
]

Mask = Literal["sha256", "redact"]

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=200)]


class EntityOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[sinks.NAME.entities."schema.table"]`: how the rows of one table are told of.

    The others go by their table's name.
    """

    type: str = ""
    """The entity's type. Empty: the table's name."""
    channel: str = ""
    """What realtime clients subscribe to. Empty: the table's name."""
    location: str | None = None
    """Instead of the sink's."""
    user: str | None = None
    """Instead of the sink's."""
    columns: tuple[str, ...] | None = None
    """Only these columns are told of. Left out: all but `exclude`."""
    exclude: tuple[str, ...] = ()
    """These columns are not told of."""
    mask: dict[str, Mask] = {}
    """Columns that are told of as a digest (`sha256`, equal for equal values) or not at all (`redact`)."""
    retention: Duration | None = None
    """Instead of the sink's; for an audit trail: `never`."""


class FeedOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, dict=True):
    """`[sinks.NAME]` of `kind = "data_changes"`: one table of all changes, that applications poll or follow."""

    table: Table = "data_changes"
    """The table, made by cdc with a few beside it whose names begin alike. PostgreSQL: may be `schema.table`."""
    location: str = ""
    """The column (field) that tells where a change belongs, such as `branch_id`. Empty: none."""
    user: str = ""
    """The column that tells who made it. Empty: none. (A transaction can say so itself: see docs/data-changes.md.)"""
    scope: tuple[str, ...] = ()
    """Columns by which tokens may be limited to rows (`where` of `[[http.tokens]]`)."""
    max_payload_bytes: Annotated[int, msgspec.Meta(ge=1024, le=8 * 1024**2)] = 256 * 1024
    """In bytes: a change whose before, after and delta are larger together is told of without them."""
    retention: Duration = "24h"
    """How long changes are kept: such as `90s`, `30m`, `24h`, `7d`, or `never`."""
    entities: dict[str, Name | EntityOptions] = {}
    """By `schema.table` or `database.collection`: a section each, or a string that is the type alone."""

    def __post_init__(self) -> None:
        """Raises `ConfigError` where entities contradict each other."""
        kept: dict[str, str] = {}
        for key, given in self.entities.items():
            if "." not in key:
                raise ConfigError(
                    f'entities."{key}": not schema.table, or database.collection', hint="the table's full name"
                )
            entity = Entity.of(_table(key), self)
            if kept.setdefault(entity.type, entity.retention) != entity.retention:
                raise ConfigError(
                    f'entities."{key}".retention: another table of type {entity.type!r} has {kept[entity.type]!r}',
                    hint="what is of one type is kept for one time",
                )
            for column in (entity.location, entity.user, *entity.scope):
                if column.partition(".")[0] in entity.mask:
                    raise ConfigError(
                        f'entities."{key}".mask: {column!r} tells location, user or scope', hint="exclude it instead"
                    )
            if isinstance(given, EntityOptions) and given.columns is not None and given.exclude:
                raise ConfigError(f'entities."{key}".exclude: not together with columns', hint="keep one of them")

    @property
    def own_tables(self) -> tuple[str, ...]:
        """All tables that a feed consists of; without a schema they are in PostgreSQL's `public`."""
        return tuple(self.table + suffix for suffix in SUFFIXES)

    @cached_property
    def retentions(self) -> Mapping[str, float | None]:
        """Seconds by entity type, of those that are configured; `None`: for ever."""
        entities = (Entity.of(_table(key), self) for key in self.entities)
        return {entity.type: seconds(entity.retention) for entity in entities}

    @property
    def default_retention(self) -> float | None:
        """Seconds, of all other types; `None`: for ever."""
        return seconds(self.retention)


class Entity(msgspec.Struct, frozen=True, kw_only=True):
    """How one table is told of: `EntityOptions` with everything filled in. Empty `location`, `user`: there is none."""

    type: str
    channel: str
    location: str
    user: str
    columns: frozenset[str] | None
    exclude: frozenset[str]
    mask: Mapping[str, Mask]
    retention: str
    scope: tuple[str, ...]

    @classmethod
    def of(cls, table: TableName, options: FeedOptions) -> Entity:
        """What the options say of a table."""
        given = options.entities.get(str(table), EntityOptions())
        own = EntityOptions(type=given) if isinstance(given, str) else given
        return cls(
            type=own.type or table.name,
            channel=own.channel or table.name,
            location=options.location if own.location is None else own.location,
            user=options.user if own.user is None else own.user,
            columns=None if own.columns is None else frozenset(own.columns),
            exclude=frozenset(own.exclude),
            mask=own.mask,
            retention=own.retention or options.retention,
            scope=options.scope,
        )

    def shows(self, name: str) -> bool:
        """Whether a column is told of at all."""
        return name not in self.exclude and (self.columns is None or name in self.columns)


def seconds(duration: str) -> float | None:
    """`24h` as seconds; `None`: for ever. Raises `ConfigError`."""
    if duration == NEVER:
        return None
    match = re.fullmatch(r"([0-9]+)([smhd])", duration)
    if match is None:
        raise ConfigError(f"{duration!r} is not a duration", hint="such as 24h, 7d, 30m, 90s, or never")
    return float(int(match[1]) * _UNITS[match[2]])


def _table(key: str) -> TableName:
    schema, _, name = key.partition(".")
    return TableName(schema, name)
