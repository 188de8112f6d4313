"""A browser of the system, and a service for it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from tests.browser.service import Line, Service

NAMES = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--disable-quic",
]

expect.set_options(timeout=60_000)

NewService = Callable[..., Service]
NewLine = Callable[[Service], Line]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Skips where there is none: `scripts/setup-browser` installs it.

    Not for the session: as long as it runs, Playwright has an event loop in this thread, and no test may start another.
    """
    executable = next((path for name in NAMES if (path := shutil.which(name))), None)
    if executable is None:
        pytest.skip("no Chromium on this machine: scripts/setup-browser installs one on Debian and Ubuntu")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    """A fresh profile, whose pages reach this machine only."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(60_000)
    yield context
    context.close()


@pytest.fixture
def new_service(tmp_path: Path) -> Iterator[NewService]:
    with ExitStack() as stack:

        def new(*, token: str = "", daemon: bool = True) -> Service:
            service = Service(tmp_path, token=token, daemon=daemon)
            stack.callback(service.close)
            service.start()
            return service

        yield new


@pytest.fixture
def service(new_service: NewService) -> Service:
    """A daemon without tokens."""
    return new_service()


@pytest.fixture
def new_line() -> Iterator[NewLine]:
    with ExitStack() as stack:

        def new(service: Service) -> Line:
            line = Line(service.port)
            stack.callback(line.close)
            return line

        yield new


@pytest.fixture
def line(service: Service, new_line: NewLine) -> Line:
    """The way to `service`."""
    return new_line(service)


@pytest.fixture
def page(context: BrowserContext, line: Line) -> Page:
    """A page of the service's origin, with nothing on it."""
    return blank(context, line.url)


def blank(context: BrowserContext, url: str) -> Page:
    page = context.new_page()
    page.goto(f"{url}/health")
    return page
