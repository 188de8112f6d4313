"""A client for the daemon's HTTP interface, for the command line. Standard library only."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from http.client import HTTPException
from itertools import islice
from typing import Any, Final
from urllib.parse import quote, urlencode

import msgspec

from cdc.api.pinned import connection_to
from cdc.config import LogLevel
from cdc.errors import CdcError
from cdc.letter import Letter, LetterId, LetterPage, LetterQuery, Outcome, Outcomes
from cdc.secret import Token
from cdc.status import DaemonStatus, from_json
from cdc.steering import Ordered, Replayed

TIMEOUT_SECONDS: Final = 20.0

GREETING_SECONDS: Final = 5.0
"""For what a daemon answers at once, whatever its pipelines do."""

_ALIVE: Final = b'{"alive":true}'

_LETTERS: Final = "/api/dead-letters"

_SILENT: Final = "its log may tell why; if it stays so, kill and restart it: nothing is lost"


class DaemonUnreachable(CdcError):
    """Nothing that is our daemon answers at the address."""


class DaemonSilent(CdcError):
    """Something listens at the address, and does not answer in time: our daemon hangs, or it is somebody else."""


class Client:
    """Talks to one daemon; every call is one short connection."""

    def __init__(self, url: str, token: Token | None = None, certificate: str = "") -> None:
        """certificate: as of `cdc.api.pinned.connection_to`."""
        self.url = url
        self.certificate = certificate
        self._headers = {"Authorization": f"Bearer {token.reveal()}"} if token is not None else {}

    def greet(self) -> None:
        """Return if it answers at all. Raises `DaemonUnreachable` or, within seconds, `DaemonSilent`."""
        self.request("GET", "/health", timeout_seconds=GREETING_SECONDS)

    def is_cdc(self) -> bool:
        """Whether a process of cdc answers there, within seconds. Needs no token."""
        try:
            return self.request("GET", "/health", timeout_seconds=GREETING_SECONDS) == _ALIVE
        except CdcError:
            return False

    def status(self) -> DaemonStatus:
        """The daemon's snapshot."""
        data = self.request("GET", "/status")
        try:
            return from_json(data)
        except msgspec.DecodeError as exc:
            raise DaemonUnreachable(f"{self.url}: does not answer as a cdc daemon") from exc

    def set_log_level(self, level: LogLevel) -> None:
        """Let it log more or less."""
        self.request("POST", "/log-level", msgspec.json.encode({"level": level}))

    def pause(self, name: str) -> None:
        """Pause a source or a sink."""
        self.request("POST", f"/pause/{quote(name, safe='')}")

    def resume(self, name: str) -> None:
        """Let it go on."""
        self.request("POST", f"/resume/{quote(name, safe='')}")

    def resync(self, name: str, tables: Sequence[str], *, yes: bool) -> Ordered:
        """Let a sink, or all sinks of a source, be made right again."""
        body = msgspec.json.encode({"tables": tables, "yes": yes})
        return msgspec.json.decode(self.request("POST", f"/resync/{quote(name, safe='')}", body), type=Ordered)

    def replay(self, sink: str, since: str, *, dry_run: bool) -> Replayed:
        """Let a mirror get once more what is kept from a point on."""
        body = msgspec.json.encode({"from": since, "dry_run": dry_run})
        return msgspec.json.decode(self.request("POST", f"/sinks/{quote(sink, safe='')}/replay", body), type=Replayed)

    @property
    def dead_letters(self) -> RemoteLetters:
        """The daemon's parked changes."""
        return RemoteLetters(self)

    def request(
        self, method: str, path: str, body: bytes | None = None, *, timeout_seconds: float = TIMEOUT_SECONDS
    ) -> bytes:
        """What is answered. Raises `CdcError` with what the daemon says where that is an error."""
        connection = connection_to(self.url, self.certificate, timeout_seconds)
        try:
            connection.request(method, path, body, headers=self._headers)
            response = connection.getresponse()
            data = response.read()
        except TimeoutError as exc:
            raise DaemonSilent(f"{self.url} does not answer within {timeout_seconds:.0f} s", hint=_SILENT) from exc
        except (OSError, HTTPException) as exc:
            raise DaemonUnreachable(f"{self.url}: {exc}", hint="is the daemon running?") from exc
        finally:
            connection.close()
        if response.status != 200:
            raise _refusal(response.status, data)
        return data


class RemoteLetters:
    """Implements `cdc.letter.DeadLetters` for those of a daemon, which knows the token, and is told who acts."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def list(self, query: LetterQuery) -> LetterPage:
        """One page of them."""
        values: dict[str, Any] = msgspec.to_builtins(query)
        lists = {name: ",".join(value) for name, value in values.items() if isinstance(value, list | tuple)}
        texts = urlencode(values | lists | {"full": "true" if query.full else "false"})
        return msgspec.json.decode(self._client.request("GET", f"{_LETTERS}?{texts}"), type=LetterPage)

    def get(self, letter: LetterId) -> Letter:
        """One of them, with its contents."""
        return msgspec.json.decode(self._client.request("GET", f"{_LETTERS}/{letter}"), type=Letter)

    def retry(self, letters: Collection[LetterId] | None, who: str, *, sink: str = "") -> Sequence[Outcome]:
        """Make them due now; the daemon waits a little for what comes of it."""
        body = {"sink": sink, "by": who}
        if letters is None:
            return self._post("retry", {"ids": None, **body})
        return [outcome for ids in _portions(letters) for outcome in self._post("retry", {"ids": ids, **body})]

    def discard(self, letters: Collection[LetterId], *, reason: str, who: str) -> Sequence[Outcome]:
        """Give them up."""
        return [
            outcome
            for ids in _portions(letters)
            for outcome in self._post("discard", {"ids": ids, "reason": reason, "by": who})
        ]

    def _post(self, action: str, body: dict[str, Any]) -> Sequence[Outcome]:
        answer = self._client.request("POST", f"{_LETTERS}/{action}", msgspec.json.encode(body))
        return msgspec.json.decode(answer, type=Outcomes).outcomes


def _portions(letters: Collection[LetterId]) -> Iterator[tuple[str, ...]]:
    """As many as a request's body can hold."""
    ids = iter(sorted(letters))
    while portion := tuple(map(str, islice(ids, 500))):
        yield portion


def _refusal(status: int, data: bytes) -> CdcError:
    try:
        error: dict[str, Any] = msgspec.json.decode(data, type=dict[str, Any])
    except msgspec.DecodeError:
        error = {}
    return CdcError(str(error.get("error", f"the daemon answered {status}")), hint=str(error.get("hint", "")))
