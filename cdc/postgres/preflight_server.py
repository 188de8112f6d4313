"""What the checks of sources and of mirrors share: questions to a server, and what is asked of any."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final

from cdc.postgres.connection import Connection, translated_errors
from cdc.preflight import Finding, Level
from cdc.secret import Secret

SUPPORTED_VERSIONS: Final = range(14, 19)

PGBOUNCER_PORT: Final = 6432


def check_version(connection: Connection) -> Iterator[Finding]:
    """Whether the server is one of those that are supported."""
    version = connection.info.server_version // 10000
    supported = f"{SUPPORTED_VERSIONS.start} to {SUPPORTED_VERSIONS.stop - 1}"
    if version < SUPPORTED_VERSIONS.start:
        yield Finding("error", "server", f"PostgreSQL {version} is too old", f"upgrade to one of {supported}")
    elif version >= SUPPORTED_VERSIONS.stop:
        yield Finding("warning", "server", f"PostgreSQL {version} is newer than those that were tested ({supported})")
    else:
        yield Finding("ok", "server", f"PostgreSQL {version}")


def check_pooler(connection: Connection, level: Level) -> Iterator[Finding]:
    """A pooler hands out cancellation keys of its own, so the process id it announced is not the backend's."""
    ((backend_pid,),) = rows(connection, "SELECT pg_backend_pid()")
    if connection.info.backend_pid != backend_pid:
        known = f" (port {PGBOUNCER_PORT} is PgBouncer's)" if connection.info.port == PGBOUNCER_PORT else ""
        message = f"the url leads to a connection pooler{known}: sessions and replication do not survive it"
        yield Finding(level, "server", message, "connect to the server itself")


def check_fsync(subject: str, connection: Connection) -> Iterator[Finding]:
    """Whether a commit of the server outlives a crash of its machine."""
    if setting(connection, "fsync") == "off":
        message = "fsync is off: after a crash the server may have forgotten what it had committed"
        yield Finding("warning", subject, message, "set fsync = on")


def reveal(url: Secret | None) -> str:
    """Return the url that `cdc.config` has completed."""
    assert url is not None
    return url.reveal()


def rows(connection: Connection, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
    """All rows of a query."""
    with translated_errors():
        return connection.execute(query, parameters).fetchall()


def value(connection: Connection, query: str, *parameters: Any) -> Any:
    """Return the only value of the only row of a query."""
    return rows(connection, query, *parameters)[0][0]


def setting(connection: Connection, name: str) -> str:
    """Return a setting as this session sees it."""
    return str(value(connection, "SELECT current_setting(%s)", name))


def role_of(connection: Connection) -> str:
    """Return the role whose privileges count."""
    return str(value(connection, "SELECT current_user"))


def shortened(names: Iterable[object], limit: int = 10) -> str:
    """Join names for a message; beyond `limit` only their number."""
    listed = list(map(str, names))
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more
