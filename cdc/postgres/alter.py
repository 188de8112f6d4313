"""Carries out on a mirror's table what its source's table has gone through. Within transactions of the caller's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import psycopg
import structlog
from psycopg import sql

from cdc.change import TableName
from cdc.postgres.connection import Connection
from cdc.postgres.evolution import (
    AddColumn,
    DropColumn,
    DropExpression,
    RenameColumn,
    SetDefault,
    SetKey,
    SetNotNull,
    SetType,
    Step,
    renames,
)
from cdc.postgres.schema import type_holds
from cdc.postgres.shape import ColumnShape, TableShape

log = structlog.get_logger()

VIRTUAL_SINCE: Final = 180000
"""The first server version with virtual generated columns."""

LACKING: Final = (
    psycopg.errors.UndefinedObject,
    psycopg.errors.UndefinedFunction,
    psycopg.errors.UndefinedTable,
    psycopg.errors.InvalidSchemaName,
)
"""What a step needs (a type, a function, a sequence) is not on the mirror."""


class _Column(NamedTuple):
    """A column of the mirror's table, as it is now."""

    type: str
    not_null: bool
    generated: str
    collation: str | None
    default: str | None


class ForeignKey(NamedTuple):
    """A foreign key that was taken away. table: the referring one. statement: the one that makes it again."""

    table: TableName
    name: str
    statement: str


