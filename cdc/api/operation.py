"""What each route declares about itself: whom it is for, what it takes, and what it answers.

The guard reads the first, `/openapi.json` shows all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, Literal, TypeVar

import msgspec
from starlette.routing import BaseRoute

from cdc.api.principal import Principal
from cdc.feed.visibility import Limits

F = TypeVar("F", bound=Callable[..., Any])

Access = Literal["public", "any", "read", "overview", "publish", "admin"]
"""public: whoever reaches us. any: whoever has a token. overview: `read` without limits."""

_ATTRIBUTE: Final = "cdc_operation"


class Operation(msgspec.Struct, frozen=True, kw_only=True):
    """One route.

    answers: by status, JSON of that type, or a media type.
    query, headers, body: their structs. errors: statuses beyond those that `access`, `query` and `body` bring along.
    tickets: `?ticket=` is taken instead of a token.
    """

    access: Access
    answers: Mapping[int, Any] = {}
    query: type[msgspec.Struct] | None = None
    headers: type[msgspec.Struct] | None = None
    body: type[msgspec.Struct] | None = None
    errors: tuple[int, ...] = ()
    tickets: bool = False

    def allows(self, principal: Principal) -> bool:
        """Whether somebody who was let in may do this."""
        if self.access == "public" or self.access == "any":  # noqa: PLR1714 - mypy narrows by this
            return True
        if self.access == "overview":
            return principal.may("read") and principal.limits == Limits()
        return principal.may(self.access)


UNDECLARED: Final = Operation(access="admin")
"""Of a route that says nothing about itself."""


def operation(
    access: Access,
    answers: Mapping[int, Any],
    *,
    query: type[msgspec.Struct] | None = None,
    headers: type[msgspec.Struct] | None = None,
    body: type[msgspec.Struct] | None = None,
    errors: tuple[int, ...] = (),
    tickets: bool = False,
) -> Callable[[F], F]:
    """Declare what an endpoint is: see `Operation`. Its docstring is the description."""
    declared = Operation(
        access=access, answers=answers, query=query, headers=headers, body=body, errors=errors, tickets=tickets
    )

    def declare(endpoint: F) -> F:
        setattr(endpoint, _ATTRIBUTE, declared)
        return endpoint

    return declare


def declared_by(route: BaseRoute) -> Operation | None:
    """What a route's endpoint declares."""
    found = getattr(getattr(route, "endpoint", None), _ATTRIBUTE, None)
    return found if isinstance(found, Operation) else None
