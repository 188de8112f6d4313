"""Who is let in, and what for: over the application itself, whose routes read a feed in memory."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jwt
import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st
from jwt.utils import base64url_encode
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.testclient import TestClient

from cdc.api import tickets as tickets_module
from cdc.api.app import create_app
from cdc.api.feed import Feed
from cdc.api.guard import Guard
from cdc.api.keyring import Keyring, Unauthorized
from cdc.api.operation import declared_by
from cdc.api.principal import PRINCIPAL, Principal
from cdc.api.tickets import LIFETIME_SECONDS, MAX_OUTSTANDING, MAX_OUTSTANDING_EACH, Tickets, TooMany
from cdc.feed.visibility import Limits
from cdc.http_config import Http, JwtConfig, Right, TokenConfig
from cdc.secret import Token
from cdc.testing_feed import MemoryFeed
from tests.gateway import record
from tests.unit.test_api import FakeBackend

SECRET = "0123456789abcdef0123456789abcdef"
URL = "http://cdc.example:8642"


def token(name: str, *scopes: Right, **limits: Any) -> TokenConfig:
    return TokenConfig(name=name, token=Token(f"{name}-token"), scopes=scopes, **limits)


HTTP = Http(
    origins=("https://app.example",),
    tokens=(
        token("reader", "read"),
        token("limited", "read", channels=("orders",)),
        token("publisher", "publish"),
        token("admin", "admin"),
    ),
    jwt=JwtConfig(key=Token(SECRET), algorithms=("HS256",), audience="cdc", issuer="shop"),
)


def app_of(http: Http = HTTP) -> Starlette:
    feed = MemoryFeed()
    feed.writer("@publish").publish(record("orders"))
    return create_app(FakeBackend(), http, Feed(feed.reader(), feed.writer("@publish")))


@pytest.fixture
def client() -> Iterator[TestClient]:
    with TestClient(app_of(), base_url=URL) as client:
        yield client


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {name}-token"}


def claims(**more: Any) -> dict[str, Any]:
    given = {"exp": int(time.time()) + 60, "aud": "cdc", "iss": "shop", "scope": "read", **more}
    return {name: value for name, value in given.items() if value is not None}


def signed(payload: dict[str, Any], key: Any = SECRET, algorithm: str = "HS256", **header: Any) -> str:
    return jwt.encode(payload, key, algorithm, headers=header)


# --- rights -----------------------------------------------------------------------------------------------------------


def test_f105_every_route_declares_whom_it_is_for() -> None:
    routes = app_of().routes
    assert len(routes) > 12
    assert [route for route in routes if declared_by(route) is None] == []


def test_the_document_has_every_route_that_is_no_websocket(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    for route in app_of().routes:
        declared = declared_by(route)
        if not isinstance(route, Route) or declared is None:
            continue
        for method in (route.methods or set()) - {"HEAD"}:
            described = paths[route.path_format].pop(method.lower())
            assert described["summary"].endswith((".", ";")), route
            assert ("security" in described) == ("401" in described["responses"]) == (declared.access != "public")
    assert not any(paths.values())


def test_f105_a_route_that_forgot_is_for_admins() -> None:
    def forgotten(*_: Any) -> Any:
        raise AssertionError

    guard = Guard(forgotten, [Route("/new", forgotten)], Keyring(HTTP), Tickets())
    for name in ("reader", "publisher"):
        assert TestClient(guard, base_url=URL).get("/new", headers=bearer(name)).status_code == 403


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/health", {"nobody", "reader", "limited", "publisher", "admin"}),
        ("GET", "/openapi.json", {"nobody", "reader", "limited", "publisher", "admin"}),
        ("GET", "/ready", {"reader", "admin"}),
        ("GET", "/status", {"reader", "admin"}),
        ("GET", "/metrics", {"reader", "admin"}),
        ("GET", "/stats", {"reader", "limited", "admin"}),
        ("GET", "/api/changes/poll", {"reader", "limited", "admin"}),
        ("GET", "/api/changes/Orders/1", {"reader", "limited", "admin"}),
        ("POST", "/api/tickets", {"reader", "limited", "publisher", "admin"}),
        ("POST", "/publish", {"publisher", "admin"}),
        ("POST", "/api/changes/poll/cleanup", {"admin"}),
        ("POST", "/log-level", {"admin"}),
        ("POST", "/pause/shop", {"admin"}),
        ("POST", "/resume/shop", {"admin"}),
        ("POST", "/sinks/mirror/hold", {"admin"}),
        ("POST", "/sinks/mirror/release", {"admin"}),
        ("GET", "/api/dead-letters", {"admin"}),
        ("GET", "/api/dead-letters/mirror:1.0", {"admin"}),
        ("POST", "/api/dead-letters/retry", {"admin"}),
        ("POST", "/api/dead-letters/discard", {"admin"}),
    ],
)
def test_f105_who_may_do_what(client: TestClient, method: str, path: str, allowed: set[str]) -> None:
    names = ("reader", "limited", "publisher", "admin")
    answers = {name: client.request(method, path, headers=bearer(name)) for name in names}
    answers["nobody"] = client.request(method, path)
    refused = {"nobody": 401}
    for name, answer in answers.items():
        expected = name in allowed
        assert (answer.status_code not in {401, 403}) == expected, name
        assert expected or answer.status_code == refused.get(name, 403)
    if "nobody" not in allowed:
        assert answers["nobody"].headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "authorization",
    [
        "", "Bearer", "Bearer ", "Basic admin-token", "Bearer admin-token x", "admin-token", "Bearer admin-toke",
        "Bearer admin-tokenn", "Bearer " + "x" * 9_000, "Bearer ü",
    ],
)  # fmt: skip
def test_f105_wrong_tokens(client: TestClient, authorization: str) -> None:
    answer = client.get("/status", headers={"Authorization": authorization.encode("latin-1")})
    assert answer.status_code == 401
    assert answer.json()["error"]


def test_f105_the_scheme_is_case_insensitive(client: TestClient) -> None:
    assert client.get("/status", headers={"Authorization": "bearer reader-token"}).status_code == 200


def test_f105_each_token_is_compared_whichever_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """How long it takes must not tell which one it was, nor how much of it was right."""
    compared: list[tuple[int, int]] = []
    real = hmac.compare_digest

    def spy(given: bytes, known: bytes) -> bool:
        compared.append((len(given), len(known)))
        return real(given, known)

    monkeypatch.setattr(hmac, "compare_digest", spy)
    keyring = Keyring(HTTP)
    for text in ("reader-token", "admin-token"):
        compared.clear()
        assert keyring.principal(f"Bearer {text}").name == text.removesuffix("-token")
        assert compared == [(32, 32)] * len(HTTP.tokens)
    compared.clear()
    with pytest.raises(Unauthorized):
        keyring.principal("Bearer x")
    assert compared == [(32, 32)] * len(HTTP.tokens)


# --- before anything is read or accepted ------------------------------------------------------------------------------


async def _nothing_is_read() -> Any:
    raise AssertionError("the guard read what somebody sent whom it does not know")


def ask(app: Callable[..., Any], scope: dict[str, Any]) -> list[Any]:
    """What the application sends to somebody of whom it may read nothing."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(app(scope, _nothing_is_read, send))
    return sent


