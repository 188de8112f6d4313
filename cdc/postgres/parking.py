"""What changes are about on a PostgreSQL mirror, so that what belongs together can wait together.

A row is known by its key, where the mirror takes two keys for the same if and only if their texts are the same bytes.
Elsewhere (1.0 and 1.00, case-insensitive text, a table without key, or with one that is only checked at the end of a
transaction) a change is about its table as a whole.

What a change writes into other unique columns is a key as well: whoever wants such a value next waits behind it. So
nothing can take in the meantime what a parked change needs, and the earliest one is refused for its own sake only.
(Unique indexes over expressions, or values of other types, do without: then a person may have to free a value.)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from operator import itemgetter
from typing import Final, NamedTuple

import msgspec

from cdc.change import DDL, MESSAGE, Batch, Change, Image, Table, TableName, Truncate
from cdc.errors import DecodeError, PermanentError
from cdc.position import SourcePosition
from cdc.postgres.connection import Connection
from cdc.postgres.fold import FoldError
from cdc.postgres.plan import TablePlan
from cdc.postgres.row import COUNT_BYTES, UNCHANGED, Row, decode_row, encode_row
from cdc.postgres.schema import FIRST_USER_OID
from cdc.sink import NEVER_FREE, QuickLook, Subject

_EXACT: Final = (
    16, 17, 18, 19, 20, 21, 23, 25, 26, 1043, 1082, 1083, 1114, 1184, 2950, 3220,
)  # fmt: skip
"""Types whose values are equal if and only if their texts are: bool, bytea, "char", name, int8, int2, int4, text, oid,
varchar, date, time, timestamp, timestamptz (in one time zone), uuid, pg_lsn. So are enums, and domains over these."""

_ENUM: Final = 0

_MOST_KNOWN: Final = 1000

_FEW_KEYS: Final = 50
"""So many are looked for in the bytes of a row; more in a table of keys, which takes the row's own keys out of it."""

NOTHING: Final = Subject((), None)


class Uniqueness(NamedTuple):
    """What is unique in a table of the mirror.

    exact: by name of the column the OID of its basic type, or 0 for an enum; only columns that are compared as bytes.
    indexes: by name of the unique index its columns.
    """

    exact: Mapping[str, int]
    indexes: Mapping[str, tuple[str, ...]]


def read_uniqueness(connection: Connection) -> dict[TableName, Uniqueness]:
    """Of all tables."""
    found: dict[TableName, tuple[dict[str, int], dict[str, tuple[str, ...]]]] = {}
    for schema, table, column, oid in connection.execute(_COLUMNS, [list(_EXACT)]).fetchall():
        found.setdefault(TableName(schema, table), ({}, {}))[0][column] = oid
    for schema, table, index, columns in connection.execute(_INDEXES).fetchall():
        found.setdefault(TableName(schema, table), ({}, {}))[1][index] = tuple(columns)
    return {table: Uniqueness(*each) for table, each in found.items()}


class SubjectFinder:
    """What changes are about. Needs no connection, from whatever thread."""

    def __init__(
        self,
        plan_of: Callable[[Table], TablePlan],
        mirrored: Collection[TableName],
        uniqueness: Mapping[TableName, Uniqueness],
    ) -> None:
        self._plan_of = plan_of
        self._mirrored = mirrored
        self._uniqueness = uniqueness
        self._known: dict[int, _Known] = {}

    def find(self, tables: Sequence[Table], change: Change) -> Subject:
        """See `cdc.sink.Parking.subject_of`. A table that is not mirrored is nothing that could be waited for."""
        if change.operation == MESSAGE:
            return NOTHING
        if isinstance(change.detail, Truncate):
            names = [tables[index].qualified for index in change.detail.tables]
            return Subject(tuple(name for name in names if name in self._mirrored), None)
        table = tables[change.table]
        if change.operation == DDL:
            return Subject((table.qualified,), None) if table.qualified in self._mirrored else NOTHING
        known = self._known_as(table)
        return known.whole if known.keys is None else Subject(known.whole.tables, known.keys.of(change))

    def free_of(self, table: Table, keys: Set[bytes]) -> QuickLook:
        """See `cdc.sink.Parking.free_of`."""
        known = self._known_as(table).keys
        return NEVER_FREE if known is None else known.free_of(keys)

    def _known_as(self, table: Table) -> _Known:
        known = self._known.get(id(table))
        if known is None:
            name = table.qualified
            whole = Subject((name,), None) if name in self._mirrored else NOTHING
            if len(self._known) > _MOST_KNOWN:
                self._known.clear()
            # by what it is in memory: comparing tables takes longer than all the rest
            known = self._known[id(table)] = _Known(table, whole, None if whole is NOTHING else self._find_keys(table))
        return known

    def _find_keys(self, table: Table) -> _Keys | None:
        try:
            plan = self._plan_of(table)
        except (PermanentError, FoldError):
            return None  # the mirror's table does not fit: nothing of it can be applied
        keys = _Keys(plan, self._uniqueness.get(plan.target.name, Uniqueness({}, {})))
        return keys if keys.usable else None


