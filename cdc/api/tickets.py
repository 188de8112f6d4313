"""Tickets: what a browser puts into a URL where it cannot send a header."""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Callable
from hashlib import sha256
from typing import Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from cdc.api.keyring import Unauthorized
from cdc.api.operation import operation
from cdc.api.principal import PRINCIPAL, Principal
from cdc.api.responses import answer, failure

LIFETIME_SECONDS: Final = 60
MAX_OUTSTANDING: Final = 10_000
MAX_OUTSTANDING_EACH: Final = 2_000
"""Of one principal: all browsers of an application may share its token, and come back at once after a restart."""


class TooMany(Exception):
    """So many tickets are not used yet that there is none."""


class Issued(msgspec.Struct, frozen=True, rename="camel"):
    """A ticket, and for how many seconds it is good."""

    ticket: str
    expires_in: int


class Tickets:
    """Each is good for one request, on its issuer's behalf. Only their hashes are kept."""

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._outstanding: dict[bytes, tuple[Principal, float]] = {}  # the oldest first
        self._each: Counter[str] = Counter()

    def routes(self) -> list[BaseRoute]:
        """The routes of this group."""
        return [Route("/api/tickets", self.post, methods=["POST"])]

    @operation("any", {201: Issued}, errors=(429,))
    async def post(self, request: Request) -> Response:
        """Issue a ticket with the rights of the token, for the URL of a WebSocket or an event stream; good once."""
        try:
            ticket = self.issue(request.scope[PRINCIPAL])
        except TooMany:
            return failure(429, "too many tickets are not used yet", hint=f"they expire in {LIFETIME_SECONDS} s")
        return answer(Issued(ticket, LIFETIME_SECONDS), 201)

    def issue(self, principal: Principal) -> str:
        """Return 256 random bits as text. Raises `TooMany`."""
        self._forget_expired()
        if len(self._outstanding) >= MAX_OUTSTANDING or self._each[principal.name] >= MAX_OUTSTANDING_EACH:
            raise TooMany
        ticket = secrets.token_urlsafe(32)
        self._outstanding[_digest(ticket)] = principal, self._now() + LIFETIME_SECONDS
        self._each[principal.name] += 1
        return ticket

    def redeem(self, ticket: str) -> Principal:
        """Return on whose behalf it was issued. Raises `Unauthorized`, also when it is shown again."""
        self._forget_expired()
        found = self._outstanding.get(_digest(ticket))
        if found is None:
            raise Unauthorized("the ticket is unknown, used or too old", hint="POST /api/tickets gives another")
        self._forget(_digest(ticket))
        principal, _ = found
        if principal.expires_at is not None and principal.expires_at <= self._now():
            raise Unauthorized("the token that the ticket was given for has expired")
        return principal

    def _forget_expired(self) -> None:
        now = self._now()
        while self._outstanding:
            digest, (_, expires_at) = next(iter(self._outstanding.items()))
            if now < expires_at:
                return
            self._forget(digest)

    def _forget(self, digest: bytes) -> None:
        principal, _ = self._outstanding.pop(digest)
        self._each[principal.name] -= 1
        if not self._each[principal.name]:
            del self._each[principal.name]


def _digest(ticket: str) -> bytes:
    return sha256(ticket.encode()).digest()
