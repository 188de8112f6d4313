"""Whom a bearer token belongs to: one of the configured, or a JSON web token."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from hashlib import sha256
from typing import Annotated, Any, Final, get_args

import msgspec

from cdc.api.principal import LOCAL, Principal
from cdc.errors import CdcError
from cdc.feed.visibility import Limits
from cdc.http_config import Http, JwtConfig, Right, TokenConfig

LEEWAY_SECONDS: Final = 5
"""How far the clock of whoever issues JSON web tokens may be off."""

MAX_TOKEN_BYTES: Final = 8 * 1024

_RIGHTS: Final = frozenset(get_args(Right))


class Unauthorized(CdcError):
    """Nobody is let in with that."""


class _Claims(msgspec.Struct, frozen=True):
    """Of a JSON web token. A limit that is there must be understood: `null` is none."""

    exp: float
    sub: Annotated[str, msgspec.Meta(max_length=200)] = ""
    scope: str | tuple[str, ...] = ()
    channels: frozenset[str] | msgspec.UnsetType = msgspec.UNSET
    where: Annotated[dict[str, str], msgspec.Meta(min_length=1)] | msgspec.UnsetType = msgspec.UNSET

    def principal(self) -> Principal:
        """Raises `Unauthorized` for an admin with limits. Scopes that are not ours mean nothing to us."""
        given = self.scope.split() if isinstance(self.scope, str) else self.scope
        scopes: frozenset[Any] = _RIGHTS & set(given)
        limits = Limits(
            None if self.channels is msgspec.UNSET else self.channels,
            None if self.where is msgspec.UNSET else self.where,
        )
        if "admin" in scopes and limits != Limits():
            raise Unauthorized("the token's claims contradict each other", hint="an admin has no limits")
        return Principal(f"jwt:{self.sub}", scopes, limits, self.exp)


class Keyring:
    """All that `[http]` lets in."""

    def __init__(self, http: Http) -> None:
        self.guarded = http.guarded
        self._jwt = http.jwt
        self.adopt(http)

    def adopt(self, http: Http) -> None:
        """Let others in from now on: those that the tokens belong to."""
        self._tokens = [(_digest(_text(entry)), _principal(entry)) for entry in http.tokens]

    def still_knows(self, principal: Principal) -> bool:
        """Whether somebody who was let in before would be so now."""
        of_a_token = any(principal == known for _, known in self._tokens)
        return of_a_token or principal.expires_at is not None  # a JSON web token; they end by themselves

    def principal(self, authorization: str | None) -> Principal:
        """Whom that header belongs to. Raises `Unauthorized`."""
        if not self.guarded:
            return LOCAL
        if authorization is None:
            raise Unauthorized("the token is missing", hint="send Authorization: Bearer TOKEN")
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer" or len(token) > MAX_TOKEN_BYTES:
            raise Unauthorized("the Authorization header is not what is expected", hint="Authorization: Bearer TOKEN")
        token = token.strip()
        found = self._configured(token)
        if found is None and self._jwt is not None and token.count(".") == 2:
            found = _signed(token, self._jwt)
        if found is None:
            raise Unauthorized("the token is wrong")
        return found

    def _configured(self, token: str) -> Principal | None:
        """Compares with each, whether one was found or not: how long it takes tells nothing."""
        given, found = _digest(token), None
        for digest, principal in self._tokens:
            if hmac.compare_digest(given, digest):
                found = principal
        return found


def _signed(token: str, options: JwtConfig) -> Principal:
    import jwt  # noqa: PLC0415 - was loaded to check the key, by who has one

    assert options.key is not None
    try:
        payload: Mapping[str, Any] = jwt.decode(
            token,
            options.key.reveal(),
            algorithms=list(options.algorithms),
            audience=options.audience,
            issuer=options.issuer,
            leeway=LEEWAY_SECONDS,
            options={"require": ["exp"]},
        )
        return msgspec.convert(payload, _Claims).principal()
    except jwt.ExpiredSignatureError as exc:
        raise Unauthorized("the token has expired") from exc
    except msgspec.ValidationError as exc:
        raise Unauthorized(f"the token's claims are not what is expected: {exc}") from exc
    except (jwt.PyJWTError, ValueError, RecursionError) as exc:  # its header is read before the signature is checked
        raise Unauthorized("the token is wrong") from exc


def _digest(token: str) -> bytes:
    """Of equal length for all tokens, so that comparing tells nothing about theirs."""
    return sha256(token.encode()).digest()


def _text(entry: TokenConfig) -> str:
    assert entry.token is not None
    return entry.token.reveal()


def _principal(entry: TokenConfig) -> Principal:
    return Principal(entry.name, frozenset(entry.scopes), entry.limits)
