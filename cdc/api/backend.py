"""What the routes ask of the daemon."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from cdc.config import LogLevel
from cdc.errors import CdcError
from cdc.letter import DeadLetters
from cdc.position import SourcePosition
from cdc.status import DaemonStatus
from cdc.steering import Ordered, Replayed


class UnknownName(CdcError):
    """No source or sink has that name."""


class Backend(Protocol):
    """The daemon, as HTTP sees it. All but `status` may block and are called from threads."""

    dead_letters: DeadLetters
    """Parked changes."""

    def status(self) -> DaemonStatus:
        """Take a snapshot. Never blocks."""
        ...

    def set_log_level(self, level: LogLevel) -> None:
        """Until the configuration is read again, or the daemon ends."""
        ...

    def pause(self, name: str) -> None:
        """Pause a source or a sink until `resume`, also over restarts. Raises `UnknownName`."""
        ...

    def resume(self, name: str) -> None:
        """Undo `pause`. Raises `UnknownName`."""
        ...

    def resync(self, name: str, tables: Sequence[str], *, yes: bool) -> Ordered:
        """Let a sink, or all sinks of a source, be made right again. Raises `UnknownName`, or `CdcError` with a reason.

        tables: by their names at the source; empty for all. yes: also where a database may be another one than before.
        """
        ...

    def replay(self, name: str, since: str, *, dry_run: bool) -> Replayed:
        """Let a mirror get once more what is kept from a point on. Raises `UnknownName`, or a `CdcError`."""
        ...

    def hold(self, name: str, until: SourcePosition | None, seconds: float) -> SourcePosition:
        """Block until a sink stands exactly at `until` (`None`: where it is); return where it stands.

        It stays there until `release`, or until `seconds` after the call. Raises `UnknownName`, `TransientError`
        if it does not get there in time, or another `CdcError` where it cannot stand there.
        """
        ...

    def release(self, name: str) -> None:
        """Let a held sink go on; nothing happens to one that is not held. Raises `UnknownName`."""
        ...