def scope_of(kind: str, path: str, headers: dict[str, str], query: bytes = b"") -> dict[str, Any]:
    return {
        "type": kind, "asgi": {"version": "3.0"}, "http_version": "1.1", "path": path, "raw_path": path.encode(),
        "query_string": query, "root_path": "", "scheme": "ws" if kind == "websocket" else "http",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        "extensions": {"websocket.http.response": {}}, **({"method": "POST"} if kind == "http" else {}),
    }  # fmt: skip


@pytest.mark.parametrize("path", ["/ws", "/ws/", "/nothing"])
def test_f105_nobody_is_upgraded_before_authentication(path: str) -> None:
    for query in (b"", b"ticket=", b"ticket=unknown"):
        first, *_ = ask(app_of(), scope_of("websocket", path, {"host": "cdc.example"}, query))
        assert (first["type"], first["status"]) == ("websocket.http.response.start", 401)


def test_f105_a_token_that_may_not_read_is_not_upgraded() -> None:
    headers = {"host": "cdc.example", "authorization": "Bearer publisher-token"}
    first, *_ = ask(app_of(), scope_of("websocket", "/ws", headers))
    assert (first["type"], first["status"]) == ("websocket.http.response.start", 403)


@pytest.mark.parametrize("path", ["/publish", "/api/changes/poll/cleanup", "/sinks/mirror/hold", "/nothing"])
def test_f105_no_body_is_read_before_authentication(path: str) -> None:
    first, *_ = ask(app_of(), scope_of("http", path, {"host": "cdc.example"}))
    assert (first["type"], first["status"]) == ("http.response.start", 401)


