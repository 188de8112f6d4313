"""A client for the daemon's HTTP interface, for the command line. Standard library only."""

from __future__ import annotations

from http.client import HTTPConnection, HTTPException
from typing import Any, Final
from urllib.parse import quote, urlsplit

import msgspec

from cdc.config import Token
from cdc.errors import CdcError
from cdc.status import DaemonStatus, from_json

TIMEOUT_SECONDS: Final = 10.0


class DaemonUnreachable(CdcError):
    """Nothing that is our daemon answers at the address."""


class Client:
    """Talks to one daemon; every call is one short connection."""

    def __init__(self, url: str, token: Token | None = None) -> None:
        self.url = url
        self._headers = {"Authorization": f"Bearer {token.reveal()}"} if token is not None else {}

    def status(self) -> DaemonStatus:
        """The daemon's snapshot."""
        data = self._request("GET", "/status")
        try:
            return from_json(data)
        except msgspec.DecodeError as exc:
            raise DaemonUnreachable(f"{self.url}: does not answer as a cdc daemon") from exc

    def pause(self, name: str) -> None:
        """Pause a source or a sink."""
        self._request("POST", f"/pause/{quote(name, safe='')}")

    def resume(self, name: str) -> None:
        """Let it go on."""
        self._request("POST", f"/resume/{quote(name, safe='')}")

    def _request(self, method: str, path: str) -> bytes:
        connection = HTTPConnection(urlsplit(self.url).netloc, timeout=TIMEOUT_SECONDS)
        try:
            connection.request(method, path, headers=self._headers)
            response = connection.getresponse()
            data = response.read()
        except (OSError, HTTPException) as exc:
            raise DaemonUnreachable(f"{self.url}: {exc}", hint="is the daemon running?") from exc
        finally:
            connection.close()
        if response.status != 200:
            raise _refusal(response.status, data)
        return data


def _refusal(status: int, data: bytes) -> CdcError:
    try:
        error: dict[str, Any] = msgspec.json.decode(data, type=dict[str, Any])
    except msgspec.DecodeError:
        error = {}
    return CdcError(str(error.get("error", f"the daemon answered {status}")), hint=str(error.get("hint", "")))