class MirrorTable:
    """One table of a mirror, to be altered.

    sink: its name, for the log.
    made: whether the sink has made it. The user's own may be wider, and keeps what he has made different.
    written: the columns that the sink writes; `None`: all. The others must not refuse rows that leave them out.
    """

    def __init__(
        self, connection: Connection, sink: str, name: TableName, *, made: bool, written: Sequence[str] | None
    ) -> None:
        self.name = name
        self._log = structlog.get_logger(sink=sink, table=str(name))
        self._connection = connection
        self._made = made
        self._written = written

    def left_to_do(self, steps: Sequence[Step], *, bearable: bool) -> list[Step]:
        """Those that are not done yet; with `bearable`, of these the ones that the stream cannot go on without."""
        columns = self._columns()
        return [step for step in steps if not self._is_done(step, columns, bearable=bearable)]

    def carry_out(self, steps: Sequence[Step]) -> None:
        """Do what is not done yet. Raises psycopg's errors."""
        for step in steps:
            if self._is_done(step, self._columns()):
                continue
            if isinstance(step, SetDefault | SetKey):
                self._try(step)
            else:
                self._do(step)

    def conform(self, shape: TableShape, followed: TableShape | None) -> list[ForeignKey]:
        """Give the table, which is empty, a shape, whatever it has now.

        followed: what it was last given. It tells which columns have other names now; else they would go, and come back
        as the last. Returns the foreign keys that were in the way: those of columns with another type would be checked
        at once.
        """
        if followed is not None:
            self._rename(renames(followed, shape))
        steps = list(self._conforming(shape))
        taken = self._take_foreign_keys([step.column.name for step in steps if isinstance(step, SetType)])
        for step in steps:
            if isinstance(step, SetDefault | SetKey):
                self._try(step)
            elif isinstance(step, SetType):
                if not step.column.identity:
                    self._alter(_set_default(step.column.name, None))  # which may not fit the other type
                self._alter(_set_type(step.column) + sql.SQL(" USING NULL"))
            else:
                self._do(step, empty=True)
        return taken

    def _rename(self, steps: Sequence[RenameColumn]) -> None:
        """All of them, or none where the table has not these columns, or others with these names."""
        present = set(self._columns())
        for step in steps:
            if step.name not in present or step.new_name in present:
                return
            present = present - {step.name} | {step.new_name}
        for step in steps:
            self._do(step)

    def _take_foreign_keys(self, columns: Sequence[str]) -> list[ForeignKey]:
        """Drop all that refer with, or to, one of these columns."""
        rows = self._connection.execute(_FOREIGN_KEYS, {"table": self._regclass, "columns": list(columns)}).fetchall()
        taken = [ForeignKey(TableName(schema, table), name, text) for schema, table, name, text in rows]
        for key in taken:
            drop = sql.SQL("ALTER TABLE {} DROP CONSTRAINT {}")
            self._connection.execute(drop.format(sql.Identifier(*key.table), sql.Identifier(key.name)))
        return taken

    def _conforming(self, shape: TableShape) -> Iterator[Step]:
        present, key = self._columns(), self._key()
        wanted = {column.name: column for column in shape.columns}
        another_key = key not in ((), shape.primary_key) and self._made
        if another_key:
            yield SetKey(key, ())
        for name, found in present.items():
            if name not in wanted:
                if self._made:
                    yield DropColumn(name)
                elif found.not_null:
                    yield SetNotNull(name, not_null=False)
            elif bool(found.generated) != bool(wanted[name].generated):
                yield DropColumn(name)
        for name, column in wanted.items():
            if name not in present or bool(present[name].generated) != bool(column.generated):
                yield AddColumn(column)
            elif not column.generated:
                yield from self._conforming_column(column, present[name])
        if another_key:
            yield SetKey((), shape.primary_key)

    def _conforming_column(self, column: ColumnShape, found: _Column) -> Iterator[Step]:
        retyped = not self._has_type(column, found)
        if retyped:  # it loses its default
            yield SetType(column)
        if self._made and found.not_null != self._refuses_null(column):
            yield SetNotNull(column.name, self._refuses_null(column))
        if not column.identity and column.default != (None if retyped else found.default):
            yield SetDefault(column.name, column.default)

    def _refuses_null(self, column: ColumnShape) -> bool:
        return column.not_null and self._made and (self._written is None or column.name in self._written)

    def _has_type(self, column: ColumnShape, found: _Column) -> bool:
        if (column.type, column.collation) == (found.type, found.collation):
            return True
        return not self._made and type_holds(column.type, found.type)

    def _is_done(self, step: Step, columns: dict[str, _Column], *, bearable: bool = False) -> bool:
        match step:
            case DropColumn(name):
                return name not in columns or (bearable and not columns[name].not_null)
            case RenameColumn(name, new_name):
                return name not in columns and new_name in columns
            case SetType(column):
                found = columns.get(column.name)
                return found is not None and (
                    self._has_type(column, found) or (bearable and type_holds(column.type, found.type))
                )
            case AddColumn(column):
                return column.name in columns or (bearable and bool(column.generated))
            case DropExpression(name):
                return name in columns and not columns[name].generated
            case SetNotNull(name, not_null):
                keep = not_null and (bearable or not self._made or (self._written or (name,)).count(name) == 0)
                return keep or (name in columns and columns[name].not_null == not_null)
            case SetKey(old, wanted):
                return bearable or self._key() not in (old, ()) or self._key() == wanted
            case SetDefault():
                return bearable
        raise AssertionError(step)

    def _try(self, step: SetDefault | SetKey) -> None:
        """What the stream does not need: a function or a foreign key of the mirror may be against it."""
        try:
            with self._connection.transaction():
                self._do(step)
        except psycopg.Error as exc:
            if self._connection.closed:
                raise
            self._log.warning("not followed on the mirror", step=describe(step), error=exc.diag.message_primary)

    def _do(self, step: Step, *, empty: bool = False) -> None:
        match step:
            case DropColumn(name):
                self._alter(sql.SQL("DROP COLUMN {}").format(sql.Identifier(name)))
            case RenameColumn(name, new_name):
                self._alter(sql.SQL("RENAME COLUMN {} TO {}").format(sql.Identifier(name), sql.Identifier(new_name)))
            case SetType(column):
                self._alter(_set_type(column))
            case AddColumn(column):
                self._add(column, empty=empty)
            case DropExpression(name):
                self._alter(sql.SQL("ALTER COLUMN {} DROP EXPRESSION").format(sql.Identifier(name)))
            case SetNotNull(name, not_null):
                action = sql.SQL("SET" if not_null else "DROP")
                self._alter(sql.SQL("ALTER COLUMN {} {} NOT NULL").format(sql.Identifier(name), action))
            case SetDefault(name, default):
                self._alter(_set_default(name, default))
            case SetKey(_, columns):
                self._set_key(columns)
        self._log.info("schema change", step=describe(step))
        if isinstance(step, AddColumn):
            self._set_later_default(step.column)

    def _add(self, column: ColumnShape, *, empty: bool) -> None:
        """Old rows get what the source's old rows have."""
        parts: list[sql.Composable] = [sql.SQL("ADD COLUMN {}").format(sql.Identifier(column.name)), _type(column)]
        if column.generated:
            stored = column.generated == "s" or self._connection.info.server_version < VIRTUAL_SINCE
            kind = sql.SQL("STORED" if stored else "VIRTUAL")
            parts.append(sql.SQL("GENERATED ALWAYS AS ({}) {}").format(_sql(column.default or "NULL"), kind))
        elif empty and column.identity:
            parts.append(sql.SQL("GENERATED BY DEFAULT AS IDENTITY"))
        elif column.missing is not None:
            parts.append(sql.SQL("DEFAULT {}").format(sql.Literal(column.missing)))
        if self._refuses_null(column):
            parts.append(sql.SQL("NOT NULL"))
        self._alter(sql.SQL(" ").join(parts))

    def _set_later_default(self, column: ColumnShape) -> None:
        if not column.generated and not column.identity and (column.default or column.missing) is not None:
            self._try(SetDefault(column.name, column.default))

    def _set_key(self, columns: Sequence[str]) -> None:
        query = "SELECT conname FROM pg_constraint WHERE conrelid = to_regclass(%s) AND contype = 'p'"
        for (name,) in self._connection.execute(query, [self._regclass]).fetchall():
            self._alter(sql.SQL("DROP CONSTRAINT {}").format(sql.Identifier(name)))
        if columns:
            names = sql.SQL(", ").join(map(sql.Identifier, columns))
            self._alter(sql.SQL("ADD PRIMARY KEY ({})").format(names))

    def _alter(self, action: sql.Composed) -> None:
        self._connection.execute(sql.SQL("ALTER TABLE {} ").format(sql.Identifier(*self.name)) + action)

    @property
    def _regclass(self) -> str:
        return sql.Identifier(*self.name).as_string(None)

    def _columns(self) -> dict[str, _Column]:
        rows = self._connection.execute(_COLUMNS, [self._regclass]).fetchall()
        return {name: _Column(*rest) for name, *rest in rows}

    def _key(self) -> tuple[str, ...]:
        return tuple(name for (name,) in self._connection.execute(_KEY, [self._regclass]).fetchall())


