"""The page's routes: its files with their headers, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from cdc import __version__
from cdc.api.app import create_app
from cdc.api.feed import Feed
from cdc.api.page import STATIC
from cdc.feed.place import Place
from cdc.http_config import Http, TokenConfig
from cdc.secret import Token

FILES = sorted(file.relative_to(STATIC).as_posix() for file in STATIC.rglob("*") if file.is_file())


@pytest.fixture
def client() -> Iterator[TestClient]:
    """Without a token, of a service that wants one."""
    token = TokenConfig(name="test", token=Token("a-secret-of-the-tests"), scopes=("admin",))
    with TestClient(create_app(http=Http(tokens=(token,)))) as client:
        yield client


def test_browsers_get_the_page_and_programs_what_the_service_is(client: TestClient) -> None:
    page = client.get("/", headers={"accept": "text/html,application/xhtml+xml,application/json;q=0.1"})
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    info = client.get("/", headers={"accept": "application/json"}).json()
    assert (info["service"], info["version"]) == ("cdc", __version__)
    assert info["endpoints"] == ["/health", "/metrics", "/openapi.json", "/api/tickets"]


def test_a_gateway_names_no_endpoint_of_a_daemon(tmp_path: Path) -> None:
    app = create_app(feed=Feed.at(Place(None, tmp_path)))
    named = TestClient(app, base_url="http://localhost").get("/", headers={"accept": "application/json"}).json()
    assert {"/api/changes/poll", "/api/changes/{entityType}/{entityId}", "/ws"} <= set(named["endpoints"])
    assert "/status" not in named["endpoints"]


@pytest.mark.parametrize(
    ("file", "media_type"),
    [
        ("cdc-client.js", "text/javascript"),
        ("cdc-client.d.ts", "text/plain"),
        ("page.css", "text/css"),
        ("favicon.svg", "image/svg+xml"),
        ("vendor/uplot.min.js", "text/javascript"),
        ("vendor/uplot.LICENSE", "text/plain"),
    ],
)
def test_files_have_their_media_types(client: TestClient, file: str, media_type: str) -> None:
    answer = client.get(f"/static/{file}")
    assert answer.content == (STATIC / file).read_bytes()
    assert answer.headers["content-type"].partition(";")[0] == media_type
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("file", FILES)
def test_every_file_is_served_and_asked_for_again_by_its_etag(client: TestClient, file: str) -> None:
    first = client.get(f"/static/{file}")
    assert first.status_code == 200
    again = client.get(f"/static/{file}", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize("file", FILES)
def test_a_strict_policy_comes_with_every_file_and_no_script_is_inline(client: TestClient, file: str) -> None:
    policy = client.get(f"/static/{file}").headers["content-security-policy"]
    assert "default-src 'none'; script-src 'self'" in policy
    assert "unsafe" not in policy


@pytest.mark.parametrize(
    "path",
    [
        "../page.py",
        "..%2fpage.py",
        "%2e%2e/page.py",
        "vendor/../../page.py",
        "/etc/passwd",
        "//etc/passwd",
        "",
        "vendor",
    ],
)
def test_f107_tricky_paths_lead_nowhere(client: TestClient, path: str) -> None:
    assert client.get(f"/static/{path}").status_code in {401, 404}
