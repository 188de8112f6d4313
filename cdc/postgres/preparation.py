"""The tables of a mirror before anything is copied: made like the source's, or the user's own if they fit."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Final

import msgspec
import psycopg
from psycopg import sql

from cdc.change import TableName
from cdc.config import SinkConfig
from cdc.errors import FatalError
from cdc.postgres.alter import ForeignKey, MirrorTable
from cdc.postgres.bookkeeping import ANALYZE, FOREIGN_KEY, EntryKey, Mark, key_of
from cdc.postgres.connection import Connection, while_doing
from cdc.postgres.dump import PRIMARY_KEY, TABLE, SchemaDump, SchemaEntry, Selection
from cdc.postgres.schema import SchemaColumn, SchemaTable, read_tables, type_holds
from cdc.postgres.shape import Followed

Rename = tuple[TableName, TableName]


class Prepared(msgspec.Struct, frozen=True):
    """What became of the tables.

    made: those that were created. later: what is to be built once the copy is complete.
    """

    made: tuple[TableName, ...]
    later: tuple[SchemaEntry, ...]


class Preparation:
    """Prepares a target within one transaction of the caller's. Raises `FatalError` where it holds something else.

    marks: the tables that this sink has begun to mirror. recorded: what it has built or is going to build.
    followed: the shapes that its tables were given last.
    """

    def __init__(
        self,
        connection: Connection,
        config: SinkConfig,
        marks: Mapping[TableName, Mark],
        recorded: Collection[EntryKey],
        followed: Mapping[TableName, Followed],
    ) -> None:
        self._connection = connection
        self._config = config
        self._marks = marks
        self._recorded = recorded
        self._followed = followed

    def run(self, schema: SchemaDump) -> Prepared:
        """Make what is missing, or take tables as they are and empty the incomplete ones."""
        present = read_tables(self._connection)
        pairs = [(table, present.get(self._config.target_name(table.name))) for table in schema.tables]
        missing = [table for table, target in pairs if target is None]
        unfinished = [(table, target) for table, target in pairs if target and not self._is_complete(table.name)]
        ours = [(table, target) for table, target in unfinished if table.name in self._marks]
        follow = self._config.schema_changes == "apply"
        self._refuse(missing, among=len(pairs))
        self._check([pair for pair in unfinished if not (follow and pair in ours)])
        _empty(self._connection, [target for _, target in ours])
        taken = list(self._conform(schema, ours)) if follow and ours else []
        made = tuple(table.name for table in missing)
        if missing:
            self._make(schema, missing)
        analyzed = [*made, *(table.name for table, _ in unfinished)]
        built = self._without_keys(self._later(schema, made))
        return Prepared(made, (*built, *taken, *map(self._analyze, analyzed)))

    def _is_complete(self, table: TableName) -> bool:
        return table in self._marks and self._marks[table].copied_at is not None

    def _refuse(self, missing: Sequence[SchemaTable], *, among: int) -> None:
        """Tables are made by the sink, or by the user: where he made some, he is asked for the others too."""
        if gone := [self._config.target_name(table.name) for table in missing if self._is_complete(table.name)]:
            raise FatalError(
                f"gone from the target: {_listed(gone)}",
                hint="exclude them, start once, include them again: they are copied anew",
            )
        ours = any(mark.made for mark in self._marks.values()) if self._marks else len(missing) == among
        if missing and not ours:
            targets = [self._config.target_name(table.name) for table in missing]
            raise FatalError(
                f"missing on the target: {_listed(targets)}",
                hint="create them there, or drop the sink's tables and its rows in schema cdc to begin anew",
            )

    def _make(self, schema: SchemaDump, tables: Sequence[SchemaTable]) -> None:
        with while_doing("creating the tables on the target"):
            self._connection.execute("SET LOCAL check_function_bodies = off")
            self._connection.execute("SET LOCAL client_min_messages = warning")
            if self._marks:
                selection = schema.select([table.name for table in tables])
                made = {entry.number for entry in schema.pre_data if entry.kind == TABLE} & set(selection.about)
                self._add(schema, selection.needed, made)
            else:
                self._connection.execute("\n".join(entry.sql for entry in schema.pre_data).encode())
                rename_relations(self._connection, self._renames(schema, schema.pre_data))
            for table in tables:
                self._loosen(table)

    def _conform(self, schema: SchemaDump, tables: Sequence[tuple[SchemaTable, SchemaTable]]) -> Iterator[SchemaEntry]:
        """Tables that were begun, and are empty again: give them the shape that the source's have by now.

        Yields the foreign keys that had to go for that.
        """
        shapes = {shape.qualified: shape for shape in schema.shapes}
        selection = schema.select([table.name for table, _ in tables])
        used = [entry.number for entry in schema.pre_data if _may_need(entry, selection)]
        self._add(schema, used, ())
        for table, target in tables:
            written = self._config.table(table.name).columns
            made, sink = self._marks[table.name].made, self._config.name
            mirrored = MirrorTable(self._connection, sink, target.name, made=made, written=written)
            with while_doing(f"altering {target.name} on the target"):
                followed = self._followed.get(table.name)
                taken = mirrored.conform(shapes[table.name], followed.shape if followed else None)
            yield from (self._foreign_key(table.name, key) for key in taken)

    def _foreign_key(self, table: TableName, key: ForeignKey) -> SchemaEntry:
        referring = next((name for name in self._marks if self._config.target_name(name) == key.table), table)
        name = f"{key.table.name} {key.name}"
        return SchemaEntry(0, FOREIGN_KEY, name, referring, tuple({table, referring}), (), key.statement)

    def _add(self, schema: SchemaDump, wanted: Collection[int], made: Collection[int]) -> None:
        """Create entries, beside what an earlier run made, or the user since. made: what must not be there yet."""
        entries = [entry for entry in schema.pre_data if entry.number in wanted]
        pairs = self._renames(schema, entries)
        rename_relations(self._connection, [(target, source) for source, target in pairs])
        for entry in entries:
            try:
                with self._connection.transaction():
                    self._connection.execute(entry.sql.encode())
            except _DUPLICATES:
                if entry.number in made:
                    raise
        rename_relations(self._connection, pairs)

    def _renames(self, schema: SchemaDump, entries: Iterable[SchemaEntry]) -> list[Rename]:
        names = {*(relation for entry in entries for relation in entry.relations), *schema.sequences}
        return renames(self._config, sorted(names))

    def _later(self, schema: SchemaDump, made: Collection[TableName]) -> Iterator[SchemaEntry]:
        """What is to be built for tables that the sink has made; of old ones only what is new at the source."""
        if made and not self._marks:
            yield from schema.post_data
            return
        begun = [table for table, mark in self._marks.items() if mark.made and not self._is_complete(table)]
        about = schema.select(made).about
        needed = schema.select([*made, *begun]).needed
        for entry in schema.post_data:
            if entry.number in about or (entry.number in needed and key_of(entry) not in self._recorded):
                yield entry

    def _without_keys(self, entries: Iterable[SchemaEntry]) -> Iterator[SchemaEntry]:
        """A table that was conformed has its primary key, perhaps by another name."""
        keyed = {table.name for table in read_tables(self._connection).values() if table.primary_key}
        for entry in entries:
            if entry.kind != PRIMARY_KEY or entry.table is None or self._config.target_name(entry.table) not in keyed:
                yield entry

    def _analyze(self, table: TableName) -> SchemaEntry:
        target = self._config.target_name(table)
        return SchemaEntry(0, ANALYZE, target.name, table, (table,), (), "")  # its SQL is made from the table

    def _loosen(self, table: SchemaTable) -> None:
        """Lift what replicated rows would break. The cut-over makes identity columns GENERATED ALWAYS again."""
        target = sql.Identifier(*self._config.target_name(table.name))
        mirrored = mirrored_columns(self._config, table)
        for column in table.replicated_columns:
            if column.identity == "a":  # which UPDATE may not write
                action = sql.SQL("SET GENERATED BY DEFAULT")
            elif column.not_null and not column.identity and column not in mirrored:
                action = sql.SQL("DROP NOT NULL")
            else:
                continue
            alter = sql.SQL("ALTER TABLE {} ALTER COLUMN {} {}")
            self._connection.execute(alter.format(target, sql.Identifier(column.name), action))

    def _check(self, tables: Sequence[tuple[SchemaTable, SchemaTable]]) -> None:
        """Tables of the user must fit, and be empty: what is in them is not ours to remove."""
        problems = [text for table, target in tables for text in self._misfits(table, target)]
        if problems:
            raise FatalError(
                f"the target's tables do not fit: {'; '.join(problems)}", hint="alter them to what the source has"
            )
        for table, target in tables:
            if table.name not in self._marks and not self._is_empty(target.name):
                raise FatalError(
                    f"{target.name} on the target has rows that this sink did not copy",
                    hint="empty it if they may go, or mirror into another database",
                )

    def _misfits(self, table: SchemaTable, target: SchemaTable) -> Iterator[str]:
        """What about a target table would not hold the source's rows."""
        columns = {column.name: column for column in target.columns}
        for column in mirrored_columns(self._config, table):
            found = columns.get(column.name)
            if found is None:
                yield f"{target.name}: column {column.name} ({column.type_name}) is missing"
            elif found.generated:
                yield f"{target.name}: column {column.name} is generated"
            elif not type_holds(column.type_name, found.type_name):
                yield f"{target.name}: column {column.name} is {found.type_name}, at the source {column.type_name}"

    def _is_empty(self, table: TableName) -> bool:
        query = sql.SQL("SELECT FROM {} LIMIT 1").format(sql.Identifier(*table))
        return self._connection.execute(query).rowcount == 0