def describe(step: Step) -> str:
    """The step in words, without any value of a row."""
    match step:
        case DropColumn(name):
            return f"drop column {name}"
        case RenameColumn(name, new_name):
            return f"rename column {name} to {new_name}"
        case SetType(column):
            return f"column {column.name} becomes {column.type}"
        case AddColumn(column):
            return f"add column {column.name} {column.type}"
        case DropExpression(name):
            return f"column {name} is no longer generated"
        case SetNotNull(name, not_null):
            return f"column {name} {'refuses' if not_null else 'takes'} NULL"
        case SetDefault(name, default):
            return f"column {name} has {'another' if default else 'no'} default"
        case SetKey(_, columns):
            return f"primary key ({', '.join(columns)})" if columns else "no primary key"


def _set_type(column: ColumnShape) -> sql.Composed:
    return sql.SQL("ALTER COLUMN {} TYPE {}").format(sql.Identifier(column.name), _type(column))


def _set_default(name: str, default: str | None) -> sql.Composed:
    action = sql.SQL("DROP DEFAULT") if default is None else sql.SQL("SET DEFAULT {}").format(_sql(default))
    return sql.SQL("ALTER COLUMN {} {}").format(sql.Identifier(name), action)


def _type(column: ColumnShape) -> sql.Composed:
    collation = sql.SQL(" COLLATE ") + _sql(column.collation) if column.collation else sql.SQL("")
    return _sql(column.type) + collation


def _sql(text: str) -> sql.Composed:
    """What the source's catalog has as SQL (a type, an expression): only the source can have written it."""
    return sql.Composed([sql.SQL(text)])


_COLUMNS: Final = """
SELECT a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attgenerated::text,
       (SELECT quote_ident(n.nspname) || '.' || quote_ident(c.collname)
          FROM pg_collation c JOIN pg_namespace n ON n.oid = c.collnamespace
         WHERE c.oid = a.attcollation AND a.attcollation <> t.typcollation),
       pg_get_expr(d.adbin, d.adrelid)
  FROM pg_attribute a
  JOIN pg_type t ON t.oid = a.atttypid
  LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
 WHERE a.attrelid = to_regclass(%s) AND a.attnum > 0 AND NOT a.attisdropped
 ORDER BY a.attnum
"""

_KEY: Final = """
SELECT a.attname
  FROM pg_index i, unnest(i.indkey[0:i.indnkeyatts - 1]) WITH ORDINALITY AS k (attnum, ordinality)
  JOIN pg_attribute a ON a.attnum = k.attnum
 WHERE i.indrelid = to_regclass(%s) AND i.indisprimary AND a.attrelid = i.indrelid
 ORDER BY k.ordinality
"""

_FOREIGN_KEYS: Final = """
SELECT n.nspname, r.relname, c.conname,
       format(
           'ALTER TABLE %%I.%%I ADD CONSTRAINT %%I %%s', n.nspname, r.relname, c.conname, pg_get_constraintdef(c.oid)
       )
  FROM pg_constraint c
  JOIN pg_class r ON r.oid = c.conrelid
  JOIN pg_namespace n ON n.oid = r.relnamespace
 WHERE c.contype = 'f' AND c.conparentid = 0
   AND EXISTS (SELECT FROM pg_attribute a
                WHERE a.attrelid = to_regclass(%(table)s) AND a.attname = ANY (%(columns)s)
                  AND (a.attrelid = c.conrelid AND a.attnum = ANY (c.conkey)
                       OR a.attrelid = c.confrelid AND a.attnum = ANY (c.confkey)))
 ORDER BY c.oid
"""
