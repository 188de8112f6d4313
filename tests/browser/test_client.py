"""`cdc-client.js`: every change once and in order, whatever happens to the connection."""

from __future__ import annotations

import random
from typing import Any

from playwright.sync_api import BrowserContext, Page, WebSocketRoute

from tests.browser.conftest import NewLine, NewService, blank
from tests.browser.service import Line, Service

START = """async (options) => {
    const { RealtimeClient } = await import("/static/cdc-client.js");
    window.seen = []; window.gaps = []; window.told = []; window.errors = [];
    window.client = new RealtimeClient({ minDelayMs: 10, maxDelayMs: 100, ...options });
    client.on("*", (event) => void seen.push(event));
    client.onConnect(({ transport }) => void told.push(transport));
    client.onDisconnect(() => void told.push("off"));
    client.onGap((gap) => void gaps.push(gap));
    client.onError((error) => void errors.push(`${error}`));
    const subscribed = options.channels ? client.subscribe(options.channels, { since: options.since ?? {} }) : null;
    await client.connect();
    return await subscribed;
}"""


def start(page: Page, *channels: str, **options: Any) -> Any:
    """Connect, and return the cursors of the channels."""
    return page.evaluate(START, {"channels": list(channels), **options})


def wait_for(page: Page, count: int) -> None:
    page.wait_for_function("(count) => seen.length >= count", arg=count)


def seen(page: Page) -> list[str]:
    found = page.evaluate("seen.map((event) => event.id)")
    assert isinstance(found, list)
    return found


def numbers(count: int, first: int = 1) -> list[str]:
    return [str(number) for number in range(first, first + count)]


def test_what_is_subscribed_arrives_at_the_listeners_of_its_event(page: Page, service: Service) -> None:
    start(page, "orders", "clients")
    page.evaluate("""() => {
        window.updated = []; window.deleted = [];
        client.on("orders:updated", (event) => void updated.push(event));
        client.on("orders:deleted", (event) => void deleted.push(event));
        window.none = client.on("clients:*", () => void deleted.push("never"));
        none();
    }""")
    service.commit("products", 1)
    service.commit("orders", 2, 3, changed=("status",), user_id="u5")
    service.commit("clients", 4)
    wait_for(page, 3)
    assert seen(page) == ["2", "3", "4"]
    first = page.evaluate("updated[0]")
    assert first["channel"] == "orders"
    assert (first["entityType"], first["changeType"], first["event"]) == ("Orders", "UPDATE", "updated")
    assert (first["data"], first["changed"], first["userId"]) == ({"id": 2, "version": 1}, ["status"], "u5")
    assert page.evaluate("[updated.length, deleted.length]") == [2, 0]


def test_the_star_is_all_channels_and_stands_alone(page: Page, service: Service) -> None:
    start(page, "*")
    service.commit("orders", 1)
    service.commit("clients", 2)
    wait_for(page, 2)
    assert seen(page) == ["1", "2"]
    assert "alone" in page.evaluate("(() => { try { client.subscribe(['orders']) } catch (e) { return e.message } })()")


def test_a_subscription_begins_where_it_is_told_and_a_new_one_replaces_it(page: Page, service: Service) -> None:
    service.commit("orders", *range(1, 11))
    cursors = start(page, "orders", since={"orders": "4"})
    assert cursors == {"orders": "4"}
    wait_for(page, 6)
    assert page.evaluate("client.subscribe(['orders'], { since: '8' })") == {"orders": "8"}
    wait_for(page, 8)
    assert seen(page) == [*numbers(6, 5), "9", "10"]
    assert page.evaluate("client.cursors") == {"orders": "10"}


def test_events_of_a_subscription_that_was_replaced_are_not_taken_for_the_new_one(page: Page, service: Service) -> None:
    """The server answers the first subscription, and something happens, before it hears of the second."""
    held: list[str | bytes] = []
    servers: list[WebSocketRoute] = []

    def relay(route: WebSocketRoute) -> None:
        servers.append(route.connect_to_server())
        passed = iter(range(3))  # subscribe, unsubscribe, subscribe
        route.on_message(
            lambda message: held.append(message) if next(passed, None) is None else servers[0].send(message)
        )

    page.route_web_socket("**/ws", relay)
    start(page, "orders")
    service.commit("orders", 1, 2)
    wait_for(page, 2)
    page.evaluate("""() => {
        client.unsubscribe(["orders"]);
        client.subscribe(["orders"]);
        client.subscribe(["orders"], { since: "0" });
    }""")
    with page.expect_event("console", lambda message: message.text == "live"):
        page.evaluate("""() => {
            const parse = JSON.parse;  // where the client sees a frame first
            JSON.parse = (text) => {
                const frame = parse(text);
                if (frame.type === "events") queueMicrotask(() => console.log("live"));
                return frame;
            };
        }""")
        service.commit("orders", 3)
    for message in held:
        servers[0].send(message)
    wait_for(page, 5)
    assert seen(page) == ["1", "2", "1", "2", "3"]


