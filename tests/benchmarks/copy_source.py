"""The database that is copied: how it is made, and whether a copy of it is equal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from tests.benchmarks.table import PUBLICATION, BenchFailed
from tests.servers import Database

FULL_BYTES: Final = 5_000_000_000
"""Of the database where the scale is 1, indexes included."""

_SCRIPT: Final = Path(__file__).with_name("copy_source.sql")

_TABLES: Final = "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r' ORDER BY 1"

_DEFINITIONS: Final = """
SELECT 'index', tablename, indexdef FROM pg_indexes WHERE schemaname = 'public'
UNION ALL
SELECT 'constraint', conrelid::regclass::text, conname || ' ' || pg_get_constraintdef(oid)
  FROM pg_constraint WHERE connamespace = 'public'::regnamespace AND conrelid <> 0
ORDER BY 1, 2, 3
"""


def create(database: Database, size: int) -> None:
    """Fill an empty database with about so many bytes, published, and as tidy as autovacuum would leave it."""
    with database.connect() as connection:
        connection.execute("SELECT set_config('bench.scale', %s, false)", [str(size / FULL_BYTES)])
        connection.execute("SET maintenance_work_mem = '256MB'")
        connection.execute(_SCRIPT.read_text(encoding="utf-8"))
        connection.execute(f"CREATE PUBLICATION {PUBLICATION} FOR ALL TABLES")
        connection.execute("VACUUM ANALYZE")


def fingerprint(database: Database) -> dict[str, Any]:
    """By table its number of rows and a hash over each row's text; and all indexes and constraints."""
    with database.connect() as connection:
        tables = [name for (name,) in connection.execute(_TABLES)]
        found: dict[str, Any] = {
            name: connection.execute(
                f'SELECT count(*), sum(hashtextextended(t::text, 0)) FROM public."{name}" AS t'
            ).fetchone()
            for name in tables
        }
        return found | {"definitions": connection.execute(_DEFINITIONS).fetchall()}


def require_copied(target: Database, expected: Mapping[str, Any]) -> None:
    """Raise `BenchFailed` unless the copy has the fingerprint of its source."""
    found = fingerprint(target)
    different = [name for name in sorted({*expected, *found}) if expected.get(name) != found.get(name)]
    if different:
        raise BenchFailed(f"{target.name} differs from its source in {', '.join(different)}")
