"""The web page at `/`: what an operator sees and does."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, expect

from tests.browser.conftest import NewLine, NewService
from tests.browser.server import HOSTILE
from tests.browser.service import Line, Service


@pytest.fixture
def opened(context: BrowserContext, line: Line) -> Iterator[Page]:
    """The page, of a daemon that may do everything. Nothing may go wrong on it, and it may ask nobody else."""
    page = context.new_page()
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(f"{error}"))
    page.on("console", lambda message: complaints.append(message.text) if is_error(message) else None)
    page.on("request", lambda request: complaints.append(request.url) if line.url not in request.url else None)
    page.goto(line.url)
    yield page
    assert complaints == []


def is_error(message: ConsoleMessage) -> bool:
    """What is said of a service that was killed is none."""
    return message.type == "error" and not re.match("Failed to load resource|WebSocket connection to", message.text)


def test_it_shows_the_flow_from_source_to_sinks(opened: Page) -> None:
    source = opened.get_by_role("article", name="Source shop")
    expect(source.locator(".chip")).to_have_text("running")
    expect(source.locator(".rate strong")).to_have_text(re.compile(r"^(9\d|1[01]\d)$"))
    queue = opened.get_by_role("article", name="Queue")
    expect(queue.locator(".rate")).to_have_text("5 MB")
    assert queue.get_by_role("meter").get_attribute("aria-valuenow") == "5000000"
    mirror = opened.get_by_role("article", name="Sink mirror")
    expect(mirror.locator("[data-fact=Parked] dd")).to_contain_text("7, for")
    expect(mirror.locator("[data-fact=Dead] dd")).to_have_text("2")
    archive = opened.get_by_role("article", name="Sink archive")
    expect(archive.locator(".copy p")).to_have_text("Copied 3 of 12 tables, 1,000 rows, 90 s left")
    assert opened.locator(".stream.moving").count() == 2, "to the queue, and to the mirror"


def test_it_draws_lag_and_throughput(opened: Page) -> None:
    for chart in ("#rate-chart", "#lag-chart"):
        expect(opened.locator(f"{chart} canvas")).to_be_visible()
    expect(opened.locator("#rate-legend li").first).to_have_text(re.compile(r"shop\d+"))


def test_problems_and_their_hints_are_said_in_words(opened: Page) -> None:
    notes = opened.get_by_label("Problems")
    expect(notes).to_contain_text("mirror: 2 changes are dead")
    expect(notes).to_contain_text("mirror: 5 changes wait")
    expect(opened.locator("#health-text")).to_have_text("1 problem")
    expect(opened).to_have_title("⚠ cdc: 1 problem")


def test_pause_and_resume(opened: Page) -> None:
    mirror = opened.get_by_role("article", name="Sink mirror")
    mirror.get_by_role("button", name="Pause").click()
    expect(mirror.locator(".chip")).to_have_text("paused")
    expect(opened.locator("#toast")).to_have_text("mirror is paused")
    expect(opened.get_by_label("Problems")).to_contain_text("mirror is paused")
    mirror.get_by_role("button", name="Resume").click()
    expect(mirror.locator(".chip")).to_have_text("running")


def test_what_is_parked_is_retried_and_discarded(opened: Page) -> None:
    parked = opened.get_by_role("region", name="Parked")
    first, second = (parked.locator(f"tr[data-id='mirror:{seq}.0']") for seq in (1, 2))
    expect(first).to_contain_text('{"_id":"poison"}')
    expect(first).to_contain_text("E11000")
    expect(second).to_contain_text("behind mirror:1.0")
    expect(second.get_by_role("button", name="Retry")).to_be_disabled()
    first.get_by_role("button", name="Retry").click()
    expect(opened.locator("#toast")).to_have_text("mirror:1.0 is tried as soon as its sink delivers")
    expect(first.locator(".badge")).to_have_text("retrying")
    first.get_by_role("button", name="Discard").click()
    dialog = opened.get_by_role("dialog", name="Discard mirror:1.0?")
    dialog.get_by_label("Why?").fill("a mistake")
    opened.keyboard.press("Enter")
    expect(opened.locator("#toast")).to_have_text("mirror:1.0 is discarded")
    expect(first).to_have_count(0)
    expect(second.locator(".badge")).to_have_text("retrying")


def test_changes_come_live_the_newest_first(opened: Page, service: Service) -> None:
    expect(opened.locator("#live-text")).to_have_text("live")
    service.commit("orders", 1, changed=("status", "total"), location_id="north", user_id="u5")
    service.commit("clients", 2)
    rows = opened.locator("#rows tr")
    expect(rows).to_have_count(2)
    expect(rows.first).to_contain_text("Clients")
    expect(rows.last).to_contain_text("status, total")
    expect(rows.last).to_contain_text("north, u5")


def test_changes_from_before_the_page_was_opened_are_there(service: Service, opened: Page) -> None:
    service.commit("orders", *range(80))
    opened.reload()
    expect(opened.locator("#rows tr")).to_have_count(50)
    expect(opened.locator("#rows .id").first).to_have_text("79")


def test_they_are_filtered_by_entity_and_id(opened: Page, service: Service) -> None:
    service.commit("orders", 1, 2)
    service.commit("clients", 21)
    rows = opened.locator("#rows tr")
    expect(rows).to_have_count(3)
    opened.get_by_role("button", name="Orders").click()
    expect(rows).to_have_count(2)
    service.commit("clients", 22)
    service.commit("orders", 23)
    expect(rows).to_have_count(3)
    opened.get_by_role("button", name="All").click()
    expect(rows).to_have_count(5)
    opened.get_by_label("Find an id").fill("2")
    expect(rows).to_have_count(4)
    opened.get_by_label("Find an id").fill("nowhere")
    expect(opened.locator("#empty")).to_have_text("None of the latest changes fits.")


def test_a_frozen_list_stands_still(opened: Page, service: Service) -> None:
    service.commit("orders", 1)
    expect(opened.locator("#rows tr")).to_have_count(1)
    opened.get_by_role("button", name="Freeze").click()
    service.commit("orders", 2)
    expect(opened.locator("#pace")).not_to_have_text("0 a second")
    expect(opened.locator("#rows tr")).to_have_count(1)
    opened.get_by_role("button", name="Go on").click()
    expect(opened.locator("#rows tr")).to_have_count(2)


def test_details_show_before_and_after_and_the_history_with_the_keyboard_alone(opened: Page, service: Service) -> None:
    before, after = {"status": "open", "total": 5}, {"status": "paid", "total": 5}
    service.commit("orders", 7, version=1, after=json.dumps(before).encode())
    service.commit(
        "orders",
        7,
        version=2,
        before=json.dumps(before).encode(),
        after=json.dumps(after).encode(),
        changed=("status",),
        user_id="u5",
    )
    button = opened.locator("#rows .id").first
    button.focus()
    opened.keyboard.press("Enter")
    detail = opened.get_by_role("dialog", name="Orders 7")
    expect(detail.locator("tr.changed")).to_have_text(re.compile("status.*open.*paid"))
    expect(detail.locator("tr.changed")).to_have_count(1)
    expect(detail).to_contain_text("u5")
    detail.get_by_role("button", name="version 1").click()
    expect(detail.locator(".images")).not_to_contain_text("paid")
    opened.keyboard.press("Escape")
    expect(detail).to_be_hidden()


def test_hostile_values_stay_text(opened: Page, service: Service) -> None:
    service.commit(
        "orders",
        HOSTILE,
        entity_type=HOSTILE,
        user_id=HOSTILE,
        location_id=HOSTILE,
        changed=(HOSTILE,),
        before=json.dumps({HOSTILE: HOSTILE}).encode(),
        after=json.dumps({HOSTILE: [HOSTILE]}).encode(),
    )
    service.commit("clients", 1)
    expect(opened.locator("#rows .id").last).to_have_text(HOSTILE)
    expect(opened.locator("#filters button").nth(1)).to_contain_text(HOSTILE)
    opened.locator("#rows .id").last.click()
    expect(opened.locator("#detail-title")).to_have_text(f"{HOSTILE} {HOSTILE}")
    expect(opened.locator(".images tbody th")).to_have_text(HOSTILE)
    assert opened.evaluate("window.hacked") is None
    assert opened.locator("img, script").count() == 3, "ours"


def test_nothing_but_our_own_files_may_run(context: BrowserContext, line: Line) -> None:
    page = context.new_page()
    page.goto(line.url)
    with page.expect_console_message(lambda message: "Content Security Policy" in message.text):
        page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.hacked=1\">')")
    with page.expect_console_message(lambda message: "Content Security Policy" in message.text):
        page.evaluate("""() => {
            const script = document.createElement("script");
            script.textContent = "window.hacked = 1";
            document.body.append(script);
        }""")
    assert page.evaluate("window.hacked") is None


def test_it_says_that_the_daemon_is_away_and_recovers(opened: Page, service: Service) -> None:
    expect(opened.locator("#live-text")).to_have_text("live")
    service.kill()
    expect(opened.locator("#health-text")).to_have_text("The daemon does not answer")
    expect(opened.locator("#live-text")).to_have_text("reconnecting …")
    service.commit("orders", 1)
    service.start()
    expect(opened.locator("#health-text")).to_have_text("1 problem")
    expect(opened.locator("#rows tr")).to_have_count(1)


def test_it_asks_for_a_token_and_keeps_it_in_the_tab_only(
    new_service: NewService, new_line: NewLine, context: BrowserContext
) -> None:
    service = new_service(token="a-secret-of-the-tests")
    page = context.new_page()
    page.goto(new_line(service).url)
    dialog = page.get_by_role("dialog", name="A token, please")
    dialog.get_by_label("Token").fill("wrong")
    page.keyboard.press("Enter")
    expect(dialog).to_contain_text("That is not a token of this service.")
    dialog.get_by_label("Token").fill(service.token)
    dialog.get_by_role("button").click()
    expect(dialog).to_be_hidden()
    expect(page.get_by_role("article", name="Source shop")).to_be_visible()
    service.commit("orders", 1)
    expect(page.locator("#rows tr")).to_have_count(1)
    page.reload()
    expect(page.locator("#rows tr")).to_have_count(1)
    assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]


def test_of_a_gateway_it_shows_the_changes_only(
    new_service: NewService, new_line: NewLine, context: BrowserContext
) -> None:
    service = new_service(daemon=False)
    page = context.new_page()
    page.goto(new_line(service).url)
    service.commit("orders", 1)
    expect(page.locator("#rows tr")).to_have_count(1)
    expect(page.locator("#flow-section")).to_be_hidden()
    expect(page.locator("#health-text")).to_contain_text("gateway")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 768, 1280])
def test_it_fits_and_can_be_read(
    browser: Browser, service: Service, line: Line, tmp_path: Path, width: int, scheme: str
) -> None:
    context = browser.new_context(
        viewport={"width": width, "height": 800},
        color_scheme="dark" if scheme == "dark" else "light",
        reduced_motion="reduce",
    )
    page = context.new_page()
    page.goto(line.url)
    service.commit("a_channel_with_a_rather_long_name", f"{'long-id-' * 20}", changed=tuple("abcdefghij" * 9))
    expect(page.locator("#rows tr")).to_have_count(1)
    expect(page.locator("#rate-legend li").first).to_be_visible()
    page.locator("#rows .id").click()
    expect(page.locator(".images")).to_be_visible()
    beyond = "[document.documentElement, detail].map((node) => node.scrollWidth - node.clientWidth)"
    assert page.evaluate(beyond) == [0, 0]
    page.keyboard.press("Escape")
    assert page.evaluate(CONTRASTS) == []
    assert len(page.screenshot(path=tmp_path / "page.png", full_page=True)) > 10_000
    context.close()


CONTRASTS = """() => {
    const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
    const over = (colours) => {  // painted one over the other, as the browser would
        canvas.clearRect(0, 0, 1, 1);
        for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
        return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
    };
    const light = (rgb) => {
        const [r, g, b] = rgb.map((c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const found = [];
    for (const node of document.querySelectorAll("main *, header *")) {
        const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
        if (!own || !node.checkVisibility()) continue;
        const grounds = [];
        for (let at = node; at; at = at.parentElement) grounds.unshift(getComputedStyle(at).backgroundColor);
        const [a, b] = [over([...grounds, getComputedStyle(node).color]), over(grounds)].map(light);
        const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        if (ratio < 4.5) found.push(`${node.tagName} ${node.className} ${node.textContent.slice(0, 20)} ${ratio}`);
    }
    return found;
}"""
"""Texts with less contrast than 4.5 to 1 (WCAG 2.2, 1.4.3)."""