# --- origins ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "https://app.example.evil", "http://app.example"])
def test_f105_foreign_origins_are_refused_before_the_upgrade(origin: str) -> None:
    headers = {"host": "cdc.example", "authorization": "Bearer reader-token", "origin": origin}
    first, *_ = ask(app_of(), scope_of("websocket", "/ws", headers))
    assert (first["type"], first["status"]) == ("websocket.http.response.start", 403)
    first, *_ = ask(app_of(), scope_of("http", "/publish", headers))
    assert first["status"] == 403


def test_f105_foreign_origins_get_no_cors_headers(client: TestClient) -> None:
    headers = {"Origin": "https://evil.example"}
    preflight = client.options("/api/changes/poll", headers={**headers, "Access-Control-Request-Method": "GET"})
    assert preflight.status_code == 403
    answer = client.get("/api/changes/poll", headers={**headers, **bearer("reader")})
    assert not [name for name in (*answer.headers, *preflight.headers) if name.startswith("access-control")]


@pytest.mark.parametrize("headers", [bearer("reader"), {}])
def test_f105_cors_follows_the_allowed_origins(client: TestClient, headers: dict[str, str]) -> None:
    """Also of a refusal: a page that cannot read a 401 does not know that it needs another token."""
    ours = {"Origin": "https://app.example"}
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,idempotency-key"}
    preflight = client.options("/publish", headers={**ours, **asked})
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == "https://app.example"
    assert "Idempotency-Key" in preflight.headers["access-control-allow-headers"]
    answer = client.get("/api/changes/poll", headers={**ours, **headers})
    assert answer.status_code == (200 if headers else 401)
    assert answer.headers["access-control-allow-origin"] == "https://app.example"
    assert "origin" in answer.headers["vary"].lower()


def test_f105_without_tokens_a_web_page_opens_no_websocket() -> None:
    for headers in ({"host": "127.0.0.1:8642", "origin": "https://evil.example"}, {"host": "rebound.example"}):
        first, *_ = ask(app_of(Http()), scope_of("websocket", "/ws", headers))
        assert (first["type"], first["status"]) == ("websocket.http.response.start", 403)


# --- JSON web tokens --------------------------------------------------------------------------------------------------


def principal(text: str, http: Http = HTTP) -> Principal:
    return Keyring(http).principal(f"Bearer {text}")


def refused(text: str, http: Http = HTTP) -> str:
    with pytest.raises(Unauthorized) as caught:
        principal(text, http)
    return str(caught.value)


def test_f105_a_json_web_token_carries_rights_and_limits() -> None:
    found = principal(signed(claims(sub="u5", scope="openid read publish", channels=["a"], where={"company_id": "7"})))
    assert found.scopes == {"read", "publish"}
    assert found.limits == Limits(frozenset({"a"}), {"company_id": "7"})
    assert found.name == "jwt:u5"
    assert found.expires_at is not None
    assert found.expires_at > time.time()
    assert principal(signed(claims(scope=["admin"]))).may("publish")
    assert principal(signed(claims(scope=None))).scopes == set()


