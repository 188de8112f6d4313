"""Reads a single row from the source again, where a change does not carry all of it."""

from __future__ import annotations

from psycopg import sql

from cdc.change import Image, Table
from cdc.errors import PermanentError
from cdc.postgres.connection import connect, translated_errors
from cdc.postgres.row import UNCHANGED, decode_row, encode_row


def reread(url: str, table: Table, image: Image) -> Image | None:
    """The row as it is now, with the columns of `table`, by its key columns; `None` if it is gone."""
    row = decode_row(image)
    keys = [index for index, column in enumerate(table.columns) if column.is_key and row[index] is not UNCHANGED]
    if not keys:
        raise PermanentError(f"table {table.qualified} has no key to read a row again by")
    query = sql.SQL("SELECT {} FROM {} WHERE {}").format(
        sql.SQL(", ").join(sql.SQL("{}::text").format(sql.Identifier(column.name)) for column in table.columns),
        sql.Identifier(table.schema, table.name),
        sql.SQL(" AND ").join(sql.SQL("{} = %s").format(sql.Identifier(table.columns[index].name)) for index in keys),
    )
    parameters = [str(bytes(value or b""), "utf-8") for value in (row[index] for index in keys)]
    with connect(url) as connection, translated_errors():
        found = connection.execute(query, parameters).fetchone()
    return None if found is None else encode_row(tuple(None if value is None else value.encode() for value in found))
