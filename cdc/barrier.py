"""Barriers: a mirror that stands still at one position of its source, so that both can be seen at the same point."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Protocol
from urllib.parse import quote, urlsplit

import msgspec

from cdc.api.pinned import connection_to
from cdc.errors import CdcError, FatalError, TransientError
from cdc.position import SourcePosition, format_position


class Held(msgspec.Struct, frozen=True):
    """How a mirror stands while it is held.

    exact: all that commits below the wanted position is applied, and nothing else.
    lag_bytes: how far it is behind that position, where that is known.
    """

    exact: bool
    lag_bytes: int | None


class Barrier(Protocol):
    """Makes a mirror stand still."""

    def hold(self, until: SourcePosition | None, timeout_seconds: float) -> Held:
        """Return when the mirror stands at `until` (`None`: where it is now, between two transactions).

        A hold may be moved on by another call. It ends by itself `timeout_seconds` after it was asked for.
        """
        ...

    def release(self) -> None:
        """Let the mirror go on. Safe to call twice, and without a hold."""
        ...


class HttpBarrier:
    """Asks a running daemon to hold one of its sinks."""

    def __init__(self, base_url: str, sink: str, token: str | None = None, certificate: str = "") -> None:
        """certificate: as of `cdc.api.pinned.connection_to`."""
        self._url, self._certificate = base_url, certificate
        self._path = f"{urlsplit(base_url).path.rstrip('/')}/sinks/{quote(sink, safe='')}"
        self._headers = {"Content-Type": "application/json"}
        if token is not None:
            self._headers["Authorization"] = f"Bearer {token}"

    def hold(self, until: SourcePosition | None, timeout_seconds: float) -> Held:
        """Raises `TransientError` where the daemon cannot be reached or the sink did not get there in time."""
        body = {"until": format_position(until), "seconds": timeout_seconds}
        answer = self._post("hold", body, timeout_seconds + 10)
        if answer.get("held") is not True:
            raise TransientError("the daemon did not hold the sink", hint="see `cdc status`")
        return Held(exact=until is not None, lag_bytes=0 if until is not None else None)

    def release(self) -> None:
        """A daemon that cannot be reached lets go by itself."""
        with suppress(CdcError):
            self._post("release", {}, 10)

    def _post(self, verb: str, body: Mapping[str, object], timeout_seconds: float) -> dict[str, Any]:
        connection = connection_to(self._url, self._certificate, timeout_seconds)
        try:
            connection.request("POST", f"{self._path}/{verb}", json.dumps(body), self._headers)
            response = connection.getresponse()
            return _answer(response.status, response.read(65536))
        except (OSError, http.client.HTTPException) as exc:
            raise TransientError(f"{verb}: the daemon does not answer: {exc}", hint="is `cdc run` running?") from exc
        finally:
            connection.close()


class NoBarrier:
    """For a mirror that nobody writes to: it stands still by itself, most likely behind the source.

    position: reads where the mirror stands.
    """

    def __init__(self, position: Callable[[], SourcePosition | None]) -> None:
        self._position = position

    def hold(self, until: SourcePosition | None, timeout_seconds: float) -> Held:  # noqa: ARG002 - the protocol's
        """Never exact: what has committed between the mirror's position and `until` is not known."""
        position = self._position()
        if isinstance(position, int) and isinstance(until, int):
            return Held(exact=False, lag_bytes=max(until - position, 0))
        return Held(exact=False, lag_bytes=None)

    def release(self) -> None:
        """Nothing was held."""


def _answer(status: int, body: bytes) -> dict[str, Any]:
    """The daemon's answer, or its error as one of ours."""
    try:
        decoded = json.loads(body or b"{}")
    except ValueError:
        decoded = {}
    answer = decoded if isinstance(decoded, dict) else {}
    if status == http.client.OK:
        return answer
    message = f"{answer.get('error') or f'the daemon answered with status {status}'}"
    kind = FatalError if status in {400, 401, 403, 404} else TransientError
    raise kind(message, hint=f"{answer.get('hint', '')}")
