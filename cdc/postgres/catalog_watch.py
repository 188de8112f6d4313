"""Tells the stream of tables whose shape has changed, where no event trigger has: by looking into the catalog."""

from __future__ import annotations

import secrets
from typing import Final

import msgspec
import psycopg
import structlog
from psycopg import sql

from cdc.change import TableName
from cdc.config import SourceConfig
from cdc.postgres.connection import Connection, to_cdc_error, translated_errors
from cdc.postgres.ddl_capture import PREFIX, trigger_key
from cdc.postgres.schema import PUBLISHABLE
from cdc.postgres.shape import SHAPE, TRACE, TableShape
from cdc.source import Facts

log = structlog.get_logger()

_KEY_FACT: Final = "ddl_key"
_SHAPES_FACT: Final = "shapes"


class _Seen(msgspec.Struct, frozen=True, array_like=True):
    """A table as it was when it was last looked at. digest: of its shape."""

    schema: str
    name: str
    digest: str

    @property
    def qualified(self) -> TableName:
        return TableName(self.schema, self.name)


class CatalogWatch:
    """Looks for tables that were created, altered or dropped, and writes a message about each.

    prefixes: of the messages that are to be believed. Grows when event triggers are found.
    """

    def __init__(self, source: SourceConfig, facts: Facts) -> None:
        self.prefixes: set[str] = set()
        self._source = source
        self._facts = facts

    def look(self, connection: Connection, *, tell_all: bool = False) -> None:
        """Compare with the last look, which may be from before a restart. Never waits for anybody's lock.

        tell_all: where there was no look before, tell of every table.
        """
        self._learn_keys(connection)
        with translated_errors():
            rows = connection.execute(_DIGESTS).fetchall()
        now = {oid: _Seen(*seen) for oid, *seen in rows}
        fact = self._facts.get(_SHAPES_FACT)
        known = msgspec.json.decode(fact or "{}", type=dict[int, _Seen])
        if fact is None and not tell_all:
            known = {oid: seen for oid, seen in now.items() if self._is_captured(seen)}
        told = {oid: seen for oid, seen in known.items() if oid in now}
        for oid in known.keys() - now.keys():
            self._tell(connection, TableShape(oid, known[oid].schema, known[oid].name, dropped=True))
        for oid, seen in now.items():
            ours = oid in known or self._is_captured(seen)
            if ours and known.get(oid) != seen and self._tell_shape(connection, oid, seen):
                told |= {oid: seen}
        if fact is None or told != known:
            self._facts.set(_SHAPES_FACT, msgspec.json.encode(told).decode())

    def _learn_keys(self, connection: Connection) -> None:
        key = self._facts.get(_KEY_FACT)
        if key is None:
            key = secrets.token_hex(16)
            self._facts.set(_KEY_FACT, key)
        self._prefix = PREFIX + key
        keys = (key, trigger_key(connection))
        self.prefixes.update(PREFIX + each for each in keys if each is not None)

    def _is_captured(self, seen: _Seen) -> bool:
        return self._source.tables.match(seen.qualified)

    def _tell(self, connection: Connection, shape: TableShape) -> None:
        with translated_errors():
            connection.execute(_EMIT, [self._prefix, msgspec.json.encode(shape).decode()])

    def _tell_shape(self, connection: Connection, oid: int, seen: _Seen) -> bool:
        """Under a lock, so that no later DDL commits before the message. False where somebody holds a stronger one.

        Who may not read a table may not lock it: it is told of all the same, and who wants to copy it says what lacks.
        """
        lock = sql.SQL("LOCK TABLE {} IN ACCESS SHARE MODE NOWAIT").format(sql.Identifier(*seen.qualified))
        told = 0
        for before in (lock, _LOCK_AT_ONCE):
            try:
                with connection.transaction():
                    connection.execute(before)
                    told = connection.execute(_EMIT_SHAPE, [self._prefix, oid, seen.digest]).rowcount
                break
            except (psycopg.errors.LockNotAvailable, psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName):
                return False
            except psycopg.errors.InsufficientPrivilege as exc:
                log.warning("cannot look at a table", table=str(seen.qualified), error=exc.diag.message_primary)
            except psycopg.Error as exc:
                raise to_cdc_error(exc) from exc
        return bool(told)


_LOCK_AT_ONCE: Final = sql.SQL("SET LOCAL lock_timeout = '1ms'")

_EMIT: Final = "SELECT pg_logical_emit_message(true, %s, %s)"

_TABLES: Final = f"FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE {PUBLISHABLE}"

_DIGEST: Final = f"md5({TRACE}::text)"

_DIGESTS: Final = f"SELECT c.oid::bigint, n.nspname, c.relname, {_DIGEST} {_TABLES}"

_EMIT_SHAPE: Final = f"""
SELECT pg_logical_emit_message(true, %s, {SHAPE}::text) {_TABLES} AND c.oid = %s AND {_DIGEST} = %s
"""
