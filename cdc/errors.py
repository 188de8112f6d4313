"""What can go wrong, as types: what to do about an error follows from its class (see `cdc.retry`).

Every error carries a hint: what an operator can do about it, in one sentence.
"""

from __future__ import annotations


class CdcError(Exception):
    """Base of all errors that `cdc` raises on purpose. `str(error)` is one line, without secrets."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class ConfigError(CdcError):
    """The configuration cannot be used: names the file, the key and the reason."""

    exit_code = 2


class DecodeError(CdcError):
    """Bytes from a source or from the queue are not what their format promises."""


class TransientError(CdcError):
    """Worth trying again unchanged: connection lost, deadlock, time-out, server starting up."""


class PermanentError(CdcError):
    """The target refuses a change and will refuse it again: constraint, type, missing column."""


class FatalError(CdcError):
    """This pipeline cannot go on until a person has acted: refused login, missing privilege."""


class ResyncRequired(FatalError):
    """Changes are missing between what the source can send and what was captured or applied.

    Never repaired silently: starting "from now" would leave a hole that nobody sees.
    """


class HistoryLost(ResyncRequired):
    """The same, where it is beyond doubt that the database is the one it was: only what came between is gone."""


class UnknownTable(FatalError):
    """A sink was asked for a table that it has not."""


class QueueCorrupt(FatalError):
    """The queue file is damaged, or was written by a version that this one cannot read."""


class DirectoryInUse(FatalError):
    """Another process holds the data directory."""
