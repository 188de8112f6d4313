"""`[http]`: where the daemon and the gateway answer, and to whom."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Final, Literal

import msgspec

from cdc.errors import ConfigError
from cdc.feed.visibility import Limits
from cdc.secret import Token, from_file, place_of

Right = Literal["read", "publish", "admin"]

Algorithm = Literal["HS256", "HS384", "HS512", "RS256", "RS384", "RS512", "ES256", "ES384", "ES512"]

_ADDRESS: Final = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^:\[\]]+):\d{1,5}")
_ORIGIN: Final = re.compile(r"https?://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:\d{1,5})?")
_VISIBLE: Final = re.compile(r"[\x21-\x7e]+")
"""Of what a token consists: all else is changed or refused on its way through a header."""


class TokenConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[[http.tokens]]`: somebody who may talk to us, and what he may do and see.

    Whoever asks must then send "Authorization: Bearer TOKEN" (docs/http-api.md tells what needs none).
    """

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=100)]
    """Who that is, for logs."""
    token: Token | None = None
    """Long and random: `openssl rand -hex 32`. The command line uses the first with the scope `admin`."""
    token_file: str | None = None
    """The same from a file, so that neither this file nor the environment holds it."""
    scopes: Annotated[tuple[Right, ...], msgspec.Meta(min_length=1)]
    """`read`: changes, status, metrics. `publish`: events of one's own. `admin`: everything."""
    channels: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)] | None = None
    """Only changes of these channels. Left out: of all."""
    where: Annotated[dict[str, str], msgspec.Meta(min_length=1)] | None = None
    """Only changes of entities whose fields are equal to these, as text. Left out: of all."""

    @property
    def limits(self) -> Limits:
        """What of the feed it sees."""
        return Limits(None if self.channels is None else frozenset(self.channels), self.where)


class JwtConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[http.jwt]`: JSON web tokens of an application that knows its users.

    Claims: scope, channels, where, and exp, which is demanded.
    """

    key: Token | None = None
    """HS256, HS384, HS512: a secret. RS256 ... ES512: a public key in PEM."""
    key_file: str | None = None
    """The key from a file, instead."""
    algorithms: Annotated[tuple[Algorithm, ...], msgspec.Meta(min_length=1)]
    """Only these are taken, whatever a token says about itself."""
    audience: str | None = None
    """What the claim `aud` has to be, or contain. Left out: tokens that have one are refused."""
    issuer: str | None = None
    """What the claim `iss` has to be. Left out: anything."""


class Http(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[http]`: status, metrics, control, and the feed of changes (docs/http-api.md)."""

    address: str = "127.0.0.1:8642"
    """`HOST:PORT`; port 0 takes a free one. Another address than loopback demands tokens, or a jwt."""
    certificate_file: str = ""
    """HTTPS, by this certificate, and those between it and its authority, in PEM. Empty: HTTP."""
    key_file: str = ""
    """The certificate's private key in PEM, without a password. Empty: it is in the same file."""
    origins: tuple[str, ...] = ()
    """Web pages of these origins may use the interface, besides the daemon's own: such as `https://app.example.com`."""
    max_connections: Annotated[int, msgspec.Meta(ge=1)] = 2_000
    """Connections at a time; who comes when there are more is told so."""
    feed: str = ""
    """The sink of `kind = "data_changes"` whose feed is served. Empty: the only one."""
    max_clients: Annotated[int, msgspec.Meta(ge=0)] = 1_500
    """WebSockets and event streams at a time."""
    max_clients_each: Annotated[int, msgspec.Meta(ge=0)] = 1_500
    """How many of them may belong to one token, or to one subject of JSON web tokens."""
    tokens: tuple[TokenConfig, ...] = ()
    jwt: JwtConfig | None = None

    @property
    def host_and_port(self) -> tuple[str, int]:
        """What to listen on; port 0 takes a free one."""
        host, _, port = self.address.rpartition(":")
        return host.removeprefix("[").removesuffix("]"), int(port)

    @property
    def guarded(self) -> bool:
        """Whether a token is needed."""
        return bool(self.tokens) or self.jwt is not None

    @property
    def row_limits(self) -> tuple[str, ...]:
        """The fields by which tokens are limited to rows."""
        return tuple(sorted({field for entry in self.tokens for field in entry.where or ()}))

    @property
    def admin_token(self) -> Token | None:
        """What the command line shows to its daemon."""
        return next((entry.token for entry in self.tokens if "admin" in entry.scopes), None)


