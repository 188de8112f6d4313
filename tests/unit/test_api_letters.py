"""Parked changes over HTTP: the real application, on a real queue that holds a few."""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bson
import pytest
import structlog
from starlette.testclient import TestClient

from cdc.api.app import create_app
from cdc.change import INSERT, UPDATE, Batch, Change, Delta, Table, Transaction
from cdc.dead_letters import Box, Office
from cdc.http_config import Http, TokenConfig
from cdc.queue import Queue
from cdc.queue.parked import ParkedChange, payload_of
from cdc.secret import Token
from cdc.stats import DeliveryStats
from tests.unit.test_api import FakeBackend

ORDERS = Table("shop", "orders", (), "")
AUTHORIZATION = {"Authorization": "Bearer open-sesame"}


def document(key: str, **fields: Any) -> bytes:
    return bson.encode({"_id": key, **fields})


def parked(seq: int, change: Change, **facts: Any) -> tuple[ParkedChange, bytes]:
    token = b"%d" % seq
    batch = Batch((ORDERS,), [Transaction(token, token, 1_700_000_000_123_456, 0, 0, True, [change])], token, 0)
    payload = payload_of(batch)
    row = ParkedChange(
        place=seq, ordinal=0, position=token, tables=(ORDERS.qualified,), keys=(change.key or b"",), size=len(payload),
        created_at=1_700_000_001.0, **facts,
    )  # fmt: skip
    return row, payload


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[Queue]:
    found = poisoned(tmp_path)
    yield found
    found.close()


def poisoned(directory: Path) -> Queue:
    """Of `mirror`: a dead change, one behind it, and one that is tried again."""
    found = Queue(directory / "shop.queue", max_bytes=10**9, min_free_bytes=0)
    found.begin(b"begin")
    found.register("mirror")
    poison = Change(INSERT, 0, document("poison"), None, document("poison", n=1))
    delta = Delta(bson.encode({"updatedFields": {"n": 2.0}}))
    behind = Change(UPDATE, 0, document("poison"), None, None, delta)
    other = Change(INSERT, 0, document("other"), None, document("other", n=1))
    rows = [
        parked(1, poison, state="dead", attempts=20, error="E11000"),
        parked(2, behind),
        parked(3, other, attempts=2, next_attempt_at=1_700_000_060.0, error="E11000"),
    ]
    found.park("mirror", rows)
    found.advance("mirror", 3, b"3")
    return found


@pytest.fixture
def stats() -> DeliveryStats:
    return DeliveryStats("mirror", "shop")


@pytest.fixture
def client(queue: Queue, stats: DeliveryStats) -> Iterator[TestClient]:
    backend = FakeBackend()
    backend.dead_letters = Office(lambda: {"mirror": Box("mirror", "mongodb", queue, queue, None, stats)})
    http = Http(tokens=(TokenConfig(name="ops", token=Token("open-sesame"), scopes=("admin",)),))
    with TestClient(create_app(backend, http), base_url="http://cdc.example", headers=AUTHORIZATION) as found:
        yield found


def test_f89_what_is_parked_is_listed(client: TestClient) -> None:
    page = client.get("/api/dead-letters").json()
    assert not page["hasMore"]
    dead, waiting, retrying = page["letters"]
    assert dead == {
        "id": "mirror:1.0", "sink": "mirror", "state": "dead", "behind": None, "tables": ["shop.orders"],
        "operation": "insert", "key": {"_id": "poison"}, "error": "E11000", "attempts": 20, "nextAttemptAt": None,
        "parkedAt": "2023-11-14T22:13:21Z", "size": dead["size"],
    }  # fmt: skip
    assert (waiting["state"], waiting["behind"], waiting["attempts"]) == ("waiting", "mirror:1.0", 0)
    assert (retrying["state"], retrying["nextAttemptAt"]) == ("retrying", "2023-11-14T22:14:20Z")


def test_pages_and_filters(client: TestClient) -> None:
    found: list[str] = []
    for _ in range(3):
        after = {"after": found[-1]} if found else {}
        page = client.get("/api/dead-letters", params={"limit": 1, "sink": "mirror", **after}).json()
        found += [each["id"] for each in page["letters"]]
        assert page["hasMore"] == (len(found) < 3)
    assert found == ["mirror:1.0", "mirror:2.0", "mirror:3.0"]
    chosen = client.get("/api/dead-letters", params={"state": "dead,retrying"}).json()["letters"]
    assert [each["id"] for each in chosen] == ["mirror:1.0", "mirror:3.0"]


