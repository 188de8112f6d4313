"""What a cut-over from PostgreSQL to PostgreSQL asks of both servers."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Iterable
from typing import Final

from psycopg.sql import SQL, Identifier, Literal

from cdc.change import TableName
from cdc.config import SinkConfig
from cdc.cutover import Finished
from cdc.errors import TransientError
from cdc.position import Lsn, SourcePosition, format_lsn, parse_lsn
from cdc.postgres.connection import Connection, connect, translated_errors
from cdc.postgres.digest import nudge
from cdc.postgres.pgoutput import Delete, Insert, PgMessage, Relation, Truncate, Update, decode
from cdc.postgres.schema import read_tables
from cdc.postgres.sequences import SequencesSet, read_sequences, set_sequences
from cdc.urls import redact

_WATCHED_WRITES: Final = 1000
"""Messages looked at (and the rest of their transaction): one write would be too many already."""

_TOO_MANY_NAMED: Final = 20


class PostgresHandover:
    """`cdc.cutover.Handover`. Watches the source by a temporary slot: it sees every write, and only committed ones.

    position: reads where the mirror stands (`None`: nowhere yet).
    """

    def __init__(
        self,
        source_url: str,
        target_url: str,
        *,
        publications: Collection[str],
        sink: SinkConfig,
        tables: Collection[TableName],
        position: Callable[[], SourcePosition | None],
        patience_seconds: float = 60.0,
    ) -> None:
        self.source = redact(source_url)
        self.target = redact(target_url)
        self._target_url = target_url
        self._publications = ", ".join(Identifier(name).as_string() for name in publications)
        self._sink = sink
        self._tables = tables
        self._position = position
        self._slot = f"cdc_cutover_{secrets.token_hex(6)}"
        self._watched = Lsn(0)
        timeout = f"{max(1, int(patience_seconds * 1000))}ms"
        self._connection = connect(source_url, application_name="cdc-cutover", lock_timeout=timeout)

    def watch(self) -> str:
        """Create the slot, which waits for every open transaction that has written."""
        query = SQL("SELECT lsn::text FROM pg_create_logical_replication_slot({}, 'pgoutput', temporary => true)")
        try:
            with translated_errors():
                ((lsn,),) = self._connection.execute(query.format(Literal(self._slot))).fetchall()
        except TransientError as exc:
            raise TransientError(
                f"the source is still being written to: {exc}",
                hint="stop the applications, end open transactions (pg_stat_activity) and prepared ones",
            ) from exc
        self._watched = parse_lsn(lsn)
        return format_lsn(self._watched)

    def nudge(self) -> None:
        """Commit a logical message, which moves the stream and is no write."""
        nudge(self._connection)

    def behind(self) -> str:
        """How far the mirror is behind the watched position; empty when it is there or past it."""
        position = self._position()
        missing = max(self._watched - position, 0) if isinstance(position, int) else self._watched
        return f"{missing:,} bytes" if missing else ""

    def writes(self) -> tuple[str, ...]:
        """Tables with writes that committed since `watch`: what the slot would send, without taking it."""
        query = SQL(_PEEK).format(Literal(self._slot), Literal(_WATCHED_WRITES), Literal(self._publications))
        with translated_errors():
            rows = self._connection.execute(query).fetchall()
        return _written(decode(data) for (data,) in rows)

    def finish(self) -> Finished:
        """Set sequences, make identity columns GENERATED ALWAYS again, and name what was never mirrored."""
        with connect(self._target_url, application_name="cdc-cutover") as target:
            values = read_sequences(self._connection, self._tables)
            sequences = set_sequences(target, values, self._sink.target_name)
            identities = restore_identities(self._connection, target, self._sink, self._tables)
        done = [f"{len(sequences.done)} sequences stand where the source's do"]
        done += [f"{column} is GENERATED ALWAYS again" for column in identities]
        problems = [*_sequence_problems(sequences), *_large_object_problems(self._connection)]
        return Finished(tuple(done), tuple(problems))

    def close(self) -> None:
        """Disconnect, which drops the slot."""
        self._connection.close()


def restore_identities(
    source: Connection, target: Connection, sink: SinkConfig, tables: Collection[TableName]
) -> list[str]:
    """Make identity columns GENERATED ALWAYS that are so at the source; return those that were not."""
    wanted, present = read_tables(source), read_tables(target)
    restored = []
    for table in (wanted[name] for name in sorted(tables) if name in wanted):
        name = sink.target_name(table.name)
        found = {column.name: column.identity for column in present[name].columns} if name in present else {}
        for column in table.columns:
            if column.identity == "a" and found.get(column.name) == "d":
                with translated_errors():
                    target.execute(
                        SQL("ALTER TABLE {} ALTER COLUMN {} SET GENERATED ALWAYS").format(
                            Identifier(*name), Identifier(column.name)
                        )
                    )
                restored.append(f"{name}.{column.name}")
    return restored


def _written(messages: Iterable[PgMessage]) -> tuple[str, ...]:
    names: dict[int, str] = {}
    written: set[int] = set()
    for message in messages:
        match message:
            case Relation():
                names[message.oid] = str(message.table.qualified)
            case Insert() | Update() | Delete():
                written.add(message.relation)
            case Truncate():
                written.update(message.relations)
    return tuple(sorted(names[oid] for oid in written))


def _sequence_problems(sequences: SequencesSet) -> list[str]:
    lines = [f"sequence {name} is not on the mirror" for name in sequences.missing]
    lines += [f"sequence {name} was not set: {reason}" for name, reason in sequences.refused]
    return _bounded(lines)


def _large_object_problems(source: Connection) -> list[str]:
    with translated_errors():
        ((count,),) = source.execute("SELECT count(*) FROM pg_largeobject_metadata").fetchall()
    return [f"{count:,} large objects are not on the mirror: logical replication carries none"] if count else []


def _bounded(lines: list[str]) -> list[str]:
    rest = len(lines) - _TOO_MANY_NAMED
    return lines if rest <= 0 else [*lines[:_TOO_MANY_NAMED], f"and {rest} more sequences"]


_PEEK: Final = """
SELECT data FROM pg_logical_slot_peek_binary_changes({}, NULL, {}, 'proto_version', '1', 'publication_names', {})
"""