def listening_on(http: Http, address: str) -> Http:
    """The same on another address. Raises `ConfigError` as `complete` does."""
    http = msgspec.structs.replace(http, address=address)
    _check_address(http)
    return http


def complete(http: Http) -> Http:
    """Read the secrets that are in files, and check what one option means for another. Raises `ConfigError`."""
    tokens = tuple(_complete_token(f"http.tokens[{at}]", entry) for at, entry in enumerate(http.tokens))
    http = msgspec.structs.replace(http, tokens=tokens, jwt=None if http.jwt is None else _complete_jwt(http.jwt))
    _check_unique("name", [entry.name for entry in tokens])
    _check_unique("token", [entry.token.reveal() if entry.token else "" for entry in tokens])
    _check_address(http)
    if http.key_file and not http.certificate_file:
        raise ConfigError("http.key_file: there is no http.certificate_file", hint="set both, or none")
    for origin in http.origins:
        if not _ORIGIN.fullmatch(origin):
            raise ConfigError(
                f"http.origins: {origin!r} is no origin", hint='for example "https://app.example.com", in lower case'
            )
    return http


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_address(http: Http) -> None:
    if not _ADDRESS.fullmatch(http.address) or http.host_and_port[1] > 65535:
        raise ConfigError(f"http.address: {http.address!r} is not host:port", hint='for example "127.0.0.1:8642"')
    if not http.guarded and not is_loopback(http.host_and_port[0]):
        raise ConfigError(
            f"http.address: {http.address} can be reached from other machines, and there are no tokens",
            hint="add [[http.tokens]] or [http.jwt], or listen on 127.0.0.1",
        )


def _check_unique(what: str, values: Sequence[str]) -> None:
    for at, value in enumerate(values):
        if value in values[:at]:
            raise ConfigError(
                f"http.tokens[{at}].{what}: the same as that of http.tokens[{values.index(value)}]",
                hint="it must be clear who somebody is",
            )


def _complete_token(key: str, entry: TokenConfig) -> TokenConfig:
    token = from_file(Token, f"{key}.token", entry.token, entry.token_file)
    if token is None:
        raise ConfigError(f"{key}.token: missing", hint="set token or token_file")
    place = place_of(f"{key}.token", entry.token_file)
    if not token.reveal():
        raise ConfigError(f"{place}: empty", hint="a token that nobody knows is a long random string")
    if not _VISIBLE.fullmatch(token.reveal()):
        raise ConfigError(f"{place}: has a space or a character beyond ASCII", hint="`openssl rand -hex 32`")
    if "admin" in entry.scopes and entry.limits != Limits():
        raise ConfigError(f"{key}: admin may do everything, and has limits", hint="remove channels and where")
    return msgspec.structs.replace(entry, token=token)


def _complete_jwt(options: JwtConfig) -> JwtConfig:
    key = from_file(Token, "http.jwt.key", options.key, options.key_file)
    if key is None:
        raise ConfigError("http.jwt.key: missing", hint="set key or key_file")
    place = place_of("http.jwt.key", options.key_file)
    for name in options.algorithms:
        _check_key(place, name, key.reveal())
    return msgspec.structs.replace(options, key=key)


def _check_key(place: str, algorithm: str, key: str) -> None:
    """A key that fits no algorithm would be noticed with the first request only."""
    import jwt  # noqa: PLC0415 - 10 MiB with what it brings, for those alone who use it

    hash_bytes = int(algorithm[2:]) // 8
    if algorithm.startswith("HS") and len(key.encode()) < hash_bytes:  # RFC 7518, section 3.2
        raise ConfigError(f"{place}: shorter than the {hash_bytes} bytes of {algorithm}", hint=_KEYS["HS"])
    try:
        prepared = jwt.get_algorithm_by_name(algorithm).prepare_key(key)
    except (jwt.PyJWTError, ValueError, TypeError) as exc:
        raise ConfigError(f"{place}: does not fit {algorithm}", hint=_KEYS[algorithm[:2]]) from exc
    if not algorithm.startswith("HS") and not hasattr(prepared, "verify"):
        raise ConfigError(f"{place}: a private key", hint="give the public one: it is enough to check tokens")


_KEYS: Final[Mapping[str, str]] = {
    "HS": "HS* takes a secret, and never a public key: `openssl rand -hex 64`",
    "RS": "RS* takes an RSA public key in PEM",
    "ES": "ES* takes a public key in PEM, of the algorithm's curve",
}
