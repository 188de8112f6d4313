"""The tables of every type can be made and filled on all versions under test."""

from __future__ import annotations

from tests import types
from tests.servers import Database, PostgresServer


def test_every_type_has_rows_and_rotating_changes_them(postgres: PostgresServer, source_db: Database) -> None:
    with source_db.connect() as connection:
        types.create_types_schema(connection)
        types.fill(connection)
        filled = types.contents(connection)
        types.rotate(connection)
        rotated = types.contents(connection)
    assert all(filled[table] for table in types.TABLES)
    assert all(rotated[table] != filled[table] for table in types.TABLES if table != "typmods")
