"""Parked changes as operators get at them: at the command line, and over HTTP."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

from tests.command import Cdc
from tests.processes import wait_until

SOON = "retry = { initial = 0.05, max = 0.1, attempts = 2 }"
TOKENS = """
    [[http.tokens]]
    name = "operator"
    token = "admin-token"
    scopes = ["admin"]
    [[http.tokens]]
    name = "reader"
    token = "reader-token"
    scopes = ["read"]
"""


def ask(cdc: Cdc, token: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
    """Ask the running daemon: the answer's status, and its JSON."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    request = urllib.request.Request((cdc.data_dir / "http").read_text() + path, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as exc:
        return exc.code, json.load(exc)


def mirror(cdc: Cdc) -> dict[str, Any]:
    """The running sink's status."""
    found = ask(cdc, "reader-token", "/status")[1]["sinks"]["mirror"]
    assert isinstance(found, dict)
    return found


def are_dead(cdc: Cdc, dead: int, parked: int) -> None:
    """Wait until so many changes are dead, of so many that are parked."""
    wait_until(
        lambda: (mirror(cdc)["dead"], mirror(cdc)["parked"]) == (dead, parked),
        timeout_seconds=60,
        what=lambda: f"{dead} of {parked} to be dead: {mirror(cdc)}\n{cdc.log[-3000:]}",
    )


def none_is_parked(cdc: Cdc) -> None:
    """Wait until the sink runs, and nothing is parked."""
    wait_until(
        lambda: mirror(cdc)["state"] == "running" and not mirror(cdc)["parked"],
        timeout_seconds=60,
        what=lambda: f"nothing to be parked: {mirror(cdc)}\n{cdc.log[-3000:]}",
    )


def assert_for_admins_only(cdc: Cdc, letter: str) -> None:
    """Whoever may only read the status sees no parked change, and changes none."""
    for path, body in (("", None), (f"/{letter}", None), ("/retry", {"ids": None}), ("/discard", {"ids": [letter]})):
        assert ask(cdc, "reader-token", f"/api/dead-letters{path}", body)[0] == 403
        assert ask(cdc, "nobody's", f"/api/dead-letters{path}", body)[0] == 401
    assert ask(cdc, "admin-token", f"/api/dead-letters/{letter}")[1]["id"] == letter


def letters(cdc: Cdc, *arguments: str) -> list[dict[str, Any]]:
    """What `cdc dead-letters list` finds."""
    result = cdc("dead-letters", "list", "--json", *arguments)
    assert result.stdout, result.stderr
    found = json.loads(result.stdout)
    assert isinstance(found, list)
    return found


def fates(cdc: Cdc, *arguments: str) -> tuple[int, list[str]]:
    """The exit code, and what became of each change that was retried or discarded."""
    result = cdc("dead-letters", *arguments, "--json")
    assert result.stdout, result.stderr
    return result.returncode, [each["fate"] for each in json.loads(result.stdout)["outcomes"]]