def test_the_cursor_moves_on_only_when_the_listeners_have_run(page: Page, service: Service) -> None:
    start(page, "orders")
    page.evaluate("""() => {
        window.finish = null;
        window.order = [];
        client.on("orders:*", async ({ id }) => {
            if (id === "1") await new Promise((resolve) => (window.finish = resolve));
            order.push(id);
        });
        client.on("orders:*", () => { throw new Error("a listener's own"); });
    }""")
    service.commit("orders", 1, 2)
    page.wait_for_function("finish !== null")
    assert page.evaluate("client.cursors.orders") == "0"
    page.evaluate("finish()")
    page.wait_for_function("client.cursors.orders === '2'")
    assert page.evaluate("order") == ["1", "2"]
    assert page.evaluate("errors") == ["Error: a listener's own"] * 2


def test_after_the_service_was_killed_it_goes_on_behind_the_cursor(page: Page, service: Service) -> None:
    start(page, "orders")
    service.commit("orders", *numbers(3))
    wait_for(page, 3)
    service.kill()
    page.wait_for_function("!client.isConnected()")
    service.commit("orders", *numbers(3, 4))
    service.start()
    wait_for(page, 6)
    service.commit("orders", 7)
    wait_for(page, 7)
    assert seen(page) == numbers(7)
    assert page.evaluate("told.slice(0, 2)") == ["websocket", "off"]


def test_after_fifty_cuts_under_load_every_change_was_seen_once_and_in_order(
    page: Page, service: Service, line: Line
) -> None:
    start(page, "orders", "clients", stableMs=0, pollAfter=1_000)
    chance = random.Random(4)
    number = 0
    for cut in range(50):
        for _ in range(chance.randint(1, 4)):
            count = chance.randint(1, 20)
            service.commit(chance.choice(["orders", "clients"]), *range(number + 1, number + count + 1))
            number += count
        if cut % 2:  # else in the middle of whatever it is at
            page.wait_for_function("client.isConnected()")
        line.cut()
    wait_for(page, number)
    assert_once_and_in_order(page, number)
    assert page.evaluate("told.filter((what) => what === 'off').length") >= 25


def test_it_polls_where_no_websocket_comes_through_and_returns_without_loss(
    page: Page, service: Service, line: Line
) -> None:
    line.websockets = False
    start(page, "orders", "clients", pollAfter=2, retrySocketMs=1_000)
    assert page.evaluate("client.transport") == "polling"
    service.commit("orders", *numbers(20))
    service.commit("clients", *numbers(20, 21))
    wait_for(page, 40)
    line.websockets = True
    page.wait_for_function("client.transport === 'websocket'")
    service.commit("orders", *numbers(20, 41))
    wait_for(page, 60)
    line.websockets = False
    line.cut()
    service.commit("clients", *numbers(20, 61))
    page.wait_for_function("client.transport === 'polling'")
    wait_for(page, 80)
    assert_once_and_in_order(page, 80)


def test_without_channels_polling_is_a_connection_too(page: Page, line: Line) -> None:
    """As the documentation has it: first `connect`, then `subscribe`."""
    line.websockets = False
    connect = """async () => {
        const { RealtimeClient } = await import("/static/cdc-client.js");
        window.client = new RealtimeClient({ pollAfter: 1, retrySocketMs: 60_000 });
        const slow = new Promise((resolve) => setTimeout(() => resolve("hangs"), 10_000));
        return Promise.race([client.connect().then(() => client.transport), slow]);
    }"""
    assert page.evaluate(connect) == "polling"


def test_while_polling_each_channel_begins_behind_its_own_cursor(page: Page, service: Service, line: Line) -> None:
    service.commit("orders", 1, 2)
    service.commit("clients", 3, 4)
    line.websockets = False
    start(page, "orders", "clients", since={"orders": "1", "clients": "3"}, pollAfter=1)
    wait_for(page, 2)
    assert seen(page) == ["2", "4"]


def test_a_subscription_interrupts_the_poll_that_waits(page: Page, service: Service, line: Line) -> None:
    line.websockets = False
    start(page, "orders", pollAfter=1, retrySocketMs=600_000)
    page.evaluate("client.subscribe(['clients'])")
    service.commit("clients", 1)
    wait_for(page, 1)
    page.evaluate("client.unsubscribe(['clients'])")
    service.commit("clients", 2)
    service.commit("orders", 3)
    wait_for(page, 2)
    assert seen(page) == ["1", "3"]


