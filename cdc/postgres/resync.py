"""Putting single rows right on a mirror, in order with the stream.

The mirror is made to stand at the position of a snapshot of the source, as for `cdc verify`: all transactions that
commit before it are applied, none of the others. So the rows as the snapshot shows them are right exactly where the
mirror stands: nothing that is still in the queue is in them, and nothing that is in them is still in the queue. The
rows are written in a transaction that begins, as every transaction of the sink does, by locking the sink's position:
should the sink go on all the same, it waits for us, or we notice and write nothing.

Where no daemon runs, the mirror stands behind any snapshot that could be had: that is refused.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import Final

import psycopg
from psycopg import sql
from psycopg.sql import SQL, Identifier, Literal

from cdc.change import TableName
from cdc.errors import FatalError, TransientError
from cdc.mirroring import Mirroring
from cdc.position import Lsn, as_lsn, format_lsn, parse_lsn
from cdc.postgres.connection import Connection, connect, to_cdc_error, translated_errors
from cdc.postgres.digest import ComparedTable, Comparison, nudge
from cdc.postgres.preflight_server import reveal
from cdc.postgres.schema import SchemaTable
from cdc.postgres.snapshot import open_snapshot
from cdc.postgres.target import CopyTarget
from cdc.resync import MAX_ROWS, Action, ResyncReport, SyncedRow, Wanted

HOLD_SECONDS: Final = 60.0

Row = tuple[str | None, ...]
Rows = Mapping[Row, Row]
"""Key -> all columns, as text."""
Side = tuple[Connection, ComparedTable]


def resync(
    mirroring: Mirroring, comparison: Comparison, table: TableName, wanted: Wanted, *, dry_run: bool
) -> ResyncReport:
    """Look at every row that is asked for, and put right what differs. All or nothing."""
    if mirroring.position is None:
        raise FatalError(
            "no daemon runs: the mirror cannot be brought to where the source is", hint="start it with `cdc run`"
        )
    one, other = comparison.source[table], comparison.target[table]
    if not one.key:
        raise FatalError(f"{table} has no key to find single rows by", hint="copy it again instead")
    with ExitStack() as stack:
        source, position = stack.enter_context(_standing(mirroring, comparison))
        target = stack.enter_context(connect(reveal(mirroring.sink.url), application_name="cdc-sync"))
        CopyTarget(mirroring.sink).silence_triggers(target)
        with translated_errors(), target.transaction():
            _lock_position(target, mirroring.sink.name, position)
            keys, absent = _find(((source, one), (target, other)), comparison.schema[table], wanted)
            if len(keys) > MAX_ROWS:
                raise FatalError(f"more than {MAX_ROWS:,} rows of {table} are meant", hint="name fewer of them")
            wanted_rows, found = _rows(source, one, keys), _rows(target, other, keys)
            actions = {key: _action(wanted_rows.get(key), found.get(key)) for key in keys}
            if not dry_run:
                for key, action in actions.items():
                    _put(target, other, key, action, wanted_rows)
    actions |= dict.fromkeys(absent, Action.ABSENT)
    rows = tuple(SyncedRow(", ".join(map(str, key)), action) for key, action in actions.items())
    return ResyncReport(str(table), rows, dry_run)


@contextmanager
def _standing(mirroring: Mirroring, comparison: Comparison) -> Iterator[tuple[Connection, Lsn]]:
    """A connection into a snapshot of the source, while the mirror stands at its position."""
    barrier, url = mirroring.barrier, reveal(mirroring.source.url)
    try:
        barrier.hold(None, HOLD_SECONDS)
        with closing(open_snapshot(url, comparison.schema)) as snapshot:
            with connect(url) as connection:
                nudge(connection)
            asked = time.monotonic()
            barrier.hold(snapshot.position, HOLD_SECONDS)
            if time.monotonic() - asked >= HOLD_SECONDS:
                raise TransientError("the hold ended before the rows could be read", hint="try again")
            with closing(snapshot.connect()) as connection:
                yield connection, snapshot.position
    finally:
        barrier.release()


def _lock_position(target: Connection, sink: str, position: Lsn) -> None:
    """As every transaction of the sink begins: it cannot commit beside us. Raises if it has gone on already."""
    row = target.execute("SELECT position::text FROM cdc.positions WHERE sink = %s FOR UPDATE", [sink]).fetchone()
    if row is None or parse_lsn(row[0]) > as_lsn(position):
        where = row[0] if row else "nowhere"
        raise TransientError(f"the mirror stands at {where}, not at {format_lsn(position)}", hint="try again")


def _find(sides: Sequence[Side], schema: SchemaTable, wanted: Wanted) -> tuple[list[Row], list[Row]]:
    """The keys of the rows that are meant, on either side; and those of `wanted.ids` that are on neither."""
    table = sides[0][1]
    types = {column.name: column.type_name for column in schema.columns}
    found: list[Row] = []
    absent: list[Row] = []
    for text in wanted.ids:
        values = _key_values(table, text)
        hint = f"its key is {', '.join(f'{name} ({types[name]})' for name in table.key)}"
        with _blaming(f"{text!r} is not a key of {table.name}", hint):
            keys = _keys(sides, _is(table, values))
        found += keys
        absent += [] if keys else [values]
    if wanted.where:
        with _blaming(f"not a condition on {table.name}", f"SQL over its columns: {', '.join(types)}"):
            _check_alone(*sides[0], SQL(wanted.where))
            found += _keys(sides, SQL(wanted.where))
    return list(dict.fromkeys(found)), list(dict.fromkeys(absent))


@contextmanager
def _blaming(what: str, hint: str) -> Iterator[None]:
    """Where a server cannot make sense of what a person has written, say so."""
    try:
        yield
    except psycopg.errors.InsufficientPrivilege:
        raise
    except (psycopg.DataError, psycopg.ProgrammingError) as exc:
        raise FatalError(f"{what}: {to_cdc_error(exc)}", hint=hint) from exc


def _key_values(table: ComparedTable, text: str) -> Row:
    if len(table.key) == 1:
        return (text,)
    try:
        values = json.loads(text)
    except ValueError:
        values = None
    if not isinstance(values, list) or len(values) != len(table.key):
        raise FatalError(
            f"{text!r} is not a key of {table.name}",
            hint=f"""as in --id '["a", 1]', in the order {", ".join(table.key)}""",
        )
    return tuple(map(str, values))


def _check_alone(connection: Connection, table: ComparedTable, condition: SQL) -> None:
    """Let the server judge a person's condition before anything of ours stands behind it, which it would blame.

    In binary, psycopg sends one statement at most.
    """
    connection.execute(SQL("EXPLAIN SELECT FROM {} WHERE {}").format(_from(table), condition), binary=True)


def _keys(sides: Sequence[Side], condition: sql.Composable) -> list[Row]:
    """Of the rows that it holds for, on either side; of each, at most one more than may be meant."""
    found: list[Row] = []
    for connection, table in sides:
        where = SQL("({}\n) AND ({})").format(condition, SQL(table.where or "true"))  # it may end with a comment
        query = SQL("SELECT {} FROM {} WHERE {} LIMIT {}").format(
            _texts(table.key), _from(table), where, Literal(MAX_ROWS + 1)
        )
        found += map(tuple, connection.execute(query).fetchall())
    return found


def _rows(connection: Connection, table: ComparedTable, keys: Sequence[Row]) -> dict[Row, Row]:
    """The rows with these keys, by the database's own equality; and only such as the filter lets through."""
    found: dict[Row, Row] = {}
    for key in keys:
        where = SQL("{} AND ({})").format(_is(table, key), SQL(table.where or "true"))
        query = SQL("SELECT {} FROM {} WHERE {}").format(_texts(table.columns), _from(table), where)
        for row in connection.execute(query).fetchall():
            found[key] = tuple(row)
    return found


