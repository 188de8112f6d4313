"""The HTTP interface, over the real application and a backend that remembers what it was asked."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from cdc import logs
from cdc.api.app import create_app
from cdc.api.backend import UnknownName
from cdc.api.requests import MAX_BODY_BYTES
from cdc.api.traced import Traced
from cdc.config import LogLevel
from cdc.dead_letters import Office
from cdc.errors import CdcError, TransientError
from cdc.http_config import Http, TokenConfig
from cdc.letter import DeadLetters
from cdc.metrics import APPLY_SECONDS
from cdc.position import SourcePosition, parse_lsn
from cdc.secret import Token
from cdc.stats import CaptureStats, CopyStatus, DeliveryStats, SlotStats, State
from cdc.status import DaemonStatus, from_json, snapshot
from cdc.steering import Ordered, Replayed
from tests.unit.test_status import queue_stats

LOCAL = "http://127.0.0.1:8642"


class FakeBackend:
    def __init__(self) -> None:
        self.capture = CaptureStats("shop", State.RUNNING, received=50, server_end=150, confirmed=100)
        self.capture.slot = SlotStats("cdc_shop", True, "reserved", 4096, None)
        self.delivery = DeliveryStats("mirror", "shop", State.RUNNING, position=20, seq=3)
        self.dead_letters: DeadLetters = Office(dict)
        self.calls: list[tuple[Any, ...]] = []
        self.error: Exception | None = None

    def status(self) -> DaemonStatus:
        return snapshot(
            version="1",
            started_at=1.0,
            sources=[(self.capture, queue_stats(last_seq=9))],
            sinks=[self.delivery],
            now=2.0,
        )

    def set_log_level(self, level: LogLevel) -> None:
        self._call("set_log_level", level)

    def pause(self, name: str) -> None:
        self._call("pause", name)

    def resume(self, name: str) -> None:
        self._call("resume", name)

    def hold(self, name: str, until: SourcePosition | None, seconds: float) -> SourcePosition:
        self._call("hold", name, until, seconds)
        return 15 if until is None else until

    def resync(self, name: str, tables: Sequence[str], *, yes: bool) -> Ordered:
        self._call("resync", name, tuple(tables), yes)
        return Ordered((name,))

    def replay(self, name: str, since: str, *, dry_run: bool) -> Replayed:
        self._call("replay", name, since, dry_run)
        return Replayed(7, 3)

    def release(self, name: str) -> None:
        self._call("release", name)

    def _call(self, *call: Any) -> None:
        self.calls.append(call)
        if self.error is not None:
            raise self.error


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def client(backend: FakeBackend) -> Iterator[TestClient]:
    with TestClient(create_app(backend), base_url=LOCAL, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def guarded(backend: FakeBackend) -> Iterator[TestClient]:
    http = Http(tokens=(TokenConfig(name="ops", token=Token("open-sesame"), scopes=("admin",)),))
    with TestClient(create_app(backend, http), base_url="http://cdc.example:8642") as client:
        yield client


def metrics_of(client: TestClient) -> dict[tuple[str, ...], float]:
    """Values by metric name and label values, these in the order of the labels' names."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def test_health_and_ready(client: TestClient, backend: FakeBackend) -> None:
    assert client.get("/health").status_code == 200
    assert client.get("/ready").status_code == 200
    backend.capture.state = State.WAITING
    answer = client.get("/ready")
    assert (answer.status_code, answer.json()) == (503, {"ready": False, "sources": {"shop": "waiting"}})
    assert client.get("/health").status_code == 200


def test_status_is_the_snapshot(client: TestClient, backend: FakeBackend) -> None:
    answer = client.get("/status")
    assert answer.headers["content-type"] == "application/json"
    assert from_json(answer.content) == backend.status()