class _Known(NamedTuple):
    """A table as some batch describes it. keys: `None` where only the table as a whole will do."""

    table: Table
    whole: Subject
    keys: _Keys | None


class _Keys:
    """The keys of one table's changes."""

    def __init__(self, plan: TablePlan, uniqueness: Uniqueness) -> None:
        self._plan = plan
        self._exact = uniqueness.exact
        index_of = {plan.source.columns[index].name: index for index in plan.columns}
        self.usable = bool(plan.key) and all(map(self._is_exact, plan.key))
        self._others = [
            (b"%s\0" % name.encode(), indexes)
            for name, columns in sorted(uniqueness.indexes.items())
            if all(column in index_of for column in columns)
            and (indexes := tuple(index_of[column] for column in columns))
            and set(indexes) != set(plan.key)
            and all(map(self._is_exact, indexes))
        ]

    def of(self, change: Change) -> tuple[bytes, ...] | None:
        """`None` where a key did not travel."""
        old, after = change.before or change.key, change.after
        if old is None and after is not None and not self._others:  # nearly always
            key = self._key(after)
            return None if key is None else (key,)
        if after is None:
            key = None if old is None else self._key(old)
            return None if key is None else (key,)
        key = self._key(after)
        found = [] if key is None else [key]
        if old is not None and (before := self._key(old)) is not None and before != key:
            found.append(before)
        if not found:
            return None
        if self._others:
            row = decode_row(after)
            for name, indexes in self._others:
                values = tuple([row[index] for index in indexes])
                if None not in values and UNCHANGED not in values:
                    found.append(name + encode_row(values))
        return tuple(found)

    def free_of(self, keys: Set[bytes]) -> QuickLook:
        """What tells of changes that they have none of these keys."""

        def exactly(change: Change) -> bool:
            own = self.of(change)
            return own is not None and keys.isdisjoint(own)

        if sorted(self._plan.key) != list(range(len(self._plan.key))) or len(keys) > _FEW_KEYS:
            return QuickLook(exactly)
        starts = tuple({start for key in keys for start in self._starts(key)})
        parts = tuple({part for key in keys for part in self._parts(key)})

        def is_free(change: Change) -> bool:
            after, old = change.after, change.before or change.key
            if old is not None and old.startswith(starts):
                return exactly(change)
            if after is None:
                return old is not None
            if after.startswith(starts):
                return exactly(change)
            for part in parts:
                if part in after:
                    return exactly(change)
            return True

        return QuickLook(is_free, frozenset((*starts, *parts)))

    def _starts(self, key: bytes) -> Iterator[bytes]:
        """How a row begins, if it may have this key: perhaps with columns of it that did not travel."""
        values = self._values(key)
        if not values:
            return
        count = encode_row((None,) * self._plan.width)[:COUNT_BYTES]
        for known in range(len(values)):
            yield count + _columns((*values[:known], None))
            yield count + _columns((*values[:known], UNCHANGED))
        yield count + _columns(values)

    def _parts(self, key: bytes) -> Iterator[bytes]:
        """What is in a row that has this key, if it is one of the other columns."""
        for name, _ in self._others:
            if key.startswith(name) and (values := _decoded(key[len(name) :])):
                yield max((_columns((value,)) for value in values), key=len)

    def _values(self, key: bytes) -> Row:
        """Of the key's columns, in the table's order; none if no row can have this key."""
        values = (key,) if len(self._plan.key) == 1 else _decoded(key)
        if len(values) != len(self._plan.key):
            return ()
        return tuple([value for _, value in sorted(zip(self._plan.key, values, strict=True), key=itemgetter(0))])

    def _key(self, image: Image) -> bytes | None:
        value = self._plan.key_of(image)
        if isinstance(value, bytes):
            return value
        if isinstance(value, tuple) and all(isinstance(each, bytes) for each in value):
            return encode_row(value)
        return None

    def _is_exact(self, index: int) -> bool:
        """Whether the mirror compares a column by its text, and has it as the source does (1 is 01 for an integer)."""
        column = self._plan.source.columns[index]
        oid = self._exact.get(column.name)
        return oid is not None and (oid in {_ENUM, column.type_oid} or column.type_oid >= FIRST_USER_OID)


