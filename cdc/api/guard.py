"""Who may do what: nothing of a request is read, and no WebSocket is accepted, before that is clear."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.datastructures import Headers, QueryParams
from starlette.responses import Response
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Receive, Scope, Send

from cdc.api.keyring import Keyring, Unauthorized
from cdc.api.operation import UNDECLARED, Operation, declared_by
from cdc.api.principal import PRINCIPAL, Principal
from cdc.api.responses import failure
from cdc.api.tickets import Tickets

_SOMEWHERE = Operation(access="any")
"""Where no route is, or none of that method: whoever has a token may know."""


class Guard:
    """ASGI middleware that answers 401 or 403, or leaves the principal in the scope and passes on.

    What a route demands stands beside it (`cdc.api.operation`); one that says nothing is for admins.
    """

    def __init__(self, app: ASGIApp, routes: Sequence[BaseRoute], keyring: Keyring, tickets: Tickets) -> None:
        self._app = app
        self._routes = routes
        self._keyring = keyring
        self._tickets = tickets

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse, or pass on."""
        if scope["type"] != "lifespan":
            refusal = self._refusal(scope)
            if refusal is not None:
                await refusal(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> Response | None:
        operation = self._operation(scope)
        if operation.access == "public":
            return None
        try:
            principal = self._principal(scope, operation)
        except Unauthorized as exc:
            answer = failure(401, str(exc), exc.hint)
            answer.headers["WWW-Authenticate"] = "Bearer"
            return answer
        if not operation.allows(principal):
            return failure(403, "the token does not allow this", hint=_NEEDS[operation.access])
        scope[PRINCIPAL] = principal
        return None

    def _operation(self, scope: Scope) -> Operation:
        for route in self._routes:
            if route.matches(scope)[0] is Match.FULL:
                return declared_by(route) or UNDECLARED
        return _SOMEWHERE

    def _principal(self, scope: Scope, operation: Operation) -> Principal:
        authorization = Headers(scope=scope).get("authorization")
        ticket = QueryParams(scope["query_string"]).get("ticket") if operation.tickets else None
        if authorization is None and ticket is not None and self._keyring.guarded:
            principal = self._tickets.redeem(ticket)
            if not self._keyring.still_knows(principal):
                raise Unauthorized("the token that the ticket was given for is no longer let in")
            return principal
        return self._keyring.principal(authorization)


_NEEDS = {
    "read": "it takes the scope read",
    "overview": "it takes the scope read, without channels and where",
    "publish": "it takes the scope publish",
    "admin": "it takes the scope admin",
}