def test_metrics_say_what_status_says(client: TestClient, backend: FakeBackend) -> None:
    backend.capture.changes["insert"] = 5
    backend.delivery.changes["delete"] = 2
    backend.delivery.parked_attempts, backend.delivery.discarded = 4, 3
    backend.delivery.copy = lambda: CopyStatus(1, 3, 10, 30, 100, 300)
    APPLY_SECONDS.labels("mirror").observe(0.02)
    found = metrics_of(client)
    assert found["cdc_captured_changes_total", "insert", "shop"] == 5
    assert found["cdc_applied_changes_total", "delete", "mirror"] == 2
    assert found["cdc_source_lag_bytes", "shop"] == 50
    assert found["cdc_sink_lag_bytes", "mirror"] == 130
    assert found["cdc_queue_oldest_age_seconds", "shop"] == 1.5
    assert found["cdc_slot_retained_bytes", "cdc_shop", "shop"] == 4096
    assert found["cdc_copy_rows_expected", "mirror"] == 30
    assert found["cdc_apply_seconds_count", "mirror"] >= 1
    assert (found["cdc_parked_attempts_total", "mirror"], found["cdc_discarded_changes_total", "mirror"]) == (4, 3)
    assert found["process_resident_memory_bytes",] > 0


def test_unknown_values_are_left_out(client: TestClient) -> None:
    """A slot without a limit has no safe bytes: neither 0 nor NaN."""
    assert not any(name == "cdc_slot_safe_bytes" for name, *_ in metrics_of(client))


def test_states_are_one_hot(client: TestClient, backend: FakeBackend) -> None:
    backend.delivery.state = State.COPYING
    hot = {key[2] for key, value in metrics_of(client).items() if key[0] == "cdc_sink_state" and value == 1}
    cold = {key[2] for key, value in metrics_of(client).items() if key[0] == "cdc_sink_state" and value == 0}
    assert hot == {"copying"}
    assert cold == set(State) - {"copying"}


def test_f108_metrics_do_not_grow_with_use(client: TestClient, backend: FakeBackend) -> None:
    before = set(metrics_of(client))
    for number in range(200):
        client.get("/status")
        client.post(f"/pause/nobody{number}")
        client.get(f"/nothing/{number}")
    assert set(metrics_of(client)) == before


def test_openmetrics_where_asked_for(client: TestClient) -> None:
    answer = client.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert answer.text.endswith("# EOF\n")


@pytest.mark.parametrize(("sent", "kept"), [("proxy-7", True), ("two words", False), ("x" * 65, False), (None, False)])
def test_a_request_has_an_id_in_its_answer_and_in_the_log(backend: FakeBackend, sent: str | None, kept: bool) -> None:
    stream = io.StringIO()
    logs.configure("json", stream=stream)
    backend.error = RuntimeError("broken")
    client = TestClient(Traced(create_app(backend)), base_url=LOCAL, raise_server_exceptions=False)
    answer = client.post("/pause/shop", headers={} if sent is None else {"X-Request-ID": sent})
    assert answer.status_code == 500
    given = answer.headers["X-Request-ID"]
    assert given == sent if kept else len(given) == 16
    (line,) = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert (line["event"], line["request_id"]) == ("request failed", given)


def test_pause_and_resume(client: TestClient, backend: FakeBackend) -> None:
    assert client.post("/pause/shop").json() == {"paused": True}
    assert client.post("/resume/shop").json() == {"paused": False}
    assert client.post("/log-level", json={"level": "debug"}).json() == {"level": "debug"}
    assert client.post("/log-level", json={"level": "loud"}).status_code == 400
    assert backend.calls == [("pause", "shop"), ("resume", "shop"), ("set_log_level", "debug")]


def test_hold_and_release(client: TestClient, backend: FakeBackend) -> None:
    answer = client.post("/sinks/mirror/hold", json={"until": "16/B374D848", "seconds": 5})
    assert (answer.status_code, answer.json()) == (200, {"held": True, "position": "16/B374D848"})
    assert client.post("/sinks/mirror/release").status_code == 200
    assert backend.calls == [("hold", "mirror", parse_lsn("16/B374D848"), 5.0), ("release", "mirror")]