def test_fifty_cuts_while_polling_lose_and_double_nothing(page: Page, service: Service, line: Line) -> None:
    line.websockets = False
    start(page, "orders", "clients", pollAfter=1, retrySocketMs=200)
    for cut in range(50):
        service.commit("orders" if cut % 3 else "clients", *range(cut * 10 + 1, cut * 10 + 11))
        line.cut()
    wait_for(page, 500)
    assert_once_and_in_order(page, 500)


def assert_once_and_in_order(page: Page, number: int) -> None:
    """Ids were given in order of their commits: in each channel they arrive in that order."""
    found = page.evaluate("seen.map((event) => [event.channel, Number(event.id)])")
    for channel in ("orders", "clients"):
        mine = [at for name, at in found if name == channel]
        assert mine == sorted(set(mine))
    assert sorted(at for _, at in found) == list(range(1, number + 1))


def test_a_gap_is_told_and_then_it_goes_on_with_what_is_left(page: Page, service: Service) -> None:
    service.commit("orders", *numbers(3))
    start(page, "orders", since={"orders": "999"})  # of another feed
    page.wait_for_function("gaps.length === 1")
    gap = page.evaluate("gaps[0]")
    assert (gap["channel"], gap["since"]) == ("orders", "999")
    service.commit("orders", 4)
    page.wait_for_function("seen.some((event) => event.id === '4')")
    assert seen(page)[-1] == "4"


def test_a_gap_is_told_while_polling_too(page: Page, service: Service, line: Line) -> None:
    line.websockets = False
    service.commit("orders", *numbers(3))
    start(page, "orders", since={"orders": "999"}, pollAfter=1)
    page.wait_for_function("gaps.length === 1")
    service.commit("orders", 4)
    page.wait_for_function("seen.some((event) => event.id === '4')")


def test_a_reloaded_page_goes_on_where_it_was_left(page: Page, service: Service) -> None:
    start(page, "orders", storageKey="cursors")
    service.commit("orders", *numbers(3))
    wait_for(page, 3)
    page.reload()
    service.commit("orders", *numbers(3, 4))
    start(page, "orders", storageKey="cursors")
    wait_for(page, 3)
    assert seen(page) == numbers(3, 4)
    page.evaluate("client.unsubscribe(['orders'])")
    page.reload()
    assert start(page, "orders", storageKey="cursors") == {"orders": "6"}


def test_when_the_browser_is_on_line_again_it_connects_at_once(page: Page, service: Service, line: Line) -> None:
    start(page, "orders", minDelayMs=10_000_000, maxDelayMs=10_000_000)
    line.cut()
    page.wait_for_function("told.includes('off')")
    service.commit("orders", 1)
    page.evaluate("dispatchEvent(new Event('online'))")
    wait_for(page, 1)


def test_a_dead_connection_is_noticed(page: Page, service: Service, line: Line) -> None:
    start(page, "orders", pingMs=200, pongTimeoutMs=300)
    line.stall()
    page.wait_for_function("told.includes('off')")
    service.commit("orders", 1)
    wait_for(page, 1)
    assert seen(page) == ["1"]


def test_the_token_travels_as_a_header_and_tickets_open_the_websocket(
    new_service: NewService, new_line: NewLine, context: BrowserContext
) -> None:
    service = new_service(token="a-secret-of-the-tests")
    line = new_line(service)
    page = blank(context, line.url)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("websocket", lambda websocket: asked.append(websocket.url))
    start(page, "orders", token=service.token, stableMs=0)
    service.commit("orders", 1)
    wait_for(page, 1)
    assert any("ticket=" in url for url in asked)
    assert not any(service.token in url for url in asked)
    for _ in range(3):  # each time with a new ticket
        page.evaluate("told.length = 0")
        line.cut()
        page.wait_for_function("told.includes('websocket')")
    line.websockets = False
    line.cut()
    page.wait_for_function("client.transport === 'polling'")
    service.commit("orders", 2)
    wait_for(page, 2)


def test_a_wrong_token_is_told_and_not_tried_again(
    new_service: NewService, new_line: NewLine, context: BrowserContext
) -> None:
    line = new_line(new_service(token="a-secret-of-the-tests"))
    page = blank(context, line.url)
    refusal = f"({START})({{ token: 'wrong' }}).then(() => null, (error) => [error.name, error.status])"
    assert page.evaluate(refusal) == ["Refused", 401]
    assert page.evaluate("[client.isConnected(), errors.length]") == [False, 1]


def test_disconnect_ends_it_and_connect_goes_on(page: Page, service: Service) -> None:
    start(page, "orders")
    page.evaluate("client.disconnect()")
    assert not page.evaluate("client.isConnected()")
    service.commit("orders", *numbers(2))
    page.evaluate("client.disconnect(); client.connect(); client.disconnect(); client.connect()")
    wait_for(page, 2)
    assert seen(page) == numbers(2)