def mirrored_columns(config: SinkConfig, table: SchemaTable) -> list[SchemaColumn]:
    """The columns that travel to this sink, in the source's order."""
    wanted = config.table(table.name).columns
    if wanted is None:
        return list(table.replicated_columns)
    if unknown := set(wanted) - {column.name for column in table.replicated_columns}:
        raise FatalError(f"{table.name} has no column {', '.join(sorted(unknown))} to mirror", hint="see `columns`")
    if left_out := set(table.primary_key) - set(wanted):
        raise FatalError(
            f"{table.name}: the key column {', '.join(sorted(left_out))} is left out", hint="add it to `columns`"
        )
    return [column for column in table.replicated_columns if column.name in wanted]


def renames(config: SinkConfig, names: Iterable[TableName]) -> list[Rename]:
    """(name at the source, another name on the target), for those that have one."""
    return [(name, renamed) for name in names if (renamed := config.target_name(name)) != name]


def rename_relations(connection: Connection, pairs: Iterable[Rename]) -> None:
    """Rename tables and sequences, those that do not exist left out.

    By way of names that nobody has, so that they may swap theirs. What a table owns moves with it.
    """
    present = [(old, new) for old, new in pairs if _exists(connection, old)]
    for number, (old, new) in enumerate(present):
        passing = TableName(old.schema, f"cdc_renaming_{number}")
        _alter(connection, old, "RENAME TO {}", passing.name)
        if old.schema != new.schema:
            _ensure_schema(connection, new.schema)
            _alter(connection, passing, "SET SCHEMA {}", new.schema)
    for number, (_, new) in enumerate(present):
        _alter(connection, TableName(new.schema, f"cdc_renaming_{number}"), "RENAME TO {}", new.name)


def _may_need(entry: SchemaEntry, selection: Selection) -> bool:
    """Whether columns of tables that are there may need it: a type, a function, a sequence."""
    if entry.number in selection.about:
        return entry.kind == "SEQUENCE" and "CREATE SEQUENCE" in entry.sql
    return entry.number in selection.needed


def _listed(names: Iterable[TableName]) -> str:
    return ", ".join(map(str, names))


def _empty(connection: Connection, tables: Sequence[SchemaTable]) -> None:
    """Empty tables, but not those that inherit from them."""
    if not tables:
        return
    names = [sql.SQL("" if table.partitioned else "ONLY ") + sql.Identifier(*table.name) for table in tables]
    try:
        with connection.transaction():
            connection.execute(sql.SQL("TRUNCATE {}").format(sql.SQL(", ").join(names)))
    except psycopg.errors.FeatureNotSupported:  # a foreign key of a table that is complete
        for name in names:
            # an old connection of ours may still commit: TRUNCATE would have waited for it
            connection.execute(sql.SQL("LOCK TABLE {} IN EXCLUSIVE MODE").format(name))
            connection.execute(sql.SQL("DELETE FROM ") + name)


def _alter(connection: Connection, table: TableName, action: str, name: str) -> None:
    statement = sql.SQL("ALTER TABLE {} " + action)
    connection.execute(statement.format(sql.Identifier(*table), sql.Identifier(name)))


def _ensure_schema(connection: Connection, name: str) -> None:
    if not connection.execute("SELECT FROM pg_namespace WHERE nspname = %s", [name]).rowcount:
        connection.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(name)))


def _exists(connection: Connection, table: TableName) -> bool:
    query = "SELECT FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace WHERE nspname = %s AND relname = %s"
    return connection.execute(query, list(table)).rowcount > 0


_DUPLICATES: Final = (
    psycopg.errors.DuplicateSchema,
    psycopg.errors.DuplicateTable,
    psycopg.errors.DuplicateObject,
    psycopg.errors.DuplicateFunction,
)
