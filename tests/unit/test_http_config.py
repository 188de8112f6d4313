"""`[http]`: addresses, tokens and the keys of JSON web tokens, and what is refused before anybody listens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from cdc.config_file import parse
from cdc.errors import ConfigError
from cdc.feed.visibility import Limits
from cdc.http_config import Http
from cdc.secret import Token

SECRET = "0123456789abcdef0123456789abcdef"


def http(section: dict[str, Any], **environment: str) -> Http:
    raw = {"sources": {"shop": {"url": "postgresql://db/shop"}}, "http": section}
    return parse(raw, environment).http


def refusal(section: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        http(section)
    assert caught.value.hint
    return str(caught.value)


def token(name: str = "ops", **options: Any) -> dict[str, Any]:
    return {"name": name, "token": f"{name}-secret", "scopes": ["read"], **options}


@pytest.mark.parametrize("address", ["0.0.0.0:8642", "[::]:8642", "10.0.0.7:80", "cdc.example:8642"])
def test_f105_address_that_others_reach_demands_a_token(address: str) -> None:
    assert refusal({"address": address}).endswith("and there are no tokens")
    assert http({"address": address, "tokens": [token()]}).address == address
    assert http({"address": address, "jwt": {"key": SECRET, "algorithms": ["HS256"]}}).guarded


@pytest.mark.parametrize(
    ("address", "parts"),
    [("127.0.0.1:0", ("127.0.0.1", 0)), ("[::1]:8642", ("::1", 8642)), ("localhost:80", ("localhost", 80))],
)
def test_loopback_needs_none(address: str, parts: tuple[str, int]) -> None:
    found = http({"address": address})
    assert (found.host_and_port, found.guarded, found.admin_token) == (parts, False, None)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"address": "nowhere"}, "http.address: 'nowhere' is not host:port"),
        ({"address": "127.0.0.1:99999"}, "http.address: '127.0.0.1:99999' is not host:port"),
        ({"origin": []}, "http: Object contains unknown field `origin`"),
        ({"origins": ["*"]}, "http.origins: '*' is no origin"),
        ({"origins": ["https://app.example/"]}, "http.origins: 'https://app.example/' is no origin"),
        ({"origins": ["https://App.example"]}, "http.origins: 'https://App.example' is no origin"),
        ({"tokens": [token(token="")]}, "http.tokens[0].token: empty"),
        ({"tokens": [token(token="open sesame")]}, "http.tokens[0].token: has a space"),
        ({"tokens": [token(token="sésame")]}, "http.tokens[0].token: has a space or a character beyond ASCII"),
        ({"tokens": [token(token_file="/x")]}, "http.tokens[0].token: excludes token_file"),
        ({"tokens": [{"name": "a", "scopes": ["read"]}]}, "http.tokens[0].token: missing"),
        ({"tokens": [token(scopes=[])]}, "http.tokens[0].scopes: Expected `array` of length >= 1"),
        ({"tokens": [token(scopes=["write"])]}, "http.tokens[0].scopes[0]: Invalid enum value 'write'"),
        ({"tokens": [token(channels=[])]}, "http.tokens[0].channels: Expected `array` of length >= 1"),
        ({"tokens": [token(where={})]}, "http.tokens[0].where: Expected `object` of length >= 1"),
        ({"tokens": [token(where={"a": 1})]}, "http.tokens[0].where.a: Expected `str`, got `int`"),
        ({"tokens": [token("a"), token("a")]}, "http.tokens[1].name: the same as that of http.tokens[0]"),
        ({"tokens": [token("a", token="x"), token("b", token="x")]}, "http.tokens[1].token: the same as"),
        ({"tokens": [token(scopes=["admin"], channels=["a"])]}, "http.tokens[0]: admin may do everything, and has"),
        ({"jwt": {"algorithms": ["HS256"]}}, "http.jwt.key: missing"),
        ({"jwt": {"key": SECRET, "algorithms": []}}, "http.jwt.algorithms: Expected `array` of length >= 1"),
        ({"jwt": {"key": SECRET, "algorithms": ["none"]}}, "http.jwt.algorithms[0]: Invalid enum value 'none'"),
        ({"jwt": {"key": "short", "algorithms": ["HS256"]}}, "http.jwt.key: shorter than the 32 bytes of HS256"),
        ({"jwt": {"key": SECRET, "algorithms": ["RS256"]}}, "http.jwt.key: does not fit RS256"),
    ],
)
def test_f112_errors_name_key_and_reason(section: dict[str, Any], message: str) -> None:
    assert refusal(section).startswith(message)


def pem(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> tuple[str, str]:
    """The private and the public key."""
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return private.decode(), public.decode()


def test_f105_keys_fit_their_algorithms() -> None:
    """Whoever knows a public key must not be able to sign with it as if it were a secret."""
    rsa_private, rsa_public = pem(rsa.generate_private_key(65537, 2048))
    _, p256 = pem(ec.generate_private_key(ec.SECP256R1()))
    assert http({"jwt": {"key": rsa_public, "algorithms": ["RS256", "RS512"]}}).guarded
    assert http({"jwt": {"key": p256, "algorithms": ["ES256"]}}).guarded
    assert refusal({"jwt": {"key": rsa_public, "algorithms": ["RS256", "HS256"]}}) == "http.jwt.key: does not fit HS256"
    assert refusal({"jwt": {"key": p256, "algorithms": ["RS256"]}}) == "http.jwt.key: does not fit RS256"
    assert refusal({"jwt": {"key": p256, "algorithms": ["ES384"]}}) == "http.jwt.key: does not fit ES384"
    assert refusal({"jwt": {"key": rsa_private, "algorithms": ["RS256"]}}) == "http.jwt.key: a private key"


def test_f113_secrets_from_environment_and_files_do_not_show(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("geheim-in-file\n")
    (tmp_path / "key").write_text(f"{SECRET}\n")
    found = http(
        {
            "tokens": [
                token("a", token="${OURS}"),
                {"name": "b", "token_file": f"{tmp_path}/token", "scopes": ["read"]},
            ],
            "jwt": {"key_file": f"{tmp_path}/key", "algorithms": ["HS256"]},
        },
        OURS="geheim-in-environment",
    )
    assert [entry.token for entry in found.tokens] == [Token("geheim-in-environment"), Token("geheim-in-file")]
    assert found.jwt is not None
    assert found.jwt.key == Token(SECRET)
    assert "geheim" not in repr(found)
    assert SECRET not in repr(found)


def test_what_a_file_holds_is_named_by_the_file(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("short\n")
    assert refusal({"jwt": {"key_file": f"{tmp_path}/key", "algorithms": ["HS256"]}}) == (
        f"http.jwt.key_file: {tmp_path}/key: shorter than the 32 bytes of HS256"
    )


def test_f113_errors_do_not_quote_secrets() -> None:
    assert "geheim" not in refusal({"tokens": [token("a", token="ge heim"), token("b", token="geheim ")]})
    assert "geheim" not in refusal({"jwt": {"key": "geheim", "algorithms": ["HS256"]}})
    assert "geheim" not in refusal({"tokens": [token("a", token="geheim"), token("b", token="geheim")]})


def test_the_command_line_uses_the_first_admin() -> None:
    entries = [token("a"), token("b", scopes=["publish", "admin"]), token("c", scopes=["admin"])]
    assert http({"tokens": entries}).admin_token == Token("b-secret")
    assert http({"tokens": entries[:1]}).admin_token is None


def test_limits() -> None:
    found = http({"tokens": [token("a"), token("b", channels=["x"], where={"company_id": "7"})]})
    assert [entry.limits for entry in found.tokens] == [Limits(), Limits(frozenset({"x"}), {"company_id": "7"})]