@pytest.mark.parametrize(
    ("more", "error"),
    [
        ({"exp": None}, "the token is wrong"),
        ({"exp": 1}, "the token has expired"),
        ({"exp": int(time.time()) - 60}, "the token has expired"),
        ({"exp": "soon"}, "the token is wrong"),
        ({"exp": [1]}, "the token is wrong"),
        ({"exp": float("inf")}, "the token is wrong"),
        ({"nbf": int(time.time()) + 10**8}, "the token is wrong"),
        ({"aud": None}, "the token is wrong"),
        ({"aud": "other"}, "the token is wrong"),
        ({"iss": "other"}, "the token is wrong"),
        ({"scope": 5}, "the token's claims are not what is expected"),
        ({"channels": "orders"}, "the token's claims are not what is expected"),
        ({"channels": [1]}, "the token's claims are not what is expected"),
        ({"where": {"a": 1}}, "the token's claims are not what is expected"),
        ({"where": {}}, "the token's claims are not what is expected"),
        ({"where": [["a", "b"]]}, "the token's claims are not what is expected"),
        ({"scope": "admin", "channels": ["a"]}, "the token's claims contradict each other"),
    ],
)
def test_f105_claims_that_are_wrong_or_malformed(more: dict[str, Any], error: str) -> None:
    assert refused(signed(claims(**more))).startswith(error)


@pytest.mark.parametrize("claim", ["channels", "where"])
def test_f105_a_limit_of_null_is_no_limitlessness(claim: str) -> None:
    assert "not what is expected" in refused(signed({**claims(), claim: None}))


def test_f105_only_the_configured_algorithms_and_key() -> None:
    ours = rsa.generate_private_key(65537, 2048)
    public = ours.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    http = Http(jwt=JwtConfig(key=Token(public), algorithms=("RS256",), audience="cdc"))
    assert principal(signed(claims(), ours, "RS256"), http).may("read")
    assert refused(signed(claims(), ours, "RS512"), http)
    assert refused(signed(claims(), SECRET), http)
    forged = rsa.generate_private_key(65537, 2048)
    assert refused(signed(claims(), forged, "RS256", jwk={"kty": "RSA"}, x5u="http://evil.example"), http)
    for unsigned in (jwt.encode(claims(), "", "none"), signed(claims())[:-5], signed(claims(), SECRET[::-1])):
        assert refused(unsigned)
    assert refused(signed(claims(), SECRET * 2, "HS512"))


PARTS = st.text(st.characters(max_codepoint=255)) | st.binary().map(lambda part: base64url_encode(part).decode())


@given(parts=st.lists(PARTS, min_size=3, max_size=3))
def test_f105_nonsense_is_refused(parts: list[str]) -> None:
    assert refused(".".join(parts))


def test_f105_a_header_that_is_nested_without_end_is_refused() -> None:
    """It is read before its signature can be checked."""
    deep = base64url_encode(b'{"alg":' + b"[" * 5_000).decode()
    assert refused(f"{deep}.e30.AAAA")


# --- tickets ----------------------------------------------------------------------------------------------------------

SOMEBODY = Principal("somebody", frozenset({"read"}), Limits(frozenset({"orders"})), expires_at=1_100.0)


class Clock:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def tickets(clock: Clock) -> Tickets:
    return Tickets(clock)


def test_f105_a_ticket_works_once_on_its_issuers_behalf(tickets: Tickets) -> None:
    first, second = tickets.issue(SOMEBODY), tickets.issue(SOMEBODY)
    assert first != second
    assert len(first) >= 43  # 256 bits in base64
    assert tickets.redeem(first) is SOMEBODY
    for wrong in (first, "", "x", second[:-1]):
        with pytest.raises(Unauthorized):
            tickets.redeem(wrong)
    assert tickets.redeem(second) is SOMEBODY


def test_f105_a_ticket_expires(tickets: Tickets, clock: Clock) -> None:
    early, late = tickets.issue(SOMEBODY), tickets.issue(SOMEBODY)
    clock.now += LIFETIME_SECONDS - 1
    assert tickets.redeem(early)
    clock.now += 1
    with pytest.raises(Unauthorized):
        tickets.redeem(late)


