"""A mirror's target transaction: it begins where the mirror stands, and ends with its next position."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import psycopg

from cdc.errors import CdcError, TransientError
from cdc.failpoints import failpoint
from cdc.position import Lsn, Position, as_lsn, format_lsn
from cdc.postgres.connection import Connection
from cdc.postgres.prepared import Prepared, Statement, strict

_BEGIN: Final[Statement] = b"BEGIN", ()
_COMMIT: Final[Statement] = b"COMMIT", ()

_LOCK: Final = "SELECT position::text FROM cdc.positions WHERE sink = %s FOR UPDATE"

_MOVE: Final = b"""
UPDATE cdc.positions SET queue_id = $1, seq = $2, position = $3, updated_at = now() WHERE sink = $4 AND position = $5
"""


class TargetTransaction:
    """What every statement of a sink runs in. Its first one locks the position and compares it.

    position: where the target stands. is_open: whether a transaction is under way. prepared: statements for it.
    """

    def __init__(self, connection: Connection, sink: str, position: Lsn) -> None:
        self.position = position
        self.is_open = False
        self.prepared = Prepared(connection)
        self._connection = connection
        self._sink = sink

    def begin(self) -> None:
        """Begin, if none is open, and set a savepoint. Raises `TransientError` where the target stands elsewhere."""
        if self.is_open:
            self.keep()
            return
        self.is_open = True
        with self._connection.pipeline():
            self._connection.execute("BEGIN")
            locked = self._connection.execute(_LOCK, [self._sink])
            self._connection.execute("SAVEPOINT batch")
        # an old connection of ours may have committed after we read the position
        row = locked.fetchone()
        found, expected = row[0] if row else None, format_lsn(self.position)
        if found != expected:
            raise TransientError(f"the target stands at {found}, not at {expected}: someone else wrote there")

    @contextmanager
    def at_once(self, position: Position) -> Iterator[tuple[Sequence[Statement], Sequence[Statement]]]:
        """What to send before and after changes that are a transaction by themselves.

        The position moves first, which locks and compares it: refused (`PermanentError`) where the target stands
        elsewhere. After any error nothing was done, once it is rolled back.
        """
        reached = as_lsn(position.source)
        values = position.queue_id, str(position.seq), format_lsn(reached), self._sink, format_lsn(self.position)
        failpoint("target.commit.before")
        yield [_BEGIN, strict((_MOVE, [value.encode() for value in values]))], [_COMMIT]
        failpoint("target.commit.after")
        self.position = reached

    def commit(self, position: Position) -> None:
        """End it, with a new position."""
        reached = as_lsn(position.source)
        with self._connection.pipeline():
            self._connection.execute(
                "UPDATE cdc.positions SET queue_id = %s, seq = %s, position = %s, updated_at = now() WHERE sink = %s",
                [position.queue_id, position.seq, format_lsn(reached), self._sink],
            )
            failpoint("target.commit.before")
            self.end()
        failpoint("target.commit.after")
        self.position = reached

    def end(self) -> None:
        """End it; the position stays."""
        self._connection.execute("COMMIT")
        self.is_open = False

    @contextmanager
    def as_a_whole(self) -> Iterator[None]:
        """Let nothing that is kept in it stay once it is undone: what `undo` goes back to is where it began."""
        self._connection.execute("SAVEPOINT batch")  # within the other, which is back when this one is released
        try:
            yield
        except (CdcError, psycopg.Error):
            if self.is_open and not self._connection.closed:
                self.undo()
                self._connection.execute("RELEASE SAVEPOINT batch")
            raise
        self._connection.execute("RELEASE SAVEPOINT batch")

    def roll_back(self) -> None:
        """Undo all of it."""
        self._connection.execute("ROLLBACK")
        self.is_open = False

    def undo(self) -> None:
        """Go back to the savepoint."""
        self._connection.execute("ROLLBACK TO SAVEPOINT batch")

    def keep(self) -> None:
        """Let what was done since the savepoint stay, whatever is undone after it."""
        self._connection.execute("RELEASE SAVEPOINT batch")
        self._connection.execute("SAVEPOINT batch")
