"""Publications are made where they are missing, extended by new tables, and dropped."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import psycopg
from psycopg import sql

from cdc.change import TableName
from cdc.config import SourceConfig
from cdc.errors import FatalError
from cdc.postgres.connection import Connection, to_cdc_error, translated_errors
from cdc.postgres.publication import (
    Publication,
    addition,
    creation,
    publication_names,
    read_coverage,
    read_publications,
)
from cdc.postgres.publication_check import publication_problems
from cdc.preflight import require


def existing_publications(connection: Connection, source: SourceConfig) -> tuple[str, ...]:
    """Those of the source's publications that exist: the names to stream with."""
    existing = read_publications(connection, publication_names(source))
    return tuple(name for name in publication_names(source) if name in existing)


def missing_publications(connection: Connection, publications: Sequence[Publication]) -> list[Publication]:
    """The publications that do not exist yet."""
    existing = read_publications(connection, [publication.name for publication in publications])
    return [publication for publication in publications if publication.name not in existing]


def create_publications(connection: Connection, publications: Sequence[Publication]) -> list[str]:
    """Create those that are missing, all or none, and return their names.

    Raises `FatalError` where one would make the user's own UPDATE or DELETE fail.
    """
    missing = missing_publications(connection, publications)
    require(publication_problems(connection, missing))
    version = connection.info.server_version
    try:
        with connection.transaction():
            for publication in missing:
                connection.execute(creation(publication, version))
    except psycopg.errors.InsufficientPrivilege as exc:
        statements = "; ".join(creation(publication, version).as_string(connection) for publication in missing)
        reason = f"publication {publication.name} cannot be created: {exc.diag.message_primary}"
        raise FatalError(reason, hint=f"as a superuser: {statements}") from exc
    except psycopg.Error as exc:
        raise to_cdc_error(exc) from exc
    return [publication.name for publication in missing]


def extend_publications(connection: Connection, publications: Sequence[Publication]) -> list[TableName]:
    """Add the tables that none of these publications covers yet, all or none, and return them.

    Changes of a table are sent from then on: a copy must read a later snapshot. For publications of our own only.
    Raises `FatalError` where it would make the user's own UPDATE or DELETE fail, or where others own what it takes.
    """
    with translated_errors(), connection.transaction():
        connection.execute("SELECT pg_advisory_xact_lock(hashtextextended('cdc.publication', 0))")
        coverage = read_coverage(connection, [publication.name for publication in publications])
        new = [
            msgspec.structs.replace(publication, tables=tables)
            for publication in publications
            if (tables := tuple(published for published in publication.tables if published.name not in coverage))
        ]
        require(publication_problems(connection, new))
        additions = [
            addition(publication, published, connection.info.server_version)
            for publication in new
            for published in publication.tables
        ]
        try:
            for statement in additions:
                connection.execute(statement)
        except psycopg.errors.InsufficientPrivilege as exc:
            names = ", ".join(str(published.name) for publication in new for published in publication.tables)
            raise FatalError(
                f"new tables cannot be added to the publication ({names}): {exc.diag.message_primary}",
                hint=f"as a superuser: {'; '.join(each.as_string(connection) for each in additions)}",
            ) from exc
    return [published.name for publication in new for published in publication.tables]


def drop_publications(connection: Connection, source: SourceConfig) -> None:
    """Drop the source's publications; without effect where they do not exist.

    Raises `FatalError` where they are somebody else's, as those are that an administrator made for us.
    """
    drops = [
        sql.SQL("DROP PUBLICATION IF EXISTS {}").format(sql.Identifier(name)) for name in publication_names(source)
    ]
    with translated_errors():
        try:
            for statement in drops:
                connection.execute(statement)
        except psycopg.errors.InsufficientPrivilege as exc:
            raise FatalError(
                f"the publication cannot be dropped: {exc.diag.message_primary}",
                hint=f"as its owner: {'; '.join(each.as_string(connection) for each in drops)}; then once more",
            ) from exc
