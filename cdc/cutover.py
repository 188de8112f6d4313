"""The cut-over: a mirror becomes the database that applications write to.

Nothing is changed before the mirror has passed everything that the source held, both were found equal, and nobody has
written to the source meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import Enum
from typing import Final, Protocol

import msgspec

from cdc.errors import TransientError
from cdc.verify_report import VerifyReport

POLL_SECONDS: Final = 0.1
NUDGE_SECONDS: Final = 1.0


class Verdict(Enum):
    """How a cut-over ended."""

    READY = "ready"
    DIFFERENT = "different"
    WRITES_WENT_ON = "writes_went_on"


class Finished(msgspec.Struct, frozen=True):
    """What was done to the mirror so that it can be written to.

    done: for people, a line each. problems: what a person has to look after, a line each.
    """

    done: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


class CutoverResult(msgspec.Struct, frozen=True):
    """How it ended, and why.

    position: where the source stood at the start; the mirror has passed it.
    writes: tables that were written to at the source since then.
    source, target: what to switch from and to, without passwords.
    """

    verdict: Verdict
    position: str
    waited_seconds: float
    report: VerifyReport
    writes: tuple[str, ...]
    finished: Finished
    source: str
    target: str

    @property
    def ready(self) -> bool:
        """Whether applications may be switched."""
        return self.verdict is Verdict.READY

    def lines(self) -> list[str]:
        """What to tell the person in charge, and what is to be done next."""
        return [*self._outcome(), *self.finished.done, *self.finished.problems]

    def _outcome(self) -> list[str]:
        if self.verdict is Verdict.WRITES_WENT_ON:
            return [
                f"NOT READY: the source was written to after {self.position}: {', '.join(self.writes)}",
                "Stop the applications that write to the source, then cut over again.",
            ]
        if self.verdict is Verdict.DIFFERENT:
            return [
                f"NOT READY: the mirror is not proven equal to the source at {self.report.position or self.position}.",
                "Nothing was changed. See what differs, put it right, then cut over again.",
            ]
        position = self.report.position or self.position
        return [
            f"READY: the mirror equals the source at {position}, and nobody has written since.",
            f"Switch your applications from {self.source} to {self.target}.",
            "Do not let anybody write to the source again: the mirror would take it over its own changes.",
            "Then end the replication: cdc drop.",
        ]


class Handover(Protocol):
    """A source and its mirror, as a cut-over sees them."""

    source: str
    target: str

    def watch(self) -> str:
        """Begin to notice writes, and return from which position on, for people.

        Waits for transactions that have begun and not ended; raises `TransientError` where that takes too long.
        """
        ...

    def nudge(self) -> None:
        """Write something harmless at the source, so that its stream moves on."""
        ...

    def behind(self) -> str:
        """How far the mirror is behind the watched position, for people; empty when it is there or past it."""
        ...

    def writes(self) -> tuple[str, ...]:
        """Tables with writes that committed since `watch`."""
        ...

    def finish(self) -> Finished:
        """Give the mirror what the stream does not carry, and take back what only a mirror needs. May be repeated."""
        ...

    def close(self) -> None:
        """Stop watching. Safe to call twice."""
        ...


def cutover(
    handover: Handover,
    verify: Callable[[], VerifyReport],
    *,
    timeout_seconds: float,
    progress: Callable[[str], None] = lambda _line: None,
) -> CutoverResult:
    """Prove that the mirror has everything, and make it ready to be written to.

    Applications must have stopped writing to the source. Raises `TransientError` if the mirror does not get there
    within `timeout_seconds`.
    """
    started = time.monotonic()
    progress("waiting for open transactions at the source")
    position = handover.watch()
    _wait(handover, timeout_seconds, progress)
    waited = time.monotonic() - started
    progress("comparing")
    report = verify()
    finished = Finished()
    writes = handover.writes()
    if report.equal and report.exact and not writes:
        progress("preparing the mirror")
        finished = handover.finish()
        writes = handover.writes()
    return CutoverResult(
        verdict=_verdict(report, writes),
        position=position,
        waited_seconds=round(waited, 3),
        report=report,
        writes=writes,
        finished=finished,
        source=handover.source,
        target=handover.target,
    )


def _verdict(report: VerifyReport, writes: tuple[str, ...]) -> Verdict:
    if writes:
        return Verdict.WRITES_WENT_ON
    return Verdict.READY if report.equal and report.exact else Verdict.DIFFERENT


def _wait(handover: Handover, timeout_seconds: float, progress: Callable[[str], None]) -> None:
    deadline = time.monotonic() + timeout_seconds
    nudged = -NUDGE_SECONDS
    while behind := handover.behind():
        now = time.monotonic()
        if now >= deadline:
            raise TransientError(
                f"the mirror is still {behind} behind after {timeout_seconds:.0f} seconds",
                hint="see `cdc status`: is the sink running, or paused? A longer time-out may do",
            )
        if now - nudged >= NUDGE_SECONDS:
            handover.nudge()
            nudged = now
            progress(f"the mirror is {behind} behind")
        time.sleep(POLL_SECONDS)
