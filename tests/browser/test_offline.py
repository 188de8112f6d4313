"""The offline queue of `cdc-client.js`: operations arrive in order, again only with the same key, from one tab."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from playwright.sync_api import BrowserContext, Page

from tests.browser.conftest import blank
from tests.browser.service import Line, Service
from tests.processes import wait_until

START = """async (options) => {
    const { OfflineQueue } = await import("/static/cdc-client.js");
    window.sent = []; window.failed = []; window.errors = []; window.stats = [];
    window.queue = new OfflineQueue({ minDelayMs: 20, maxDelayMs: 100, ...options });
    queue.onSent(({ operation }) => void sent.push(operation.data));
    queue.onFailed((operation) => void failed.push([operation.data, operation.httpStatus]));
    queue.onError((error) => void errors.push(`${error}`));
    queue.onChange((found) => void stats.push(found));
}"""

COUNT_LOOKS_AT_LEASE = """() => {
    const { getItem } = Storage.prototype;
    window.looks = 0;
    Storage.prototype.getItem = function (key) {
        looks += key.endsWith(".lease");
        return getItem.call(this, key);
    };
}"""


class Backend:
    """An application's server, of another origin. It remembers what it got.

    answers: what to answer to an operation's data, one after the other; then 200. busy: how many requests are at work.
    """

    def __init__(self) -> None:
        self.got: list[tuple[str, Any]] = []
        self.methods: list[str] = []
        self.answers: dict[int, list[tuple[int, dict[str, str]]]] = {}
        self.busy = self.busiest = 0
        self.hold = threading.Event()
        self.hold.set()
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.hold.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def data(self) -> list[Any]:
        return [data for _, data in self.got]


def _handler(backend: Backend) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_OPTIONS(self) -> None:
            self._answer(204, {})

        def do_POST(self) -> None:
            data = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with backend.lock:
                backend.got.append((self.headers["Idempotency-Key"], data))
                backend.methods.append(self.command)
                backend.busy += 1
                backend.busiest = max(backend.busiest, backend.busy)
                status, headers = (backend.answers.get(data) or [(200, {})]).pop(0)
            backend.hold.wait(30)
            with backend.lock:
                backend.busy -= 1
            self._answer(status, headers)

        do_PUT = do_POST  # noqa: N815 - as http.server calls it

        def _answer(self, status: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            cors = {"Origin": "*", "Headers": "*, Idempotency-Key, Content-Type", "Methods": "*"}
            for name, value in {**{f"Access-Control-Allow-{key}": text for key, text in cors.items()}}.items():
                self.send_header(name, value)
            self.send_header("Access-Control-Expose-Headers", "Retry-After")
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    return Handler


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One for all: pages come from it, and what they send goes to the backend; only the last test writes to it."""
    service = Service(tmp_path_factory.mktemp("service"))
    service.start()
    yield service
    service.close()


@pytest.fixture
def backend() -> Iterator[Backend]:
    backend = Backend()
    yield backend
    backend.close()


def start(page: Page, backend: Backend, **options: Any) -> None:
    page.evaluate(START, {"baseUrl": backend.url, **options})


def put(page: Page, *numbers: int) -> None:
    for number in numbers:
        page.evaluate("(data) => queue.queueOperation({ resource: 'orders', action: 'create', data })", number)


def wait_until_sent(page: Page) -> None:
    page.wait_for_function("queue.getStats().pending === 0 && !queue.getStats().isSyncing")


def test_operations_are_sent_in_order_once_the_network_is_back(
    page: Page, context: BrowserContext, backend: Backend
) -> None:
    start(page, backend)
    context.set_offline(True)
    put(page, *range(1, 21))
    page.evaluate("queue.queueOperation({ resource: 'orders', action: 'update', method: 'PUT', data: 21 })")
    stats = page.evaluate("queue.getStats()")
    assert (stats["pending"], stats["failed"], backend.got) == (21, 0, [])
    kept = page.evaluate("queue.getQueue()")
    assert [operation["data"] for operation in kept] == list(range(1, 22))
    context.set_offline(False)
    wait_until_sent(page)
    assert backend.data == list(range(1, 22))
    assert [key for key, _ in backend.got] == [operation["id"] for operation in kept]
    assert backend.methods == ["POST"] * 20 + ["PUT"]
    assert page.evaluate("localStorage.length") == 0


def test_they_survive_a_reload(page: Page, context: BrowserContext, backend: Backend) -> None:
    start(page, backend)
    context.set_offline(True)
    put(page, 1, 2)
    page.evaluate("queue.close()")  # or it would begin to send, and send again what a reload cuts off
    context.set_offline(False)
    page.reload()
    start(page, backend)
    wait_until_sent(page)
    assert backend.data == [1, 2]