def test_one_is_shown_with_all_that_it_holds(client: TestClient, queue: Queue) -> None:
    found = client.get("/api/dead-letters/mirror:2.0").json()
    contents = found["contents"]
    assert contents["change"] == {"delta": {"updatedFields": {"n": {"$numberDouble": "2.0"}}}}
    assert (contents["position"], contents["committedAt"]) == ("32", "2023-11-14T22:13:20.123456Z")
    assert b64decode(contents["stored"]) == payload_of(*queue.parked_batches("mirror", [(2, 0)]))
    full = client.get("/api/dead-letters", params={"full": "true"}).json()["letters"]
    assert full[1] == found
    assert "n" in full[0]["contents"]["change"]["after"]


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/api/dead-letters/mirror:9.0", 404),
        ("/api/dead-letters/nobody:1.0", 404),
        ("/api/dead-letters/everything", 404),
        ("/api/dead-letters?sink=nobody", 404),
        ("/api/dead-letters?state=alive", 400),
        ("/api/dead-letters?limit=0", 400),
        ("/api/dead-letters?limit=5000", 400),
        ("/api/dead-letters?after=x", 400),
    ],
)
def test_what_is_not_there_or_not_understood(client: TestClient, path: str, status: int) -> None:
    answer = client.get(path)
    assert (answer.status_code, set(answer.json())) == (status, {"error", "hint"})


def test_f89_retry(client: TestClient, queue: Queue) -> None:
    answer = client.post("/api/dead-letters/retry", json={"ids": ["mirror:1.0", "mirror:2.0", "mirror:7.0"]})
    assert [(each["id"], each["fate"]) for each in answer.json()["outcomes"]] == [
        ("mirror:1.0", "due"),
        ("mirror:2.0", "waiting"),
        ("mirror:7.0", "unknown"),
    ]
    assert [(row.state, row.attempts) for row in queue.parked("mirror")] == [("retrying", 0)] * 2 + [("retrying", 2)]
    for body in ({"ids": None}, {"ids": None, "sink": "mirror"}):
        answer = client.post("/api/dead-letters/retry", json=body)
        assert [(each["id"], each["fate"]) for each in answer.json()["outcomes"]] == [
            ("mirror:1.0", "due"),
            ("mirror:3.0", "due"),
        ], "and the other one follows by itself"
    assert client.post("/api/dead-letters/retry", json={"ids": None, "sink": "nobody"}).status_code == 404


def test_f89_discard(client: TestClient, queue: Queue, stats: DeliveryStats) -> None:
    body = {"ids": ["mirror:1.0"], "reason": "a mistake", "by": "ann"}
    with structlog.testing.capture_logs() as logs:
        answer = client.post("/api/dead-letters/discard", json=body)
    assert answer.json() == {"outcomes": [{"id": "mirror:1.0", "fate": "discarded", "reason": ""}]}
    assert [row.id for row in queue.parked("mirror")] == [(2, 0), (3, 0)]
    assert stats.discarded == 1
    told = str(logs)
    assert "ann (ops)" in told
    assert "a mistake" in told
    assert "poison" not in told, "no values"


@pytest.mark.parametrize(
    ("action", "body"),
    [
        ("retry", {}),
        ("retry", {"ids": None, "all": True}),
        ("retry", {"ids": ["x"]}),
        ("discard", {"ids": ["mirror:1.0"]}),
        ("discard", {"ids": ["mirror:1.0"], "reason": ""}),
        ("discard", {"ids": "mirror:1.0", "reason": "x"}),
        ("discard", {"all": True, "reason": "x"}),
    ],
)
def test_bad_wishes_change_nothing(client: TestClient, queue: Queue, action: str, body: dict[str, Any]) -> None:
    before = queue.parked("mirror")
    answer = client.post(f"/api/dead-letters/{action}", json=body)
    assert answer.status_code == 400
    assert queue.parked("mirror") == before