def _columns(values: Row) -> bytes:
    """As they are in a row's image."""
    return encode_row(values)[COUNT_BYTES:]


def _decoded(image: bytes) -> Row:
    """Nothing, if it is none."""
    try:
        return decode_row(image)
    except DecodeError:
        return ()


def with_ends(batches: Sequence[Batch], *, last_ends: bool) -> list[Batch]:
    """The same, where a transaction is complete once another one follows, whatever was left out of it.

    last_ends: whether the last one is complete, too, though it might not say so.
    """
    found: list[Batch] = []
    following: SourcePosition | None = None
    for batch in reversed(batches):
        transactions = []
        for transaction in reversed(batch.transactions):
            ends = transaction.complete or last_ends if following is None else transaction.position != following
            same = ends == transaction.complete
            transactions.append(transaction if same else msgspec.structs.replace(transaction, complete=ends))
            following = transaction.position
        found.append(msgspec.structs.replace(batch, transactions=transactions[::-1]))
    return found[::-1]


_OURS: Final = "c.relkind IN ('r', 'p') AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'cdc')"

_COLUMNS: Final = f"""
WITH RECURSIVE based AS (
    SELECT oid, oid AS base, typtype FROM pg_type WHERE typtype <> 'd'
    UNION ALL
    SELECT t.oid, based.base, based.typtype FROM pg_type t JOIN based ON t.typbasetype = based.oid
)
SELECT n.nspname, c.relname, a.attname, CASE WHEN based.typtype = 'e' THEN 0 ELSE based.base::int8 END
  FROM pg_attribute a
  JOIN pg_class c ON c.oid = a.attrelid
  JOIN pg_namespace n ON n.oid = c.relnamespace
  JOIN based ON based.oid = a.atttypid
  LEFT JOIN pg_collation l ON l.oid = a.attcollation
 WHERE {_OURS} AND a.attnum > 0 AND NOT a.attisdropped
   AND (based.typtype = 'e' OR based.base = ANY (%s::oid[])) AND l.collisdeterministic IS NOT FALSE
"""  # noqa: S608 - a constant

_INDEXES: Final = f"""
SELECT n.nspname, c.relname, i.relname, array_agg(a.attname::text ORDER BY k.ordinality)
  FROM pg_index x
  JOIN pg_class c ON c.oid = x.indrelid
  JOIN pg_namespace n ON n.oid = c.relnamespace
  JOIN pg_class i ON i.oid = x.indexrelid
  CROSS JOIN unnest(x.indkey[0:x.indnkeyatts - 1]) WITH ORDINALITY AS k(attnum, ordinality)
  JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = k.attnum
 WHERE {_OURS} AND x.indisunique AND x.indexprs IS NULL
 GROUP BY x.indexrelid, n.nspname, c.relname, i.relname
"""  # noqa: S608 - a constant