@pytest.mark.parametrize("status", [500, 503, 429, 408])
def test_what_may_be_better_later_is_tried_again_with_the_same_key_and_nothing_overtakes_it(
    page: Page, backend: Backend, status: int
) -> None:
    backend.answers[2] = [(status, {}), (status, {})]
    start(page, backend)
    put(page, 1, 2, 3)
    wait_until_sent(page)
    assert backend.data == [1, 2, 2, 2, 3]
    assert len({key for key, data in backend.got if data == 2}) == 1
    assert page.evaluate("[sent, failed, errors.length]") == [[1, 2, 3], [], 2]


def test_retry_after_is_honoured_whoever_adds_what(page: Page, backend: Backend) -> None:
    backend.answers[1] = [(503, {"Retry-After": "600"})]
    start(page, backend)
    put(page, 1)
    page.wait_for_function("queue.getStats().nextTryAt !== null")
    put(page, 2)
    assert page.evaluate("(queue.getStats().nextTryAt - new Date()) / 1000 > 500")
    assert backend.data == [1]
    page.evaluate("queue.syncAll()")
    assert backend.data == [1, 1, 2]


def test_a_refused_operation_is_kept_for_the_application_and_the_others_go_on(page: Page, backend: Backend) -> None:
    backend.answers[2] = [(422, {})]
    start(page, backend)
    put(page, 1, 2, 3)
    wait_until_sent(page)
    assert backend.data == [1, 2, 3]
    assert page.evaluate("failed") == [[2, 422]]
    assert page.evaluate("queue.getQueue().map(({ data, status }) => [data, status])") == [[2, "failed"]]
    page.evaluate("queue.retryFailed()")
    wait_until_sent(page)
    assert backend.data == [1, 2, 3, 2]
    assert len({key for key, data in backend.got if data == 2}) == 1


def test_failed_operations_can_be_cleared(page: Page, backend: Backend) -> None:
    backend.answers[1] = [(404, {})]
    start(page, backend)
    put(page, 1)
    page.wait_for_function("queue.getStats().failed === 1")
    page.evaluate("queue.clearFailed()")
    assert page.evaluate("queue.getQueue()") == []


def test_after_a_401_everything_waits_for_another_token(page: Page, backend: Backend) -> None:
    backend.answers[1] = [(401, {})]
    start(page, backend)
    put(page, 1)
    page.wait_for_function("errors.length === 1")
    assert page.evaluate("queue.getStats()")["pending"] == 1
    assert page.evaluate("queue.syncAll()") == {"sent": 1, "failed": 0, "pending": 0}


@pytest.mark.parametrize("lease", [False, True], ids=["web-locks", "lease"])
def test_two_tabs_never_send_at_the_same_time(
    page: Page, context: BrowserContext, line: Line, backend: Backend, lease: bool
) -> None:
    other = blank(context, line.url)
    backend.hold.clear()
    start(page, backend, lease=lease)
    put(page, 1)
    wait_until(lambda: backend.got, what="a first request")
    if lease:  # two that begin at once may both have it where storage takes long between tabs
        other.wait_for_function("localStorage.getItem('cdc-queue.lease') !== null")
        other.evaluate(COUNT_LOOKS_AT_LEASE)
    start(other, backend, lease=lease)
    for number in range(2, 11):
        put(page if number % 2 else other, number)
    for each in (page, other):
        each.wait_for_function("queue.getStats().pending === 10")
    if lease:
        other.wait_for_function("looks > 1")
    backend.hold.set()
    for each in (page, other):
        wait_until_sent(each)
    assert {data for _, data in backend.got} == set(range(1, 11))
    assert len(set(backend.got)) == 10, "what is sent again has the same key"
    assert backend.busiest == 1


def test_a_full_queue_says_so(page: Page, context: BrowserContext, backend: Backend) -> None:
    start(page, backend, maxOperations=2)
    context.set_offline(True)
    put(page, 1, 2)
    refusal = "(() => { try { queue.queueOperation({ resource: 'x' }) } catch (e) { return [e.name, e.message] } })()"
    name, message = page.evaluate(refusal)
    assert name == "QueueFull"
    assert "full" in message
    assert page.evaluate("queue.getStats()")["pending"] == 2


def test_a_full_storage_says_so(page: Page, context: BrowserContext, backend: Backend) -> None:
    start(page, backend, maxBytes=100_000_000)
    context.set_offline(True)
    large = """() => {
        try {
            for (;;) queue.queueOperation({ resource: "orders", data: "x".repeat(1_000_000) });
        } catch (error) {
            return error.name;
        }
    }"""
    assert page.evaluate(large) == "QueueFull"
    assert page.evaluate("queue.getQueue().length") >= 4


def test_an_operation_can_go_to_any_url(page: Page, service: Service) -> None:
    """Here to cdc itself, which knows the idempotency key."""
    page.evaluate(START, {})
    page.evaluate("""() => queue.queueOperation({
        resource: "clients", url: "/publish", data: { channel: "clients", event: "created", id: "7", data: {} },
    })""")
    wait_until_sent(page)
    assert [change["entityId"] for change in service.get("/api/changes/poll")["changes"]] == ["7"]
