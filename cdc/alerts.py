"""Messages to a webhook when something goes wrong, and when it is over: for those who have no Prometheus.

One message tells all that began or ended since the last one, and none comes sooner than `interval_seconds` after it.
What was not delivered is told again. Pipelines notice nothing of it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from http.client import HTTPException
from typing import Final
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import msgspec
import structlog

from cdc.config import AlertOptions
from cdc.logs import redact
from cdc.secret import Token
from cdc.stats import State
from cdc.status import DaemonStatus, SinkStatus, SourceStatus

LOOK_SECONDS: Final = 1.0
"""How often the status is looked at."""

TIMEOUT_SECONDS: Final = 10.0

log = structlog.get_logger()


class Message(msgspec.Struct, frozen=True):
    """What is posted, as JSON. text: all of it, for people; the others: sentences by what they are about."""

    text: str
    firing: Mapping[str, str]
    resolved: Mapping[str, str]
    version: str


def conditions(status: DaemonStatus, options: AlertOptions) -> dict[str, str]:
    """What is wrong now: a sentence each, by a key that stays the same while it lasts."""
    pipelines: list[tuple[str, SourceStatus | SinkStatus]] = [*status.sources.items(), *status.sinks.items()]
    return {
        f"{name}: {key}": f"{name} {text}"
        for name, pipeline in pipelines
        for key, text in (*_of_any(pipeline, options), *_of_one(pipeline))
    }


def _of_any(pipeline: SourceStatus | SinkStatus, options: AlertOptions) -> Iterator[tuple[str, str]]:
    if pipeline.state in {State.FAILED, State.WAITING}:
        doing = "has failed" if pipeline.state is State.FAILED else "waits"
        yield str(pipeline.state), f"{doing}: {pipeline.error}"
    elif pipeline.state in _MOVING and pipeline.lag_seconds is not None and pipeline.lag_seconds > options.lag_seconds:
        yield "lag", f"is {pipeline.lag_seconds:.0f} s behind"


_MOVING: Final = frozenset({State.RUNNING, State.CATCHING_UP})
"""What does something else, or nothing, falls behind as a matter of course."""


def _of_one(pipeline: SourceStatus | SinkStatus) -> Iterator[tuple[str, str]]:
    if isinstance(pipeline, SinkStatus):
        if pipeline.dead:
            yield "dead", f"has {pipeline.dead} dead changes"
        return
    if pipeline.slot is not None and pipeline.slot.wal_status in {"unreserved", "lost"}:
        yield "slot", f"has a slot that is {pipeline.slot.wal_status}: the server gives up its WAL"
    if pipeline.oplog is not None and pipeline.oplog.is_short:
        yield "oplog", "has an oplog that will soon have forgotten the captured position"
    if pipeline.queue is not None and pipeline.queue.full:
        yield "queue", "is not read, as its queue is full"


class Alerts:
    """Looks at the status, and tells the webhook.

    clock: in seconds; for tests.
    """

    def __init__(
        self,
        webhook: Token,
        options: AlertOptions,
        status: Callable[[], DaemonStatus],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._webhook = webhook
        self._options = options
        self._status = status
        self._clock = clock
        self._since: dict[str, float] = {}
        self._told: dict[str, str] = {}
        self._quiet_until = clock()

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            try:
                await self.look()
            except Exception as exc:  # the task's outer edge
                log.error("alerts failed", exc_info=exc)
            await asyncio.sleep(LOOK_SECONDS)

    async def look(self, *, last: bool = False) -> None:
        """Tell what has begun, and lasted, and what is over. last: at once, and what ends now is not put right."""
        status, now = self._status(), self._clock()
        current = conditions(status, self._options)
        self._since = {key: self._since.get(key, now) for key in current}
        lasting = {
            key: text
            for key, text in current.items()
            if last or key in self._told or now - self._since[key] >= self._options.after_seconds
        }
        begun = {key: text for key, text in lasting.items() if key not in self._told}
        over = {key: text for key, text in self._told.items() if key not in lasting and not last}
        if not (begun or over) or (now < self._quiet_until and not last):
            return
        self._quiet_until = now + self._options.interval_seconds
        if await asyncio.to_thread(_post, self._webhook.reveal(), _message(begun, over, status.version)):
            self._told = lasting


def _message(begun: Mapping[str, str], over: Mapping[str, str], version: str) -> Message:
    begun, over = ({key: redact(text) for key, text in each.items()} for each in (begun, over))
    lines = [*(f"cdc: {text}" for text in begun.values()), *(f"cdc: over: {text}" for text in over.values())]
    return Message("\n".join(lines), begun, over, version)


def _post(url: str, message: Message) -> bool:
    """Whether it was taken. The URL is a secret, and so is not logged."""
    headers = {"Content-Type": "application/json"}
    try:
        request = Request(url, msgspec.json.encode(message), headers)  # noqa: S310 - checked with the configuration
        with urlopen(request, timeout=TIMEOUT_SECONDS):  # noqa: S310
            return True
    except HTTPError as exc:
        log.warning("the webhook refused a message", status=exc.code)
    except (OSError, HTTPException) as exc:
        log.warning("the webhook cannot be reached", error=type(getattr(exc, "reason", exc)).__name__)
    return False
