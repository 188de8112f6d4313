"""What `[sinks.NAME.entities]` says of a PostgreSQL source, compared with the tables that are there.

A name that fits nothing hides nothing: the column that was meant is shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from cdc.change import TableName
from cdc.config import Config, SourceConfig
from cdc.feed.options import EntityOptions, FeedOptions
from cdc.postgres.schema import SchemaTable
from cdc.preflight import Finding


def check_feeds(config: Config, source: SourceConfig, captured: Mapping[TableName, SchemaTable]) -> Iterator[Finding]:
    """Names in the configuration of the source's feeds that fit no table or column."""
    for sink in config.sinks_of(source.name):
        if isinstance(sink.options, FeedOptions):
            tables = {str(name): table for name, table in captured.items()}
            for key, entity in sink.options.entities.items():
                subject = f'sinks.{sink.name}.entities."{key}"'
                if key not in tables:
                    yield Finding("warning", subject, "names no captured table", "correct it, or include the table")
                elif isinstance(entity, EntityOptions):
                    yield from _check_columns(subject, entity, {column.name for column in tables[key].columns})


def _check_columns(subject: str, entity: EntityOptions, columns: set[str]) -> Iterator[Finding]:
    hidden = sorted({*entity.exclude, *entity.mask} - columns)
    if hidden:
        message = f"hides columns that are not there: {', '.join(hidden)}"
        yield Finding("error", subject, message, "correct them: what is not named is shown")
    named = {*(entity.columns or ()), entity.location or "", entity.user or ""} - {""}
    if unknown := sorted(named - columns):
        yield Finding("warning", subject, f"names columns that are not there: {', '.join(unknown)}", "correct them")
