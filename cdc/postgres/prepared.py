"""Prepared statements, several in one round trip, straight through libpq.

A cursor of psycopg's costs 60 us of CPU a statement, this 5; and our connections let psycopg prepare nothing
(`prepare_threshold`), so that the server would parse and plan each anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any, Final, cast

import psycopg
from psycopg import Cursor, RawCursor, generators, pq
from psycopg.abc import PQGen
from psycopg.pq.abc import PGresult

from cdc.postgres.connection import Connection, result_error
from cdc.postgres.row import Value

Statement = tuple[bytes, Sequence[Value]]
"""A query with `$1` placeholders, and its parameters as text."""

_MOST: Final = 1000
"""So many stay prepared: each keeps its plan in the server's memory."""


def strict(statement: Statement) -> Statement:
    """The same UPDATE, INSERT or DELETE, but refused (division by zero) where it touches no row."""
    query, parameters = statement
    return b"WITH done AS (%b RETURNING 1) SELECT 1 / count(*) FROM done" % query, parameters


def execute(connection: Connection, statement: Statement) -> Cursor[Any]:
    """Execute one by itself, unprepared: for what is too rare to be kept."""
    query, parameters = statement
    return RawCursor(connection).execute(query, parameters or None)


class Prepared:
    """The prepared statements of one connection, by their text."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._pgconn = connection.pgconn
        self._names: dict[bytes, bytes] = {}
        self._numbers = count()

    def run(self, statements: Sequence[Statement]) -> list[int]:
        """Execute in order, in one round trip; return how many rows each has touched.

        Raises the `CdcError` of the first that is refused; what follows it is not executed. A transaction that is open
        then has failed, and is the caller's to roll back.
        """
        if len(self._names) > _MOST:
            self.forget()
        self._pgconn.enter_pipeline_mode()
        prepared = [self._send(*statement) for statement in statements]
        self._pgconn.pipeline_sync()
        results = self._connection.wait(self._receive(prepared))
        self._pgconn.exit_pipeline_mode()  # where an error came instead, the connection is lost
        for result in results:
            if result.status == pq.ExecStatus.FATAL_ERROR:
                raise result_error(result)
        return [result.command_tuples or 0 for result in results]

    def forget(self) -> None:
        """Begin anew: a statement keeps the types that its parameters had when it was prepared."""
        if self._names:
            self._names.clear()
            self._connection.execute("DEALLOCATE ALL")

    def _send(self, query: bytes, parameters: Sequence[Value]) -> bytes | None:
        """Put a statement into the pipeline; returns its query if it has to be prepared before."""
        name = self._names.get(query)
        is_new = name is None
        if name is None:
            name = self._names[query] = b"cdc_%d" % next(self._numbers)
            self._pgconn.send_prepare(name, query)
        self._pgconn.send_query_prepared(name, cast("Sequence[bytes | None]", parameters))
        return query if is_new else None

    def _receive(self, prepared: Sequence[bytes | None]) -> PQGen[list[PGresult]]:
        """Take the answers to all that was sent; of a statement that was prepared and refused, the first."""
        yield from generators.send(self._pgconn)
        results: list[PGresult] = []
        for query in prepared:
            if query is not None:
                result = yield from self._answer()
                if result.status != pq.ExecStatus.COMMAND_OK:
                    del self._names[query]
                    results.append(result)
            results.append((yield from self._answer()))
        end = yield from self._answer()
        if end.status != pq.ExecStatus.PIPELINE_SYNC:
            raise self._lost()
        return results

    def _answer(self) -> PQGen[PGresult]:
        """The next one. Behind one that makes no sense there is none."""
        answers: list[PGresult] = yield from generators.fetch_many(self._pgconn)
        if len(answers) != 1:
            raise self._lost()
        return answers[0]

    def _lost(self) -> psycopg.OperationalError:
        message = self._pgconn.get_error_message()
        self._connection.close()
        return psycopg.OperationalError(message)
