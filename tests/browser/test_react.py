"""`cdc-react.js` in a real browser, bundled with the real React; and the types of both modules."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import BrowserContext, Page, expect

from tests.browser.conftest import blank
from tests.browser.service import Line, Service
from tests.processes import wait_until

FOLDER = Path(__file__).parent / "javascript"


@pytest.fixture(scope="session")
def tools() -> Path:
    """The folder of esbuild and tsc. Skips where npm cannot bring them."""
    if shutil.which("npm") is None:
        pytest.skip("no npm on this machine: React hooks and TypeScript types are not tried")
    wanted, installed = FOLDER / "package-lock.json", FOLDER / "node_modules" / ".package-lock.json"
    with wanted.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may run other tests of this file
        if not installed.exists() or installed.stat().st_mtime < wanted.stat().st_mtime:
            command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
            done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, timeout=240, check=False)
            if done.returncode:
                pytest.skip(f"npm cannot install React and TypeScript: {done.stderr[-300:]}")
    return FOLDER / "node_modules" / ".bin"


@pytest.fixture(scope="session")
def bundle(tools: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The application of `hooks.jsx`, as one script."""
    file = tmp_path_factory.mktemp("bundle") / "hooks.js"
    command = [str(tools / "esbuild"), "hooks.jsx", "--bundle", "--jsx=automatic", "--format=iife", f"--outfile={file}"]
    environment = {**os.environ, "NODE_PATH": str(FOLDER / "node_modules")}
    subprocess.run(command, cwd=FOLDER, env=environment, capture_output=True, check=True)
    return file.read_text()


@pytest.fixture
def application(context: BrowserContext, line: Line, bundle: str) -> Iterator[Page]:
    page = blank(context, line.url)
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(f"{error}"))
    page.add_script_tag(content=bundle)
    yield page
    assert complaints == []


def begin(page: Page, **options: Any) -> None:
    page.evaluate("(options) => begin(options)", {"pollInterval": 50, **options})
    expect(page.locator("#sync")).to_contain_text("connected")
    expect(page.locator("#entity")).to_have_class("connected")  # by a poller of its own, which begins now, too


def wait_for(page: Page, count: int) -> list[str]:
    page.wait_for_function("(count) => batches.flat().length >= count", arg=count)
    found = page.evaluate("batches.flat()")
    assert isinstance(found, list)
    return found


def test_changes_are_given_once_and_in_order_also_in_strict_mode(application: Page, service: Service) -> None:
    service.commit("orders", 0)  # before it begins
    begin(application)
    for number in range(1, 41):
        service.commit("orders", number)
        service.commit("clients", f"c{number}")
    assert wait_for(application, 40) == [str(number) for number in range(1, 41)]
    expect(application.locator("#sync")).to_contain_text("synced")


def test_what_the_listener_could_not_take_comes_again(application: Page, service: Service) -> None:
    begin(application)
    application.evaluate("""() => {
        let calls = 0;
        options.onChanges = async () => { if ((calls += 1) <= 2) throw new Error("not now"); };
    }""")
    service.commit("orders", 1)
    assert wait_for(application, 1) == ["1"]
    expect(application.locator("#sync")).not_to_contain_text("not now")


def test_it_survives_the_service(application: Page, service: Service) -> None:
    begin(application)
    service.kill()
    expect(application.locator("#sync")).to_contain_text("off")
    service.commit("orders", 1)
    service.start()
    assert wait_for(application, 1) == ["1"]
    expect(application.locator("#sync")).to_contain_text("connected")


def test_a_page_that_is_seen_again_looks_at_once(application: Page, service: Service) -> None:
    begin(application, pollInterval=10_000_000)
    service.commit("orders", 1)
    application.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    assert wait_for(application, 1) == ["1"]


def test_a_gap_is_told(application: Page, service: Service) -> None:
    service.commit("orders", 1)
    begin(application, since="999")
    application.wait_for_function("gaps.length > 0")
    service.commit("orders", 2)
    application.wait_for_function("batches.flat().includes('2')")


def test_an_entity_is_followed_and_then_another(application: Page, service: Service) -> None:
    begin(application)
    entity = application.locator("#entity")
    service.commit("orders", 7, version=1)
    service.commit("orders", 8, version=1)
    service.commit("orders", 7, version=2)
    expect(entity).to_have_text("7.2 8.1 7.1 latest 2")
    application.evaluate("setId(8)")
    expect(entity).to_have_text("latest")
    service.commit("orders", 7, version=3)
    service.commit("orders", 8, version=2)
    expect(entity).to_have_text("8.2 latest 2")


HOLDING = """() => {
    const real = window.fetch;
    const held = new Promise((letGo) => Object.assign(window, { letGo }));
    window.fetch = async (...request) => {
        const answer = await real(...request);
        window.answered ||= (await answer.clone().text()).includes('"version":2');
        await held;
        return answer;
    };
}"""
"""Answers stay under way until `letGo` is called; `answered`: whether one of them tells of a second version."""


def test_what_was_under_way_for_another_entity_is_not_shown(application: Page, service: Service) -> None:
    begin(application)
    entity = application.locator("#entity")
    service.commit("orders", 7, version=1)
    expect(entity).to_have_text("7.1 latest 1")
    application.evaluate(HOLDING)
    service.commit("orders", 7, version=2)
    application.wait_for_function("window.answered")
    application.evaluate("setId(8)")
    expect(entity).to_have_text("latest")
    application.evaluate("letGo()")
    service.commit("orders", 8, version=1)
    expect(entity).to_have_text("8.1 latest 1")


def test_other_types_begin_anew_and_a_component_that_is_gone_polls_no_more(application: Page, service: Service) -> None:
    begin(application)
    application.evaluate("setTypes(['Clients'])")
    application.wait_for_function("document.querySelector('#sync').textContent.includes('connected')")
    with application.expect_response(lambda answer: "entityTypes=Clients" in answer.url and answer.ok):
        application.evaluate("syncNow()")
    service.commit("orders", 1)
    service.commit("clients", 2)
    assert wait_for(application, 1) == ["2"]
    application.evaluate("setIsThere(false)")
    expect(application.locator("#gone")).to_be_attached()
    asked: list[str] = []
    application.on("request", lambda request: asked.append(request.url))
    wait_until(lambda: polls(application, asked, "Orders") >= 6, what="the other component to go on")
    assert polls(application, asked, "Clients") == 0


def polls(page: Page, asked: list[str], types: str) -> int:
    """How often was asked for an entity type."""
    page.evaluate("0")  # lets Playwright tell what has happened
    return sum(f"entityTypes={types}" in url for url in asked)


def test_an_application_in_typescript_compiles(tools: Path) -> None:
    options = "--noEmit --strict --skipLibCheck false --module esnext --moduleResolution bundler --target es2022"
    paths = ["--lib", "es2023,dom", "--types", "react"]
    command = [str(tools / "tsc"), *options.split(), *paths, "example.ts"]
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout
