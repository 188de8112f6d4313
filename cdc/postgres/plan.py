"""How changes of one source table become statements for its mirror. Made once per table and shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from operator import itemgetter
from typing import Final

from psycopg import sql

from cdc.change import Change, Image, Table, TableName
from cdc.errors import PermanentError
from cdc.postgres.fold import KeyOf, old_row
from cdc.postgres.prepared import Statement
from cdc.postgres.row import UNCHANGED, Row, Value, decode_row, decode_row_at, first_value
from cdc.postgres.schema import SchemaTable

Values = tuple[Value, ...]

_PARAMETER: Final = "\0"


class TablePlan:
    """The statements for one table.

    key: indexes of the source columns that identify a row on the mirror: its primary key, or what the source
    sends as identity. Empty for a table that has neither, or only a deferrable key: the whole old row is compared.
    """

    def __init__(self, source: Table, target: SchemaTable, columns: Sequence[str] | None) -> None:
        self.source = source
        self.target = target
        written = {column.name for column in target.columns if not column.generated}
        wanted = [
            index
            for index, column in enumerate(source.columns)
            if columns is None or column.name in columns or column.is_key
        ]
        missing = [source.columns[index].name for index in wanted if source.columns[index].name not in written]
        if missing:
            raise PermanentError(
                f"table {target.name} has no column {', '.join(missing)} that could be written",
                hint="alter the mirror's table like the source's, or name the columns to mirror in the configuration",
            )
        self.columns = tuple(wanted)
        self.width = len(source.columns)
        self._every_column = tuple(range(self.width))
        self.key = self._find_key()
        # not unique at every moment, but an index to look in
        self._near = tuple(index for index in wanted if source.columns[index].name in target.primary_key)
        self._queries: dict[tuple[object, ...], bytes] = {}
        self._base_types = {column.name: column.base_type_name for column in target.columns}

    def _find_key(self) -> tuple[int, ...]:
        index_of = {self.source.columns[index].name: index for index in self.columns}
        sent = tuple(index for index in self.columns if self.source.columns[index].is_key)
        if self.source.identity == "i":  # only these columns come with a DELETE
            return sent
        if self.target.key_deferrable:
            return ()  # in mid-transaction two rows may have the same key
        primary_key = tuple(index_of[name] for name in self.target.primary_key if name in index_of)
        is_whole = len(primary_key) == len(self.target.primary_key)
        if self.source.identity == "d":  # as above; the mirror may have another key, of its own or from before
            return primary_key if is_whole and set(primary_key) == set(sent) else sent
        return primary_key if is_whole else ()

    @cached_property
    def key_of(self) -> KeyOf:
        """Returns the key values of a row's image: a value, or a tuple of them. Looks no further into the row."""
        if self.key == (0,):
            return first_value
        pick, limit = itemgetter(*self.key), max(self.key) + 1
        return lambda image: pick(decode_row_at(image, 0, limit)[0])

    @property
    def takes_all(self) -> bool:
        """Whether rows can be written as they are, without picking columns."""
        return self.columns == self._every_column

    def pick(self, rows: Sequence[Row], columns: Sequence[int]) -> Sequence[Values]:
        """The given columns of each row."""
        if columns == self._every_column:
            return rows
        if len(columns) == 1:
            only = columns[0]
            return [(row[only],) for row in rows]
        return list(map(itemgetter(*columns), rows))

    def names(self, columns: Sequence[int]) -> sql.Composed:
        """The columns' names, for a list."""
        return sql.SQL(", ").join(sql.Identifier(self.source.columns[index].name) for index in columns)

    @cached_property
    def table(self) -> sql.Identifier:
        """The mirror's table."""
        return sql.Identifier(*self.target.name)

    def copy_in(self) -> sql.Composed:
        """COPY of whole rows into the table itself."""
        return sql.SQL("COPY {} ({}) FROM STDIN").format(self.table, self.names(self.columns))

    def staging(self, name: str, columns: Sequence[int]) -> sql.Composed:
        """A temporary table for some columns. AS SELECT: LIKE would bring NOT NULL along."""
        return sql.SQL("CREATE TEMPORARY TABLE {} ON COMMIT DELETE ROWS AS SELECT {} FROM {} WITH NO DATA").format(
            sql.Identifier("pg_temp", name), self.names(columns), self.table
        )

    def delete_staged(self, name: str) -> sql.Composed:
        """Delete the rows whose keys are in a temporary table."""
        return sql.SQL("DELETE FROM {} AS t USING {} AS s WHERE {}").format(
            self.table, sql.Identifier("pg_temp", name), self._same_key()
        )

    def update_staged(self, name: str, columns: Sequence[int]) -> sql.Composed:
        """Update the rows whose keys are in a temporary table from its other columns."""
        changed = [index for index in columns if index not in self.key]
        return sql.SQL("UPDATE {} AS t SET {} FROM (SELECT * FROM {} ORDER BY {}) AS s WHERE {}").format(
            self.table,
            sql.SQL(", ").join(
                sql.SQL("{0} = s.{0}").format(sql.Identifier(self.source.columns[index].name)) for index in changed
            ),
            sql.Identifier("pg_temp", name),
            self.names(self.key),  # neighbours in the index are often neighbours in the table
            self._same_key(),
        )

    @cached_property
    def can_upsert(self) -> bool:
        """Whether the key is the mirror's primary key: who has another one's is another row."""
        names = {self.source.columns[index].name for index in self.key}
        return bool(names) and names == set(self.target.primary_key) and not self.target.key_deferrable

    def insert(self, image: Image, *, upsert: bool = False) -> Statement:
        """Insert a whole row; with `upsert` over one that has its key, where it `can_upsert`."""
        query = self._cached(("insert", upsert), lambda: self._insert(upsert=upsert))
        row = decode_row(image)
        return query, tuple(row[index] for index in self.columns)

    def overwrite(self, image: Image) -> Statement:
        """Update the row that has a whole row's key."""
        query = self._cached(("update", self.columns), lambda: self._update(self.columns))
        row = decode_row(image)
        return query, tuple(row[index] for index in (*self.columns, *self.key))

    def update(self, change: Change) -> Statement | None:
        """Update one row in place, its key included; `None` if no column travelled."""
        assert change.after is not None
        after, old = decode_row(change.after), old_row(change)
        key_moves = bool(self.key) and any(after[index] != old[index] for index in self.key)
        changed = tuple(
            index for index in self.columns if after[index] is not UNCHANGED and (key_moves or index not in self.key)
        )
        if not changed:
            return None
        query = self._cached(("update", changed), lambda: self._update(changed))
        return query, (*(after[index] for index in changed), *self._identity(old))

    def delete(self, change: Change) -> Statement:
        """Delete one row."""
        query = self._cached(
            ("delete",), lambda: sql.SQL("DELETE FROM {} AS t WHERE {}").format(self.table, self._where())
        )
        return query, self._identity(old_row(change))

    def _cached(self, kind: tuple[object, ...], compose: Callable[[], sql.Composed]) -> bytes:
        """Composing costs more than executing."""
        query = self._queries.get(kind)
        if query is None:
            text, *rest = compose().as_bytes().split(_PARAMETER.encode())  # a NUL cannot be in a name
            query = self._queries[kind] = text + b"".join(b"$%d%b" % each for each in enumerate(rest, 1))
        return query

    def _insert(self, *, upsert: bool) -> sql.Composed:
        query = sql.SQL("INSERT INTO {} ({}) OVERRIDING SYSTEM VALUE VALUES ({})").format(
            self.table, self.names(self.columns), sql.SQL(", ").join([sql.SQL(_PARAMETER)] * len(self.columns))
        )
        if not upsert:
            return query
        changed = [index for index in self.columns if index not in self.key]
        return query + sql.SQL(" ON CONFLICT ({}) DO {}").format(
            sql.SQL(", ").join(map(sql.Identifier, self.target.primary_key)),
            self._set_excluded(changed) if changed else sql.SQL("NOTHING"),
        )

    def _update(self, changed: Sequence[int]) -> sql.Composed:
        return sql.SQL("UPDATE {} AS t SET {} WHERE {}").format(
            self.table,
            sql.SQL(", ").join(
                sql.SQL("{} = \0").format(sql.Identifier(self.source.columns[index].name)) for index in changed
            ),
            self._where(),
        )

    def _identity(self, old: Row) -> Values:
        """The parameters of `_where`."""
        return tuple(old[index] for index in self.key or (*self._near, *self.columns))

    def _where(self) -> sql.Composed:
        if self.key:
            return sql.SQL(" AND ").join(
                sql.SQL("t.{} = {}").format(sql.Identifier(self.source.columns[index].name), self._typed(index))
                for index in self.key
            )
        if self.source.identity != "f":
            raise PermanentError(
                f"table {self.source.qualified} has no key to find a row by",
                hint=f"ALTER TABLE {self.source.qualified} REPLICA IDENTITY FULL, or give it a primary key",
            )
        return self._same_image()

    def _same_image(self) -> sql.Composed:
        """One row whose record image equals the old one's: `=` does not exist for json, and 1.0 is not 1.00."""
        return sql.SQL(
            "(t.tableoid, t.ctid) = (SELECT o.tableoid, o.ctid FROM {} AS o"
            " WHERE {}ROW({})::record *= ROW({})::record LIMIT 1)"
        ).format(
            self.table,
            sql.SQL("").join(
                sql.SQL("o.{} = {} AND ").format(sql.Identifier(self.source.columns[index].name), self._typed(index))
                for index in self._near
            ),
            sql.SQL(", ").join(sql.Identifier("o", self.source.columns[index].name) for index in self.columns),
            sql.SQL(", ").join(map(self._typed, self.columns)),
        )

    def _typed(self, index: int) -> sql.Composed:
        """A parameter of the column's own type: beside a `regclass` an unknown one would be taken for an `oid`."""
        return sql.SQL("\0::{}").format(sql.SQL(self._base_types[self.source.columns[index].name]))

    def _same_key(self) -> sql.Composed:
        return sql.SQL(" AND ").join(
            sql.SQL("t.{0} = s.{0}").format(sql.Identifier(self.source.columns[index].name)) for index in self.key
        )

    def _set_excluded(self, columns: Sequence[int]) -> sql.Composed:
        names = [sql.Identifier(self.source.columns[index].name) for index in columns]
        return sql.SQL("UPDATE SET {}").format(
            sql.SQL(", ").join(sql.SQL("{0} = excluded.{0}").format(name) for name in names)
        )


def truncate(tables: Sequence[TableName], *, restart_identity: bool) -> sql.Composed:
    """Empty the tables by one statement.

    Never CASCADE: the source has named all the tables that its statement emptied.
    """
    return sql.SQL("TRUNCATE {} {}").format(
        sql.SQL(", ").join(sql.Identifier(*table) for table in tables),
        sql.SQL("RESTART IDENTITY" if restart_identity else "CONTINUE IDENTITY"),
    )