def test_hold_where_it_stands(client: TestClient, backend: FakeBackend) -> None:
    answer = client.post("/sinks/mirror/hold", json={"until": None})
    assert answer.json() == {"held": True, "position": "0/F"}
    assert backend.calls == [("hold", "mirror", None, 60.0)]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"16/0"',
        b"{}",
        b'{"until": 5}',
        b'{"until": "16/0", "seconds": 0}',
        b'{"until": "16/0", "seconds": 1e9}',
        b'{"until": "16/0", "secs": 1}',
        b'{"until": "not a position"}',
        b"\xff\xfe",
        b'{"until": "\xff"}',
        b"[" * 60_000,
    ],
)
def test_bad_body_is_a_400_that_says_why(client: TestClient, backend: FakeBackend, body: bytes) -> None:
    answer = client.post("/sinks/mirror/hold", content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]
    assert backend.calls == []


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UnknownName("no sink is called 'mirror'", hint="one of: a"), 404),
        (CdcError("the sink is past that position", hint="take a later one"), 409),
        (TransientError("the sink did not come that far"), 503),
        (ZeroDivisionError("secret row value"), 500),
    ],
)
def test_errors_are_json_with_the_right_status(
    client: TestClient, backend: FakeBackend, error: Exception, status: int
) -> None:
    backend.error = error
    answer = client.post("/sinks/mirror/hold", json={"until": "0/1"})
    assert answer.status_code == status
    assert set(answer.json()) == {"error", "hint"}
    assert "secret" not in answer.text


def test_unknown_path_and_method_are_json_too(client: TestClient) -> None:
    assert (client.get("/nothing").status_code, set(client.get("/nothing").json())) == (404, {"error", "hint"})
    wrong = client.get("/pause/shop")
    assert (wrong.status_code, wrong.headers["allow"], set(wrong.json())) == (405, "POST", {"error", "hint"})


def test_large_body_is_refused_before_it_is_held_in_memory(client: TestClient, backend: FakeBackend) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(1000):
            sent += 1
            yield b" " * (MAX_BODY_BYTES // 4)

    assert client.post("/sinks/mirror/hold", content=b" " * MAX_BODY_BYTES + b" ").status_code == 413
    assert client.post("/sinks/mirror/hold", content=endless()).status_code == 413
    assert backend.calls == []


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:9999", "http://[", "x"])
def test_web_page_of_another_origin_cannot_control(client: TestClient, backend: FakeBackend, origin: str) -> None:
    assert client.post("/pause/shop", headers={"Origin": origin}).status_code == 403
    assert backend.calls == []


def test_page_of_the_daemon_itself_can(client: TestClient, backend: FakeBackend) -> None:
    assert client.post("/pause/shop", headers={"Origin": LOCAL}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example:8642", "localhost.evil.example", "", "[::1"])
def test_rebound_dns_name_reaches_nothing(client: TestClient, host: str) -> None:
    assert client.get("/status", headers={"Host": host}).status_code == 403


@pytest.mark.parametrize("host", ["localhost:8642", "127.0.0.1", "[::1]:8642"])
def test_local_names_are_served(client: TestClient, host: str) -> None:
    assert client.get("/status", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("path", ["/ready", "/status", "/metrics", "/nothing", "/health/", "//health"])
def test_token_guards_everything(guarded: TestClient, path: str) -> None:
    url = f"{LOCAL}{path}"  # in full: //health alone would be a host's name
    assert guarded.get(url).status_code == 401
    assert guarded.get(url, headers={"Authorization": "Bearer wrong"}).status_code == 401
    assert guarded.get(url, headers={"Authorization": "Basic open-sesame"}).status_code == 401
    assert guarded.get(url, headers={"Authorization": "Bearer \xff".encode("latin-1")}).status_code == 401
    assert guarded.get(url, headers={"Authorization": "Bearer open-sesame"}).status_code != 401


def test_token_guards_control_but_not_health(guarded: TestClient, backend: FakeBackend) -> None:
    assert guarded.post("/pause/shop").status_code == 401
    assert guarded.get("/health").status_code == 200
    assert backend.calls == []
