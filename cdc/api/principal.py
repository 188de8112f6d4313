"""On whose behalf a request is made, and what that allows."""

from __future__ import annotations

from typing import Final

import msgspec

from cdc.feed.visibility import Limits
from cdc.http_config import Right

PRINCIPAL: Final = "cdc.principal"
"""Where the guard leaves the principal, in the ASGI scope."""


class Principal(msgspec.Struct, frozen=True):
    """Somebody who was let in.

    name: for logs. scopes: `admin` includes the others. expires_at: unix seconds, when open streams have to end.
    """

    name: str
    scopes: frozenset[Right]
    limits: Limits = Limits()
    expires_at: float | None = None

    def may(self, right: Right) -> bool:
        """Whether a scope covers it."""
        return right in self.scopes or "admin" in self.scopes


LOCAL: Final = Principal("local", frozenset({"admin"}))
"""Whoever reaches a loopback address, where no token is needed."""
