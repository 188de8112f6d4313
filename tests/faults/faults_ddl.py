"""What users of PostgreSQL do to their tables under load."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Final

from tests.faults.world_postgres import PostgresWorld, compare
from tests.servers import Database

MAX_COLUMNS: Final = 6

_FIXED: Final = 2
"""Columns of `shapes` that the load knows: they stay."""

_COLUMNS: Final = """
SELECT attname::text, format_type(atttypid, atttypmod) FROM pg_attribute
 WHERE attrelid = 'shapes'::regclass AND attnum > 0 AND NOT attisdropped ORDER BY attnum
"""

Column = tuple[str, str]
"""Name and type."""


def reshaped(world: PostgresWorld, rng: random.Random) -> None:
    """Columns come, go, and get other names and types."""
    for _ in range(rng.randint(1, 3)):
        with world.source.connect(autocommit=False) as connection:
            for _ in range(rng.choice((1, 1, 2))):
                columns = connection.execute(_COLUMNS).fetchall()[_FIXED:]
                connection.execute(_alteration(columns, rng).encode())
                if rng.random() < 0.3:
                    connection.execute("UPDATE shapes SET revision = revision + 1")
        world.rest(rng.uniform(0.0, 1.0))
    world.wait(lambda: _columns(world.target) == _columns(world.source), "the mirror to be altered")


def new_table(world: PostgresWorld, rng: random.Random) -> None:
    """A table is made, filled and written, and goes away when the mirror has it."""
    name = f"new_{rng.getrandbits(40)}"
    world.source.execute(f"CREATE TABLE {name} (id int PRIMARY KEY, text text DEFAULT 'new')")
    world.source.execute(f"INSERT INTO {name} SELECT generate_series(1, 100)")
    world.wait(lambda: world.target.value(f"SELECT to_regclass('{name}') IS NOT NULL"), "the mirror to have the table")
    world.source.execute(f"DELETE FROM {name} WHERE id % 3 = 0; UPDATE {name} SET text = 'changed' WHERE id % 3 = 1")
    world.wait(lambda: not compare(world.source, world.target, name), "its rows")
    world.source.execute(f"DROP TABLE {name}")


def _columns(database: Database) -> Sequence[Column]:
    return database.execute(_COLUMNS)


def _alteration(columns: Sequence[Column], rng: random.Random) -> str:
    name, type_ = rng.choice(columns) if columns else ("", "")
    new = f"c{rng.getrandbits(40)}"
    kinds = (f"int DEFAULT {rng.randrange(100)}", "timestamptz DEFAULT now()", "varchar(10)", "float8 DEFAULT random()")
    add = f"ADD COLUMN {new} {rng.choice(kinds)}"
    choices: list[str] = [add, f"RENAME COLUMN {name} TO {new}", f"DROP COLUMN {name}", _wider(name, type_)]
    if not columns or len(columns) > MAX_COLUMNS:
        choices = [f"DROP COLUMN {name}"] if columns else [add]
    return f"ALTER TABLE shapes {rng.choice(choices)}"


def _wider(name: str, type_: str) -> str:
    wider = {"integer": "bigint", "bigint": "numeric", "character varying(10)": "varchar(20)"}
    return f"ALTER COLUMN {name} TYPE {wider.get(type_, 'text')}"
