"""Deferrable unique constraints of a mirror, checked where the server does not.

It checks them by triggers, and those keep still in a session that is a replica. What the source has committed passes
such a check in any case; but not what is left of it where some of it is parked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final, NamedTuple

from psycopg.sql import SQL, Identifier

from cdc.change import INSERT, UPDATE, Batch, Table, TableName, Transaction
from cdc.errors import PermanentError
from cdc.postgres.connection import Connection
from cdc.postgres.roster import Plans
from cdc.postgres.row import UNCHANGED, Row, decode_row


class LateKey(NamedTuple):
    """A deferrable primary key or unique constraint. types, operators: how its columns are compared, as SQL."""

    name: str
    columns: tuple[str, ...]
    types: tuple[str, ...]
    operators: tuple[str, ...]


Written = Mapping[tuple[TableName, LateKey], set[Row]]
"""The values that changes bring, by the mirror's table and what is unique there."""


class LateKeys:
    """Those of one connection's mirror. Needs no `plans` but those that the changes are applied with."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        ((role,),) = connection.execute("SHOW session_replication_role").fetchall()
        self._silent = role == "replica"
        self._plans: Plans | None = None
        self._keys: dict[TableName, list[LateKey]] = {}
        self._unended: Written = {}  # by the transaction that is incomplete so far

    def concern(self, plans: Plans, batches: Sequence[Batch]) -> bool:
        """Whether there is anything to `check`."""
        if not self._silent:
            return False
        self._see(plans)
        return bool(self._keys) and any(
            self._written(plans, batch.tables, each) for batch in batches for each in batch.transactions
        )

    def check(self, plans: Plans, batches: Sequence[Batch], *, without: set[TableName]) -> None:
        """Look for values that more rows have than one, once the transactions which bring them are applied as a whole.

        without: tables of the mirror whose rows are of different moments. Raises `PermanentError`; after that, what
        was applied has to be undone.
        """
        if not self._silent:
            return
        self._see(plans)
        if not self._keys:
            return
        ended: dict[tuple[TableName, LateKey], set[Row]] = {}
        unended = self._unended
        for batch in batches:
            for transaction in batch.transactions:
                unended = _together(unended, self._written(plans, batch.tables, transaction))
                if transaction.complete:
                    for each, values in unended.items():
                        ended.setdefault(each, set()).update(values)
                    unended = {}
        for (table, key), values in ended.items():
            if values and table not in without:
                self._check(table, key, values)
        self._unended = unended

    def _see(self, plans: Plans) -> None:
        if plans is not self._plans:  # tables may have been altered
            keys: dict[TableName, list[LateKey]] = {}
            for schema, table, *key in self._connection.execute(_KEYS).fetchall():
                name, *parts = key
                keys.setdefault(TableName(schema, table), []).append(LateKey(name, *map(tuple, parts)))
            self._plans, self._keys = plans, keys

    def _written(self, plans: Plans, tables: Sequence[Table], transaction: Transaction) -> Written:
        written: dict[tuple[TableName, LateKey], set[Row]] = {}
        for change in transaction.changes:
            if change.operation not in (INSERT, UPDATE):
                continue
            name = plans.target_name(tables[change.table])
            if (keys := self._keys.get(name)) is None:
                continue
            assert change.after is not None
            row = decode_row(change.after)
            for key, values in _values(keys, tables[change.table], row):
                written.setdefault((name, key), set()).add(values)
        return written

    def _check(self, table: TableName, key: LateKey, values: set[Row]) -> None:
        numbered = range(len(key.columns))
        same = [
            SQL("t.{} {} s.{}").format(Identifier(key.columns[n]), SQL(key.operators[n]), Identifier(f"c{n}"))
            for n in numbered
        ]
        query = SQL(_TWICE).format(
            arrays=SQL(", ").join(SQL("%s::{}[]").format(SQL(key.types[n])) for n in numbered),
            names=SQL(", ").join(Identifier(f"c{n}") for n in numbered),
            table=Identifier(*table),
            same=SQL(" AND ").join(same),
        )
        ((twice,),) = self._connection.execute(query, list(map(list, zip(*values, strict=True)))).fetchall()
        if twice:
            raise PermanentError(
                f"more rows than one of {table} have the same {', '.join(key.columns)}, against constraint {key.name}",
                hint="it is deferrable: what is parked keeps a value that another row wants",
            )


def _values(keys: Sequence[LateKey], table: Table, row: Row) -> Iterator[tuple[LateKey, Row]]:
    index_of = {column.name: index for index, column in enumerate(table.columns)}
    for key in keys:
        values = tuple(row[index_of[name]] if name in index_of else None for name in key.columns)
        if None not in values and UNCHANGED not in values:
            yield key, values


def _together(one: Written, other: Written) -> dict[tuple[TableName, LateKey], set[Row]]:
    return {each: one.get(each, set()) | other.get(each, set()) for each in (*one, *other)}


_KEYS: Final = """
SELECT n.nspname, c.relname, o.conname,
       array_agg(a.attname::text ORDER BY k.ordinality),
       array_agg(format_type(a.atttypid, NULL) ORDER BY k.ordinality),
       array_agg(format('OPERATOR(%I.%s)', s.nspname, e.oprname) ORDER BY k.ordinality)
  FROM pg_constraint o
  JOIN pg_class c ON c.oid = o.conrelid
  JOIN pg_namespace n ON n.oid = c.relnamespace
  JOIN pg_index x ON x.indexrelid = o.conindid
  CROSS JOIN unnest(o.conkey, x.indclass::oid[]) WITH ORDINALITY AS k(attnum, class)
  JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = k.attnum
  JOIN pg_opclass p ON p.oid = k.class
  JOIN pg_am m ON m.oid = p.opcmethod AND m.amname = 'btree'
  JOIN pg_amop q ON q.amopfamily = p.opcfamily AND q.amopstrategy = 3
   AND q.amoplefttype = p.opcintype AND q.amoprighttype = p.opcintype
  JOIN pg_operator e ON e.oid = q.amopopr
  JOIN pg_namespace s ON s.oid = e.oprnamespace
 WHERE o.contype IN ('p', 'u') AND o.condeferrable AND c.relkind IN ('r', 'p') AND NOT c.relispartition
 GROUP BY o.oid, n.nspname, c.relname, o.conname
"""

_TWICE: Final = """
SELECT EXISTS (SELECT FROM unnest({arrays}) AS s ({names})
                WHERE 1 < (SELECT count(*) FROM (SELECT FROM {table} AS t WHERE {same} LIMIT 2) AS found))
"""