def _action(wanted: Row | None, found: Row | None) -> Action:
    if wanted == found:
        return Action.EQUAL
    if wanted is None:
        return Action.DELETED
    return Action.INSERTED if found is None else Action.REPLACED


def _put(target: Connection, table: ComparedTable, key: Row, action: Action, wanted: Rows) -> None:
    if action is Action.DELETED:
        target.execute(SQL("DELETE FROM {} WHERE {}").format(_from(table), _is(table, key)))
    elif action is Action.INSERTED:
        statement = SQL("INSERT INTO {} ({}) OVERRIDING SYSTEM VALUE VALUES ({})")
        columns, values = map(Identifier, table.columns), map(Literal, wanted[key])
        name = Identifier(*table.name)
        target.execute(statement.format(name, SQL(", ").join(columns), SQL(", ").join(values)))
    elif action is Action.REPLACED:
        assigned = [
            SQL("{} = {}").format(Identifier(name), Literal(value))
            for name, value in zip(table.columns, wanted[key], strict=True)
        ]
        statement = SQL("UPDATE {} SET {} WHERE {}")
        target.execute(statement.format(_from(table), SQL(", ").join(assigned), _is(table, key)))


def _is(table: ComparedTable, key: Row) -> sql.Composable:
    equal = [
        SQL("{} = {}").format(Identifier(name), Literal(value)) for name, value in zip(table.key, key, strict=True)
    ]
    return SQL(" AND ").join(equal)


def _texts(columns: Sequence[str]) -> sql.Composable:
    return SQL(", ").join(SQL("{}::text").format(Identifier(column)) for column in columns)


def _from(table: ComparedTable) -> sql.Composable:
    return SQL("{} {}").format(SQL("" if table.partitioned else "ONLY"), Identifier(*table.name))