def test_f105_a_ticket_does_not_outlive_its_token(tickets: Tickets, clock: Clock) -> None:
    clock.now = 1_090.0
    ticket = tickets.issue(SOMEBODY)
    clock.now = 1_100.0
    with pytest.raises(Unauthorized, match="the token that"):
        tickets.redeem(ticket)


def test_f105_a_ticket_does_not_outlive_the_removal_of_its_token() -> None:
    keyring, feed = Keyring(HTTP), MemoryFeed()
    app = create_app(FakeBackend(), HTTP, Feed(feed.reader(), feed.writer("@publish")), keyring)
    with TestClient(app, base_url=URL) as client:
        tickets = [
            client.post("/api/tickets", headers=who).json()["ticket"]
            for who in (bearer("reader"), bearer("admin"), {"Authorization": f"Bearer {jwt.encode(claims(), SECRET)}"})
        ]
        keyring.adopt(msgspec.structs.replace(HTTP, tokens=HTTP.tokens[1:]))
        assert client.get("/status", headers=bearer("reader")).status_code == 401
        opened = [client.get(f"/api/changes/stream?ticket={ticket}") for ticket in tickets]
        assert [answer.status_code for answer in opened] == [401, 503, 503]  # for who is let in nobody reads the feed


def test_f107_tickets_are_bounded(tickets: Tickets, clock: Clock) -> None:
    issued = [tickets.issue(SOMEBODY) for _ in range(MAX_OUTSTANDING_EACH)]
    with pytest.raises(TooMany):
        tickets.issue(SOMEBODY)
    tickets.redeem(issued[0])
    tickets.issue(SOMEBODY)
    for number in range(MAX_OUTSTANDING - MAX_OUTSTANDING_EACH):
        tickets.issue(Principal(f"p{number}", frozenset({"read"})))
    with pytest.raises(TooMany):
        tickets.issue(Principal("one more", frozenset({"read"})))
    clock.now += LIFETIME_SECONDS
    assert tickets.issue(SOMEBODY)


def test_f107_too_many_tickets_are_a_429(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tickets_module, "MAX_OUTSTANDING_EACH", 2)
    assert [client.post("/api/tickets", headers=bearer("reader")).status_code for _ in range(3)] == [201, 201, 429]
    assert client.post("/api/tickets", headers=bearer("admin")).status_code == 201


def test_f105_tickets_open_streams_and_nothing_else(client: TestClient) -> None:
    def ticket() -> str:
        answer = client.post("/api/tickets", headers=bearer("limited"))
        assert answer.json()["expiresIn"] == LIFETIME_SECONDS
        return str(answer.json()["ticket"])

    for path in ("/api/changes/poll", "/stats", "/status", "/publish"):
        assert client.get(f"{path}?ticket={ticket()}").status_code == 401
    given = ticket()
    with client.websocket_connect(f"/ws?ticket={given}") as websocket:
        assert websocket.receive_json()["type"] == "welcome"
    assert ask(app_of(), scope_of("websocket", "/ws", {"host": "x"}, f"ticket={given}".encode()))[0]["status"] == 401


@contextmanager
def capturing(tickets: Tickets) -> Iterator[tuple[TestClient, list[Principal]]]:
    """An application of one route that takes tickets, and on whose behalf it was called."""
    seen: list[Principal] = []
    (route,) = (route for route in app_of().routes if getattr(route, "path", "") == "/api/changes/stream")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope[PRINCIPAL])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})

    yield TestClient(Guard(app, [route], Keyring(HTTP), tickets), base_url=URL), seen


def test_f105_a_ticket_has_its_issuers_limits_and_a_token_goes_before_it(tickets: Tickets) -> None:
    with capturing(tickets) as (client, seen):
        ticket = tickets.issue(SOMEBODY)
        client.get("/api/changes/stream", params={"ticket": ticket}, headers=bearer("reader"))
        client.get("/api/changes/stream", params={"ticket": ticket})
        assert client.get("/api/changes/stream", params={"ticket": ticket}).status_code == 401
    assert [found.name for found in seen] == ["reader", "somebody"]
    assert seen[1] is SOMEBODY
