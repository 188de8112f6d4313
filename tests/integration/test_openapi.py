"""The published description is right: requests made from it, and to break it, find nothing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cdc.api.feed import Feed
from cdc.feed.place import Place, writer
from cdc.http_config import Http, TokenConfig
from cdc.secret import Token
from tests.gateway import Gateway, Source, record
from tests.unit.test_api import FakeBackend

HTTP = Http(tokens=(TokenConfig(name="admin", token=Token("admin-token"), scopes=("admin",)),))

SETTINGS = """
[checks.positive_data_acceptance]
expected-statuses = ["2xx", 404, 410, 503]

[[operations]]
include-path = "/api/changes/stream"
enabled = false  # it never ends

[[operations]]
include-path = "/api/changes/poll"
parameters = { wait = 0 }  # or it would wait for nothing
"""


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    """A feed in which something has happened, beside a daemon."""
    place = Place(None, tmp_path)
    source = Source(writer(place, "shop"))
    for number in range(20):
        source.commit(record("orders", number % 5, number), record("clients", number, location_id="north"))
    with Gateway(Feed.at(place), HTTP, backend=FakeBackend()) as gateway:
        yield gateway
    source.close()


def test_requests_made_from_the_description_find_nothing(gateway: Gateway, tmp_path: Path) -> None:
    """Each operation with what it says it takes, and what it does not; answers are as described, and never a 500."""
    (tmp_path / "schemathesis.toml").write_text(SETTINGS)
    command = [
        str(Path(sys.executable).with_name("schemathesis")), "run", f"{gateway.url}/openapi.json",
        "--header", "Authorization: Bearer admin-token", "--checks", "all", "--phases", "examples,coverage,fuzzing",
        "--max-examples", "15", "--seed", "1", "--generation-deterministic",
        "--no-color", "--suppress-health-check", "all", "--continue-on-failure",
    ]  # fmt: skip
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=200)
    assert result.returncode == 0, result.stdout[-20_000:] + result.stderr
